"""The base of quantizers that round a layer's weight by what the layer's inputs are."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
from torch import Tensor, nn

from tersor.config.values import is_activation
from tersor.errors import ConflictError
from tersor.quantization.base import FakeQuantize, spec_of
from tersor.quantization.calibrated import CalibratedQuantizer
from tersor.quantization.observers import MinMax, MovingAverage, RangeObserver
from tersor.quantization.second_order import Fit
from tersor.quantization.uniform import UniformQuantize
from tersor.targets.channels import is_conv1d
from tersor.targets.planned import PlannedTarget
from tersor.training.layer_inputs import from_rows, weight_rows
from tersor.training.ranks import of_first_process
from tersor.wrapping import Mask, Stage


class LayerwiseQuantizer(CalibratedQuantizer):
    """Base of post-training quantizers that change weights so that rounding them changes each layer's output least.

    Weights are rounded first, stage by stage (:mod:`tersor.training.stages`): a layer sees the inputs that the already
    rounded layers before it give. They see no rounded activations: inputs, outputs and biases are calibrated after all
    weights, once, as :class:`tersor.quantization.CalibratedQuantizer` does it, on what the rounded weights give. If
    that fails in between, weights that have been rounded by then stay so.

    The latent weights change and lie on their grid, so ``unwrap_model()`` gives back what was simulated. Masked weights
    are zero in them.

    Args: those of :class:`tersor.quantization.CalibratedQuantizer`; the calibration must be batches.

    Raises:
        ConflictError: a ``weight`` of another module than a linear layer or a convolution, or one that other modules
            use too.
    """

    folds_norms = False

    @abstractmethod
    def round_weights(self, weights: dict[str, Rounding]) -> None:
        """Give each weight its scales and new values, by :meth:`Rounding.settle`.

        Args:
            weights: by the name of the module.
        """

    def fake_quantize(self, target: PlannedTarget) -> UniformQuantize:
        """Uniform; a weight's ranges are the least and the greatest value by default."""
        return UniformQuantize(target.name, self.form(target), self.cut(target), _observer(target))

    def calibrate(self) -> None:
        """Round the weights, then find the scales of all else."""
        transforms = [(target, _uniform(target, transform)) for target, transform in self.transforms()]
        for _, transform in transforms:
            transform.enabled = False
        weights = {
            target.config.module_name: Rounding(target, transform, self.latent(target), self._mask(target))
            for target, transform in transforms
            if target.config.target_name == "weight"
        }
        others = [transform for target, transform in transforms if target.config.target_name != "weight"]
        if weights:
            self.round_weights(weights)
        if not others:
            return
        for transform in others:
            transform.watching = True
        try:
            self.run_calibration()
        finally:
            for transform in others:
                transform.watching = False
        for transform in others:
            transform.observer.synchronize()
            transform.settle()
            transform.enabled = True

    def _mask(self, target: PlannedTarget) -> Tensor | None:
        mask = self._stack(target).find(Stage.MASK)
        if not isinstance(mask, Mask) or not mask.factors or mask.method != "mul":
            return None
        return mask.product(self.latent(target).shape)

    def _wrap_targets(self) -> None:
        for target in self._quantized():
            if target.config.target_name == "weight":
                self._check_weight(target)
        super()._wrap_targets()

    def _check_weight(self, target: PlannedTarget) -> None:
        module, where = target.config.module, f"{target.config.where} on {target.name}"
        name = type(self).__name__
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not is_conv1d(module):
            raise ConflictError(
                f"{name} rounds weights by the inputs that they multiply, and a {type(module).__name__} is no layer "
                "for that",
                where=where,
                legal=("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D of Transformers"),
                remedy="Exclude it, and give it to a PtqQuantizer beside this one.",
            )
        others = [".".join(place) for place in self.wrappers.tied(*target.place) if place != target.place]
        if others:
            raise ConflictError(
                f"{name} would change {', '.join(others)} as well, which is the same tensor with other inputs",
                where=where,
                remedy="Exclude it, and give it to a PtqQuantizer beside this one.",
            )


class Rounding:
    """One weight on its way to its grid.

    Attributes:
        target: what is quantized.
        module: the layer.
        transform: its simulation.
        latent: the weight.
        keep: the mask of a pruner, of the weight's shape, True keeps; None where nothing is masked.
    """

    def __init__(self, target: PlannedTarget, transform: UniformQuantize, latent: Tensor, keep: Tensor | None) -> None:
        self.target = target
        self.module = target.config.module
        self.transform = transform
        self.latent = latent.detach()
        self.keep = keep

    @property
    def rows(self) -> Tensor:
        """The weight as matrices, shape (groups, rows, columns)."""
        return weight_rows(self.module, self.latent)

    @property
    def kept_rows(self) -> Tensor | None:
        """The mask in the shape of the rows."""
        return None if self.keep is None else weight_rows(self.module, self.keep)

    @property
    def fit(self) -> Fit:
        """How scales and zero points follow from the elements of blocks."""
        return fit_of(self.transform)

    def scales_of_rows(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point for the weight as it is, in the shape of the rows."""
        kept = self.latent if self.keep is None else self.latent * self.keep
        blocks = self.transform.cut.rows(kept.to(torch.promote_types(kept.dtype, torch.float32)))
        scale, zero_point = self.fit(blocks)
        return self.as_rows(scale), self.as_rows(zero_point)

    def as_rows(self, per_block: Tensor) -> Tensor:
        """One number a block, repeated in the shape of the rows."""
        spread = self.transform.cut.spread(per_block, self.latent.shape)
        return weight_rows(self.module, spread.expand(self.latent.shape))

    @torch.no_grad()
    def settle(self, rows: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Take over a weight on its grid, the first process's on all; from now on it is simulated.

        Args:
            rows: the weight, in the shape of the rows.
            scale: in the same shape, alike over each block.
            zero_point: likewise.
        """
        weight, *scales = (of_first_process(from_rows(self.module, each)) for each in (rows, scale, zero_point))
        self.transform.set(*(self.transform.cut.rows(each)[..., 0].float() for each in scales))
        self.transform.enabled = True
        # In a half type the weight is next to its grid, and float64 scales have become float32.
        self.latent.copy_(self.transform(weight.to(self.latent.dtype)))


def fit_of(transform: UniformQuantize) -> Fit:
    """How scales and zero points follow from the elements of blocks, by the observer of a transform, which stays new.

    >>> from tersor.config import IntDtype
    >>> from tersor.quantization import Cut, Format
    >>> int2 = Format(IntDtype(2), "symmetric", low=-1, high=1)
    >>> fit_of(UniformQuantize("fc.weight", int2, Cut("", None, ()), MinMax()))(torch.tensor([[0.5, -2.0]]))
    (tensor([2.]), tensor([0.]))
    """

    def fit(blocks: Tensor) -> tuple[Tensor, Tensor]:
        observer = copy.deepcopy(transform.observer).to(blocks.device)
        observer.add(blocks)
        return transform.form.scale_and_zero_point(*observer.range())

    return fit


def _uniform(target: PlannedTarget, transform: FakeQuantize) -> UniformQuantize:
    if not isinstance(transform, UniformQuantize):
        raise ConflictError(
            "what is quantized is computed from the weight and a norm behind it",
            where=f"{target.config.where} on {target.name}",
            remedy="Fold the norm into the weight for good first.",
        )
    return transform


def _observer(target: PlannedTarget) -> RangeObserver:
    spec = spec_of(target)
    asked = spec.observer or "minmax"
    if spec.dynamic or asked not in ("minmax", "moving_average"):
        key = "dynamic" if spec.dynamic else "observer"
        raise ConflictError(
            "rounding weights goes with fixed ranges, from the least value to the greatest",
            where=f"{target.config.where}[{key!r}] on {target.name}",
            remedy="Leave it out, or give the target to a PtqQuantizer beside this one.",
        )
    return MovingAverage() if asked == "moving_average" and is_activation(target.config.target_name) else MinMax()
