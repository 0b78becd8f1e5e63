"""The base of quantizers that round a layer's weight by what the layer's inputs are."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
from torch import Tensor, nn

from tersor.errors import ConflictError
from tersor.quantization.base import FakeQuantize
from tersor.quantization.calibrated import CalibratedQuantizer, switch_off
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

    def calibrate(self) -> None:
        """Round the weights, then find the scales of all else."""
        found = self.transforms()
        switch_off(found)
        weights = {
            target.config.module_name: Rounding(target, transform, self.latent(target), self._mask(target))
            for target, transform in found
            if target.config.target_name == "weight"
        }
        others = [own for own in found if own[0].config.target_name != "weight"]
        if weights:
            self.round_weights(weights)
        self.fix_ranges(others)

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

    def __init__(self, target: PlannedTarget, transform: FakeQuantize, latent: Tensor, keep: Tensor | None) -> None:
        assert isinstance(transform, UniformQuantize), "a weight is not dynamic, and norms are not folded here"
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
    >>> from tersor.quantization import Cut, Format, MinMax
    >>> int2 = Format(IntDtype(2), "symmetric", low=-1, high=1)
    >>> fit_of(UniformQuantize("fc.weight", int2, Cut("", None, ()), MinMax()))(torch.tensor([[0.5, -2.0]]))
    (tensor([2.]), tensor([0.]))
    """

    def fit(blocks: Tensor) -> tuple[Tensor, Tensor]:
        observer = copy.deepcopy(transform.observer).to(blocks.device)
        observer.add(blocks)
        return transform.form.scale_and_zero_point(*observer.range())

    return fit
