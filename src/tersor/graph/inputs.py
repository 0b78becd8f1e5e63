"""Example inputs: how a model is called, and fresh inputs of the same kind at another batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import InvalidValueError, TraceError

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call of the model.

    Args:
        example_inputs: a tensor (the only argument), a tuple or list (positional arguments) or a mapping (keyword
            arguments).

    Raises:
        InvalidValueError: None was given, or a string or a number.

    >>> args, kwargs = as_call({"ids": torch.zeros(2, 3)})
    >>> args, list(kwargs)
    ((), ['ids'])
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise InvalidValueError(
        f"example inputs of type {type(example_inputs).__name__} cannot be given to a model",
        where="example_inputs",
        legal=("a tensor", "a tuple of arguments", "a mapping of keyword arguments"),
        remedy="Give one small real batch, for example next(iter(loader))[0][:2].",
    )


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply ``function`` to every tensor in nested tuples, named tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclass-like outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        return [tensor for item in vars(value).values() for tensor in tensors_of(item)]
    return []


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by qualified name, tied ones under each name."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in modules
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def fresh_inputs(example_inputs: Any, *, batch_dim: int = 0, seed: int = 0) -> Any:
    """New inputs of the same kind as the example, at another batch size: one sample, or two if the example has one.

    Floating tensors are drawn from a normal distribution with the example's mean and standard deviation; integer and
    boolean tensors (token ids, masks) repeat the example's own rows in another order, so that they stay legal.
    Tensors whose size along ``batch_dim`` is not the first tensor's are taken as unbatched: they keep their shape.

    Args:
        example_inputs: as for :func:`as_call`.
        batch_dim: the dimension that holds the batch.
        seed: of the draws; the global random state is not used.

    >>> fresh_inputs(torch.zeros(8, 3)).shape, fresh_inputs(torch.zeros(1, 3)).shape
    (torch.Size([1, 3]), torch.Size([2, 3]))
    """
    batched = [tensor for tensor in tensors_of(example_inputs) if tensor.dim() > batch_dim]
    batch = batched[0].shape[batch_dim] if batched else 0
    generator = torch.Generator().manual_seed(seed)

    def renew(tensor: Tensor) -> Tensor:
        is_batched = tensor.dim() > batch_dim and tensor.shape[batch_dim] == batch
        shape = list(tensor.shape)
        if is_batched:
            shape[batch_dim] = 1 if batch > 1 else 2
        if tensor.is_floating_point():
            spread = tensor.float().std() if tensor.numel() > 1 else torch.tensor(0.0)
            noise = torch.randn(shape, generator=generator) * (spread.cpu() or 1.0) + tensor.float().mean().cpu()
            return noise.to(device=tensor.device, dtype=tensor.dtype)
        if not is_batched:
            return tensor
        rows = torch.randint(batch, (shape[batch_dim],), generator=generator).to(tensor.device)
        return tensor.index_select(batch_dim, rows)

    return map_tensors(example_inputs, renew)


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Eval mode without gradients and without fused attention fast paths; every module's flag is restored."""
    training = [module for module in model.modules() if module.training]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    for module in training:
        module.training = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module in training:
            module.training = True


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Call the model on example inputs; an exception of its own becomes a :class:`TraceError` that says so."""
    args, kwargs = as_call(example_inputs)
    try:
        return model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of((args, kwargs)))
        raise TraceError(
            f"{type(model).__name__} cannot run on the example inputs of shape {shapes}: "
            f"{type(error).__name__}: {error}",
            where="example_inputs",
            remedy="Give inputs on which model(...) itself runs, on the model's device and in its dtype.",
        ) from error
