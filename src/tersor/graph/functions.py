"""Functions as modules: a model in which every operation that computes can be named as a target."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.graph.inputs import as_call, copied, evaluating, named_tensors
from tersor.graph.operations import (
    OPERATIONS,
    UNARY,
    Operand,
    causal_mask,
    masked,
    unary_module,
    zero_where_all_is_masked,
)
from tersor.graph.trace import concrete_trace
from tersor.graph.values import leaves

LARGEST = 2.0**15
"""From this magnitude on values are taken as those of a mask: half of what float16 can hold."""


def functions_as_modules(
    model: nn.Module, example_inputs: Any, *, leaf_types: tuple[type[nn.Module], ...] = ()
) -> fx.GraphModule:
    """A model that computes the same, in which calls of functions have become modules with names.

    A config list names modules. A sum of two branches, a product of attention scores or a softmax that stands in
    ``forward`` as a function has no name, so it would stay in floating point. Here it becomes ``layer1.0.add`` or
    ``blocks.3.attn.matmul_1``: the module whose code calls it, the function, and a number from the second call on.
    ``op_types`` selects them (``Add``, ``MatMul``, ``Concat``; :mod:`tersor.graph.operations` has them all), and their
    targets are ``_input_0``, ``_input_1`` and ``_output_0``. Activations, softmax, dropout and pooling become modules
    of ``torch.nn``, so they can be fused too. Views, slices and other movement of data stay functions.

    The result shares the model's modules and parameters, under the same names; training one trains the other. It
    computes the same bits and gradients. Attention is the exception: ``scaled_dot_product_attention`` is taken apart
    into a scaling of the queries, a product, a mask, a softmax and a product, which agree up to rounding.

    These stay functions, since no grid holds what they compute:

    - a sum with a mask before a softmax: one that depends on nothing learned is taken as a mask;
    - what has infinite or huge values (:data:`LARGEST`) in the example.

    So give an example in which something is masked. Also left alone are writes into memory that is read again under
    another name, attention with dropout, and functions that are in no table; ``meta["functions"]`` says how many of
    each name are left. Modules of torch.nn stay whole, ``nn.MultiheadAttention`` too: its insides are no targets.

    Args:
        model: any module; it is left as it was. Its control flow is frozen: see
            :func:`tersor.graph.concrete_trace`. ``F.dropout(x, p, self.training)`` stays dropout in training.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        leaf_types: module types to keep whole, besides those of ``torch.nn``: those that own a weight which is to be
            a target (the ``Conv1D`` of transformers), and hand-written norms, whose insides need range.

    Raises:
        TraceError: the model cannot be traced.

    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return torch.relu(x + self.fc(x))
    >>> functions_as_modules(Residual(), torch.zeros(2, 4))
    Residual(
      (fc): Linear(in_features=4, out_features=4, bias=True)
      (add): Add(add(_input_0, _input_1))
      (relu): ReLU()
    )
    """
    traced = concrete_trace(model, example_inputs, leaf_types=leaf_types)
    seen = _Run(traced)
    args, kwargs = as_call(copied(example_inputs))
    with evaluating(traced):
        seen.run(*args, *kwargs.values())
    rewriter = _Rewriter(model, traced, seen)
    for node in list(traced.graph.nodes):
        if node.op in ("call_function", "call_method") and node in seen.floating:
            rewriter.rewrite(node)
    traced.graph.lint()
    traced.recompile()
    traced.meta["functions"] = Counter(
        _name(node) for node in traced.graph.nodes if node.op in ("call_function", "call_method")
    )
    return traced


class _Run(fx.Interpreter):
    """Runs the graph on the example, and keeps what has to be known of the values.

    Attributes:
        floating: nodes whose value is a floating tensor.
        huge: those of them that hold values of a mask.
        alone: writes into memory that nobody reads afterwards but through their result.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.floating: set[fx.Node] = set()
        self.huge: set[fx.Node] = set()
        self.alone: set[fx.Node] = set()
        self._kept = {_memory(tensor) for tensor in named_tensors(traced).values()}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        if n.meta.get("impure") and n.args and isinstance(n.args[0], fx.Node) and self._is_alone(n, n.args[0]):
            self.alone.add(n)
        value = super().run_node(n)
        if n.op == "placeholder":
            self._kept.update(_memory(leaf) for leaf in leaves(value) if isinstance(leaf, Tensor))
        if isinstance(value, Tensor) and value.is_floating_point():
            self.floating.add(n)
            if value.numel() and not float(value.detach().abs().max()) < LARGEST:
                self.huge.add(n)
        return value

    def _is_alone(self, node: fx.Node, written: fx.Node) -> bool:
        """Values that are still read after this node are in ``env`` and do not end here.

        Where types are mixed, what is written takes the type of the memory, and a sum that is made anew would not.
        """
        operands = [self.env[other] for other in node.all_input_nodes if other in self.floating]
        if len({operand.dtype for operand in operands}) > 1:
            return False
        memory, ending = _memory(self.env[written]), self.user_to_last_uses.get(node, [])
        living = [value for other, value in self.env.items() if other not in ending and other.users]
        others = {_memory(leaf) for leaf in leaves(living) if isinstance(leaf, Tensor)}
        return memory not in self._kept | others


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Rewriter:
    """Puts modules in the place of function calls.

    Args:
        model: whose names are taken.
        traced: the graph to be changed.
        seen: what its values are.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule, seen: _Run) -> None:
        self._model, self._traced, self._graph, self._seen = model, traced, traced.graph, seen
        self._own = set(model.modules())
        self._learned = _learned(traced)

    def rewrite(self, node: fx.Node) -> None:
        """Replace a call, if a module can take its place exactly."""
        name, keywords = _name(node), dict(node.kwargs)
        if node.meta.get("impure"):
            if node not in self._seen.alone or not (keywords.get("inplace") or name != name.rstrip("_")):
                return
            name = name if name.startswith("__") else name.rstrip("_")
        if node in self._seen.huge or self._is_masking(node):
            return
        with self._graph.inserting_before(node):
            if name == "scaled_dot_product_attention":
                made = self._attention(node, *node.args, **keywords)  # pyright: ignore
            elif name in UNARY:
                made = self._unary(node, name, node.args, keywords)
            elif name in OPERATIONS:
                function = node.target if callable(node.target) else getattr(Tensor, name)
                made = self._operation(node, name, function, node.args, keywords)
            else:
                return
        if made is not None:
            made.meta = {key: value for key, value in node.meta.items() if key != "impure"}
            if node in self._learned:
                self._learned.add(made)
            node.replace_all_uses_with(made)
            self._graph.erase_node(node)

    def _is_masking(self, node: fx.Node) -> bool:
        """Whether it adds, before a softmax, what depends on nothing learned."""
        if _name(node).strip("_") not in ("add", "sub") or not node.users or not all(map(self._is_softmax, node.users)):
            return False
        return [operand in self._learned for operand in node.all_input_nodes] in ([True, False], [False, True])

    def _is_softmax(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._traced.get_submodule(str(node.target)), nn.Softmax)
        return _name(node) == "softmax"

    def _unary(self, node: fx.Node, name: str, args: Sequence[Any], keywords: dict[str, Any]) -> fx.Node | None:
        x, *arguments = args if args else (keywords.pop("input"),)
        if any(isinstance(value, fx.Node) for value in leaves((arguments, keywords))):
            return None
        module = unary_module(name, arguments, keywords)
        if module is None:
            return None
        dtype = keywords.get("dtype") or next((value for value in arguments if isinstance(value, torch.dtype)), None)
        x = x if dtype is None else self._graph.call_method("to", (x, dtype))
        return self._call(node, name, module, [x])

    def _operation(self, node: fx.Node, name: str, function: Any, args: Any, keywords: Any) -> fx.Node | None:
        """The call of an operation: floating tensors by position, other nodes by name."""
        floating: list[fx.Node] = []
        others: dict[str, fx.Node] = {}

        def template(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [template(item) for item in value] if isinstance(value, list) else tuple(map(template, value))
            if not isinstance(value, fx.Node):
                return value
            if value in self._seen.floating:
                floating.append(value)
                return Operand(len(floating) - 1)
            others[f"other_{len(others)}"] = value
            return Operand(f"other_{len(others) - 1}")

        kind = OPERATIONS[name]
        module = kind(function, template(tuple(args)), {key: template(value) for key, value in keywords.items()})
        own_name = kind.__name__.removeprefix("Functional").lower()
        return self._call(node, own_name, module, floating, others) if floating else None

    def _attention(
        self,
        node: fx.Node,
        query: fx.Node,
        key: fx.Node,
        value: fx.Node,
        attn_mask: fx.Node | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | fx.Node | None = None,
        enable_gqa: bool = False,
    ) -> fx.Node | None:
        """Attention, step by step: softmax(scale * Q K^T + mask) V."""
        if dropout_p != 0:
            return None
        shape = query.meta["shape"]
        if enable_gqa:
            groups = shape[-3] // key.meta["shape"][-3], -3
            key, value = (self._graph.call_method("repeat_interleave", (x, *groups)) for x in (key, value))
        scaled = self._binary(node, "mul", query, shape[-1] ** -0.5 if scale is None else scale)
        scores = self._binary(node, "matmul", scaled, self._floating("transpose", key, -2, -1))
        mask = self._graph.call_function(causal_mask, (scores,)) if is_causal else attn_mask
        if mask in self._learned and mask in self._seen.floating - self._seen.huge:
            scores, mask = self._binary(node, "add", scores, mask), None
        if mask is None:
            weights = self._call(node, "softmax", nn.Softmax(-1), [scores])
        else:
            scores = self._graph.call_function(masked, (scores, mask))
            weights = self._call(node, "softmax", nn.Softmax(-1), [scores])
            weights = self._graph.call_function(zero_where_all_is_masked, (weights, mask))
            self._seen.floating.add(weights)
        return self._binary(node, "matmul", weights, value)

    def _binary(self, node: fx.Node, name: str, *operands: Any) -> Any:
        return self._operation(node, name, getattr(torch, name), operands, {})

    def _floating(self, method: str, *args: Any) -> fx.Node:
        made = self._graph.call_method(method, args)
        self._seen.floating.add(made)
        return made

    def _call(self, node: fx.Node, name: str, module: nn.Module, operands: Any, others: Any = None) -> fx.Node:
        """Add a module where the call stands, and call it."""
        module.train(self._traced.training)
        target = self._free_name(node.meta["module"], name)
        self._traced.add_submodule(target, module)
        made = self._graph.call_module(target, tuple(operands), others)
        made.meta["module"] = node.meta["module"]
        self._seen.floating.add(made)
        return made

    def _free_name(self, scope: str, name: str) -> str:
        """A name in the module whose code calls the function, or above it where that is one of the user's objects."""
        place: nn.Module | None = self._traced
        path: list[str] = []
        for atom in scope.split(".") if scope else ():
            place = getattr(place, atom, None)
            if place in self._own:
                place = self._traced.get_submodule(".".join(path))
                break
            path.append(atom)
        takers = place, self._model.get_submodule(".".join(path))
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        free = next(name for name in names if not any(hasattr(taker, name) for taker in takers))
        return ".".join([*path, free])


def _name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _learned(traced: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value depends on a parameter."""
    parameters = {name for name, _ in traced.named_parameters(remove_duplicate=False)}
    learned: set[fx.Node] = set()
    for node in traced.graph.nodes:
        owns = node.op == "call_module" and any(True for _ in traced.get_submodule(node.target).parameters())
        if owns or node.target in parameters or not learned.isdisjoint(node.all_input_nodes):
            learned.add(node)
    return learned
