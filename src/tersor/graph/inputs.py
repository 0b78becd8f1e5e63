"""Example inputs: how a model is called, and fresh inputs of the same kind at another batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tersor.errors import InvalidValueError, TersorError, TraceError

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
        mapped = copy.copy(value)  # a subclass stays one
        mapped.update({key: map_tensors(item, function) for key, item in value.items()})
        return mapped
    return value


def tensors_of(value: Any, _seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and objects with attributes, in order.

    The tensors of a key-value cache are not among them: it is a model's state, not its result.
    """
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "get_seq_length"):
        return []
    if isinstance(value, Mapping):
        items: Any = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and id(value) not in _seen:
        items, _seen = vars(value).values(), _seen | {id(value)}
    else:
        return []
    return [tensor for item in items for tensor in tensors_of(item, _seen)]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by qualified name; tied ones under the name in each module that has them."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model whose parameters have no shape yet.

    Raises:
        TraceError: naming the first one.
    """
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise TraceError("a lazy parameter has no shape yet", where=name, remedy="Run the model once before.")


def batch_size(example_inputs: Any, batch_dim: int = 0) -> int:
    """The size of the first tensor along the batch dimension; 0 where no tensor has one."""
    return next((t.shape[batch_dim] for t in tensors_of(example_inputs) if t.dim() > batch_dim), 0)


def first_samples(example_inputs: Any, samples: int) -> Any:
    """The first samples of a batch; tensors whose first size is not the first tensor's are left whole.

    >>> first_samples(torch.zeros(8, 3), 2).shape
    torch.Size([2, 3])
    """
    batch = batch_size(example_inputs)
    return map_tensors(example_inputs, lambda t: t[:samples] if t.dim() and t.shape[0] == batch else t)


def fresh_inputs(example_inputs: Any, samples: int, *, batch_dim: int = 0, seed: int = 0) -> Any:
    """New inputs of the same kind as the example, at another batch size.

    Floating tensors are drawn from a normal distribution with the example's mean and standard deviation; integer and
    boolean tensors (token ids, masks) repeat the example's own rows in another order, so that they stay legal.
    Tensors whose size along ``batch_dim`` is not the first tensor's are taken as unbatched: they keep their shape.

    Args:
        example_inputs: as for :func:`as_call`.
        samples: the new batch size.
        batch_dim: the dimension that holds the batch.
        seed: of the draws; the global random state is not used.

    >>> fresh_inputs(torch.zeros(8, 3), 5).shape
    torch.Size([5, 3])
    """
    batch = batch_size(example_inputs, batch_dim)
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def renew(tensor: Tensor) -> Tensor:
        is_batched = tensor.dim() > batch_dim and tensor.shape[batch_dim] == batch
        shape = list(tensor.shape)
        if is_batched:
            shape[batch_dim] = samples
        if tensor.is_floating_point():
            spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
            noise = torch.randn(shape, generator=generator, device="cpu") * (spread or 1.0) + float(
                tensor.float().mean()
            )
            return noise.to(device=tensor.device, dtype=tensor.dtype)
        if not is_batched:
            return tensor
        rows = torch.randint(batch, (samples,), generator=generator, device="cpu").to(tensor.device)
        return tensor.index_select(batch_dim, rows)

    return map_tensors(example_inputs, renew)


def copied(example_inputs: Any) -> Any:
    """Example inputs in new tensors and containers, for a model that may write into them."""
    return map_tensors(example_inputs, torch.clone)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients and without fused attention fast paths; nothing of it remains.

    Train/eval flags, buffers that ``forward`` writes, caches and the random state are put back. Runs under it draw the
    same random numbers.
    """
    caches = [(cache, dict(cache)) for cache in caches_of(model)]
    training = [module for module in model.modules() if module.training]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    written = [
        (registry, name, tensor, tensor._version, tensor.detach().clone())
        for module in model.modules()
        for registry in _written_by_forward(module)
        for name, tensor in registry.items()
        if tensor is not None and not tensor.is_meta and not tensor.is_inference()
    ]
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[index] for index in _cuda_devices(model)]
    states = [generator.get_state() for generator in generators]
    for module in training:
        module.training = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for cache, _ in caches:
            cache.clear()
        for generator in generators:
            generator.manual_seed(0)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for cache, content in caches:
            cache.clear()
            cache.update(content)
        for module in training:
            module.training = True
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for registry, name, tensor, version, value in written:
            registry[name] = tensor
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


def caches_of(model: nn.Module) -> list[dict[Any, Any]]:
    """Dictionaries in which modules keep what ``forward`` computed, by the name of the attribute (``bias_cache``)."""
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if "cache" in name and type(value) is dict
    ]


def _written_by_forward(module: nn.Module) -> list[dict[str, Any]]:
    """Where a module keeps what its own ``forward`` may write: buffers, and the table of a renormalizing embedding."""
    renormalizes = getattr(module, "max_norm", None) is not None
    return [module._buffers, module._parameters] if renormalizes else [module._buffers]


def _cuda_devices(model: nn.Module) -> set[int]:
    """The GPUs that hold a parameter or buffer; no other is touched."""
    return {tensor.device.index for tensor in named_tensors(model).values() if tensor.device.type == "cuda"}


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Call the model on example inputs; an exception of its own becomes a :class:`TraceError` that says so."""
    args, kwargs = as_call(example_inputs)
    try:
        return model(*args, **kwargs)
    except TersorError:
        raise  # by a hook of ours, and it says what is wrong
    except Exception as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of((args, kwargs)))
        raise TraceError(
            f"{type(model).__name__} cannot run on the example inputs of shape {shapes}: "
            f"{type(error).__name__}: {error}",
            where="example_inputs",
            remedy="Give inputs on which model(...) itself runs, on the model's device and in its dtype.",
        ) from error
