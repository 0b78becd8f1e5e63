"""Random networks: what the masked model computes is what the small one computes, whatever the layers are joined by."""

import copy
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import VerificationError
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


class Apply(nn.Module):
    """A function of one or two values as a layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


class Gate(nn.Module):
    """Squeeze and excitation, whose sigmoid is a half where its input is removed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Own(nn.Module):
    """A bare parameter, or a buffer, that is added, multiplied or contracted."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int, buffer: bool = False) -> None:
        super().__init__()
        self.function = function
        if buffer:
            self.register_buffer("own", torch.zeros(shape))
        else:
            self.own = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.own)


class First(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


Draw = random.Random
Makers = Sequence[Callable[[int, Draw], nn.Module]]


def width(draw: Draw) -> int:
    return draw.choice((1, 2, 4, 6))


def function(apply: Callable[..., Tensor]) -> Callable[[int, Draw], nn.Module]:
    return lambda channels, draw: Apply(apply)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


ANYWHERE: Makers = [
    *(function(f) for f in (torch.relu, torch.sigmoid, torch.cos, F.hardswish, F.softplus, F.gelu, F.elu, torch.tanh)),
    *(function(f) for f in (lambda x: x.clamp(0.1, 1), lambda x: 1 - x, lambda x: (x * x + 1).rsqrt())),
    *(function(f) for f in (lambda x: x.masked_fill(x < 0, -0.7), lambda x: torch.where(x > 0, x, 0.3), lambda x: x + 0)),
    *(function(f) for f in (lambda x: x.relu_(), lambda x: x.mul_(0.5), lambda x: F.dropout(x, training=False))),
    *(function(f) for f in (lambda x: x * torch.sigmoid(x.sum()), lambda x: x.flip(0), lambda x: torch.cat([x, x])[::2])),
]  # fmt: skip

IMAGE: Makers = [
    lambda c, draw: nn.Conv2d(c, width(draw), 3, padding=draw.choice((0, 1)), bias=draw.random() < 0.7),
    lambda c, draw: nn.Conv2d(c, width(draw), 1, stride=2),
    lambda c, draw: nn.Conv2d(c, width(draw), 3, padding="same", padding_mode="reflect"),
    lambda c, draw: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
    lambda c, draw: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=2 if c % 2 == 0 else 1),
    lambda c, draw: nn.ConvTranspose2d(c, width(draw), 2, stride=draw.choice((1, 2))),
    lambda c, draw: nn.ConvTranspose2d(c, 2 * c, 2, groups=c),
    lambda c, draw: nn.BatchNorm2d(c, affine=draw.random() < 0.8),
    lambda c, draw: nn.BatchNorm2d(c),
    lambda c, draw: nn.InstanceNorm2d(c, affine=True),
    lambda c, draw: nn.GroupNorm(1, c),
    lambda c, draw: nn.PReLU(draw.choice((1, c))),
    lambda c, draw: Gate(c),
    lambda c, draw: Own(torch.add, 1, c, 1, 1, buffer=draw.random() < 0.5),
    lambda c, draw: Own(lambda x, own: x * torch.sigmoid(own), c, 1, 1),
    lambda c, draw: Own(lambda x, own: torch.einsum("bchw,cd->bdhw", x, own), c, 4),
    *(function(f) for f in (lambda x: F.max_pool2d(x, 2, 1), lambda x: F.avg_pool2d(x, 2), lambda x: x.transpose(2, 3))),
    *(function(f) for f in (lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), lambda x: F.pad(x, (1, 0)))),
    *(function(f) for f in (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5), lambda x: x.repeat(1, 2, 1, 1))),
    *(function(f) for f in (lambda x: x.repeat_interleave(2, 1), lambda x: torch.cat([x, x.cos()], 1), channels_last)),
    *(function(f) for f in (lambda x: x.flip(1), lambda x: x.roll(1, 3), lambda x: x.roll(1, 1), lambda x: x[:, :, 1:])),
    *(function(f) for f in (lambda x: x.softmax(3), lambda x: F.normalize(x, dim=(2, 3)), lambda x: F.normalize(x, dim=1))),
    *(function(f) for f in (lambda x: x / (1 + x.std((2, 3), keepdim=True)), lambda x: x - x.amax(1, keepdim=True))),
    *(function(f) for f in (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), lambda x: x.cumsum(1), lambda x: x.sort(1)[0])),
    *(function(f) for f in (torch.Tensor.flatten, lambda x: x.flatten(1), lambda x: x.mean((2, 3)), lambda x: x.sum(3))),
    *(function(f) for f in (lambda x: x.flatten(2).transpose(1, 2), lambda x: x.reshape(x.shape[0], -1))),
]  # fmt: skip

TOKENS: Makers = [
    lambda c, draw: nn.Linear(c, width(draw), bias=draw.random() < 0.7),
    lambda c, draw: nn.Linear(c, width(draw)),
    lambda c, draw: nn.LayerNorm(c),
    lambda c, draw: First(nn.GRU(c, 4, batch_first=True)),
    lambda c, draw: Own(torch.add, c),
    lambda c, draw: Own(torch.matmul, c, 3),
    *(function(f) for f in (lambda x: x.softmax(-1) @ x.transpose(1, 2) @ x, lambda x: x.cumsum(1), lambda x: x.mean(1))),
    *(function(f) for f in (lambda x: F.scaled_dot_product_attention(x, x, x), lambda x: x.permute(0, 2, 1))),
    *(function(f) for f in (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x, lambda x: x.amax(1, keepdim=True))),
]  # fmt: skip

VECTOR: Makers = [
    lambda c, draw: nn.Linear(c, width(draw), bias=draw.random() < 0.7),
    lambda c, draw: nn.Linear(c, width(draw)),
    lambda c, draw: nn.BatchNorm1d(c),
    lambda c, draw: nn.PReLU(c),
    lambda c, draw: Own(lambda x, own: torch.lerp(x, own, 0.3), 1, c),
    lambda c, draw: Own(lambda x, own: x @ own, c, 4),
    *(function(f) for f in (lambda x: x[:, None].expand(-1, 3, -1), lambda x: x.unsqueeze(1).squeeze(1), lambda x: x.t().t())),
    *(function(f) for f in (lambda x: x[:, :, None, None].expand(-1, -1, 3, 3), lambda x: F.pad(x, (1, 0), value=2.0))),
    *(function(f) for f in (lambda x: x * x.argmax(1, keepdim=True), lambda x: x.softmax(1), lambda x: x[:, :-1])),
]  # fmt: skip

PAIRS = (torch.add, torch.mul, torch.maximum, torch.atan2, lambda x, y: x * torch.sigmoid(y), lambda x, y: x.add_(y),
         lambda x, y: torch.cat([x, y], -1), lambda x, y: torch.cat([x, y], 1), lambda x, y: torch.stack([x, y]).sum(0),
         lambda x, y: torch.where(y > 0, x, 0.5 * y))  # fmt: skip


class RandomNetwork(nn.Module):
    """Each step reads one or two earlier values of the right shape; two heads read the last value and a random one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers, self.heads = nn.ModuleList(), nn.ModuleList()
        self.places: list[tuple[int, ...]] = []
        draw = random.Random(seed)
        self.example = torch.randn(draw.choice((1, 2)), 3, 6, 6, dtype=torch.float64)
        values = self.values(self.example)
        while len(self.places) < STEPS:
            layer, places = self._draw(draw, values)
            layer = randomize(layer, seed=draw.randrange(1000)).double()
            try:
                result = layer(*(values[place].clone() for place in places))
            except (RuntimeError, IndexError, ValueError):  # too small for this kernel or norm
                continue
            if result.dim() in (2, 3, 4) and 0 < result.numel() <= LARGEST and bool((result.abs() < 1e3).all()):
                self.layers.append(layer)
                self.places.append(places)
                values = self.values(self.example)
        self.ends = (len(values) - 1, draw.randrange(1, len(values)))
        for end in self.ends:
            channels = values[end].shape[1 if values[end].dim() == 4 else -1]
            head = nn.Conv2d(channels, 2, 1) if values[end].dim() == 4 else nn.Linear(channels, 2)
            self.heads.append(randomize(head, seed=end).double())
        self.eval()

    @staticmethod
    def _draw(draw: Draw, values: list[Tensor]) -> tuple[nn.Module, tuple[int, ...]]:
        place = draw.choice([*range(len(values)), *[len(values) - 1] * 6])
        x = values[place]
        partners = [other for other, value in enumerate(values) if value.shape == x.shape]
        if draw.random() < 0.25:
            return Apply(draw.choice(PAIRS)), (place, draw.choice(partners))
        own = {2: VECTOR, 3: TOKENS, 4: IMAGE}[x.dim()]
        maker = draw.choice([*own, *ANYWHERE] if draw.random() < 0.4 else own)
        return maker(x.shape[1 if x.dim() == 4 else -1], draw), (place,)

    def values(self, x: Tensor) -> list[Tensor]:
        """The input and the result of every step; some steps write into earlier ones."""
        values = [x.clone()]
        for layer, places in zip(self.layers, self.places, strict=True):
            values.append(layer(*(values[place] for place in places)))
        return values

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = self.values(x)
        return {f"head{end}": head(values[end]) for head, end in zip(self.heads, self.ends, strict=True)}


def random_masks(coupling: Coupling, seed: int) -> dict[str, dict[str, Tensor]]:
    """Masks of all rows that write the removed half of what may leave, one index at least staying everywhere."""
    drop = np.zeros(len(coupling.classes), dtype=bool)
    generator = np.random.default_rng(seed)
    for axis in coupling.axes:
        classes = np.unique(coupling.classes[axis.span][coupling.written[axis.span]])
        free = classes[~coupling.frozen[classes]]
        if len(free) > 1 and not drop[free].any():
            drop[generator.permutation(free)[: len(free) // 2]] = True
    masks: dict[str, dict[str, Tensor]] = {}
    for axis in coupling.axes:
        rows = drop[coupling.classes[axis.span]] & coupling.written[axis.span]
        if rows.any() and not rows.all():
            module, _, target = axis.name.rpartition(".")
            vector = torch.from_numpy(~rows).reshape([-1 if dim == axis.dim else 1 for dim in range(axis.rank)])
            known = masks.setdefault(module, {}).get(target)
            masks[module][target] = vector if known is None else known & vector
    return masks


def small_against_masked(model: nn.Module, x: Tensor, fresh: Tensor, seed: int = 0) -> tuple[float, int]:
    """The relative error of the small model against the simulated one, and how many tensors were cut."""
    coupling = groups(model, x)
    masks = random_masks(coupling, seed)
    wrappers = ModelWrappers(model)
    wrappers.replace_masks(coupling.complete(masks))
    with torch.no_grad():
        expected = tensors_of(model(fresh.clone()))
        wrappers.detach()
        speedup = ModelSpeedup(model, x, masks, verify=False)
        actual = tensors_of(speedup.speedup_model()(fresh.clone()))
    assert speedup.report is not None
    return relative_error(actual, expected), len(speedup.report.shapes)


@pytest.mark.parametrize("seed", SEEDS)
def test_small_equals_masked(seed):
    network = RandomNetwork(seed)
    fresh = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    error, _ = small_against_masked(network, network.example, fresh, seed)
    assert error < 1e-9


def test_most_networks_shrink():
    shrunk = [bool(random_masks(groups(net, net.example), 0)) for net in map(RandomNetwork, SEEDS)]
    assert sum(shrunk) > len(shrunk) / 2


class Two(nn.Module):
    """Two linear layers, a third that reads them, a bare parameter, and whatever a test does with them."""

    def __init__(self, between: Callable[["Two", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        self.own = nn.Parameter(torch.zeros(6, 2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def a_view_before_a_write(model: Two, x: Tensor) -> Tensor:
    changed = model.own.clone()
    view = changed.t()
    changed.exp_()
    return torch.sigmoid(model.a(x)) @ view.t()


def a_diagonal_with_a_constant(model: Two, x: Tensor) -> Tensor:
    return model.c(torch.diagonal(model.a(x)[:, :, None] * torch.arange(1.0, 7), dim1=1, dim2=2))


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(
            a_view_before_a_write,
            marks=pytest.mark.xfail(strict=True, reason="a view counts as a parameter after its values were changed"),
        ),
        pytest.param(
            a_diagonal_with_a_constant,
            marks=pytest.mark.xfail(strict=True, reason="a diagonal pairs what is kept with the first columns"),
        ),
    ],
)
def test_exact_or_left_alone(between):
    x = torch.randn(2, 3, dtype=torch.float64)
    for seed in range(3):
        error, _ = small_against_masked(randomize(Two(between)).double(), x, torch.randn_like(x), seed)
        assert error < 1e-9
