r"""SmoothQuant on a graph: outliers move from inputs of linear layers into their weights, wherever they come from.

Channel j of an input is divided by :math:`s_j = \max|X_j|^{\alpha} / \max|W_j|^{1-\alpha}`, and column j of all weights
that read it is multiplied by it. A norm that only these layers read takes the division up. Behind everything else (a
norm whose output is added to something too, as in BERT; GELU; attention) it becomes a multiplication of its own, which
costs one pass over the values; :class:`tersor.quantization.SmoothQuantizer` adds none, and leaves such layers alone.

Paper: Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models (ICML 2023).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from tersor.graph.inputs import evaluating
from tersor.quantization.smooth import smoothing
from tersor.training.batches import to_device
from tersor.training.loops import device_of
from tersor.training.stages import inputs_of

ALPHA = 0.95
"""Nearly all goes into the weights, which have a scale for each output channel, where the input has one alone."""

NORMS = (nn.LayerNorm, nn.RMSNorm)


@final
class Scaled(nn.Module):
    """Multiplies each channel, which is the last dimension, by a number.

    Args:
        factors: shape (channels,).

    >>> Scaled(torch.tensor([1.0, 0.5]))(torch.ones(1, 2))
    tensor([[1.0000, 0.5000]])
    """

    factors: Tensor

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        """The product, same shape."""
        return x * self.factors


def smooth_inputs(
    network: fx.GraphModule, names: Collection[str], batches: Iterable[Any], alpha: float = ALPHA
) -> list[str]:
    """Smooth the inputs of linear layers; outputs stay what they were, apart from the last digits.

    Args:
        network: its weights, norms and graph are changed.
        names: of the linear layers whose inputs will be quantized; others, and layers that are called twice, are left.
        batches: calibration data.
        alpha: how much goes into the weights, from 0 to 1.

    Returns:
        The names of the layers whose inputs are smoothed.

    >>> net = fx.symbolic_trace(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1)))
    >>> net(torch.tensor([[3.0, 1.0]])).shape, smooth_inputs(net, ["1"], [torch.tensor([[3.0, 1.0]])])
    (torch.Size([1, 1]), ['1'])
    >>> [node.target for node in net.graph.nodes if node.op == "call_module"]
    ['0', '1']
    """
    groups = _groups(network, names)
    largest = _largest_inputs(network, groups, batches)
    smoothed: list[str] = []
    with torch.no_grad():
        for source, readers in groups.items():
            layers: list[nn.Linear] = [network.get_submodule(name) for name in readers]  # pyright: ignore
            activations = largest.get(readers[0])
            if activations is None:
                continue
            columns = torch.stack([layer.weight.abs().amax(0).float() for layer in layers]).amax(0)
            factors = smoothing(activations, columns, alpha).to(layers[0].weight.dtype)
            for layer in layers:
                layer.weight.mul_(factors)
            _divide(network, source, readers, factors)
            smoothed += readers
    network.graph.lint()
    network.recompile()
    return smoothed


def _groups(network: fx.GraphModule, names: Collection[str]) -> dict[fx.Node, list[str]]:
    """The layers by the value that they read, in the order in which they run."""
    called = Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    owners = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    groups: dict[fx.Node, list[str]] = {}
    for node in network.graph.nodes:
        if node.op != "call_module" or node.target not in names or called[str(node.target)] > 1:
            continue
        layer = network.get_submodule(str(node.target))
        source = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(layer, nn.Linear) and isinstance(source, fx.Node) and owners[id(layer.weight)] == 1:
            groups.setdefault(source, []).append(str(node.target))
    return groups


def _largest_inputs(
    network: fx.GraphModule, groups: dict[fx.Node, list[str]], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Of each group's first layer, the largest magnitude of each channel."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value: Tensor = args[0] if args else kwargs["input"]
            found = value.detach().abs().flatten(0, -2).amax(0).float()
            seen[name] = torch.maximum(seen[name], found) if name in seen else found

        return see

    firsts = [readers[0] for readers in groups.values()]
    handles = [network.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in firsts]
    try:
        with evaluating(network):
            for batch in batches:
                args, kwargs = inputs_of(to_device(batch, device_of(network)))
                network(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _divide(network: fx.GraphModule, source: fx.Node, readers: Sequence[str], factors: Tensor) -> None:
    """Divide a value by the factors, for these readers."""
    if _takes_up(network, source, readers):
        norm: Any = network.get_submodule(str(source.target))
        for parameter in (norm.weight, getattr(norm, "bias", None)):
            if parameter is not None:
                parameter.div_(factors)
        return
    name = f"{readers[0].replace('.', '_')}_smoothed"
    network.add_submodule(name, Scaled(1 / factors))
    with network.graph.inserting_after(source):
        scaled = network.graph.call_module(name, (source,))
    for user in [*source.users]:
        if user.op == "call_module" and user.target in readers:
            user.replace_input_with(source, scaled)


def _takes_up(network: fx.GraphModule, source: fx.Node, readers: Sequence[str]) -> bool:
    """Whether a value is what a norm gives to these readers and to nothing else."""
    if source.op != "call_module" or {str(user.target) for user in source.users} - {*readers}:
        return False
    norm: Any = network.get_submodule(str(source.target))
    uses = sum(node.target == source.target for node in network.graph.nodes)
    return isinstance(norm, NORMS) and norm.weight is not None and norm.weight.dim() == 1 and uses == 1
