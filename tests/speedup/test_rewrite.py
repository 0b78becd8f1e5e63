"""Sizes in the code, made right in the graph. What must come out is the same class built small, on the same weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tersor.errors import SpeedupError, TraceError
from tersor.graph import concrete_trace
from tersor.graph.coupling import Coupling
from tersor.graph.inputs import evaluating, named_tensors
from tersor.speedup.rewrite import record_sizes, repair_graph
from tersor.speedup.slicing import cut

STAYS, LEAVES = 1, 2


def shapes_of(graph, x):
    found = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                found[n.name] = tuple(result.shape)
            return result

    with evaluating(graph):
        Shapes(graph).run(x)
    return found


def kept(old, new, patterns):
    """Which of the indices stay: spread evenly, or as the test says."""
    pattern = patterns.get((old, new))
    if pattern is None:
        pattern = torch.diff(torch.arange(old + 1) * new // old)
    return torch.as_tensor(pattern).bool()


def shrink(model, reference, patterns):
    """Cut a model's tensors to the shapes of the reference, which gets the same values."""
    for (_, tensor), (_, small) in zip(named_tensors(model).items(), named_tensors(reference).items(), strict=True):
        for dim, (old, new) in enumerate(zip(tensor.shape, small.shape, strict=True)):
            if old != new:
                tensor.data = tensor.data.index_select(dim, kept(old, new, patterns).nonzero().flatten())
        small.data = tensor.data.clone()


def known_labels(graph, reference, x, patterns, seen):
    """What a coupling knows, made from the shapes in a graph of the reference: a class that stays, one that leaves."""
    small = shapes_of(concrete_trace(reference, x), x[:seen])
    nodes = {}
    for name, shape in shapes_of(graph, x[:seen]).items():
        nodes[name] = {
            dim: torch.where(kept(old, new, patterns), STAYS, LEAVES)
            for dim, (old, new) in enumerate(zip(shape, small[name], strict=True))
            if old != new
        }
    return SimpleNamespace(nodes=nodes, classes=np.arange(3), example_inputs=x), np.array([False, False, True])


def repaired(model, reference, x, patterns=None, seen=None):
    torch.manual_seed(0)
    patterns = patterns or {}
    graph = concrete_trace(model, x)
    coupling, removed = known_labels(graph, reference, x, patterns, seen)
    sizes = record_sizes(graph, coupling)
    shrink(model, reference, patterns)
    return graph, repair_graph(graph, coupling, removed, sizes)


def assert_same(graph, reference, x):
    for batch in (len(x), len(x) + 3, 1):
        fresh = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(graph(fresh), reference(fresh), rtol=0, atol=1e-6)


class Attention(nn.Module):
    """As in timm: a fused projection, sizes from attributes."""

    def __init__(self, heads, dim=16, size=4):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, size, heads * size
        self.scale = size**-0.5
        self.qkv = nn.Linear(dim, 3 * heads * size)
        self.proj = nn.Linear(heads * size, dim)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.attn_dim))


class FoldedHeads(Attention):
    """Heads in the batch, as in fairseq and Bloom."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).split(self.attn_dim, dim=2)
        q, k, v = (t.reshape(b, n, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        q, k, v = (t.reshape(b * self.num_heads, n, self.head_dim) for t in (q, k, v))
        mixed = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * self.scale).softmax(-1), v)
        batch = mixed.shape[0] // self.num_heads
        mixed = mixed.view(batch, self.num_heads, n, self.head_dim).transpose(1, 2)
        return self.proj(mixed.reshape(b, n, self.attn_dim))


QKV = {(48, 24): ([1] * 8 + [0] * 8) * 3}


@pytest.mark.parametrize("kind", [Attention, FoldedHeads])
def test_heads_leave_whole(kind):
    x = torch.randn(2, 5, 16)
    model, reference = kind(4), kind(2)
    graph, repairs = repaired(model, reference, x, QKV)
    assert_same(graph, reference, x)
    assert ((4, 2),) in [repair.literals for repair in repairs]


@pytest.mark.parametrize("seen", [2, 3])
def test_a_computed_size_keeps_the_batch_and_tells_its_numbers(seen):
    """Labels may have been found on the first two samples, or on all."""
    form, x = FORMS["zeros of a batch of channels"], torch.randn(3, 3, 4, 4)
    graph, (repair,) = repaired(Flat(16, form), reference := Flat(8, form), x, seen=seen)
    assert (repair.node, repair.argument, repair.old, repair.new) == ("zeros", "args[0]", 16 * seen, 8 * seen)
    assert repair.literals == ((16, 8),)
    assert_same(graph, reference, x)


@pytest.mark.parametrize("size", [400, -1])
def test_labels_that_were_found_by_running(size):
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 16, 3), nn.Linear(400, 3)

        def forward(self, x):
            return self.fc(self.conv(x).relu().view(x.shape[0], size))

    model, x = View().double().requires_grad_(False), torch.randn(4, 1, 7, 7).double()
    rows = torch.ones(16, 1, 1, 1, dtype=torch.bool)
    rows[[0, 5, 6]] = False
    graph = concrete_trace(model, x)
    coupling = Coupling(graph, x, record_nodes=True)
    masks = {"conv": {"weight": rows}}
    removed = coupling.removed(masks)
    sizes = record_sizes(graph, coupling)
    model.fc.weight.view(3, 16, 25)[:, ~rows.flatten()] = 0
    fresh = torch.randn(3, 1, 7, 7).double()
    expected = model(fresh)
    cut(model, named_tensors(model), coupling.kept(removed), {})
    repairs = repair_graph(graph, coupling, removed, sizes)
    assert [(r.old, r.new) for r in repairs] == ([(400, 325)] if size == 400 else [])
    torch.testing.assert_close(graph(fresh), expected)


def test_what_was_replaced_is_told():
    _, repairs = repaired(Attention(4), Attention(2), torch.randn(2, 5, 16), QKV)
    assert [(r.node, r.argument, r.old, r.new) for r in repairs] == [
        ("reshape", "args[4]", 4, 2),
        ("reshape_1", "args[3]", 16, 8),
    ]


def test_a_head_size_may_shrink_in_every_head():
    x = torch.randn(2, 5, 16)
    patterns = {(48, 24): [1, 1, 0, 0] * 12, (16, 8): [1, 1, 0, 0] * 4}
    model, reference = Attention(4, dim=12, size=4), Attention(4, dim=12, size=2)
    reference.scale = model.scale
    graph, _ = repaired(model, reference, x[..., :12], patterns)
    assert_same(graph, reference, x[..., :12])


class Flat(nn.Module):
    """``form`` is the code between convolution and classifier."""

    def __init__(self, width, form):
        super().__init__()
        self.k = width
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        with torch.no_grad():
            features = form(self, torch.zeros(2, width, 4, 4)).shape[-1]
        self.form = form
        self.fc = nn.Linear(features, 5)

    def forward(self, x):
        return self.fc(self.form(self, self.conv(x)))


def silenced(x, count):
    x = x.clone()
    x[:, :count] = 0
    return x


def zeros_by_rows(x, rows):
    return (x.flatten(0, 1) + torch.zeros(rows, 4, 4)).unflatten(0, (x.shape[0], -1)).mean((2, 3))


FORMS = {
    "view": lambda self, x: x.view(-1, self.k * 16),
    "view of the batch": lambda self, x: x.view(x.shape[0], self.k * 16),
    "view of both": lambda self, x: x.view(x.shape[0] * self.k, 16).view(x.shape[0], 16 * self.k),
    "shape by name": lambda self, x: torch.reshape(x, shape=(x.shape[0], self.k, 16)).mean(2),
    "slice": lambda self, x: (x[:, : self.k // 2] * x[:, self.k // 2 :]).mean((2, 3)),
    "last slice": lambda self, x: x[:, -(self.k // 2) :].mean((2, 3)),
    "ellipsis": lambda self, x: x[..., : self.k // 4, :, 1:3].mean((2, 3)),
    "narrow": lambda self, x: x.narrow(1, self.k // 4, self.k // 4).mean((2, 3)),
    "split": lambda self, x: torch.cat(torch.split(x, self.k // 2, 1), 2).mean((2, 3)),
    "split to sizes": lambda self, x: x.split([self.k // 4, 3 * self.k // 4], dim=1)[1].mean((2, 3)),
    "zeros": lambda self, x: (x + torch.zeros(x.size(0), self.k, 4, 4)).mean((2, 3)),
    "zeros of a batch of channels": lambda self, x: zeros_by_rows(x, x.shape[0] * self.k),
    "full": lambda self, x: (x + x.new_full((self.k, 4, 4), 2.0)).mean((2, 3)),
    "unflatten": lambda self, x: x.unflatten(1, (self.k // 4, 4)).mean((2, 3, 4)),
    "unflatten to the left": lambda self, x: x.unflatten(-3, (-1, self.k // 4)).mean((1, 3, 4)),
    "expand": lambda self, x: (x + x.mean(1, keepdim=True).expand(-1, self.k, 4, 4)).mean((2, 3)),
    "repeat": lambda self, x: (x + x.mean(1, keepdim=True).repeat(1, self.k, 1, 1)).mean((2, 3)),
    "layer norm": lambda self, x: F.layer_norm(x, [self.k, 4, 4]).mean((2, 3)),
    "assigned slice": lambda self, x: silenced(x, self.k // 2).mean((2, 3)),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_number_in_the_code(name):
    x = torch.randn(3, 3, 4, 4)
    graph, repairs = repaired(Flat(16, FORMS[name]), reference := Flat(8, FORMS[name]), x)
    assert_same(graph, reference, x)
    assert repairs


class Grouped(nn.Module):
    def __init__(self, groups, size):
        super().__init__()
        self.groups = groups
        self.first = nn.Conv2d(3, groups * size, 1)
        self.scale = nn.Parameter(torch.rand(groups * size))
        self.kernel = nn.Parameter(torch.randn(groups * size, size, 3, 3))
        self.back = nn.Parameter(torch.randn(groups * size, 2, 2, 2))

    def forward(self, x):
        x = F.group_norm(self.first(x), self.groups, self.scale)
        x = F.channel_shuffle(F.conv2d(x, self.kernel, padding=1, groups=self.groups), self.groups)
        return F.conv_transpose2d(x, self.back, groups=self.groups)


def test_whole_groups_leave():
    x = torch.randn(2, 3, 4, 4)
    patterns = {(16, 8): [0] * 4 + [1] * 8 + [0] * 4}
    graph, repairs = repaired(Grouped(4, 4), reference := Grouped(2, 4), x, patterns)
    assert_same(graph, reference, x)
    assert [(r.argument, r.old, r.new) for r in repairs] == [
        ("args[1]", 4, 2),
        ("kwargs['groups']", 4, 2),
        ("args[1]", 4, 2),
        ("kwargs['groups']", 4, 2),
    ]


def test_the_same_positions_of_every_group_leave():
    x = torch.randn(2, 3, 4, 4)
    patterns = {(16, 8): [0, 1, 1, 0] * 4, (4, 2): [0, 1, 1, 0]}
    graph, repairs = repaired(Grouped(4, 4), reference := Grouped(4, 2), x, patterns)
    assert_same(graph, reference, x)
    assert repairs == []


def test_parts_of_one_size_stay_a_chunk_and_others_become_sizes():
    class Chunked(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.wide, self.a, self.b = nn.Linear(4, a + b), nn.Linear(a, 2), nn.Linear(b, 2)
            self.sizes = None if a == b else [a, b]

        def forward(self, x):
            x = self.wide(x)
            a, b = torch.chunk(x, 2, -1) if self.sizes is None else torch.split(x, self.sizes, -1)
            return self.a(a) * self.b(b)

    x = torch.randn(2, 4)
    graph, repairs = repaired(Chunked(6, 6), equal := Chunked(3, 3), x, {(12, 6): [1, 0] * 6})
    assert repairs == []
    assert_same(graph, equal, x)
    unequal = Chunked(4, 2)
    model = Chunked(6, 6)
    traced = concrete_trace(model, x)
    pattern = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0])
    labels = torch.where(pattern.bool(), STAYS, LEAVES)
    names = [node.name for node in traced.graph.nodes]
    parts = dict(zip([name for name in names if name.startswith("getitem")], labels.split(6), strict=True))
    coupling = SimpleNamespace(
        nodes={"wide": {1: labels}, **{name: {1: part} for name, part in parts.items()}},
        classes=np.arange(3),
        example_inputs=x,
    )
    sizes = record_sizes(traced, coupling)
    shrink(model, unequal, {(12, 6): pattern, (6, 4): pattern[:6], (6, 2): pattern[6:]})
    repairs = repair_graph(traced, coupling, np.array([False, False, True]), sizes)
    assert [(r.old, r.new) for r in repairs] == [(2, (4, 2))]
    assert_same(traced, unequal, x)


def test_positions_in_a_slice_count_what_is_left_before_them():
    class Sliced(nn.Module):
        def __init__(self, width, start, stop):
            super().__init__()
            self.wide, self.start, self.stop = nn.Linear(4, width), start, stop

        def forward(self, x):
            return self.wide(x)[:, self.start : self.stop]

    x = torch.randn(2, 4)
    pattern = [0, 1, 0, 0, 1, 1, 1, 1, 0, 1]
    for (start, stop), (new_start, new_stop) in {(3, 6): (1, 3), (-6, -2): (1, 5)}.items():
        model, reference = Sliced(10, start, stop), Sliced(6, new_start, new_stop)
        graph, repairs = repaired(model, reference, x, {(10, 6): pattern, (3, 2): [0, 1, 1], (4, 4): None})
        assert_same(graph, reference, x)
        assert [r.new for r in repairs] == ([1, 3] if start > 0 else [-5, -1])


def test_a_module_that_keeps_a_size_is_called_as_its_operator():
    def net(heads):
        return nn.Sequential(
            nn.Linear(4, heads * 3), nn.Unflatten(1, (heads, 3)), nn.Flatten(), nn.Linear(heads * 3, 2)
        )

    x = torch.randn(2, 4)
    model, reference = net(4), net(2)
    graph, repairs = repaired(model, reference, x)
    assert_same(graph, reference, x)
    assert [(r.module, r.old, r.new) for r in repairs] == [("1", 4, 2)]
    assert model[1].unflattened_size == (4, 3)


def test_an_error_names_the_node_and_what_was_expected():
    class Folded(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.wide, self.width = nn.Linear(4, width), width

        def forward(self, x):
            return self.wide(x).as_strided((2, self.width), (self.width, 1))

    with pytest.raises(SpeedupError, match=r"node 'as_strided'.*\n?.*shape \(2, 4\)"):
        repaired(Folded(8), Folded(4), torch.randn(2, 4))


def test_labels_of_another_batch_are_refused():
    graph = concrete_trace(nn.Sequential(nn.Linear(4, 6)), torch.randn(3, 4))
    coupling = SimpleNamespace(nodes={"_0": {0: torch.ones(5)}}, example_inputs=torch.randn(3, 4))
    with pytest.raises(TraceError, match="another size"):
        record_sizes(graph, coupling)


def test_a_tensor_that_nothing_cuts_is_named():
    class Cached(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.wide, self.cache = nn.Linear(4, width), [torch.ones(width)]

        def forward(self, x):
            return self.wide(x) * self.cache[0]

    with pytest.raises(SpeedupError, match=r"has shape \(8,\) and is kept outside .* must have shape \(4,\)"):
        repaired(Cached(8), Cached(4), torch.randn(2, 4))
