"""What a test may not leave behind: hooks, parametrizations, changed settings of torch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

SETTINGS: dict[str, Callable[[], object]] = {
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "number of threads": torch.get_num_threads,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "attention fast path": torch.backends.mha.get_fastpath_enabled,
    "torch function modes": torch._C._len_torch_function_stack,
    "torch dispatch modes": torch._C._len_torch_dispatch_stack,
    "global forward hooks": lambda: len(torch_module._global_forward_hooks),
    "global forward pre-hooks": lambda: len(torch_module._global_forward_pre_hooks),
}


@contextmanager
def no_leaks() -> Iterator[None]:
    """Raise an AssertionError if the block leaves anything behind that was not there before.

    Hooks and parametrizations are noted as they are made. So they count wherever their module lives, deep in a model or
    already out of reach, and a block that makes none costs nothing.
    """
    __tracebackhide__ = True  # a reader of the failure wants to know what was left, not how it was found
    hooks: list[tuple[dict[int, object], int]] = []
    parametrized: list[tuple[nn.Module, str]] = []
    inject_property = parametrize._inject_property

    def noting(register: str) -> AbstractContextManager[object]:
        original = getattr(nn.Module, register)

        def noted(module: nn.Module, *args: object, **kwargs: object) -> object:
            handle = original(module, *args, **kwargs)
            hooks.append((handle.hooks_dict_ref(), handle.id))
            return handle

        return mock.patch.object(nn.Module, register, noted)

    def noted_property(module: nn.Module, name: str) -> None:
        inject_property(module, name)
        parametrized.append((module, name))

    before = {name: get() for name, get in SETTINGS.items()}
    with (
        noting("register_forward_hook"),
        noting("register_forward_pre_hook"),
        mock.patch.object(parametrize, "_inject_property", noted_property),
    ):
        yield
    left = [f"the hook {registry[key]}" for registry, key in hooks if key in registry]
    left += [
        f"a parametrization of {name!r} on a {type(module).__name__}"
        for module, name in parametrized
        if parametrize.is_parametrized(module, name)
    ]
    left += [f"{name}: {before[name]} -> {get()}" for name, get in SETTINGS.items() if get() != before[name]]
    assert not left, "left behind: " + "; ".join(left)
