"""What an engine wants quantized: a model in which everything has a name, and a config list for any quantizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from tersor.deploy.engine import Wishes
from tersor.deploy.engines import engine_of
from tersor.graph.functions import functions_as_modules
from tersor.graph.operations import Add, Mean
from tersor.quantization.module_fusion import auto_fuse, fuse_modules

NON_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
"""What gives no negative value."""
RANGED = (nn.ReLU, nn.ReLU6)
"""Activations that are nothing but a limit of the range, so that a kernel has them for nothing."""
MOVING = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Identity, nn.Dropout)
"""What gives values that it was given."""

Form = Literal["non_negative", "signed", "added", "products"]


def engine_config(
    model: nn.Module, example_inputs: Any, engine: str = "auto", *, leaf_types: tuple[type[nn.Module], ...] = ()
) -> tuple[fx.GraphModule, list[dict[str, Any]]]:
    """Prepare a model for a quantizer so that an engine can run it in integers as far as that pays.

    Engines differ in where they want a value rounded: ONNX Runtime behind each convolution and on both sides of a
    residual sum, OpenVINO in front of each. Norms, softmax, GELU and products of attention stay in floating point:
    quantizing them is slower, and costs 5 to 20 dB.

    Args:
        model: any model that can be traced; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        engine: see :func:`tersor.deploy.engines`.
        leaf_types: see :func:`tersor.graph.functions_as_modules`.

    Returns:
        A copy whose batch norms are folded and whose functions are modules, and a config list for it.

    Raises:
        TraceError: the model cannot be traced.
        InvalidValueError: an unknown engine.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> net, config_list = engine_config(net, torch.zeros(1, 1, 4, 4), "onnxruntime")
    >>> [(entry["op_names"], entry["target_names"]) for entry in config_list]
    [(['0', '4'], ['weight']), (['0'], ['_input_0']), (['4'], ['_input_0'])]
    """
    wishes = engine_of(engine).wishes
    model = copy.deepcopy(model).eval()
    fuse_modules(model, auto_fuse(model, example_inputs))
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # pyright: ignore  # what is written in place has no output of its own
    traced = functions_as_modules(model, example_inputs, leaf_types=leaf_types)
    _drop_identities(traced)
    _one_module_a_call(traced)
    traced.recompile()
    return traced, _Config(traced, wishes).entries()


def _drop_identities(traced: fx.GraphModule) -> None:
    """What a folded norm leaves behind would stand between a convolution and its activation."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _one_module_a_call(traced: fx.GraphModule) -> None:
    """Where one activation serves several places, each gets its own: their outputs have ranges of their own."""
    called: set[str] = set()
    for node in traced.graph.nodes:
        if node.op != "call_module" or not isinstance(traced.get_submodule(str(node.target)), RANGED):
            continue
        name, number = str(node.target), 0
        while name in called:
            number += 1
            name = f"{node.target}_{number}"
        called.add(name)
        if number:
            traced.add_submodule(name, copy.deepcopy(traced.get_submodule(str(node.target))))
            node.target = name


@dataclass
class _Config:
    """Collects the targets of a traced model."""

    model: fx.GraphModule
    wishes: Wishes
    targets: dict[tuple[str, Form], list[str]] = field(default_factory=dict)

    def entries(self) -> list[dict[str, Any]]:
        """The config list."""
        heads: list[str] = []
        embeddings: list[str] = []
        for node, module in self._calls():
            name = str(node.target)
            if isinstance(module, (_ConvNd, nn.Linear)):
                if name not in heads:
                    heads.append(name)
                read, is_linear = node.all_input_nodes[0], isinstance(module, nn.Linear)
                product = is_linear and self.wishes.products and not self._is_non_negative(read)
                self._add(name, "_input_0", read, "products" if product else None)
                if self.wishes.linear_outputs if is_linear else self.wishes.convolution_outputs:
                    self._add_output(node)
            elif isinstance(module, nn.Embedding) and name not in embeddings:
                embeddings.append(name)
            elif isinstance(module, Add) and self.wishes.sums and self._joins_branches(node):
                self._add_operands(node)
                if self.wishes.convolution_outputs:
                    self._add_output(node)
        settings = {"weight": {"quant_dtype": "int8", "quant_scheme": "symmetric"}}
        entries: list[dict[str, Any]] = []
        if heads:
            entries.append({"op_names": heads, "target_names": ["weight"], "target_settings": settings})
        if embeddings:
            rows = {"weight": {**settings["weight"], "granularity": [1, -1]}}
            entries.append({"op_names": embeddings, "target_names": ["weight"], "target_settings": rows})
        for (target, form), names in self.targets.items():
            settings = {target: dict(getattr(self.wishes, form))}
            entries.append({"op_names": names, "target_names": [target], "target_settings": settings})
        return entries

    def _calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        for node in self.model.graph.nodes:
            if node.op == "call_module":
                yield node, self.model.get_submodule(str(node.target))

    def _add(self, name: str, target: str, value: fx.Node, form: Form | None = None) -> None:
        form = form or ("non_negative" if self._is_non_negative(value) else "signed")
        names = self.targets.setdefault((target, form), [])
        if name not in names:
            names.append(name)

    def _add_operands(self, node: fx.Node) -> None:
        """The operands of a sum. What a convolution gives to it may be an operand that the engine does not round."""
        operands, added = node.all_input_nodes, None
        fused = self._fused_operand(node) if self.wishes.fused_sums else None
        if self.wishes.added is not None and self._is_rounded(node):
            added = next((value for value in operands if self._is_convolution_for(value, node)), None)
        for position, operand in enumerate(operands):
            if operand is not fused:
                self._add(str(node.target), f"_input_{position}", operand, "added" if operand is added else None)

    def _is_convolution_for(self, value: fx.Node, reader: fx.Node) -> bool:
        return isinstance(self._module(value), _ConvNd) and set(value.users) == {reader}

    def _is_rounded(self, node: fx.Node) -> bool:
        """Whether all that reads a value rounds it."""
        for user in node.users:
            module = self._module(user)
            if isinstance(module, (*MOVING, *RANGED)):
                if not self._is_rounded(user):
                    return False
            elif not isinstance(module, (_ConvNd, nn.Linear)) and not (
                isinstance(module, Add) and self._joins_branches(user)
            ):
                return False
        return bool(node.users)

    def _add_output(self, node: fx.Node) -> None:
        """The output, behind an activation that is nothing but a limit."""
        if self._is_rounded_by_its_reader(node):
            return
        users = list(node.users)
        behind = users[0] if len(users) == 1 and isinstance(self._module(users[0]), RANGED) else node
        self._add(str(behind.target), "_output_0", behind)

    def _is_rounded_by_its_reader(self, node: fx.Node) -> bool:
        """Whether an output has one reader that rounds it, or some behind a maximum.

        An emitter puts that rounding right behind the output, where it changes nothing; a second one, whose scale a
        quantizer may learn by itself, would be in the way.
        """
        readers: set[fx.Node] = set()
        moved, found = False, [node]
        while found:
            for user in found.pop().users:
                module = self._module(user)
                if isinstance(module, (*MOVING, *RANGED)):
                    moved = moved or isinstance(module, MOVING)
                    found.append(user)
                elif isinstance(module, (_ConvNd, nn.Linear)) or (
                    isinstance(module, Add) and self.wishes.sums and self._joins_branches(user)
                ):
                    readers.add(user)
                else:
                    return False
        return len(readers) == 1 or (moved and len(readers) > 1)

    def _fused_operand(self, node: fx.Node) -> fx.Node | None:
        """The operand of a sum whose convolution can do the sum as well: nothing else reads it."""
        operands = [own for own in node.all_input_nodes if isinstance(self._module(own), _ConvNd)]
        return next((own for own in operands if len(own.users) == 1), None)

    def _joins_branches(self, node: fx.Node) -> bool:
        """Whether a sum adds what convolutions made, and not a constant or tokens."""
        operands = node.all_input_nodes
        return len(operands) == 2 and all(self._comes_from_convolution(operand) for operand in operands)

    def _comes_from_convolution(self, node: fx.Node) -> bool:
        module = self._module(node)
        if isinstance(module, (_ConvNd, Add)):
            return isinstance(module, _ConvNd) or self._joins_branches(node)
        moved = isinstance(module, (*MOVING, *RANGED))
        return moved and self._comes_from_convolution(node.all_input_nodes[0])

    def _is_non_negative(self, node: fx.Node) -> bool:
        module = self._module(node)
        if isinstance(module, NON_NEGATIVE):
            return True
        moves = isinstance(module, (*MOVING, nn.AdaptiveAvgPool2d, nn.AvgPool2d, Mean)) or (
            node.op in ("call_function", "call_method") and _name(node) in ("flatten", "reshape", "view", "permute")
        )
        return moves and self._is_non_negative(node.all_input_nodes[0])

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
