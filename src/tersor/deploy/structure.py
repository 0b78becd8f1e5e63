"""What a model takes and gives: named inputs, and outputs whose nesting outlives the model's code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from tersor.analysis.batches import batch_size_of
from tersor.errors import InvalidValueError
from tersor.graph.inputs import as_call, tensors_of


@dataclass(frozen=True)
class Input:
    """One tensor that a model takes.

    Attributes:
        name: of the argument of ``forward``.
        dtype: as torch spells it, without ``torch.``.
        shape: of the example; None along a dimension that may have any size.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def check(self, value: Any) -> None:
        """Refuse what it does not take.

        Raises:
            InvalidValueError: no tensor, another type, another shape.
        """
        legal = [f"{self.dtype} {tuple('any' if size is None else size for size in self.shape)}"]
        if not isinstance(value, Tensor):
            raise InvalidValueError(f"a {type(value).__name__} is no tensor", where=self.name, legal=legal)
        fits = len(value.shape) == len(self.shape) and all(
            size is None or size == own for size, own in zip(self.shape, value.shape, strict=True)
        )
        dtype = str(value.dtype).removeprefix("torch.")
        if not fits or dtype != self.dtype:
            raise InvalidValueError(
                f"{dtype} {tuple(value.shape)} is not what it was compiled for", where=self.name, legal=legal
            )


@dataclass(frozen=True)
class Signature:
    """What a compiled model takes and gives.

    Attributes:
        inputs: the tensors, in order.
        output: nested lists and dicts that say how outputs are nested: see :func:`describe`.
        constants: the arguments that hold no tensor, by name: what they were is part of what was compiled.
        arguments: the names of all arguments, in order.
    """

    inputs: tuple[Input, ...]
    output: Any
    constants: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, output: Any, *, dynamic_batch: bool) -> Signature:
        """That of a model.

        Args:
            model: whose ``forward`` names the inputs.
            example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
            output: what the model gives for them.
            dynamic_batch: whether the batch may have any size.
        """
        args, kwargs = as_call(example_inputs)
        batch = batch_size_of(example_inputs) if dynamic_batch else None
        inputs: list[Input] = []
        constants: dict[str, Any] = {}
        named = arguments_of(model, args, kwargs)
        for name, value in named.items():
            tensors = tensors_of(value)
            for tensor in tensors:
                shape = tuple(None if dim == 0 and size == batch else size for dim, size in enumerate(tensor.shape))
                inputs.append(Input(name, str(tensor.dtype).removeprefix("torch."), shape))
            if not tensors:
                constants[name] = value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)
        return cls(tuple(inputs), describe(output), constants, tuple(named))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Signature:
        """From what :meth:`to_dict` gave."""
        inputs = tuple(Input(own["name"], own["dtype"], tuple(own["shape"])) for own in content["inputs"])
        return cls(inputs, content["output"], dict(content["constants"]), tuple(content["arguments"]))

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, checked.

        Raises:
            InvalidValueError: naming the input that is missing, too many or does not fit.
        """
        needed = list(dict.fromkeys(own.name for own in self.inputs))
        names = list(self.arguments or needed)
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        twice = set(names[: len(args)]) & set(kwargs)
        if len(args) > len(names) or twice or set(given) - set(names) or set(needed) - set(given):
            raise InvalidValueError(
                f"called with {len(args)} positional arguments and {sorted(kwargs)}", where="inputs", legal=names
            )
        for name, constant in self.constants.items():
            own = given.get(name, constant)
            if isinstance(own, Tensor) or (own != constant and repr(own) != constant):
                raise InvalidValueError(
                    f"{'a tensor' if isinstance(own, Tensor) else repr(own)} is not what it was compiled for",
                    where=name,
                    legal=[repr(constant)],
                )
        tensors: list[Any] = [tensor for name in needed for tensor in (tensors_of(given[name]) or [given[name]])]
        if len(tensors) != len(self.inputs):
            raise InvalidValueError(f"{len(tensors)} tensors in place of {len(self.inputs)}", where="inputs")
        for own, tensor in zip(self.inputs, tensors, strict=True):
            own.check(tensor)
        batches = {
            int(tensor.shape[0]) for own, tensor in zip(self.inputs, tensors, strict=True) if own.shape[:1] == (None,)
        }
        if len(batches) > 1:
            raise InvalidValueError(f"the inputs have batches of different sizes: {sorted(batches)}", where="inputs")
        return tensors

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """Outputs, nested as the model's; of a dataclass or a named tuple a dict or a tuple is left."""
        return _rebuilt(self.output, iter(tensors))


def arguments_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the order of ``forward``; those that ``*xs`` takes are ``xs_0``, ``xs_1``."""
    signature = inspect.signature(model.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}_{index}": own for index, own in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def plain_nesting(value: Any) -> Any:
    """Nested outputs without classes of the user's own: objects with attributes become dicts of these.

    What :func:`tersor.graph.inputs.tensors_of` finds there keeps its order; what it leaves out, as the cache of keys
    and values of a language model, becomes None.

    >>> import torch
    >>> plain_nesting({"logits": torch.zeros(1), "cache": type("Cache", (), {"get_seq_length": int})()})
    {'logits': tensor([0.]), 'cache': None}
    """
    if isinstance(value, Tensor) or hasattr(value, "get_seq_length"):
        return value if isinstance(value, Tensor) else None
    if isinstance(value, Mapping):
        return {key: plain_nesting(own) for key, own in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [plain_nesting(own) for own in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, (int, float, str, bool)):
        return value
    if not tensors_of(value):
        return None
    held = {own.name: getattr(value, own.name) for own in fields(value)} if is_dataclass(value) else vars(value)
    return {key: plain_nesting(own) for key, own in held.items()}


def describe(value: Any) -> Any:
    """The nesting of a value, for JSON: ``"tensor"``, ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"dict": {...}}``.

    >>> import torch
    >>> import torch
    >>> describe({"logits": torch.zeros(1), "states": (torch.zeros(1), None)})
    {'dict': {'logits': 'tensor', 'states': {'tuple': ['tensor', {'value': None}]}}}
    """
    value = plain_nesting(value)
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, Mapping):
        return {"dict": {str(key): describe(own) for key, own in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [describe(own) for own in value]}
    return {"value": value if isinstance(value, (int, float, str, bool)) else None}


def _rebuilt(structure: Any, tensors: Iterator[Tensor]) -> Any:
    if structure == "tensor":
        return next(tensors)
    ((kind, content),) = structure.items()
    if kind == "dict":
        return {key: _rebuilt(own, tensors) for key, own in content.items()}
    if kind == "value":
        return content
    parts = [_rebuilt(own, tensors) for own in content]
    return tuple(parts) if kind == "tuple" else parts
