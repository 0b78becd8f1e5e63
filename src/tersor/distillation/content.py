"""The content of any sample, or of a whole model, as one checksum."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import InvalidValueError


def content_of(value: Any) -> str:
    """A checksum of all that a value holds: the same for equal values, in any process, and for no others.

    Tensors and arrays count with dtype, shape and content, wherever they lie; mappings without their order; lists as
    tuples. So it names a sample, and a teacher as well: ``content_of(teacher.state_dict())``.

    Args:
        value: tensors, arrays and whatever NumPy takes for one (images), numbers, strings, bytes, None; tuples, lists,
            mappings and dataclasses of them.

    Raises:
        InvalidValueError: it holds something else.

    >>> content_of({"x": torch.ones(2), "y": 1}) == content_of({"y": 1, "x": torch.ones(2)})
    True
    >>> content_of(torch.ones(2)) == content_of(torch.ones(2, 1))
    False
    """
    return checksum(value, strict=True)


def checksum(value: Any, *, strict: bool) -> str:
    """As :func:`content_of`; where not `strict`, of what nobody knows counts the type alone."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in _pieces(value, strict):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any, strict: bool) -> Iterator[bytes | memoryview]:
    """The content as bytes; every piece says first what it is and how long, so that no two values read the same."""
    if isinstance(value, Tensor):
        tensor = value.detach().as_subclass(Tensor).cpu()
        yield f"tensor {tensor.dtype} {tuple(tensor.shape)} ".encode()
        yield _bytes_of(tensor).data
    elif hasattr(value, "__array_interface__"):  # NumPy's numbers too, some of which are also Python's
        yield from _pieces_of_array(np.asarray(value), strict)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        text = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        yield f"{type(value).__name__} {len(text)} ".encode()
        yield text
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        named = {checksum(key, strict=strict): item for key, item in value.items()}
        for name in sorted(named):
            yield name.encode()
            yield from _pieces(named[name], strict)
    elif isinstance(value, (tuple, list)):
        yield f"sequence {len(value)} ".encode()
        for item in value:
            yield from _pieces(item, strict)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"{type(value).__qualname__} ".encode()
        yield from _pieces({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, strict)
    elif strict:
        raise InvalidValueError(
            f"a {type(value).__name__} cannot be told from another one.",
            where="a sample",
            legal=("tensors", "arrays", "images", "numbers", "strings", "None", "tuples, lists, mappings, dataclasses"),
            remedy="Let the data set return these, or use by='index'.",
        )
    else:
        yield f"{type(value).__qualname__} ".encode()


def _pieces_of_array(array: np.ndarray[Any, Any], strict: bool) -> Iterable[bytes | memoryview]:
    if array.dtype.hasobject:
        return _pieces(array.tolist(), strict)
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [f"array {array.dtype.str} {array.shape} ".encode(), content.data]


def _bytes_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
