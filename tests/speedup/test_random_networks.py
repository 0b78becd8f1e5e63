"""Random networks: what the masked model computes is what the small one computes, however its layers are joined."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.graph import Coupling, groups
from tersor.graph.inputs import tensors_of
from tersor.speedup import ModelSpeedup
from tersor.speedup.verify import relative_error
from tersor.wrapping import ModelWrappers
from tests.networks import randomize

SEEDS = range(60)
STEPS = 10
LARGEST = 4000
"""Elements of an intermediate value; a step that makes more is drawn again."""

Draw = random.Random


class Apply(nn.Module):
    """A function of one or two values as a layer; or of one value and a bare parameter of the given shape."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.own = nn.Parameter(torch.zeros(shape)) if shape else None

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values) if self.own is None else self.function(*values, self.own)


class Gate(nn.Module):
    """Squeeze and excitation, whose sigmoid is a half where its input is removed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Recurrent(nn.GRU):
    """A recurrent layer without its last state."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def width(draw: Draw) -> int:
    return draw.choice((1, 2, 4, 6))


IMAGE_LAYERS = (
    lambda c, draw: nn.Conv2d(c, width(draw), 3, padding=draw.choice((0, 1)), bias=draw.random() < 0.7),
    lambda c, draw: nn.Conv2d(c, width(draw), 1, stride=2),
    lambda c, draw: nn.Conv2d(c, width(draw), 3, padding="same", padding_mode="reflect"),
    lambda c, draw: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
    lambda c, draw: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=1 if c % 2 else 2),
    lambda c, draw: nn.ConvTranspose2d(c, width(draw), 2, stride=draw.choice((1, 2))),
    lambda c, draw: nn.ConvTranspose2d(c, 2 * c, 2, groups=c),
    lambda c, draw: nn.BatchNorm2d(c, affine=draw.random() < 0.8),
    lambda c, draw: nn.InstanceNorm2d(c, affine=True),
    lambda c, draw: nn.GroupNorm(1, c),
    lambda c, draw: nn.PReLU(draw.choice((1, c))),
    lambda c, draw: Gate(c),
    lambda c, draw: Apply(torch.add, 1, c, 1, 1),
    lambda c, draw: Apply(lambda x, own: x * torch.sigmoid(own), c, 1, 1),
    lambda c, draw: Apply(lambda x, own: torch.einsum("bchw,cd->bdhw", x, own), c, 4),
)
TOKEN_LAYERS = (
    lambda c, draw: nn.Linear(c, width(draw), bias=draw.random() < 0.7),
    lambda c, draw: nn.LayerNorm(c),
    lambda c, draw: Recurrent(c, 4, batch_first=True),
    lambda c, draw: Apply(torch.add, c),
    lambda c, draw: Apply(torch.matmul, c, 3),
)
VECTOR_LAYERS = (
    lambda c, draw: nn.Linear(c, width(draw), bias=draw.random() < 0.7),
    lambda c, draw: nn.BatchNorm1d(c),
    lambda c, draw: nn.PReLU(c),
    lambda c, draw: Apply(lambda x, own: torch.lerp(x, own, 0.3), 1, c),
    lambda c, draw: Apply(torch.matmul, c, 4),
)
LAYERS = {2: VECTOR_LAYERS, 3: TOKEN_LAYERS, 4: IMAGE_LAYERS}
"""Layers with parameters, by their input's number of dimensions; made from the number of channels."""

FUNCTIONS = {
    2: (
        lambda x: x[:, None].expand(-1, 3, -1),
        lambda x: x[:, :, None, None].expand(-1, -1, 3, 3),
        lambda x: x.t().unsqueeze(1).squeeze(1).t(),
        lambda x: F.pad(x, (1, 0), value=2.0),
        lambda x: x * x.argmax(1, keepdim=True),
        lambda x: x.softmax(1),
        lambda x: x[:, :-1],
    ),
    3: (
        lambda x: x.permute(0, 2, 1),
        lambda x: x.mean(1),
        lambda x: x.cumsum(1),
        lambda x: x.amax(1, keepdim=True),
        lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
        lambda x: x.softmax(-1) @ x.transpose(1, 2) @ x,
        lambda x: F.scaled_dot_product_attention(x, x, x),
    ),
    4: (
        lambda x: F.max_pool2d(x, 2, 1),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5),
        lambda x: F.normalize(x, dim=(2, 3)),
        lambda x: F.normalize(x, dim=1),
        lambda x: x / (1 + x.std((2, 3), keepdim=True)),
        lambda x: x - x.amax(1, keepdim=True),
        lambda x: x.softmax(3),
        lambda x: x.cumsum(1),
        lambda x: x.sort(1).values,
        lambda x: x.roll(1, 3),
        lambda x: x.roll(1, 1),
        lambda x: x.flip(1),
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x.repeat_interleave(2, 1)[:, 1:],
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x.cos()], 1),
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, 1:],
        lambda x: x.mean((2, 3)),
        lambda x: x.flatten(1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.flatten(2).transpose(1, 2),
    ),
}
"""Functions without parameters, by their input's number of dimensions."""

ANYWHERE = (
    *(torch.relu, torch.sigmoid, torch.cos, torch.tanh, torch.relu_, F.hardswish, F.softplus, F.gelu, F.elu),
    lambda x: x.clamp(0.1, 1.0),
    lambda x: 1 - x,
    lambda x: (x * x + 1).rsqrt(),
    lambda x: x.masked_fill(x < 0, -0.7),
    lambda x: torch.where(x > 0, x, 0.3),
    lambda x: x.mul_(0.5),
    lambda x: x * torch.sigmoid(x.sum()),
    lambda x: torch.cat([x, x])[::2],
)
PAIRS = (
    *(torch.add, torch.mul, torch.maximum, torch.atan2),
    lambda x, y: x * torch.sigmoid(y),
    lambda x, y: x.add_(y),
    lambda x, y: torch.where(y > 0, x, 0.5 * y),
    lambda x, y: torch.cat([x, y], 1),
    lambda x, y: torch.cat([x, y], -1),
    lambda x, y: torch.stack([x, y]).sum(0),
)


class Network(nn.Module):
    """Steps that each read one or two earlier values, and heads that read some of them."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.layers, self.heads = nn.ModuleList(), nn.ModuleList()
        self.places: list[tuple[int, ...]] = []
        self.ends: tuple[int, ...] = ()

    def add(self, layer: nn.Module, *places: int) -> None:
        self.layers.append(randomize(layer, seed=len(self.layers)).double())
        self.places.append(places)

    def close(self, *ends: int) -> "Network":
        self.ends = ends
        values = self.values(self.example)
        for end in ends:
            channels = _channels(values[end])
            head = nn.Conv2d(channels, 2, 1) if values[end].dim() == 4 else nn.Linear(channels, 2)
            self.heads.append(randomize(head, seed=end).double())
        return self.eval()

    def values(self, x: Tensor) -> list[Tensor]:
        """The input and the result of every step; some steps write into earlier ones."""
        values = [x.clone()]
        for layer, places in zip(self.layers, self.places, strict=True):
            values.append(layer(*(values[place] for place in places)))
        return values

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = self.values(x)
        return {f"{number}": head(values[self.ends[number]]) for number, head in enumerate(self.heads)}


def random_network(seed: int) -> Network:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    network = Network(torch.randn(draw.choice((1, 2)), 3, 6, 6, dtype=torch.float64, generator=generator))
    values = [network.example]
    while len(network.places) < STEPS:
        layer, places = drawn(draw, values)
        try:
            result = randomize(layer).double()(*(values[place].clone() for place in places))
        except (RuntimeError, ValueError):  # too small for this kernel or norm
            continue
        if result.dim() in LAYERS and 0 < result.numel() <= LARGEST and bool((result.abs() < 1e3).all()):
            network.add(layer, *places)
            values = network.values(network.example)
    return network.close(len(values) - 1, draw.randrange(1, len(values)))


def drawn(draw: Draw, values: list[Tensor]) -> tuple[nn.Module, tuple[int, ...]]:
    place = draw.choice([*range(len(values)), *[len(values) - 1] * 6])
    x, kind = values[place], draw.random()
    if kind < 0.2:
        partners = [other for other, value in enumerate(values) if value.shape == x.shape]
        return Apply(draw.choice(PAIRS)), (place, draw.choice(partners))
    if kind < 0.5:
        return Apply(draw.choice((*FUNCTIONS[x.dim()], *ANYWHERE))), (place,)
    return draw.choice(LAYERS[x.dim()])(_channels(x), draw), (place,)


def _channels(x: Tensor) -> int:
    return x.shape[1 if x.dim() == 4 else -1]


class Pair(nn.Module):
    """Two linear layers, one that reads them, a bare parameter, and whatever a test does with them."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        self.own = nn.Parameter(torch.zeros(6, 2))
        self.between = between
        self.example = torch.randn(2, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def random_masks(coupling: Coupling, role: np.ndarray, seed: int) -> dict[str, dict[str, Tensor]]:
    """Masks of all slices in a role (written, read) that belong to a random half of what may leave."""
    drop = np.zeros(len(coupling.classes), dtype=bool)
    generator = np.random.default_rng(seed)
    for axis in coupling.axes:
        classes = np.unique(coupling.classes[axis.span][role[axis.span]])
        free = classes[~coupling.frozen[classes]]
        if len(free) > 1 and not drop[free].any():
            drop[generator.permutation(free)[: len(free) // 2]] = True
    masks: dict[str, dict[str, Tensor]] = {}
    for axis in coupling.axes:
        masked = drop[coupling.classes[axis.span]] & role[axis.span]
        if masked.any() and not masked.all():
            module, _, target = axis.name.rpartition(".")
            vector = torch.from_numpy(~masked).reshape([-1 if dim == axis.dim else 1 for dim in range(axis.rank)])
            known = masks.setdefault(module, {}).get(target)
            masks[module][target] = vector if known is None else known & vector
    return masks


def error_of_small(model: Network | Pair, fresh: Tensor, seed: int) -> float:
    """The small model's relative error against the simulated one on fresh inputs. Odd seeds mask what is read."""
    coupling = groups(model, model.example)
    masks = random_masks(coupling, coupling.read if seed % 2 else coupling.written, seed)
    wrappers = ModelWrappers(model)
    wrappers.replace_masks(coupling.complete(masks))
    with torch.no_grad():
        expected = tensors_of(model(fresh.clone()))
        wrappers.detach()
        small = ModelSpeedup(model, model.example, masks, verify=False).speedup_model()
        return relative_error(tensors_of(small(fresh.clone())), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_small_equals_masked(seed):
    network = random_network(seed)
    assert error_of_small(network, torch.randn(3, 3, 6, 6, dtype=torch.float64), seed) < 1e-9


def test_most_networks_shrink():
    couplings = [groups(network, network.example) for network in map(random_network, SEEDS)]
    shrunk = [bool(coupling.removed(random_masks(coupling, coupling.written, 0)).any()) for coupling in couplings]
    assert sum(shrunk) > 0.6 * len(shrunk)


SHAPES = {2: (2, 5), 3: (2, 4, 5), 4: (2, 5, 6, 6)}


@pytest.mark.parametrize(
    ("dims", "function"),
    [(dims, function) for dims in SHAPES for function in (*FUNCTIONS[dims], *ANYWHERE, *PAIRS)],
)
def test_each_function_after_values_that_are_not_zero_at_zero(dims, function):
    """A removed channel holds a half or a one here: whatever the function spreads of it shows."""
    for seed in range(4):
        network = Network(torch.randn(SHAPES[dims], dtype=torch.float64))
        for activation in (torch.sigmoid, torch.cos):
            network.add(nn.Conv2d(5, 6, 1) if dims == 4 else nn.Linear(5, 6), 0)
            network.add(Apply(activation), len(network.places))
        network.add(Apply(function), *((2, 4) if function in PAIRS else (2,)))
        network.close(5)
        assert error_of_small(network, torch.randn(3, *SHAPES[dims][1:], dtype=torch.float64), seed) < 1e-9


def a_view_before_a_write(model, x):
    changed = model.own.clone()
    view = changed.t()
    changed.exp_()
    return torch.sigmoid(model.a(x)) @ view.t()


def a_diagonal_with_a_constant(model, x):
    return model.c(torch.diagonal(model.a(x)[:, :, None] * torch.arange(1.0, 7), dim1=1, dim2=2))


@pytest.mark.parametrize(
    "between",
    [
        a_view_before_a_write,
        a_diagonal_with_a_constant,
        lambda model, x: model.c(model.a(x).repeat(1, 2)[:, ::2]),
        lambda model, x: model.c(model.a(x).roll(1, 1)),
        lambda model, x: torch.sigmoid(model.a(x)) @ model.own.exp(),
        lambda model, x: torch.sigmoid(model.a(x)) @ torch.sigmoid(model.b(x)).t(),
        lambda model, x: model.c(F.batch_norm(model.a(x).t(), None, None, training=True).t()),
        lambda model, x: model.c(model.a(x).unsqueeze_(1)),
        lambda model, x: model.c(F.linear(x, model.a.weight, torch.ones(6, dtype=x.dtype))),
    ],
)
def test_exact_or_left_alone(between):
    for seed in range(4):
        model = randomize(Pair(between)).double()
        assert error_of_small(model, torch.randn(2, 3, dtype=torch.float64), seed) < 1e-9
