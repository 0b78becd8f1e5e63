"""The base of quantizers that first move scales between layers, by what the layers' inputs are on calibration data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tersor.quantization.calibrated import CalibratedQuantizer, switch_off
from tersor.quantization.cut import Cut
from tersor.quantization.format import Format
from tersor.quantization.scaling import Kernel, ScaleGroup, find_scaling
from tersor.targets.channels import activation_channel_dim, is_linear_or_convolution
from tersor.targets.planned import PlannedTarget
from tersor.training.layer_inputs import unfold_inputs, weight_rows
from tersor.training.ranks import of_first_process


class MigratingQuantizer(CalibratedQuantizer):
    """Base of quantizers that divide what a layer reads by a factor for each channel, and multiply its weight by it.

    What wrote the channels is divided instead (:mod:`tersor.quantization.scaling`), so nothing is added to the model.
    Latent weights change by that, and stay so when the model is unwrapped: it then computes what it did, up to
    rounding. A calibration fits these weights: save them with it.

    Where no factor can be moved, a layer is quantized as it is, and :attr:`refused` says why.

    Attributes:
        moved: after calibration, the channels that took factors, by the layers that write and read them.
        factors: of each of these groups, the factor of each channel, float64.
        refused: after calibration, of each quantized weight whose inputs took no factor, why.
    """

    moved: tuple[ScaleGroup, ...] = ()
    factors: tuple[Tensor, ...] = ()
    refused: Mapping[str, str] = {}

    @abstractmethod
    def choose(self, groups: tuple[ScaleGroup, ...]) -> list[Tensor]:
        """The factors of each group's channels, from calibration data.

        Args:
            groups: the channels that are read by at least one layer that is quantized.
        """

    def migrate(self) -> None:
        """Find where factors can be moved, choose them, move them, and check the result.

        Raises:
            InvalidValueError: neither example inputs nor a calibration batch.
            EquivalenceError: the model no longer computes what it did; all weights are as they were.
        """
        switch_off(self.transforms())
        with self.wrappers.detached():
            scaling = find_scaling(self.model, self.example())
        wanted = self.readers()
        groups = tuple(group for group in scaling.groups if any(own.name in wanted for own in group.readers))
        reached = {kernel.name for group in groups for kernel in group.readers}
        self.refused = {
            name: scaling.refused.get(name, "is called by no code that is followed on the example inputs")
            for name in wanted
            if name not in reached
        }
        chosen = [of_first_process(own.double().cpu()) for own in self.choose(groups)]
        factors = torch.ones(scaling.count, dtype=torch.float64, device="cpu")
        for group, own in zip(groups, chosen, strict=True):
            factors[group.channels] = own
        with self.wrappers.detached():
            scaling.apply(factors)
        self.moved, self.factors = groups, tuple(chosen)

    def readers(self) -> dict[str, nn.Module]:
        """The modules of which a target is quantized and whose weight reads channels, by the name of that weight."""
        modules = {target.config.module_name: target.config.module for target, _ in self.transforms()}
        return {
            f"{name}.weight" if name else "weight": module
            for name, module in modules.items()
            if is_linear_or_convolution(module)
        }

    def read_by(self, group: ScaleGroup) -> Iterator[tuple[Kernel, nn.Module]]:
        """The quantized readers of a group: the weight and its module."""
        wanted = self.readers()
        for kernel in group.readers:
            if kernel.name in wanted:
                yield kernel, wanted[kernel.name]

    def used(self, kernel: Kernel) -> Tensor:
        """A parameter as the model computes with it, with masked elements as zeros."""
        module, _, name = kernel.name.rpartition(".")
        value = getattr(self.model.get_submodule(module), name)
        assert isinstance(value, Tensor)
        return value.detach()

    def run_watching(self, watch: Callable[[str, nn.Module, Tensor], None]) -> None:
        """Run all calibration batches, and show what each reader is given: its weight's name, the module, the input."""
        with ExitStack() as stack:
            for name, module in self.readers().items():

                def see(module: nn.Module, args: tuple[Any, ...], kwargs: Any, name: str = name) -> None:
                    watch(name, module, args[0] if args else kwargs["input"])

                handle = module.register_forward_pre_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
            self.run_calibration()

    def target_of(self, module: nn.Module, name: str) -> PlannedTarget | None:
        """The quantized target of a module whose name begins like this; None where it has none."""
        own = (target for target, _ in self.transforms() if target.config.module is module)
        return next((target for target in own if target.config.target_name.startswith(name)), None)


def by_channel(module: nn.Module, x: Tensor) -> Tensor:
    """The values of each input channel in a row, shape ``(channels, values)``, float32 or wider.

    >>> by_channel(nn.Conv2d(3, 4, 1), torch.zeros(2, 3, 5, 5)).shape
    torch.Size([3, 50])
    """
    dim = activation_channel_dim(module, x.dim())
    assert dim is not None
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, 0).flatten(1)


def times(module: nn.Module, x: Tensor, factors: Tensor) -> Tensor:
    """An input of a module, each channel multiplied by a factor."""
    dim = activation_channel_dim(module, x.dim())
    assert dim is not None
    return x * factors.to(x).view([-1 if own == dim else 1 for own in range(x.dim())])


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight as it is used, with masked elements as zeros."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def rounded(form: Format, cut: Cut, values: Tensor) -> Tensor:
    """Values rounded to the nearest that a format holds, each block by its own range.

    >>> from tersor.config import IntDtype
    >>> rounded(Format(IntDtype(2), "symmetric", -1, 1), Cut("", None, ()), torch.tensor([0.4, 0.6, -1.0]))
    tensor([ 0.,  1., -1.])
    """
    rows = cut.rows(values)
    scale, zero_point = (cut.spread(own, values.shape) for own in form.scale_and_zero_point(*rows.aminmax(dim=-1)))
    return form.simulate(values, scale, zero_point)


def product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a linear layer or a convolution makes of an input with another weight and no bias, in rows."""
    return unfold_inputs(module, x) @ weight_rows(module, weight).to(x).mT
