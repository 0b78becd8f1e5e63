"""Inputs and outputs: which part of a call is meant, however it is given, and what of it is seen and replaced."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import TraceError, UnmatchedError
from tersor.pruning import ActivationMeanRankPruner, L1NormPruner, TaylorPruner
from tersor.targets.activations import replace_input, replace_output, values_at, watch_activation
from tersor.training import TorchEvaluator
from tests.networks import randomize

X = torch.arange(8.0).view(2, 4) - 3.5

Named = namedtuple("Named", ["hidden", "extra"])


@dataclass
class Output:
    logits: torch.Tensor
    hidden: object = None


class Returning(nn.Module):
    """A layer whose output comes in a container."""

    def __init__(self, container):
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.container = container

    def forward(self, x):
        return self.container(self.layer(x), x)


class Around(nn.Module):
    """Takes the first value out of what the inner module returns."""

    def __init__(self, container):
        super().__init__()
        self.inner = Returning(container)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        found = self.inner(x)
        if isinstance(found, dict):
            found = next(iter(found.values()))
        elif isinstance(found, Output):
            found = found.logits
        elif not isinstance(found, torch.Tensor):
            found = found[0]
        return self.out(torch.relu(found))


CONTAINERS = {
    "tensor": (lambda y, x: y, ["_output_", "_output_0"]),
    "tuple": (lambda y, x: (y, x), ["_output_0"]),
    "list": (lambda y, x: [y, None], ["_output_0"]),
    "named": (lambda y, x: Named(y, x), ["_output_0", "_output_hidden"]),
    "dict": (lambda y, x: {"hidden": y, "x": x}, ["_output_0", "_output_hidden"]),
    "dataclass": (lambda y, x: Output(y), ["_output_0", "_output_logits"]),
}


@pytest.mark.parametrize(
    ("kind", "target"), [(kind, name) for kind, (_, names) in CONTAINERS.items() for name in names]
)
def test_outputs_in_containers_are_pruned(kind, target):
    model = randomize(Around(CONTAINERS[kind][0]))
    scores = model.inner.layer(X).detach().double().abs().sum(0).numpy()
    lives = np.ones(8, dtype=bool)
    lives[np.argsort(scores)[:4]] = False
    pruner = L1NormPruner(
        model, [{"op_names": ["inner"], "target_names": [target], "sparse_ratio": 0.5}], example_inputs=X
    )
    _, masks = pruner.compress()
    found = model(X)
    pruner.unwrap_model()
    (mask,) = masks["inner"].values()
    assert np.array_equal(mask.flatten().numpy(), lives)
    expected = model.out(torch.relu(model.inner.layer(X) * torch.from_numpy(lives)))
    torch.testing.assert_close(found, expected)


def test_model_outputs_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    given = outputs.BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=X[0])
    for key in ("last_hidden_state", "0"):
        changed = replace_output(given, key, lambda value: value + 1)
        assert type(changed) is type(given)
        assert torch.equal(changed.last_hidden_state, X + 1)
        assert torch.equal(changed[0], X + 1)
        assert torch.equal(changed.pooler_output, X[0])
    assert torch.equal(given.last_hidden_state, X)
    with pytest.raises(UnmatchedError, match=r"no part 'hidden_states'.*_output_pooler_output"):
        replace_output(given, "hidden_states", lambda value: value)


@pytest.mark.parametrize(
    ("output", "key", "legal"),
    [
        ((1, 2), "2", "_output_0, _output_1"),
        ([1], "hidden", "_output_0"),
        (Named(1, 2), "2", "_output_hidden, _output_extra"),
        (Named(1, 2), "hiden", "_output_hidden, _output_extra. Did you mean 'hidden'"),
        ({"a": 1}, "b", "_output_a"),
        ({}, "0", ""),
        (Output(X), "3", "_output_logits, _output_hidden"),
    ],
)
def test_a_part_that_is_not_there_is_named(output, key, legal):
    with pytest.raises(UnmatchedError, match=rf"_output_{key}: the module's output has no part '{key}'") as caught:
        replace_output(output, key, lambda value: value)
    assert legal in str(caught.value)


def test_a_wrong_name_is_said_when_the_pruner_is_made():
    model = Around(CONTAINERS["dict"][0])
    with pytest.raises(UnmatchedError, match=r"_output_hiden.*Did you mean 'hidden'"):
        L1NormPruner(
            model,
            [{"op_names": ["inner"], "target_names": ["_output_hiden"], "sparse_ratio": 0.5}],
            example_inputs=X,
        )
    assert not model.inner._forward_hooks


def test_keys_of_mappings_stay_in_order():
    given = OrderedDict(b=1, a=2)
    assert list(replace_output(given, "1", lambda value: value + 1).items()) == [("b", 1), ("a", 3)]
    assert given["a"] == 2


class Options(nn.Module):
    def forward(self, x, scale=None, *, shift=None):
        return x


@pytest.mark.parametrize(
    ("args", "kwargs", "key", "expected"),
    [
        ((1, 2), {}, "0", ((10, 2), {})),
        ((1, 2), {}, "scale", ((1, 20), {})),
        ((1,), {"scale": 2}, "1", ((1,), {"scale": 20})),
        ((1,), {"scale": 2}, "scale", ((1,), {"scale": 20})),
        ((), {"x": 1}, "0", ((), {"x": 10})),
        ((1,), {"shift": 3}, "shift", ((1,), {"shift": 30})),
        ((1,), {}, "shift", ((1,), {})),
        ((1,), {}, "1", ((1,), {})),
        ((1,), {}, "nothing", ((1,), {})),
    ],
)
def test_inputs_however_they_are_given(args, kwargs, key, expected):
    before = args, dict(kwargs)
    assert replace_input(Options(), args, kwargs, key, lambda value: 10 * value) == expected
    assert (args, kwargs) == before


class Keywords(nn.Module):
    """Calls its inner module by keyword."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.inner(flag=True, x=x)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, flag=False):
        return self.layer(x)


@pytest.mark.parametrize("target", ["_input_", "_input_x"])
def test_inputs_given_by_keyword_are_pruned(target):
    model = randomize(Keywords())
    pruner = L1NormPruner(
        model, [{"op_names": ["inner"], "target_names": [target], "sparse_ratio": 0.5}], example_inputs=X
    )
    _, masks = pruner.compress()
    found = model(X)
    pruner.unwrap_model()
    lives = torch.tensor([False, False, True, True])  # columns of X have magnitudes 4, 4, 4, 4: ties leave in order
    (mask,) = masks["inner"].values()
    assert torch.equal(mask.flatten(), lives)
    torch.testing.assert_close(found, model.inner.layer(X * lives))


def test_values_are_those_of_the_last_call_and_nothing_remains():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Loop().train()
    places = [("layer", "_output_0"), ("layer", "_input_0"), ("layer", "_input_1"), ("", "_output_0")]
    found = values_at(model, X, places)
    inner = model.layer(X)
    assert set(found) == {places[0], places[1], places[3]}
    torch.testing.assert_close(found["layer", "_input_0"], inner)
    torch.testing.assert_close(found["layer", "_output_0"], model.layer(inner))
    assert not found["", "_output_0"].requires_grad
    assert model.training
    assert not model.layer._forward_hooks
    assert not model.layer._forward_pre_hooks


def test_an_error_of_the_model_itself_still_says_so():
    with pytest.raises(TraceError, match="cannot run on the example inputs"):
        values_at(nn.Linear(3, 2), X, [("", "_output_0")])


@pytest.mark.parametrize("target", ["_input_0", "_output_0"])
def test_what_is_watched_has_no_mask_on_it_yet(target):
    model = randomize(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    pruner = L1NormPruner(model, [{"op_names": ["0"], "target_names": [target], "sparse_ratio": 0.5}], example_inputs=X)
    _, masks = pruner.compress()
    seen = []
    handle = watch_activation(model[0], target, lambda value: seen.append(value) or value)
    found = model(X)
    handle.remove()
    pruner.unwrap_model()
    assert torch.equal(seen[0], X if target == "_input_0" else torch.relu(X))
    assert torch.equal(found, model[1](torch.relu(X) * masks["0"][target]))


class Ranks(nn.Module):
    """One layer called on tokens and on their mean, which has a dimension less."""

    def __init__(self, mean_first):
        super().__init__()
        self.layer, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.mean_first = mean_first

    def forward(self, x):
        calls = [x.mean(1), x] if self.mean_first else [x, x.mean(1)]
        first, second = (self.out(torch.relu(self.layer(value))) for value in calls)
        return first + second.mean(1) if self.mean_first else first.mean(1) + second


@pytest.mark.parametrize("mean_first", [False, True])
def test_a_mask_keeps_the_shape_of_what_it_masks(mean_first):
    """With a dimension more in the mask than in the value, broadcasting would put one in front of the value."""
    model, x = randomize(Ranks(mean_first)), torch.randn(3, 5, 4)
    pruner = L1NormPruner(
        model, [{"op_names": ["layer"], "target_names": ["_output_0"], "sparse_ratio": 0.5}], example_inputs=x
    )
    _, masks = pruner.compress()
    found = model(x)
    pruner.unwrap_model()
    lives = masks["layer"]["_output_0"].flatten()
    expected = model.out(torch.relu(model.layer(x) * lives)).mean(1)
    expected = expected + model.out(torch.relu(model.layer(x.mean(1)) * lives))
    torch.testing.assert_close(found, expected)
    assert found.shape == (3, 3)


class Sentences(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("pruner_class", [TaylorPruner, ActivationMeanRankPruner])
def test_batches_of_other_lengths_than_the_example(pruner_class):
    """Scores of channels are sums or means over all tokens, however many a batch has."""
    model = randomize(Sentences())
    batches = [torch.randn(2, length, 4) for length in (5, 1, 7)]

    def train(model, optimizer, step, scheduler, max_steps, max_epochs):
        for batch in batches[:max_steps]:
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    evaluator = TorchEvaluator(
        train, optimizer, lambda batch, model: model(batch).square().sum(), dummy_input=batches[0]
    )
    passed = [model[0](batch) for batch in batches]
    for value in passed:
        value.retain_grad()
        model[2](torch.relu(value)).square().sum().backward()
    if pruner_class is TaylorPruner:
        scores = sum((value * value.grad).double().square().sum((0, 1)) for value in passed)
    else:
        scores = sum(torch.relu(value).double().sum((0, 1)) for value in passed)
    config = {"op_names": ["0"], "target_names": ["_output_0"], "sparse_ratio": 0.5}
    pruner = pruner_class(model, [config], evaluator, training_steps=3)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    gone = set((~masks["0"]["_output_0"].flatten()).nonzero().flatten().tolist())
    assert gone == set(np.argsort(scores.detach().numpy())[:4].tolist())
