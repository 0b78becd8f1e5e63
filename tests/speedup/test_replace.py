"""Replacers: who is called with what, what is put where, and that all of it can be undone."""

import pytest
import torch
from torch import nn

from tersor.errors import InvalidValueError, SpeedupError
from tersor.graph.inputs import named_tensors
from tersor.speedup.replace import REPLACERS, Cut, replace, replace_modules
from tersor.speedup.slicing import Snapshot, cut

HALF = torch.tensor([True, False, True, False])


class Heads(nn.Module):
    """A module whose code computes with a number of its own."""

    def __init__(self):
        super().__init__()
        self.heads = 2
        self.into, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.into(x).unflatten(-1, (self.heads, 2)).softmax(-1).flatten(-2))


class Special(Heads):
    """A subclass, which follows its base."""


FIRST = torch.tensor([True, True, False, False])
LOST = {"into.weight": {0: FIRST}, "into.bias": {0: FIRST}, "out.weight": {1: FIRST}}


def inside(prefix, kept=LOST):
    return {f"{prefix}.{name}": dims for name, dims in kept.items()}


def shrink(model, kept, customized=()):
    cut(model, named_tensors(model), kept, {})
    return replace_modules(model, kept, customized)


def lose_heads(module, cut):
    module.heads = int(cut.along("into.weight", 0).sum()) // 2


@pytest.fixture
def registry():
    """The registry, empty for the test's own replacers."""
    before = dict(REPLACERS)
    REPLACERS.clear()
    yield REPLACERS
    REPLACERS.clear()
    REPLACERS.update(before)


def test_a_replacer_adapts_a_module_in_place(registry):
    replace(Heads)(lose_heads)
    model = nn.Sequential(Special(), nn.ReLU())
    heads, x = model[0], torch.randn(3, 4)
    with torch.no_grad():
        heads.out.weight[:, 2:] = 0
        expected = model(x)
        replaced = shrink(model, inside("0"))
        torch.testing.assert_close(model(x), expected)
    assert model[0] is heads
    assert heads.heads == 1
    assert replaced.names == []


def test_it_learns_what_is_left_and_what_was(registry):
    seen = {}
    replace(Heads)(lambda module, cut: seen.update(cut=cut))
    shrink(nn.ModuleDict({"x": nn.ModuleDict({"y": Heads()}), "other": nn.Linear(4, 4)}), inside("x.y"))
    assert seen["cut"].kept.keys() == LOST.keys()
    assert seen["cut"].shapes == {"into.weight": (4, 4), "into.bias": (4,), "out.weight": (4, 4), "out.bias": (4,)}
    assert seen["cut"].along("into.bias", 0).tolist() == [True, True, False, False]
    assert seen["cut"].along("out.weight", 0).tolist() == [True] * 4
    with pytest.raises(InvalidValueError, match=r"into\.weight"):
        seen["cut"].along("into", 0)


def test_who_lost_nothing_is_not_called(registry):
    called = []
    replace(Heads)(lambda module, cut: called.append(module))
    model = nn.Sequential(Heads(), Heads(), nn.Linear(4, 4))
    shrink(model, {**inside("1"), "2.weight": {1: HALF}})
    assert called == [model[1]]


def test_the_nearest_class_decides_and_the_users_own_come_first(registry):
    called = []
    for kind, name in ((nn.Module, "any"), (Heads, "heads"), (Special, "special")):
        replace(kind)(lambda module, cut, name=name: called.append(name))
    shrink(nn.Sequential(Special()), inside("0"))
    assert called == ["any", "any", "special", "any"]  # the two layers inside, the module, the model
    called.clear()
    shrink(nn.Sequential(Special()), inside("0"), [(Heads, lambda module, cut: called.append("own"))])
    assert called == ["any", "any", "own", "any"]


class Wrapper(nn.Module):
    """What a replacer puts around a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.after = inner, nn.Dropout()

    def forward(self, x):
        return self.after(self.inner(x))


def test_another_module_takes_the_place_under_every_name(registry):
    replace(Heads)(lambda module, cut: Wrapper(module))
    shared, frozen = Heads(), Heads()
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared, "c": frozen}).eval()
    shared.into.train()
    before = dict(shared.named_parameters())
    replaced = shrink(model, inside("a.0"))
    assert replaced.names == ["a.0"]
    assert model["b"] is model["a"][0]
    assert model["b"].inner is shared
    assert model["c"] is frozen
    assert all(shared.get_parameter(name) is parameter for name, parameter in before.items())
    flags = [module.training for module in (model["b"], model["b"].after, shared, shared.into)]
    assert flags == [False, False, False, True], "new modules take the old one's flag, known ones keep theirs"


def test_undo_puts_everything_back(registry):
    @replace(nn.Linear)
    def wrapped(module, cut):
        module.out_features = 99
        module.register_forward_hook(lambda *_: None)
        return Wrapper(module)

    @replace(Heads)
    def changed(module, cut):
        module.heads, module.extra = 1, nn.Parameter(torch.zeros(2))
        module.into.inner.weight = nn.Parameter(torch.zeros(1))
        module.__class__ = Special

    model, calls = nn.Sequential(Heads(), nn.ReLU()), []
    handle = model[0].into.register_forward_hook(lambda *_: calls.append(1))
    modules, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    parameters, x = dict(model.named_parameters()), torch.randn(3, 4)
    expected = model(x)
    snapshot = Snapshot(model)
    replaced = shrink(model, inside("0"))
    assert sorted(replaced.names) == ["0", "0.into", "0.out"]
    replaced.undo()
    snapshot.restore()
    assert dict(model.named_modules()) == modules
    assert replaced.names == []
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (type(model[0]), model[0].heads, model[0].into.out_features) == (Heads, 2, 4)
    assert torch.equal(model(x), expected)
    assert calls == [1, 1]
    handle.remove()
    model(x)
    assert calls == [1, 1]
    assert not model[0].out._forward_hooks


def test_a_replacer_that_fails_leaves_nothing(registry):
    replace(nn.Linear)(lambda module, cut: Wrapper(module))

    @replace(Heads)
    def broken(module, cut):
        module.heads = 7
        return module.nothing

    model = nn.Sequential(Heads())
    into = model[0].into
    with pytest.raises(SpeedupError, match=r"^0: the replacer of Heads failed: AttributeError: .*nothing"):
        replace_modules(model, inside("0"))
    assert (model[0].into, model[0].heads) == (into, 2)


@pytest.mark.parametrize(
    ("returned", "message"),
    [(3, "returned int"), (nn.ReLU(), "the model itself cannot be replaced")],
)
def test_what_cannot_be_put_in_place_is_refused(registry, returned, message):
    replace(Heads)(lambda module, cut: returned)
    model = Heads()
    with pytest.raises(SpeedupError, match=message):
        replace_modules(model, LOST)


def test_only_module_types_have_replacers(registry):
    with pytest.raises(InvalidValueError, match="no module type"):
        replace("Linear")
    for customized in ([lose_heads], {"Linear": lose_heads}, {nn.Linear: "shrink"}):
        with pytest.raises(InvalidValueError, match="customized_replacers"):
            replace_modules(nn.Linear(4, 4), {}, customized)


def test_a_cut_is_frozen():
    with pytest.raises(AttributeError):
        Cut({}, {}).kept = {}


def test_a_recurrent_network_is_kept():
    model = nn.GRU(4, 3)
    kept = {"weight_ih_l0": {1: HALF}}
    assert shrink(model, kept).names == []
    assert model.input_size == 2
    model(torch.randn(5, 1, 2))[0].sum().backward()
    assert model.weight_ih_l0.grad.shape == (9, 2)
