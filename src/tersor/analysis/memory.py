"""Size of the saved weights, and the most memory that one forward pass needs at once."""

from __future__ import annotations

import json
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.graph.inputs import as_call, evaluating, run, tensors_of

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


def file_size(model: nn.Module) -> int:
    """Bytes of the model's ``state_dict`` as a safetensors file, computed without writing it.

    Tied tensors are stored once. The file is 8 bytes, a JSON header padded to a multiple of 8, and the values.

    >>> from safetensors.torch import save
    >>> model = nn.Linear(3, 4)
    >>> file_size(model) == len(save(model.state_dict()))
    True
    """
    # keep_vars, so that a parameter with two names is one object.
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    names = {value: name for name, value in reversed(state.items())}
    header: dict[str, Any] = {}
    offset = 0
    for value, name in sorted(names.items(), key=lambda item: (-item[0].element_size(), item[1])):
        end = offset + value.numel() * value.element_size()
        dtype = _SAFETENSORS_NAMES.get(value.dtype, str(value.dtype))
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def peak_memory(model: nn.Module, example_inputs: Any) -> int:
    """Bytes of the weights and buffers, plus the most that tensors made during one forward pass hold at once.

    On a GPU that is what the allocator reports, the kernels' workspaces included; elsewhere every operator's outputs
    are followed until their storage is freed, which leaves out what a kernel allocates for itself. The inputs are not
    counted: they are the caller's.

    Args:
        model: it runs once in eval mode without gradients.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        TraceError: the model cannot run on the inputs.

    >>> model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    >>> peak_memory(model, torch.zeros(1, 10)) == 4 * (10 * 20 + 20 * 5) + 4 * (20 + 20)
    True
    """
    state = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    device = next((tensor.device for tensor in tensors_of(as_call(example_inputs))), torch.device("cpu"))
    with evaluating(model):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run(model, example_inputs)
            return state + torch.cuda.max_memory_allocated(device) - before
        with _LiveStorages() as live:
            run(model, example_inputs)
        return state + live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._follow((args, kwargs), made_here=False)  # what is read and nobody made was there before
        outputs = func(*args, **kwargs)
        self._follow(outputs, made_here=True)
        self.peak = max(self.peak, self._live)
        return outputs

    def _follow(self, value: Any, *, made_here: bool) -> None:
        for tensor in tensors_of(value):
            if tensor.layout != torch.strided:
                continue  # a sparse tensor has no storage of its own
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes() if made_here else 0

            def free(_: object, key: int = key, size: int = size) -> None:
                del self._known[key]
                self._live -= size

            self._known[key] = weakref.ref(storage, free)
            self._live += size
