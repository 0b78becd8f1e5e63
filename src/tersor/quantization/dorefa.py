"""DoReFa-Net: weights, activations and gradients of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tersor.compressor import Compressor
from tersor.config import IntDtype
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import InvalidValueError
from tersor.quantization.base import CalibrationConfig, Quantizer, spec_of, straight_through
from tersor.quantization.bnn import INT1, as_signs
from tersor.quantization.cut import Cut
from tersor.quantization.fixed import FixedGrid, refuse_given, refuse_vector
from tersor.quantization.format import Format
from tersor.quantization.low_bit_gradients import LowBitGradients
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.random_state import random_state, set_random_state

MOST_BITS = 16


@final
class DoReFaQuantizer(Quantizer):
    r"""Trains with weights, activations and, if asked, gradients on a fixed grid of few bits.

    With :math:`\operatorname{quantize}_k(r) = \operatorname{round}((2^k - 1) r) / (2^k - 1)` for :math:`r` in [0, 1],

    .. math::
        \hat{w} &= 2 \operatorname{quantize}_k\left(\frac{\tanh w}{2 \max |\tanh w|} + \frac{1}{2}\right) - 1, \qquad
        \hat{w} = \operatorname{sign}(w) \operatorname{E}|w| \text{ for one bit} \\
        \hat{x} &= \operatorname{quantize}_k(\operatorname{clip}(x, 0, 1))

    and gradients pass straight through the rounding. Weights come to fill [-1, 1] whatever their size was, and
    activations are cut at 1, so it is for training with batch norms, from the start or for long; it goes down to
    one bit, which grids with learned scales do not. Quantize inputs of layers, which follow a ReLU, rather than outputs
    that take both signs; leave the first and the last layer out, as the paper does. With ``gradient_bits`` the gradient
    of each output of a targeted module is quantized too (see :mod:`tersor.quantization.low_bit_gradients`), so that
    training could run on integers.

    Types: ``int1`` to ``int16`` and ``uint1`` to ``uint16`` alike, ``int1`` for weights alone: the method says what the
    levels are, the type how they are stored. For the same reason ``quant_scheme`` changes nothing. Levels of weights
    lie symmetrically around zero, none on it, so the zero point is a half: a kernel that wants a whole one takes
    :math:`2 q + 1` (of ``int`` types) and half the scale, which needs one bit more. The largest :math:`|\tanh w|` is
    taken on what is not masked, and is a constant for gradients. ``granularity`` of a weight is the block over which
    the largest and the mean are taken, by default all of it, as in the paper.

    Paper: Zhou, Wu, Ni, Zhou, Wen, Zou: DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
    Bitwidth Gradients (arXiv 1606.06160), sections 2.3 to 2.5.

    Args:
        model: the model; it is wrapped in place.
        config_list: weights, inputs and outputs with ``quant_dtype``.
        evaluator: how the model is trained; without one, train it in a loop of your own.
        gradient_bits: of the gradients; None leaves them as they are. Its noise comes from torch's generator, whose
            state is part of :meth:`state_dict`.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        InvalidValueError: a type that a target cannot have.
        ConflictError: a key that means nothing here, or a bias, whose size is all that it has.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-2.0, -0.1, 0.1, 2.0]]))
        >>> weights = {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int2"}
        >>> quantizer = DoReFaQuantizer(layer, [weights])
        >>> quantizer.start()
        >>> layer.weight
        tensor([[-1.0000, -0.3333,  0.3333,  1.0000]], grad_fn=<MulBackward0>)
    """

    folds_norms = False
    needs_training = True
    methods = frozenset({"dorefa_clamp_round_weight", "dorefa_clamp_round_output"})

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        gradient_bits: int | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        if gradient_bits not in (None, *range(1, MOST_BITS + 1)):
            raise InvalidValueError(
                f"{gradient_bits!r} is no number of bits", where="gradient_bits", legal=[f"1 to {MOST_BITS}", None]
            )
        self.gradient_bits = gradient_bits
        self._handles: list[RemovableHandle] = []
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def fake_quantize(self, target: PlannedTarget) -> FixedGrid:
        """The grid of a weight, or that of an activation."""
        refuse_given(target, ("observer", "dynamic"), "the method fixes all ranges")
        if is_activation(target.config.target_name):
            refuse_given(target, ("granularity",), "the range of every activation is [0, 1]")
            return UnitGrid(target.name, self.form(target))
        refuse_vector(self, target)
        return TanhGrid(target.name, self.form(target), self.cut(target), self.latent(target))

    def cut(self, target: PlannedTarget) -> Cut:
        """Weights too are one block by default."""
        granularity = spec_of(target).granularity
        whole = granularity is None or granularity.name == "default"
        return Cut.of(target.config, None) if whole else super().cut(target)

    def form(self, target: PlannedTarget) -> Format:
        """All values of a type."""
        spec, is_input = spec_of(target), is_activation(target.config.target_name)
        dtype, where = spec.quant_dtype or IntDtype(8), f"{target.config.where}[{{!r}}] on {target.name}"
        if not isinstance(dtype, IntDtype) or dtype.bits > MOST_BITS or (is_input and dtype == INT1.dtype):
            raise InvalidValueError(
                f"{dtype.as_config()!r} is no type for this target",
                where=where.format("quant_dtype"),
                legal=[f"int{2 if is_input else 1} to int{MOST_BITS}", f"uint1 to uint{MOST_BITS}"],
                remedy="An activation of one bit is 0 or 1: uint1." if dtype == INT1.dtype else "",
            )
        if spec.quant_range == "narrow":
            raise InvalidValueError(
                "the method uses all values of a type", where=where.format("quant_range"), remedy="Leave it out."
            )
        if dtype == INT1.dtype:
            return INT1
        low = -(2 ** (dtype.bits - 1)) if dtype.signed else 0
        return Format(dtype, "affine" if is_input else "symmetric", low, low + 2**dtype.bits - 1)

    def on_start(self) -> None:
        """Simulate."""
        for target, transform in self.transforms():
            assert isinstance(transform, FixedGrid)
            transform.enabled = True
            transform.watching = not is_activation(target.config.target_name)
        self._take_gradients()

    def _take_gradients(self) -> None:
        self.on_stop()
        if self.gradient_bits is not None:
            hook = LowBitGradients(self.gradient_bits)
            modules = {target.config.module: None for target, _ in self.transforms()}
            # Before all other hooks, so that what enters the module's own backward pass is what is quantized.
            self._handles = [module.register_forward_hook(hook, prepend=True) for module in modules]

    def on_stop(self) -> None:
        """Leave gradients alone."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def get_calibration_config(self) -> CalibrationConfig:
        """What a deployed model needs of each target, of the weights as they are by now."""
        for target, transform in self.transforms():
            if transform.watching:
                self._stack(target)(self.latent(target))  # the last step came after the last look
        return super().get_calibration_config()

    def own_state(self) -> dict[str, Any]:
        """The state of each simulation, and where the noise has come to."""
        noise = {"random": random_state()} if self.gradient_bits is not None else {}
        return {**super().own_state(), "gradients": bool(self._handles), **noise}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`own_state` gave."""
        super().load_own_state(state)
        if state["gradients"]:
            self._take_gradients()
        else:
            self.on_stop()
        if "random" in state:
            set_random_state(state["random"])


@final
class TanhGrid(FixedGrid):
    """The grid of a weight.

    Args:
        name: see :class:`FixedGrid`.
        form: likewise.
        cut: the blocks that are normalised each by itself.
        latent: the weight.

    Attributes:
        magnitude: of each block the largest magnitude of its tanh; where it has one bit, the mean magnitude.
    """

    magnitude: Tensor

    def __init__(self, name: str, form: Format, cut: Cut, latent: Tensor) -> None:
        super().__init__(name, form)
        self.cut = cut
        self.register_buffer("magnitude", torch.ones(cut.grid(latent.shape), device=latent.device))

    @torch.no_grad()
    def watch(self, value: Tensor) -> None:
        """Measure the weights that are not masked."""
        rows = self.cut.rows(value.to(torch.promote_types(value.dtype, torch.float32)))
        self.put("magnitude", mean_magnitude(rows) if self._binary else rows.abs().amax(-1).tanh())

    def rounded(self, value: Tensor) -> Tensor:
        """Levels, as far apart as the type has them."""
        magnitude = self.cut.spread(self.magnitude, value.shape)
        if self._binary:
            return binary_weight(value, magnitude)
        levels = weight_levels(value, magnitude, self.form.dtype.bits)
        return (levels - self._steps / 2) * torch.tensor(2 / self._steps)  # the scale as it is stored, in float32

    def grid(self) -> tuple[Tensor, Tensor]:
        """Levels from -1 to 1; of one bit, from minus to plus the mean magnitude."""
        if self.form == INT1:
            return self.magnitude, torch.zeros_like(self.magnitude)
        ones = torch.ones_like(self.magnitude)
        scale = 2 * self.magnitude if self._binary else ones * (2 / self._steps)
        return scale, ones * (self.form.low + self._steps / 2)

    def calibration(self) -> dict[str, Any]:
        """The grid, and what the latent weights are measured by."""
        return {**super().calibration(), "magnitude": self.magnitude.detach().cpu().clone()}

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Fixed from now on."""
        super().load_calibration(calibration)
        self.put("magnitude", calibration["magnitude"].to(self.magnitude))

    @property
    def measured(self) -> frozenset[str]:
        """What was found on the weights."""
        return frozenset({"magnitude", "scale"} if self._binary else {"magnitude"})

    @property
    def _binary(self) -> bool:
        return self.form.dtype.bits == 1

    @property
    def _steps(self) -> int:
        return 2**self.form.dtype.bits - 1


@final
class UnitGrid(FixedGrid):
    """The grid of an activation: levels from 0 to 1."""

    def grid(self) -> tuple[Tensor, Tensor]:
        """Level 0 stands for 0."""
        return torch.tensor(1 / (2**self.form.dtype.bits - 1)), torch.tensor(int(self.form.low))

    def rounded(self, value: Tensor) -> Tensor:
        """Clipped, with no gradient where it was, and rounded."""
        steps = 2**self.form.dtype.bits - 1
        levels = steps * value.clamp(0, 1)
        return straight_through(levels, levels.round()) * torch.tensor(1 / steps)


def weight_levels(weight: Tensor, largest: Tensor, bits: int) -> Tensor:
    r"""Which of the :math:`2^k` levels each weight is rounded to, from 0.

    .. math:: q = \operatorname{round}\left((2^k - 1) \left(\frac{\tanh w}{2 m} + \frac{1}{2}\right)\right)

    Rounding passes gradients straight through; :math:`m` takes none.

    Args:
        weight: of any shape.
        largest: :math:`m = \max |\tanh w|`, broadcastable against ``weight``. Beyond it values are clipped.
        bits: :math:`k`.

    >>> weight_levels(torch.tensor([-2.0, -0.1, 0.1, 2.0]), torch.tensor(2.0).tanh(), bits=2)
    tensor([0., 1., 2., 3.])
    """
    unit = weight.tanh() / (2 * largest).clamp_min(torch.finfo(weight.dtype).tiny) + 0.5
    levels = (2**bits - 1) * unit.clamp(0, 1)
    return straight_through(levels, levels.round())


def binary_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Signs times a scale, with the gradient of the weight itself.

    >>> binary_weight(torch.tensor([0.5, -2.0]), torch.tensor(1.25))
    tensor([ 1.2500, -1.2500])
    """
    return straight_through(weight, as_signs(weight) * scale)


def mean_magnitude(rows: Tensor) -> Tensor:
    """The mean of the magnitudes in each row; zeros, which are masked, are left out.

    >>> mean_magnitude(torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor([2., 0.])
    """
    return rows.abs().sum(-1) / rows.count_nonzero(-1).clamp_min(1)
