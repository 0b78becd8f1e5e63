"""Default targets of module types, and the registries that users extend.

A registry says, for each module type, which targets are compressed where an entry names none, and which keys each
target owns: an entry's shorthand key (``sparse_ratio`` beside ``op_types``) holds for every selected target that owns
it. The bias of a convolution, for one, owns ``align`` and no ``sparse_ratio``: it follows the weight.

Types are looked up along the method resolution order, so a subclass of ``nn.Conv2d`` is an ``nn.Conv2d``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from tersor.config import values
from tersor.config.specs import SPECS, Mode, PruningSpec, QuantizationSpec, TargetSpec
from tersor.errors import InvalidValueError, UnmatchedError, nearest
from tersor.graph.operations import (
    Add,
    Concat,
    Div,
    Einsum,
    FunctionalConv,
    FunctionalLinear,
    FunctionalNorm,
    Interpolate,
    MatMul,
    Mean,
    Mul,
    Stack,
    Sub,
    Sum,
)

ModuleType = type[nn.Module] | str
Setting = Mapping[str, TargetSpec]


class SettingRegistry:
    """The default targets of module types for one kind of compressor.

    Args:
        mode: the kind of compressor.
        name: what errors call the registry.
        generic: the setting of a target that is named explicitly and that the module's type does not list.
    """

    def __init__(self, mode: Mode, name: str, generic: Mapping[str, Any]) -> None:
        self.mode: Mode = mode
        self.name = name
        self.generic: TargetSpec = SPECS[mode].parse(generic, name)
        self._settings: dict[ModuleType, Setting] = {}

    def register(self, module_type: ModuleType, setting: Mapping[str, Mapping[str, Any]]) -> None:
        """Add or replace the default targets of a module type.

        Args:
            module_type: a module class, or the name of one; subclasses follow it.
            setting: target name to settings. A key that is None is owned and unset: entries may set it. An empty
                mapping stands for all keys.

        Raises:
            ConfigError: one of its subclasses: no module type, no target, or a key that this registry does not know.

        >>> class Scale(nn.Module): ...
        >>> with PruningSetting.preserved():
        ...     PruningSetting.register(Scale, {"gain": {"sparse_ratio": None, "granularity": "default"}})
        ...     list(PruningSetting.of(Scale()))
        ['gain']
        """
        where = f"{self.name}.register"
        with values.at(where):
            (kind,) = values.types([module_type])
        if not isinstance(setting, Mapping) or not setting:
            raise InvalidValueError(f"{setting!r} has no targets.", where=where, remedy="Give {'weight': {...}}.")
        parsed: dict[str, TargetSpec] = {}
        for name, keys in setting.items():
            with values.at(f"{where}[{name!r}]"):
                target = values.target_name(name)
                values.check_target(target, self.mode)
                parsed[target] = SPECS[self.mode].parse(keys) if keys else self.generic
        self._settings.pop(kind, None)  # The latest registration of a class, or of its name, holds.
        self._settings[kind] = parsed

    def unregister(self, module_type: ModuleType) -> None:
        """Forget a module type.

        Raises:
            UnmatchedError: it was not registered.
        """
        if module_type not in self._settings:
            name = type_name(module_type)
            known = [type_name(kind) for kind in self._settings]
            raise UnmatchedError(
                f"{name!r} is not registered.", where=self.name, legal=known, remedy=nearest(name, known)
            )
        del self._settings[module_type]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Undo on leaving whatever was registered or unregistered inside."""
        before = dict(self._settings)
        try:
            yield
        finally:
            self._settings = before

    @property
    def types(self) -> tuple[ModuleType, ...]:
        """The module types that have default targets."""
        return tuple(self._settings)

    def of(self, module: nn.Module) -> Setting | None:
        """The default targets of a module and their settings, or None where its type has none."""
        order = list(self._settings)
        for base in type(module).__mro__:
            found = [key for key in (base, base.__name__) if key in self._settings]
            if found:
                return self._settings[max(found, key=order.index)]
        return None


def type_name(module_type: ModuleType) -> str:
    """The name of a module class."""
    return module_type if isinstance(module_type, str) else module_type.__name__


PruningSetting = SettingRegistry(
    "pruning",
    "PruningSetting",
    {
        **dict.fromkeys(PruningSpec.model_fields),
        "granularity": "default",
        "apply_method": "mul",
        "apply_value": -1000.0,
    },
)
QuantizationSetting = SettingRegistry(
    "quantization",
    "QuantizationSetting",
    {
        **dict.fromkeys(QuantizationSpec.model_fields),
        "quant_dtype": "int8",
        "quant_scheme": "symmetric",
        "granularity": "default",
        "apply_method": "clamp_round",
    },
)
DistillationSetting = SettingRegistry(
    "distillation", "DistillationSetting", {"lambda": 1.0, "link": "auto", "apply_method": None}
)
SETTINGS: Mapping[Mode, SettingRegistry] = {
    "pruning": PruningSetting,
    "quantization": QuantizationSetting,
    "distillation": DistillationSetting,
}


def _follows_weight(dim: int) -> Mapping[str, Mapping[str, Any]]:
    """The weight, and a bias whose elements go with the weight's dimension `dim`."""
    bias = {"align": {"target_name": "weight", "dims": [dim]}, "apply_method": "mul", "apply_value": -1000.0}
    return {"weight": {}, "bias": bias}


for _type in (nn.Linear, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm):
    PruningSetting.register(_type, _follows_weight(0))
PruningSetting.register(_ConvTransposeNd, _follows_weight(1))
for _type in (nn.Embedding, nn.RMSNorm, nn.PReLU):
    PruningSetting.register(_type, {"weight": {}})

for _type in (nn.Linear, _ConvNd, _BatchNorm, "Conv1D"):  # the last is Transformers' linear layer
    QuantizationSetting.register(_type, {"_input_0": {}, "weight": {}, "_output_0": {}})
for _type in (Add, Sub, Mul, Div, MatMul, Einsum, FunctionalLinear, FunctionalConv):
    QuantizationSetting.register(_type, {"_input_0": {}, "_input_1": {}, "_output_0": {}})
for _type in (
    *(Concat, Stack, Mean, Sum, Interpolate, FunctionalNorm),  # inputs that share the output's grid need none
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Hardtanh, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.LogSoftmax, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(_MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd),
):
    QuantizationSetting.register(_type, {"_output_0": {}})

DistillationSetting.register(nn.Module, {"_output_0": {}})
