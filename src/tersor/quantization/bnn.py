"""Binarized neural networks: weights and activations by their signs alone."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from tersor.config import IntDtype
from tersor.config.values import is_activation
from tersor.errors import InvalidValueError
from tersor.quantization.base import Quantizer, spec_of, straight_through
from tersor.quantization.fixed import FixedGrid, refuse_given, refuse_vector
from tersor.quantization.format import Format
from tersor.targets.planned import PlannedTarget

INT1 = Format(IntDtype(1), "symmetric", -1, 1)
"""-1 and 1, with nothing between them."""


@final
class BNNQuantizer(Quantizer):
    r"""Keeps the sign of each weight and activation, and trains the weights behind them.

    .. math::
        \hat{x} = \begin{cases} -1 & x < 0 \\ +1 & x \ge 0 \end{cases} \qquad
        \frac{\partial L}{\partial x} = \frac{\partial L}{\partial \hat{x}} \mathbf{1}_{|x| \le 1}

    The gradient of the sign is taken to be that of :math:`\operatorname{clip}(x, -1, 1)`, and after each step the
    latent weights of the targets are clipped to [-1, 1], beyond which they would have no effect and no gradient. A
    product of two such tensors is an exclusive or and a count of bits. Nothing is scaled, so put a batch norm behind
    each layer, leave the first and the last layer out, and train from the start or for long: a network loses much.
    Binarize outputs of norms in place of activations: behind a ReLU all signs are the same.

    Paper: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio: Binarized Neural Networks (NeurIPS 2016), and Courbariaux et
    al. (arXiv 1602.02830), deterministic binarization.

    Args: those of :class:`tersor.compressor.Compressor`. Config list: ``quant_dtype`` is ``int1``; signs know no
        ``quant_scheme``.

    Raises:
        InvalidValueError: another type.
        ConflictError: a key that means nothing here, or a bias, whose size is all that it has.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.2, -3.0, 0.0]]))
        >>> weights = {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int1"}
        >>> quantizer = BNNQuantizer(layer, [weights])
        >>> quantizer.start()
        >>> layer.weight.tolist()
        [[1.0, -1.0, 1.0]]
    """

    folds_norms = False
    needs_training = True
    methods = frozenset({"bnn_clamp_round"})

    def fake_quantize(self, target: PlannedTarget) -> Signs:
        """Signs."""
        spec = spec_of(target)
        if spec.quant_dtype != INT1.dtype:
            raise InvalidValueError(
                f"{spec.quant_dtype.as_config() if spec.quant_dtype else None!r} is not what signs are stored as",
                where=f"{target.config.where}['quant_dtype'] on {target.name}",
                legal=["int1"],
                remedy="Use DoReFaQuantizer, QATQuantizer or LsqQuantizer for more bits.",
            )
        refuse_given(target, ("granularity", "observer", "dynamic", "quant_range"), "signs have no scale")
        refuse_vector(self, target)
        return Signs(target.name, INT1)

    def on_start(self) -> None:
        """Simulate."""
        for _, transform in self.transforms():
            assert isinstance(transform, Signs)
            transform.enabled = True

    @torch.no_grad()
    def on_step(self) -> None:
        """Clip the latent weights."""
        for target, _ in self.transforms():
            if not is_activation(target.config.target_name):
                self.latent(target).clamp_(-1, 1)


@final
class Signs(FixedGrid):
    """-1 below zero and 1 elsewhere."""

    def grid(self) -> tuple[Tensor, Tensor]:
        """A scale of one."""
        return torch.ones(()), torch.zeros((), dtype=torch.int64)

    def rounded(self, value: Tensor) -> Tensor:
        """Signs."""
        return binarize(value)


def binarize(values: Tensor) -> Tensor:
    r"""Signs, with the gradient of :math:`\operatorname{clip}(x, -1, 1)`: none where :math:`|x| > 1`.

    >>> x = torch.tensor([-1.5, -0.5, 0.0, 1.0], requires_grad=True)
    >>> binarize(x).tolist()
    [-1.0, -1.0, 1.0, 1.0]
    >>> torch.autograd.grad(binarize(x).sum(), x)[0].tolist()
    [0.0, 1.0, 1.0, 1.0]
    """
    return straight_through(values.clamp(-1, 1), as_signs(values))


def as_signs(values: Tensor) -> Tensor:
    """-1 below zero and 1 elsewhere: zero has a sign, and what is no number stays none.

    >>> as_signs(torch.tensor([-0.5, 0.0, 3.0, torch.nan]))
    tensor([-1.,  1.,  1., nan])
    """
    signs = torch.where(values < 0, -1.0, 1.0).to(values.dtype)
    return torch.where(values.isnan(), values, signs)
