"""Modules whose code needs more than smaller tensors: a replacer adapts them, or puts another module in their place.

Most modules compute with the shapes of their tensors, so slicing makes them small. Some compute with numbers of their
own (``self.num_heads``, ``view(..., 12, 64)``). A replacer is a function that gets such a module after its tensors were
sliced, and what is left of each of them::

    @replace(MyAttention)
    def shrink(module: MyAttention, cut: Cut) -> None:
        module.num_heads = int(cut.along("query.weight", 0).sum()) // module.head_dim

Modules inside come before the modules that hold them. All of it can be undone, so nothing remains where the small
model turns out to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tersor.errors import InvalidValueError, SpeedupError, TersorError
from tersor.graph.inputs import named_tensors


@dataclass(frozen=True)
class Cut:
    """What is left of a module's tensors, and of those of the modules inside it.

    Attributes:
        kept: for each tensor that lost something, its name as the module knows it (``weight``, ``query.weight``):
            dimension to bool vector, True stayed.
        shapes: the shape of every tensor before.
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]

    def along(self, target: str, dim: int) -> Tensor:
        """Which indices of a tensor's dimension stayed, bool; all of them where none left.

        Raises:
            InvalidValueError: the module has no such tensor.

        >>> cut = Cut({"weight": {0: torch.tensor([True, False])}}, {"weight": (2, 3)})
        >>> cut.along("weight", 0).tolist(), cut.along("weight", 1).tolist()
        ([True, False], [True, True, True])
        """
        if target not in self.shapes:
            raise InvalidValueError("the module has no such tensor", where=target, legal=self.shapes)
        vector = self.kept.get(target, {}).get(dim)
        return torch.ones(self.shapes[target][dim], dtype=torch.bool) if vector is None else vector


Replacer = Callable[[Any, Cut], nn.Module | None]
"""Gets a module whose tensors are sliced; returns the module to put in its place, or None to keep it."""

Customized = Mapping[type[nn.Module], Replacer] | Sequence[tuple[type[nn.Module], Replacer]]

REPLACERS: dict[type[nn.Module], Replacer] = {}

Function = TypeVar("Function", bound=Replacer)


def replace(kind: type[nn.Module]) -> Callable[[Function], Function]:
    """Register the decorated function as the replacer of a module type and of its subclasses.

    The nearest base class that has a replacer decides; a later replacer of the same type takes the place of an earlier.

    Args:
        kind: the module type.
    """
    if not _is_module_type(kind):
        raise InvalidValueError("is no module type", where=str(kind), legal=["a subclass of torch.nn.Module"])

    def register(function: Function) -> Function:
        REPLACERS[kind] = function
        return function

    return register


@dataclass
class Replacements:
    """What was replaced in a model.

    Attributes:
        names: the modules that are now another module, or of another class.
    """

    names: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def undo(self) -> None:
        """Put back every module, its class and its attributes; call it before the tensors' old values are put back."""
        while self._undo:
            self._undo.pop()()
        self.names.clear()

    def remember(self, module: nn.Module) -> None:
        """Have ``undo`` put back the module's class and attributes as they are now, and those of modules inside."""
        for inner in module.modules():
            self._undo.append(_restorer(inner))

    def swap(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` under every name that ``old`` has in the model."""
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is old:
                    self._undo.append(_restorer(parent))
                    parent._modules[key] = new


def _restorer(module: nn.Module) -> Callable[[], None]:
    """A function that gives the module its present class and attributes back.

    Registries (parameters, hooks) stay the same objects: a hook's handle removes it from the one that it knows.
    """
    kind, state = type(module), dict(vars(module))
    contents = [(value, dict(value)) for value in state.values() if isinstance(value, dict)]

    def restore() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(state)
        for registry, content in contents:
            registry.clear()
            registry.update(content)

    return restore


def replace_modules(
    model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], customized: Customized = ()
) -> Replacements:
    """Call the replacer of every module that has one and that lost something, itself or inside.

    Args:
        model: already sliced; changed in place.
        kept: qualified tensor name to dimension to bool vector, True stayed.
        customized: replacers by module type that come before the registered ones.

    Returns:
        What was replaced, and how to undo it.

    Raises:
        SpeedupError: a replacer failed or returned something else than a module; the model's modules are as before.
    """
    own = _checked(customized)
    named = list(model.named_modules())
    found = [(name, module, _find(type(module), own) or _find(type(module), REPLACERS)) for name, module in named]
    if not any(replacer for _, _, replacer in found):
        return Replacements()
    shapes = {name: _shape_before(tensor, kept.get(name, {})) for name, tensor in named_tensors(model).items()}
    replacements = Replacements()
    try:
        for name, module, replacer in reversed(found):
            cut = Cut(_inside(name, kept), _inside(name, shapes)) if replacer else None
            if replacer and cut and cut.kept:
                _replace(model, name, module, replacer, cut, replacements)
    except BaseException:
        replacements.undo()
        raise
    return replacements


def _replace(
    model: nn.Module, name: str, module: nn.Module, replacer: Replacer, cut: Cut, replacements: Replacements
) -> None:
    """Call one replacer, and put what it returns in the module's place."""
    replacements.remember(module)
    kind, inner = type(module), set(module.modules())
    try:
        new = replacer(module, cut)
    except TersorError as error:
        raise SpeedupError(error.what, where=name or "the model", legal=error.legal, remedy=error.remedy) from error
    except Exception as error:
        raise SpeedupError(
            f"the replacer of {kind.__name__} failed: {type(error).__name__}: {error}", where=name or "the model"
        ) from error
    if new is None or new is module:
        replacements.names += [name] if type(module) is not kind else []
        return
    if not isinstance(new, nn.Module):
        raise SpeedupError(
            f"the replacer of {kind.__name__} returned {type(new).__name__}",
            where=name or "the model",
            legal=["a module", "None to keep the module"],
        )
    if module is model:
        raise SpeedupError(
            "the model itself cannot be replaced by another module",
            where=kind.__name__,
            remedy="Change it in place and return None, or register a replacer for a module inside it.",
        )
    for added in new.modules():
        if added not in inner:
            added.training = module.training
    replacements.swap(model, module, new)
    replacements.names.append(name)


def _checked(customized: Customized) -> dict[type[nn.Module], Replacer]:
    try:
        replacers: dict[Any, Any] = dict(customized)
    except (TypeError, ValueError):
        replacers = {None: None}
    if not all(_is_module_type(kind) and callable(function) for kind, function in replacers.items()):
        raise InvalidValueError(
            f"{customized!r} are no replacers by module type",
            where="customized_replacers",
            legal=["{MyModule: function of (module, cut)}"],
        )
    return replacers


def _is_module_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _find(kind: type[nn.Module], replacers: Mapping[type[nn.Module], Replacer]) -> Replacer | None:
    return next((replacers[base] for base in kind.__mro__ if base in replacers), None)


def _shape_before(tensor: Tensor, dims: Mapping[int, Tensor]) -> tuple[int, ...]:
    return tuple(len(dims[dim]) if dim in dims else size for dim, size in enumerate(tensor.shape))


Value = TypeVar("Value")


def _inside(name: str, by_tensor: Mapping[str, Value]) -> dict[str, Value]:
    """What belongs to tensors in or below the named module, by their names as seen from it."""
    prefix = f"{name}." if name else ""
    return {tensor[len(prefix) :]: value for tensor, value in by_tensor.items() if tensor.startswith(prefix)}


@replace(nn.RNNBase)
def _flatten(module: nn.RNNBase, cut: Cut) -> None:
    """On GPUs, cuDNN wants the weights of a recurrent network in one piece of memory."""
    module.flatten_parameters()
