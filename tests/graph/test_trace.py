import collections
import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tersor.errors import TraceError
from tersor.graph.trace import concrete_trace
from tests.networks import IMAGE, IMAGE_NETWORKS, LiteralView, Tokens, randomize


@pytest.mark.parametrize("network", [*IMAGE_NETWORKS, LiteralView])
def test_the_graph_is_exact_at_another_batch_size(network):
    model = randomize(network())
    traced, fresh = concrete_trace(model, torch.randn(IMAGE)), torch.randn(5, *IMAGE[1:])
    assert torch.equal(traced(fresh), model(fresh))
    assert dict(traced.named_parameters()).items() == dict(model.named_parameters()).items()
    assert not traced.training


@dataclass
class Output:
    logits: Tensor
    pair: tuple


class Odd(nn.Module):
    """Sizes in arithmetic, writes into views, attributes, constants, control flow, keywords, a dataclass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x, *, shift=None):
        batch, _, height, width = x.shape
        y = self.conv(x) * self.scale + torch.arange(width).float()
        if y.shape[-1] > 4:
            y[:, 0] = 0
        y = y if shift is None else y + shift["by"]
        z = y.view(batch, 2, -1, height * width).transpose(1, 2).reshape(x.size(0), -1)
        return Output(z, (y.mT, torch.zeros(batch * 2)))


def test_sizes_writes_constants_keywords_and_dataclasses():
    model = randomize(Odd())
    traced = concrete_trace(model, {"x": torch.randn(IMAGE), "shift": {"by": torch.ones(1)}})
    fresh, shift = torch.randn(7, *IMAGE[1:]), {"by": torch.full((1,), 0.5)}
    actual, expected = traced(fresh, shift), model(fresh, shift=shift)
    assert isinstance(actual, Output)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.pair[0], expected.pair[0])
    assert actual.pair[1].shape == (14,)
    assert traced.meta["decisions"] == ("a size in 'gt'",)


def test_every_node_says_in_which_module_it_was_recorded():
    model = nn.Sequential(collections.OrderedDict(odd=Odd(), relu=nn.Flatten()))
    model.odd.forward = lambda x: Odd.forward(model.odd, x).logits
    nodes = {node.name: node for node in concrete_trace(model, torch.randn(IMAGE)).graph.nodes}
    assert nodes["odd_conv"].meta["module"] == "odd"
    assert nodes["odd_conv"].meta["shape"] == (2, 4, 8, 8)
    assert all(type(size) is int for size in nodes["odd_conv"].meta["shape"])
    assert nodes["reshape"].meta["module"] == "odd"
    assert nodes["relu"].meta["module"] == ""


def test_tokens():
    model = randomize(Tokens())
    traced = concrete_trace(model, torch.tensor([[1, 2, 3]]))
    ids = torch.randint(0, 11, (4, 3))
    assert torch.equal(traced(ids), model(ids))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Slotted:
    __slots__ = ("x",)
    x: Tensor


class Cache:
    """A state that is no container."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []

    def update(self, key: Tensor) -> Tensor:
        self.keys.append(key)
        return torch.stack(self.keys).sum(0)


class Containers(nn.Module):
    """What goes in and out of real models."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any, *more: Any, cache: Cache | None = None) -> Any:
        cache, y = cache or Cache(), self.fc(x.logits) + x.pair[0]["by"]
        total = cache.update(y) + cache.update(sum(more))
        ordered = collections.OrderedDict([("0", y), ("pool", total)])
        kept = collections.defaultdict(list, a=[y])
        return Pair(y, total), ordered, kept, collections.deque([y]), Slotted(y), torch.max(y, 1), cache, y.shape[0]


def test_containers_dataclasses_and_state_objects():
    model = Containers()
    given = Output(torch.randn(2, 4), ({"by": torch.ones(4)},))
    cache = Cache()
    cache.update(torch.zeros(2, 4))
    traced = concrete_trace(model, (given, torch.randn(2, 4), torch.randn(2, 4)))
    held = concrete_trace(_Held(model), {"x": given, "cache": cache})
    fresh, other = Output(torch.randn(3, 4), ({"by": torch.full((4,), 2.0)},)), torch.randn(3, 4)
    actual, expected = traced(fresh, other, other * 2), model(fresh, other, other * 2)
    assert [type(part) for part in actual] == [type(part) for part in expected]
    assert torch.equal(actual[0].second, expected[0].second)
    assert torch.equal(actual[1]["pool"], expected[1]["pool"])
    assert actual[2]["b"] == []
    assert torch.equal(actual[3].pop(), actual[4].x)
    assert torch.equal(actual[5].values, expected[5].values)
    assert len(actual[6].keys) == 2
    assert actual[7] == 3
    assert len(cache.keys) == 1  # the caller's own is not filled
    assert len(held(given, cache).keys) == 3
    assert len(cache.keys) == 1


class _Held(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any, cache: Cache) -> Any:
        return self.model(x, x.logits, cache=cache)[6]


def test_own_leaf_types_stay_whole():
    class Inner(nn.Module):
        def forward(self, x):
            return x * 2

    model = nn.Sequential(Inner(), nn.ReLU())
    nodes = concrete_trace(model, torch.ones(1), leaf_types=(Inner,)).graph.nodes
    assert [node.target for node in nodes if node.op == "call_module"] == ["0", "1"]
    assert [node.op for node in concrete_trace(model, torch.ones(1)).graph.nodes].count("call_module") == 1


class Layer(nn.Module):
    """Fills the cache that it is given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, cache):
        return cache.update(self.fc(x))


class Cached(nn.Module):
    """Two layers and one cache, which holds something before the first layer sees it."""

    def __init__(self, starts_empty):
        super().__init__()
        self.starts_empty = starts_empty
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        cache = Cache()
        x = x if self.starts_empty else cache.update(x)
        for layer in self.layers:
            x = layer(x, cache)
        return x, cache.keys


def test_what_a_leaf_leaves_in_an_object_is_read_back():
    model = Cached(starts_empty=False)
    traced, fresh = concrete_trace(model, torch.randn(2, 4), leaf_types=(Layer,)), torch.randn(3, 4)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layers.0", "layers.1"]
    (actual, keys), (expected, _) = traced(fresh), model(fresh)
    assert torch.equal(actual, expected)
    assert len(keys) == 3


def test_an_object_that_a_leaf_would_share_between_runs_is_refused():
    with pytest.raises(TraceError, match=r"type Cache is changed after it was given.*leaf_types"):
        concrete_trace(Cached(starts_empty=True), torch.randn(2, 4), leaf_types=(Layer,))


class Hypernetwork(nn.Module):
    """Weights that are computed for the call, once by torch.func and once by an attribute."""

    def __init__(self):
        super().__init__()
        self.fc, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.swapped = nn.Linear(4, 4)
        del self.swapped.weight
        self.swapped.weight = torch.zeros(4, 4)

    def forward(self, x):
        self.swapped.weight = self.weight / self.weight.norm()
        return torch.func.functional_call(self.fc, {"weight": self.weight * 2}, (x,)) + self.swapped(x)


def test_a_module_that_computes_with_other_tensors_than_its_own_is_followed():
    model = Hypernetwork()
    traced, fresh = concrete_trace(model, torch.randn(2, 4)), torch.randn(3, 4)
    assert torch.equal(traced(fresh), model(fresh))
    with torch.no_grad():
        model.weight.mul_(3)
    assert torch.equal(traced(fresh), model(fresh))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)).train()
    model[1].weight.requires_grad = False
    model[1].register_buffer("table", torch.zeros(1), persistent=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    concrete_trace(model, torch.randn(4, 3))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Remembers(nn.Module):
    """Keeps sizes."""

    def forward(self, x):
        self.shape, self.sizes, self.batch = x.shape, [x.shape[1:], 3], x.shape[0]
        return x.view(self.batch, -1)


def test_sizes_that_the_model_keeps_are_ordinary():
    model = Remembers()
    assert concrete_trace(model, torch.ones(2, 3, 4))(torch.ones(5, 3, 4)).shape == (5, 12)
    assert (type(model.shape), type(model.sizes[0]), type(model.batch)) == (torch.Size, torch.Size, int)
    assert (model.shape, model.sizes) == ((2, 3, 4), [(3, 4), 3])


class Wasteful(nn.Module):
    """A dead branch, a dead draw that moves the random state, and a dead read of what is written to."""

    def __init__(self):
        super().__init__()
        self.fc, self.dead = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.dead(x).relu()
        torch.rand(3)
        y = self.fc(x)
        y[:, 0].add_(1)
        y.numel() > 2  # noqa: B015
        return y + torch.rand(1)


def test_dead_code_goes_on_request_and_what_has_an_effect_stays():
    model, fresh = Wasteful(), torch.randn(3, 4)
    whole = concrete_trace(model, torch.randn(2, 4))
    lean = concrete_trace(model, torch.randn(2, 4), eliminate_dead_code=True)
    assert {node.name for node in whole.graph.nodes} - {node.name for node in lean.graph.nodes} == {
        "dead",
        "relu",
        "gt",
        "numel",
    }
    for traced in (whole, lean):
        torch.manual_seed(0)
        actual = traced(fresh)
        torch.manual_seed(0)
        assert torch.equal(actual, model(fresh))


def test_decisions_keep_their_nodes_and_what_they_were():
    nodes = concrete_trace(Wasteful(), torch.randn(2, 4)).graph.nodes
    assert [(node.name, node.meta["decided"]) for node in nodes if "decided" in node.meta] == [("gt", True)]


def test_a_traced_graph_can_be_copied_interpreted_and_traced_again():
    model = randomize(Odd())
    traced, fresh = concrete_trace(model, torch.randn(IMAGE)), torch.randn(5, *IMAGE[1:])
    expected = model(fresh).logits
    assert torch.equal(copy.deepcopy(traced)(fresh).logits, expected)
    assert torch.equal(torch.fx.Interpreter(traced).run(fresh).logits, expected)
    assert torch.equal(concrete_trace(traced, torch.randn(IMAGE))(fresh).logits, expected)
    traced.graph.lint()


def test_wrong_inputs():
    with pytest.raises(TraceError, match=r"in module '1'.*\(2, 5\)"):
        concrete_trace(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 5))


class Pedantic(nn.Module):
    """Runs, but not while it is traced."""

    def forward(self, x):
        if type(x.shape) is not torch.Size:
            raise TypeError("no Size")
        return x * 2


def test_what_cannot_be_traced_is_named_and_can_be_kept_whole():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(Pedantic()))
    with pytest.raises(TraceError, match=r"module '1.0': tracing failed: TypeError: no Size.*leaf_types=\(Pedantic,\)"):
        concrete_trace(model, torch.ones(2))
    traced = concrete_trace(model, torch.ones(2), leaf_types=(Pedantic,))
    assert traced(torch.ones(3)).tolist() == [2, 2, 2]


def test_an_error_that_the_model_catches_is_no_error():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.first(x)
            except RuntimeError:
                return self.second(x)

    model, fresh = Careful(), torch.randn(5, 4)
    traced = concrete_trace(model, torch.randn(2, 4))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["second"]
    assert torch.equal(traced(fresh), model(fresh))


def test_compiled_functions_and_modules_are_followed():
    function = torch.compile(lambda x: torch.relu(x) + 1, backend="eager")

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.compile(nn.Linear(4, 4), backend="eager")

        def forward(self, x):
            return function(self.fc(x))

    nodes = concrete_trace(Compiled(), torch.randn(2, 4)).graph.nodes
    assert [getattr(node.target, "__name__", node.target) for node in nodes][-3:-1] == ["relu", "add"]
