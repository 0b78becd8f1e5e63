import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tersor.errors import TraceError
from tersor.graph.trace import concrete_trace


class Function(nn.Module):
    """A function of one tensor, of four features, and of a layer."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(x, self.fc)


def traces(function, *, example=2, fresh=3, **options):
    """The traced function and a model that it must equal, checked on fresh inputs at another batch size."""
    model = Function(function).eval()
    traced = concrete_trace(model, torch.randn(example, 4), **options)
    x, results = torch.randn(fresh, 4), []
    for network in (traced, model):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(network(x.clone()))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    return traced


def writes(x, fc):
    y = fc(x)
    y[:, 0] = 0
    view = y[:, 1:3]
    view[:] = x[:, :2]
    y.t()[3] = 1
    y[y > 1] -= 2
    out = torch.empty_like(y)
    torch.mul(y, 2, out=out)
    x += 1
    torch._foreach_mul_([view], 2.0)
    y.data = y.data * 3
    return y, view, out, x


def augmented(x, fc):
    y = fc(x)
    y += x
    y *= 2
    y **= 2
    y //= 0.5
    mask = y > 1
    mask &= x > 0
    return y, ~mask, 2**y, 1 / (y + 9), 1 - y, abs(-y), x @ x.T


def splits(x, fc):
    first, second = fc(x).chunk(2, -1)
    ordered, order = torch.sort(x)
    head, *rest = x.t()
    return first + second, torch.cat(x.split([1, 3], dim=1), 1), ordered, order, head, rest, torch.topk(x, 2).values


def aliases(x, fc):
    y = nn.Parameter(fc(x))
    return y * 2, copy.deepcopy(x), x.contiguous(), nn.functional.dropout(x, training=False), nn.Identity()(x)


def draws(x, fc):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, generator=generator) + torch.randn(4, generator=generator)
    return fc(x) + noise + torch.rand_like(x) + nn.functional.dropout(x, training=True)


def checkpointed(x, fc):
    return checkpoint(fc, x, use_reentrant=False) + checkpoint(lambda a: fc(a) * 2, x, use_reentrant=True)


def wrapped(x, fc):
    layer = functools.partial(torch.nn.functional.linear, weight=fc.weight)
    return functools.reduce(torch.add, (layer(part) for part in (x, x * 2)))


@pytest.mark.parametrize("function", [writes, augmented, splits, aliases, draws, wrapped])
def test_calls(function):
    assert traces(function).meta["decisions"] == ()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints():
    nodes = traces(checkpointed).graph.nodes
    assert [node.op for node in nodes].count("call_module") == 2


def test_numbers_of_a_tensor_stay_free():
    def forward(x, fc):
        lengths = torch.ones(x.shape[0], dtype=torch.long) * 2
        longest = lengths.sum().item()
        parts = torch.cat([x, x]).split([*lengths.tolist()[:2], x.shape[0] * 2 - 4])
        return torch.zeros(longest), parts[:2], x / x.shape[0], x[:, : lengths.max()]

    assert traces(forward).meta["decisions"] == ()


def test_all_rows_of_a_tensor_stay_all_rows():
    traced = traces(lambda x, fc: torch.stack(list(fc(x))) + torch.cat(x.split(1)))
    assert traced.meta["decisions"] == ("a tensor's __len__",)
    first = concrete_trace(Function(lambda x, fc: torch.stack(list(x)[:1])), torch.randn(2, 4))
    assert first(torch.randn(3, 4)).shape == (1, 4)


def scripted(x: Tensor, y: Tensor) -> Tensor:
    return (torch.sigmoid(x) * y).add_(1)


def scripted_view(x: Tensor, size: int) -> Tensor:
    return x.view(size, -1)


class Inner(nn.Module):
    """Something to script."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_functions_and_modules_are_their_operators():
    function = torch.jit.script(scripted)
    nodes = traces(lambda x, fc: function(fc(x), x)).graph.nodes
    names = [str(node.target) for node in nodes]
    assert names[2:5] == ["aten.sigmoid.default", "aten.mul.Tensor", "aten.add_.Scalar"]
    model = nn.Sequential(torch.jit.script(Inner()))
    traced, fresh = concrete_trace(model, torch.randn(2, 4)), torch.randn(3, 4)
    assert torch.equal(traced(fresh), model(fresh))
    assert dict(traced.named_parameters()).keys() == {"0.fc.weight", "0.fc.bias"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_sizes_in_scripted_code_are_a_decision():
    function = torch.jit.script(scripted_view)
    traced = traces(lambda x, fc: function(x, x.shape[0]), fresh=2)
    assert traced.meta["decisions"] == ("sizes in code that is not Python's (aten.view.default)",)


def test_vmap_is_its_operators():
    def forward(x, fc):
        positions = torch.arange(x.shape[0])
        later = torch.vmap(torch.vmap(lambda i, j: i > j, in_dims=(None, 0)), in_dims=(0, None))(positions, positions)
        return torch.vmap(lambda row: row * 2 + fc.bias)(x), later

    assert traces(forward).meta["decisions"] == ()


def test_a_condition_as_an_operator_is_followed():
    traced = traces(lambda x, fc: torch.cond(x.sum() > -1e9, lambda a: fc(a), lambda a: a * 2, (x,)))
    assert "a tensor in torch.cond" in traced.meta["decisions"]
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["fc"]


@pytest.mark.parametrize(
    ("decide", "what"),
    [
        (lambda x: x.sum() > -1e9 and 1, "__bool__"),
        (lambda x: int(x.abs().max()), "__int__"),
        (lambda x: len(x), "__len__"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: (x > 100).any().item(), "item"),
        (lambda x: f"{x.sum()}", "__format__"),
        (lambda x: x.numpy().sum(), "numpy"),
        (lambda x: 9.0 in x, "__contains__"),
    ],
)
def test_decisions_on_values(decide, what):
    def forward(x, fc):
        decide(x)
        return fc(x)

    assert traces(forward).meta["decisions"] == (f"a tensor's {what}",)


class Leaf(nn.Module):
    """Keeps a tensor that others read."""

    def forward(self, x):
        self.seen = x * 2
        return self.seen + 1


class Reader(nn.Module):
    """Reads what a module has kept."""

    def __init__(self):
        super().__init__()
        self.leaf = Leaf()

    def forward(self, x):
        return self.leaf(x) + self.leaf.seen


def test_a_tensor_of_a_leaf_that_is_no_output_is_no_constant():
    with pytest.raises(TraceError, match=r"a tensor made inside 'leaf'.*leaf_types"):
        concrete_trace(Reader(), torch.ones(2, 4), leaf_types=(Leaf,))
    assert concrete_trace(Reader(), torch.ones(2, 4))(torch.ones(1)).item() == 5


def test_an_operator_that_holds_code_is_refused():
    def forward(x, fc):
        return torch.ops.higher_order.while_loop(lambda i: i.sum() < 3, lambda i: (i + 1,), (x,), ())

    with pytest.raises(TraceError, match=r"while_loop cannot be recorded.*leaf_types"):
        concrete_trace(Function(forward), torch.zeros(1, 4))


class Drawing(nn.Module):
    """A generator of its own, which goes on from call to call."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + torch.randn(4, generator=self.generator)


def test_a_generator_of_the_model_goes_on():
    model = Drawing()
    traced, x = concrete_trace(model, torch.zeros(1, 4)), torch.zeros(1, 4)
    assert not torch.equal(traced(x), traced(x))


def kernel(x, fc):
    """A kernel writes without torch's knowledge."""
    out = torch.empty_like(x)
    with torch.no_grad():
        out.detach().numpy()[:] = 3
    return fc(x), out


def test_memory_that_nothing_was_seen_to_write_is_not_read():
    with pytest.raises(TraceError, match=r"'add' reads a tensor that is written by code which torch does not see"):
        concrete_trace(Function(lambda x, fc: kernel(x, fc)[1] + 1), torch.zeros(1, 4))
    traces(lambda x, fc: torch.zeros_like(torch.empty_like(x)) + torch.empty(3, 2).view(-1).fill_(2).sum())
