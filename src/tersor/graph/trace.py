"""Trace a model by running it: real values, every call of torch's API, sizes that remember where they came from."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn

from tersor.errors import TraceError
from tersor.graph.inputs import as_call, copied, evaluating, named_tensors, refuse_lazy, run, tensors_of
from tersor.graph.nodes import Nodes, place
from tersor.graph.recorder import Below, Call, Recorder
from tersor.graph.sizes import Traced, settled
from tersor.graph.values import is_plain, leaves

OPEN = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
LEAVES = tuple(
    kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module) and kind not in OPEN
)
"""Module types of torch.nn that stay whole: all but its containers."""


def concrete_trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    leaf_types: tuple[type[nn.Module], ...] = (),
    eliminate_dead_code: bool = False,
) -> fx.GraphModule:
    """Trace a model by running it once on real values.

    Control flow on values and shapes follows the example. Sizes that the code takes from tensors stay free, so the
    graph runs at another batch size; sizes that stand in the code as numbers stay numbers. The graph's modules and
    parameters are the model's own objects, under the same names. Writes stay writes: ``x[:, 0] = 0`` is recorded as it
    is, so that it shows through every view of ``x``, as it does in the model.

    What the code decides on (a comparison of sizes, a tensor as a condition, ``int()`` of a size) is frozen as the
    example has it, in eval mode, and listed in ``meta["decisions"]``. The node decided on stays in the graph, with
    ``meta["decided"]``: the number or the answer that the code saw, or None for a tensor. So a graph whose sizes were
    changed is still the model's where these nodes have the same values.

    Frozen without notice, since Python shows it to nobody: inputs other than tensors, a loop over ``range(size)`` or
    over the rows of a tensor, and what :class:`~tersor.graph.sizes.TracedInt` lists.

    Outputs come in the containers that the model returns. Objects that hold state, such as a key-value cache, are made
    again with the tensors of the run; one that is an input is read, and not written to. Scripted functions, C++ and
    ``torch.vmap`` are recorded as the ATen operators that they call, functions under ``torch.compile`` as they are
    written. Autocast is entered and left as in the model. Gradients do not flow through what ``torch.no_grad``
    computed; a custom ``autograd.Function`` becomes the operators of its forward.

    Every node carries ``meta["module"]``, the name of the innermost module whose forward recorded it ("" for the
    model); one that makes a tensor carries ``meta["shape"]``, one that writes into a tensor ``meta["impure"]``.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        leaf_types: module types to keep whole, besides those of ``torch.nn``.
        eliminate_dead_code: leave out what no output depends on; what has an effect stays.

    Raises:
        TraceError: the model does not run on these inputs, or does what cannot be recorded; it names the module.

    >>> traced = concrete_trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(3, 4))
    >>> [node.target for node in traced.graph.nodes if node.op == "call_module"]
    ['0', '1']
    """
    refuse_lazy(model)
    nodes = Nodes(model)
    recorder = Recorder(nodes, draws=eliminate_dead_code)
    modules = _Modules(model, leaf_types, recorder)
    args, kwargs = as_call(_own(example_inputs))
    for name, value in _named_arguments(model, args, kwargs):
        nodes.remember(value, nodes.add("placeholder", name))
    for value in (*leaves((args, kwargs)), *(value for module in model.modules() for value in vars(module).values())):
        if isinstance(value, torch.Generator):
            nodes.constant(value)  # one that outlives the call goes on from its own state
    try:
        with ExitStack() as stack:
            for context in (evaluating(model), _gradients_watched(model), _compiled_functions_run_as_they_are()):
                stack.enter_context(context)
            for context in (modules.watched(), recorder, Below(recorder)):
                stack.enter_context(context)
            nodes.is_open = True
            result = model(*args, **kwargs)
            with recorder.aside():
                nodes.finish(result)
    except TraceError:
        raise
    except Exception as error:
        raise _failed(model, example_inputs, error, modules.failed_in(error)) from error
    finally:
        nodes.is_open = False
        _settle(model)
    nodes.sweep(everything=eliminate_dead_code)
    return _graph_module(model, nodes)


def _own(example_inputs: Any) -> Any:
    """A copy that the model may write into, each tensor a new one, in objects too."""
    inputs = copied(example_inputs)
    try:
        return copy.deepcopy(inputs, {id(tensor): tensor.clone() for tensor in tensors_of(inputs)})
    except (TypeError, RuntimeError):  # an object that cannot be copied is shared
        return inputs


def _named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    names += [f"input_{index}" for index in range(len(names), len(args))]
    yield from zip(names, args, strict=False)
    yield from kwargs.items()


@contextmanager
def _gradients_watched(model: nn.Module) -> Iterator[None]:
    """Gradient mode is on, so that ``no_grad`` can be told, and no parameter asks for one, so that none is prepared."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
    for parameter in asking:
        parameter.requires_grad = False
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad = True


def _settle(model: nn.Module) -> None:
    """Sizes that ``forward`` has kept in attributes become ordinary ones."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, (Traced, tuple, list)) and any(isinstance(leaf, Traced) for leaf in leaves(value)):
                vars(module)[name] = settled(value)


def _compiled_functions_run_as_they_are() -> Any:
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Modules:
    """Hooks that tell the recorder which module runs, and that make leaf modules one node each."""

    def __init__(self, model: nn.Module, leaf_types: tuple[type[nn.Module], ...], recorder: Recorder) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._leaf_types = leaf_types
        self._recorder = recorder
        self._stack: list[tuple[Call | None, BaseException | None]] = []
        self._failure: tuple[BaseException | None, str] = (None, "")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The hooks are there; a leaf's own hooks run inside it."""
        with ExitStack() as stack:
            for module in self._names:
                if not isinstance(module, torch.jit.ScriptModule):
                    before = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
                    after = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def failed_in(self, error: BaseException) -> str:
        """The innermost module that the error left."""
        return self._failure[1] if self._failure[0] is error else ""

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name, call, nodes = self._names[module], None, self._recorder.nodes
        try:
            if name and self._recorder.is_recording() and self._is_leaf(module, args, kwargs):
                call = self._recorder.begin(args, kwargs)
        finally:
            self._stack.append((call, sys.exc_info()[1]))
            nodes.scopes.append(name)

    def _is_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Not where other tensors take the place of its own, nor where a module of torch.nn is given an object."""
        is_leaf = isinstance(module, self._leaf_types) or (isinstance(module, LEAVES) and is_plain((args, kwargs)))
        return is_leaf and self._recorder.nodes.owns(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, handled = self._stack.pop()
        name, error = self._recorder.nodes.scopes.pop(), sys.exc_info()[1]
        if error is not handled:
            self._failure = self._failure if self._failure[0] is error else (error, name)
            self._recorder.drop(call)
        elif call is not None:
            self._recorder.end(call, name, output, is_pure=isinstance(module, LEAVES))


def _failed(model: nn.Module, example_inputs: Any, error: Exception, where: str) -> TraceError:
    """The error to raise: that the model itself does not run, or else that it cannot be traced."""
    try:
        with evaluating(model):
            run(model, _own(example_inputs))
    except TraceError as own:
        return TraceError(own.what, where=f"{own.where}, in {place(where)}", remedy=own.remedy)
    kind = type(model.get_submodule(where)).__name__
    remedy = (
        f"Keep the module whole: leaf_types=({kind},)." if where else "Put what it does into a module of leaf_types."
    )
    return TraceError(f"tracing failed: {type(error).__name__}: {error}", where=place(where), remedy=remedy)


def _graph_module(model: nn.Module, nodes: Nodes) -> fx.GraphModule:
    """The graph with the model's own modules and tensors; the rest of its tree is plain modules of the same names."""
    modules, tensors = dict(model.named_modules()), named_tensors(model)
    unsaved = {module: set(module._non_persistent_buffers_set) for module in model.modules()}
    root = {
        node.target: nodes.constants.get(node.target, modules.get(node.target, tensors.get(node.target)))
        for node in nodes.graph.nodes
        if node.op in ("call_module", "get_attr")
    }
    traced = fx.GraphModule(root, nodes.graph, type(model).__name__)
    for name, module in traced.named_modules():
        origin = module if module in unsaved else modules.get(name, model)
        module.training = origin.training
        module._non_persistent_buffers_set = unsaved[origin] & module._buffers.keys()
    traced.meta["decisions"] = tuple(dict.fromkeys(nodes.decisions))
    return traced
