"""AWQ: weights of few bits, of which those that meet large activations are rounded most finely."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from tersor.errors import ConflictError
from tersor.quantization.base import FakeQuantize, spec_of
from tersor.quantization.cut import Cut
from tersor.quantization.format import Format
from tersor.quantization.migration import MigratingQuantizer, by_channel, rounded, weight_of
from tersor.quantization.observers import Latest
from tersor.quantization.scaling import Kernel, ScaleGroup
from tersor.quantization.uniform import UniformQuantize
from tersor.targets.planned import PlannedTarget
from tersor.training.damping import computable
from tersor.training.layer_inputs import SecondMoment, from_rows, unfold_inputs, weight_rows
from tersor.training.ranks import sum_over_processes
from tersor.training.stages import stages

EXPONENTS = tuple(step / 20 for step in range(21))
"""The alphas that are tried; 0 leaves everything as it is."""
SHARES = tuple(1 - step / 20 for step in range(10))
"""The shares of a block's range that are tried."""


@final
class AWQQuantizer(MigratingQuantizer):
    r"""Quantizes weights alone, after it has made those larger that meet large activations.

    A weight that is multiplied by s before it is rounded, and whose input is divided by s, has an error s times
    smaller, as long as the largest weight of its block stays what it is. What deserves that is seen on the inputs: with
    the mean magnitude of each channel,

    .. math:: s_j = (\mathrm{mean} |X_j|)^{\alpha}, \qquad
        \alpha = \arg\min_{\alpha \in [0, 1]} \sum \lVert Q(W s) s^{-1} X - W X \rVert^2

    over all layers that read the channels, and all calibration data. What writes the channels takes up the division, so
    that nothing is added to the model; where nothing can, :attr:`refused` says why, and only the next step is done:
    each block of weights is clipped to the share of its range (1 to 0.55) by which the output of this block alone has
    the least error.

    All of the data counts by one matrix a layer, the second moment H of its inputs: an error D of the weights costs
    :math:`\mathrm{tr}(D H D^T)`. The layers are clipped one stage after another, each by the inputs that the quantized
    layers before it give; no more is in memory than the matrices of one stage.

    Paper: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: Activation-aware Weight Quantization for
    On-Device LLM Compression and Acceleration (MLSys 2024). The paper's setting is ``quant_dtype: "int4"`` (or
    ``"uint4"`` with ``"affine"``) and ``granularity: [1, 128]``.

    Args: those of :class:`tersor.quantization.calibrated.CalibratedQuantizer`; ``calibration`` must be given, and the
        targets are weights of linear layers and convolutions.

    Attributes:
        exponents: after calibration, of each group of :attr:`moved`, its alpha.

    Raises:
        ConflictError: a target that is no weight.
        InvalidValueError: the weight of something else than a linear layer or a convolution.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> config = [{"op_names": ["2"], "target_names": ["weight"], "quant_dtype": "int4", "granularity": [1, 4]}]
        >>> quantizer = AWQQuantizer(net, config, calibration=[torch.randn(16, 4)])
        >>> quantizer.compress()[1]["2"]["weight"]["scale"].shape
        torch.Size([4, 2])
        >>> print(*quantizer.moved)
        8 channels: 0.weight, 0.bias -> 2.weight
    """

    folds_norms = False
    exponents: tuple[float, ...] = ()

    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """Even steps, with fixed scales."""
        spec, where = spec_of(target), f"{target.config.where} on {target.name}"
        if target.config.target_name != "weight" or spec.dynamic:
            raise ConflictError(
                "AWQ quantizes weights alone, with fixed scales", where=where, remedy="Set target_names: ['weight']."
            )
        if spec.observer not in (None, "minmax"):
            raise ConflictError(
                f"AWQ searches ranges itself, not by {spec.observer!r}", where=where, remedy="Leave observer out."
            )
        weight_rows(target.config.module, self.latent(target))  # refuses what is no such layer
        return UniformQuantize(target.name, self.form(target), self.cut(target), Latest())

    def calibrate(self) -> None:
        """Move factors, then clip layer after layer."""
        self.migrate()
        for moments in self._stages():
            for target, transform in self.transforms():
                if target.config.module_name in moments:
                    assert isinstance(transform, UniformQuantize)
                    self._clip(target, transform, moments.pop(target.config.module_name))

    def choose(self, groups: tuple[ScaleGroup, ...]) -> list[Tensor]:
        """The factors of least error on the grid of alphas."""
        means = self._mean_magnitudes()
        of_groups = [[own for own, _ in self.read_by(group) if own.name in means] for group in groups]
        largest = [
            group.largest((kernel.inputs, means[kernel.name]) for kernel in kernels)
            for group, kernels in zip(groups, of_groups, strict=True)
        ]
        choices = [[emphasis(values, alpha) for alpha in EXPONENTS] for values in largest]
        errors = torch.zeros(len(groups), len(EXPONENTS), dtype=torch.float64, device="cpu")
        for moments in self._stages():
            for number, group in enumerate(groups):
                for kernel, module in self.read_by(group):
                    moment = moments.get(kernel.name.rpartition(".")[0])
                    if moment is not None:
                        errors[number] += self._errors(module, kernel, moment, group, choices[number])
        best = errors.argmin(1).tolist()
        self.exponents = tuple(EXPONENTS[own] for own in best)
        return [of_group[own] for of_group, own in zip(choices, best, strict=True)]

    def _mean_magnitudes(self) -> dict[str, Tensor]:
        """Of each quantized layer, the mean magnitude of each input channel."""
        sums: dict[str, Tensor] = {}

        def watch(name: str, module: nn.Module, x: Tensor) -> None:
            rows = by_channel(module, x).double().abs()
            own = torch.cat([rows.sum(1), rows.new_tensor([rows.shape[1]])]).cpu()
            sums[name] = own + sums[name] if name in sums else own

        self.run_watching(watch)
        totals = {name: sum_over_processes(sums[name]) for name in sorted(sums)}
        return {name: computable(total[:-1] / total[-1], "the input", name) for name, total in totals.items()}

    def _stages(self) -> Iterable[dict[str, Tensor]]:
        """Stage by stage, the second moment of each quantized layer's inputs, by the name of the module."""
        modules = {target.config.module_name: target.config.module for target, _ in self.transforms()}
        for stage in stages(self.model, self.batches(), list(modules)):
            seen: dict[str, SecondMoment] = {}
            for name in stage.modules:
                weight = weight_of(modules[name])
                groups, _, columns = weight_rows(modules[name], weight).shape
                seen[name] = SecondMoment.zeros(groups, columns, device=weight.device)

            def watch(name: str, inputs: tuple[Tensor, ...], seen: dict[str, SecondMoment] = seen) -> None:
                seen[name].add(unfold_inputs(modules[name], inputs[0]))

            stage.run(watch)
            yield {name: sum_over_processes(own.products) for name, own in seen.items()}

    def _errors(
        self, module: nn.Module, kernel: Kernel, moment: Tensor, group: ScaleGroup, choices: list[Tensor]
    ) -> Tensor:
        """What each choice of factors costs one layer, shape (choices,)."""
        target = self.target_of(module, "weight")
        assert target is not None
        weight = weight_of(module)
        found: list[Tensor] = []
        for factors in choices:
            on_inputs = group.spread(kernel.inputs, factors)
            scaled = rounded(self.form(target), self.cut(target), kernel.multiplied(weight, on_inputs))
            difference = kernel.multiplied(scaled, 1 / on_inputs) - weight
            found.append(output_error(weight_rows(module, difference), moment).sum())
        return torch.stack(found).double().cpu()

    def _clip(self, target: PlannedTarget, transform: UniformQuantize, moment: Tensor) -> None:
        """Give one weight the scales of its best clipped ranges."""
        module = target.config.module
        transform.set(*clipped_scales(module, weight_of(module), moment, transform.form, transform.cut))
        transform.enabled = True


def emphasis(means: Tensor, alpha: float) -> Tensor:
    r"""The factors :math:`s_j = m_j^{\alpha}`, scaled so that the largest and the smallest multiply to 1.

    Args:
        means: the mean magnitude of each channel; those that are never used take part with a ten-thousandth.
        alpha: from 0, which changes nothing, to 1.

    >>> emphasis(torch.tensor([16.0, 1.0, 4.0]), 0.5)
    tensor([2.0000, 0.5000, 1.0000])
    """
    factors = means.clamp(min=1e-4 * float(means.max()) or 1.0) ** alpha
    return factors / (factors.max() * factors.min()).sqrt()


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    r"""What the error of each weight adds to the squared error of the output, :math:`d_i \sum_j H_{ij} d_j`.

    Args:
        difference: of the weight, shape (groups, rows, columns).
        moment: sum of the products of inputs, shape (groups, columns, columns).

    >>> output_error(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]))
    tensor([[[2., 5.]]])
    """
    return (difference.to(moment) @ moment) * difference.to(moment)


def clipped_scales(module: nn.Module, weight: Tensor, moment: Tensor, form: Format, cut: Cut) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block of a weight, for the range of least output error among :data:`SHARES`.

    Of each block the error of what it alone adds to the output counts, as in the paper.

    Args:
        module: that the weight belongs to.
        weight: its values.
        moment: sum of the products of its inputs, shape (groups, columns, columns).
        form: what is stored.
        cut: the blocks.

    Returns:
        Of the grid's shape.
    """
    rows = cut.rows(weight.float())
    minimum, maximum = rows.aminmax(dim=-1)
    bound = torch.maximum(minimum.abs(), maximum.abs())
    numbers = torch.arange(bound.numel(), device=weight.device).view(bound.shape)
    block = weight_rows(module, cut.spread(numbers, weight.shape).expand(weight.shape))[:, 0]
    within = moment * (block[:, :, None] == block[:, None, :])
    least = torch.full_like(bound, torch.inf, dtype=torch.float64)
    best = torch.ones_like(bound)
    for share in SHARES:
        scale, zero_point = form.scale_and_zero_point(*_clipped(minimum, maximum, bound * share))
        simulated = form.simulate(weight, cut.spread(scale, weight.shape), cut.spread(zero_point, weight.shape))
        error = from_rows(module, output_error(weight_rows(module, simulated - weight), within)).contiguous()
        total = cut.rows(error).double().sum(-1)
        best, least = torch.where(total < least, share, best), torch.minimum(total, least)
    return form.scale_and_zero_point(*_clipped(minimum, maximum, bound * best))


def _clipped(minimum: Tensor, maximum: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    return torch.maximum(minimum, -bound), torch.minimum(maximum, bound)
