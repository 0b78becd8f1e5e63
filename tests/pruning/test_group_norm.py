"""What leaves with a choice, written down by hand for small networks, and its norm in float64 numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.errors import ConfigError, InvalidValueError
from tersor.graph import groups
from tersor.pruning import L2NormPruner
from tersor.pruning.group_norm import GroupNormPruner, group_norms
from tersor.speedup import ModelSpeedup
from tests.networks import IMAGE, Plain, Residual, Separable, Tokens, randomize

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
FLAT = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 11, (2, 4), generator=torch.Generator().manual_seed(0))


def runs(count, size=1, start=0):
    """The indices of each choice, shape (count, size), where they follow each other."""
    return start + np.arange(count * size).reshape(count, size)


def rows_and_shift(*names, indices):
    """The rows of layers, or the scales of norms, with their biases."""
    return [(f"{name}.{target}", 0, indices) for name in names for target in ("weight", "bias")]


def expected(model, slices, p=2):
    """The norm of each choice over all elements in its slices, each element once."""
    parameters = {name: tensor.detach().double().numpy() for name, tensor in model.named_parameters()}
    norms = []
    for choice in range(len(slices[0][2])):
        leaves = {name: np.zeros(parameters[name].shape, dtype=bool) for name, *_ in slices}
        for name, dim, indices in slices:
            np.moveaxis(leaves[name], dim, 0)[indices[choice]] = True
        norms.append(sum((np.abs(parameters[name][at]) ** p).sum() for name, at in leaves.items()) ** (1 / p))
    return np.array(norms)


def pruned(model, config_list, x, **kwargs):
    """The scores, by target, and the masks; twice, because the masked model must give the same."""
    pruner = GroupNormPruner(model, config_list, example_inputs=x, **kwargs)
    scores = pruner.importance()
    _, masks = pruner.compress()
    again = pruner.generate_masks()
    later = pruner.importance()
    pruner.unwrap_model()
    assert all(torch.equal(later[name], score) for name, score in scores.items())
    assert all(torch.equal(again[name][key], mask) for name, own in masks.items() for key, mask in own.items())
    return {name: score.double().numpy() for name, score in scores.items()}, masks


def gone(mask, dim=0):
    """The indices along a dimension that are masked, which are masked in whole."""
    rows = mask.movedim(dim, 0).flatten(1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    return set((~rows[:, 0]).nonzero().flatten().tolist())


def lowest(norms, indices, count):
    """The indices of the choices of least norm."""
    return set(indices[np.argsort(norms, kind="stable")[:count]].flatten().tolist())


PLAIN = {
    "0": [*rows_and_shift("0", "1", indices=runs(8)), ("3.weight", 1, runs(8))],
    "3": [*rows_and_shift("3", indices=runs(6)), ("7.weight", 1, runs(6, 16))],
    "7": [*rows_and_shift("7", indices=runs(7)), ("9.weight", 1, runs(7))],
}


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_writers_readers_norms_and_columns_behind_a_flatten(name, p):
    model = randomize(Plain())
    norms = expected(model, PLAIN[name], p)
    config_list = [{"op_names": [name], "sparse_ratio": 0.5}]
    scores, masks = pruned(model, config_list, X, p=p, normalize=None)
    np.testing.assert_allclose(scores[f"{name}.weight"].ravel(), norms, rtol=1e-5)
    assert scores[f"{name}.weight"].shape == tuple(np.array([len(norms), 1, 1, 1])[: scores[f"{name}.weight"].ndim])
    assert gone(masks[name]["weight"]) == lowest(norms, runs(len(norms)), len(norms) // 2)
    scores, _ = pruned(model, config_list, X, p=p)
    np.testing.assert_allclose(scores[f"{name}.weight"].ravel(), norms / norms.mean(), rtol=1e-5)


def test_it_decides_otherwise_than_the_norm_of_the_writer():
    model = randomize(Plain())
    config_list = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    writer = np.sqrt((model[0].weight.detach().double().numpy() ** 2).sum((1, 2, 3)))
    assert lowest(writer, runs(8), 4) != gone(pruned(model, config_list, X)[1]["0"]["weight"])


STREAM = [
    *rows_and_shift("stem", "bn", "conv2", "bn2", indices=runs(8)),
    *((f"{name}.weight", 1, runs(8)) for name in ("conv1", "conv3", "project")),
]
GATED = [
    *rows_and_shift("expand", "depthwise", "bn", "excite", indices=runs(12)),
    ("squeeze.weight", 1, runs(12)),
    ("project.weight", 1, runs(12)),
]


@pytest.mark.parametrize(
    ("network", "names", "slices"),
    [(Residual, ["stem", "conv2"], STREAM), (Separable, ["expand", "depthwise", "excite"], GATED)],
)
def test_all_writers_of_a_stream_count_for_each_other(network, names, slices):
    model = randomize(network())
    config_list = [{"op_names": names, "sparse_ratio": 0.5}]
    norms = expected(model, slices)
    for given in (config_list, tersor.auto_set_dependency_group_ids(model, config_list, X)):
        scores, masks = pruned(model, given, X, normalize=None)
        for name in names:
            np.testing.assert_allclose(scores[f"{name}.weight"].ravel(), norms, rtol=1e-5)
            assert gone(masks[name]["weight"]) == lowest(norms, runs(len(norms)), len(norms) // 2)


def test_the_small_model_computes_what_the_masked_one_does():
    model = randomize(Residual())
    config_list = tersor.auto_set_dependency_group_ids(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], X)
    pruner = GroupNormPruner(model, config_list, example_inputs=X)
    _, masks = pruner.compress()
    assert [(target.blocks, target.removed) for target in pruner.sparsity() if target.asked] == [
        (8, 4), (10, 5), (8, 4), (12, 6), (12, 6)
    ]  # fmt: skip
    with torch.no_grad():
        masked = model(X)
    pruner.unwrap_model()
    small = ModelSpeedup(model, X, masks).speedup_model()
    with torch.no_grad():
        torch.testing.assert_close(small(X), masked)


def test_tokens_and_an_embedding():
    model = randomize(Tokens())
    hidden = [*rows_and_shift("fc1", indices=runs(10)), ("fc2.weight", 1, runs(10))]
    stream = [
        ("embed.weight", 1, runs(6)),
        *rows_and_shift("fc2", "norm", indices=runs(6)),
        ("fc1.weight", 1, runs(6)),
        ("out.weight", 1, runs(6)),
    ]
    coupling = groups(model, IDS, allow_inexact=True)
    config_list = [{"op_names": ["embed", "fc1", "fc2"], "sparse_ratio": 0.5}]
    config_list = tersor.auto_set_dependency_group_ids(model, config_list, coupling)
    scores, masks = pruned(model, config_list, coupling, normalize=None)
    for name, slices in (("embed", stream), ("fc1", hidden), ("fc2", stream)):
        np.testing.assert_allclose(scores[f"{name}.weight"].ravel(), expected(model, slices), rtol=1e-5)
    assert (
        gone(masks["embed"]["weight"], 1) == gone(masks["fc2"]["weight"]) == lowest(expected(model, stream), runs(6), 3)
    )


class GroupedQueries(nn.Module):
    """Four heads of three features for keys and values; each is read by two for queries."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 24), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(24, 6)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("auto", [False, True])
def test_a_head_is_worth_all_that_leaves_with_it(auto):
    """In blocks of whole heads, or in single rows, all of which are worth their head."""
    model = randomize(GroupedQueries())
    slices = [
        *rows_and_shift("q", indices=runs(4, 6)),
        *rows_and_shift("k", "v", indices=runs(4, 3)),
        ("out.weight", 1, runs(4, 6)),
    ]
    norms = expected(model, slices)
    config_list = [{"op_names": ["q", "k", "v"], "sparse_ratio": 0.5}]
    if auto:
        config_list = tersor.auto_set_dependency_group_ids(model, config_list, FLAT)
    scores, masks = pruned(model, config_list, FLAT, normalize=None)
    for name, size in (("q", 6), ("k", 3), ("v", 3)):
        of_blocks = norms if auto else norms.repeat(size)
        np.testing.assert_allclose(scores[f"{name}.weight"].ravel(), of_blocks, rtol=1e-5)
        assert gone(masks[name]["weight"]) == lowest(norms, runs(4, size), 2)
    scores, _ = pruned(model, config_list, FLAT)
    assert scores["q.weight"].mean() == pytest.approx(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 10, batch_first=True)
        self.fc = nn.Linear(10, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


def test_where_rows_and_columns_of_a_unit_cross_an_element_counts_once():
    model = randomize(Recurrent())
    gates = np.arange(40).reshape(4, 10).T
    rows = [(f"lstm.{kind}_{part}_l0", 0, gates) for kind in ("weight", "bias") for part in ("ih", "hh")]
    norms = expected(model, [*rows, ("lstm.weight_hh_l0", 1, runs(10)), ("fc.weight", 1, runs(10))], p=1)
    config_list = [{"op_names": ["lstm"], "target_names": ["weight_ih_l0", "weight_hh_l0"], "sparse_ratio": 0.5}]
    scores, masks = pruned(model, config_list, FLAT, p=1, normalize=None)
    for target in ("weight_ih_l0", "weight_hh_l0"):
        np.testing.assert_allclose(scores[f"lstm.{target}"].ravel(), np.tile(norms, 4), rtol=1e-5)
        assert gone(masks["lstm"][target]) == lowest(norms, gates, 5)


class Square(nn.Module):
    """A stream to which a square layer adds, so that rows and columns of its weight leave together."""

    def __init__(self):
        super().__init__()
        self.first, self.square, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.square(torch.relu(x)))


@pytest.mark.parametrize("size", [1, 2])
def test_blocks_of_several_channels_are_worth_what_leaves_with_all_of_them(size):
    model = randomize(Square())
    pairs = runs(8 // size, size)
    slices = [*rows_and_shift("first", "square", indices=pairs), ("square.weight", 1, pairs), ("last.weight", 1, pairs)]
    shared = {"sparse_ratio": 0.5, "granularity": [[size], "back", -1], "dependency_group_id": "stream"}
    scores, masks = pruned(model, [{"op_names": ["first", "square"], **shared}], FLAT, normalize=None)
    for name in ("first", "square"):
        np.testing.assert_allclose(scores[f"{name}.weight"].ravel(), expected(model, slices), rtol=1e-5)
        assert gone(masks[name]["weight"]) == lowest(expected(model, slices), pairs, 4 // size)


def test_input_channels_are_worth_what_leaves_with_them():
    model = randomize(Plain())
    scores, masks = pruned(
        model, [{"op_names": ["3"], "sparse_ratio": 0.5, "granularity": "in_channel"}], X, normalize=None
    )
    norms = expected(model, PLAIN["0"])
    np.testing.assert_allclose(scores["3.weight"].ravel(), norms, rtol=1e-5)
    assert gone(masks["3"]["weight"], 1) == lowest(norms, runs(8), 4)


class Tied(nn.Module):
    """The decoder is the embedding: each of its columns is one slice, not two."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 11, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, ids):
        return self.decoder(self.fc(torch.relu(self.embed(ids))))


def test_a_tied_parameter_counts_once():
    model = randomize(Tied())
    slices = [("embed.weight", 1, runs(6)), *rows_and_shift("fc", indices=runs(6)), ("fc.weight", 1, runs(6))]
    scores, _ = pruned(model, [{"op_names": ["fc"], "sparse_ratio": 0.5}], IDS, p=1, normalize=None)
    np.testing.assert_allclose(scores["fc.weight"].ravel(), expected(model, slices, p=1), rtol=1e-5)


class Summed(nn.Module):
    """Nothing but the rows of one weight belongs to its channels: they are summed up."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8, bias=False)

    def forward(self, x):
        return self.fc(x).sum(-1)


def test_it_is_the_l2_norm_where_only_the_writer_leaves():
    model = randomize(Summed())
    config_list = [{"op_names": ["fc"], "sparse_ratio": 0.5}]
    (scores, masks) = pruned(model, config_list, FLAT, normalize=None)
    weight = model.fc.weight.detach().double().numpy()
    np.testing.assert_allclose(scores["fc.weight"].ravel(), np.sqrt((weight**2).sum(1)), rtol=1e-6)
    pruner = L2NormPruner(model, config_list, example_inputs=FLAT)
    _, by_l2 = pruner.compress()
    pruner.unwrap_model()
    assert torch.equal(masks["fc"]["weight"], by_l2["fc"]["weight"])


@pytest.mark.parametrize("block", [(2, 4), (1, 1)])
def test_blocks_that_are_no_slices_are_worth_their_own_norm(block):
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    config_list = [{"op_names": ["2"], "sparse_ratio": 0.5, "granularity": list(block)}]
    scores, masks = pruned(model, config_list, FLAT, normalize=None)
    blocks = model[2].weight.detach().double().numpy().reshape(4 // block[0], block[0], 8 // block[1], block[1])
    norms = np.sqrt((blocks**2).sum((1, 3)))
    np.testing.assert_allclose(scores["2.weight"], norms, rtol=1e-6)
    kept = np.kron(norms > np.median(norms), np.ones(block)).astype(bool)
    assert torch.equal(masks["2"]["weight"], torch.from_numpy(kept))


class Joined(nn.Module):
    """``left`` is an output too, and so are the first four channels of ``whole``."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.whole, self.fc = (nn.Linear(*size) for size in [(6, 4), (6, 6), (6, 10), (10, 2)])

    def forward(self, x):
        left = self.left(x)
        return self.fc(torch.cat([left, self.right(x)], -1) + self.whole(x)), left


def test_what_cannot_leave_stays_and_does_not_count():
    model = randomize(Joined())
    slices = [
        *rows_and_shift("right", indices=runs(6)),
        *rows_and_shift("whole", indices=runs(6, start=4)),
        ("fc.weight", 1, runs(6, start=4)),
    ]
    norms = expected(model, slices)
    config_list = tersor.auto_set_dependency_group_ids(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], FLAT)
    scores, masks = pruned(model, config_list, FLAT)
    np.testing.assert_allclose(scores["whole.weight"].ravel()[4:], norms / norms.mean(), rtol=1e-5)
    assert gone(masks["whole"]["weight"]) == lowest(norms, runs(6, start=4), 3)
    assert "left" not in masks


def test_outputs_are_worth_their_own_norm():
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    config_list = [{"op_names": ["1"], "target_settings": {"_output_0": {"sparse_ratio": 0.5}}}]
    pruner = GroupNormPruner(model, config_list, example_inputs=FLAT, normalize=None)
    scores = pruner.importance()
    _, masks = pruner.compress()
    pruner.unwrap_model()
    weight, bias = (tensor.detach().double().numpy() for tensor in (model[0].weight, model[0].bias))
    norms = np.sqrt((np.maximum(FLAT.double().numpy() @ weight.T + bias, 0) ** 2).sum((0, 1)))
    np.testing.assert_allclose(scores["1._output_0"].ravel(), norms, rtol=1e-5)
    assert set((~masks["1"]["_output_0"].view(8)).nonzero().flatten().tolist()) == lowest(norms, runs(8), 4)


def test_a_global_group_compares_shares_of_the_mean():
    """Layers of one size whose scales differ by a hundred share their ratio as if they did not."""
    model = randomize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[4].weight.mul_(100)
    norms = [
        expected(model, [*rows_and_shift(name, indices=runs(8)), (f"{reader}.weight", 1, runs(8))])
        for name, reader in (("0", "2"), ("2", "4"))
    ]
    config_list = [{"op_names": ["0", "2"], "sparse_ratio": 0.5, "global_group_id": "all"}]
    x = torch.randn(2, 8)
    for normalize, compared in (("mean", [own / own.mean() for own in norms]), (None, norms)):
        _, masks = pruned(model, config_list, x, normalize=normalize)
        order = np.argsort(np.concatenate(compared), kind="stable")
        order = [index for index in order if index != np.argmax(compared[0])]  # one of each layer stays
        assert gone(masks["0"]["weight"]) == {index for index in order[:8] if index < 8}
        assert gone(masks["2"]["weight"]) == {index - 8 for index in order[:8] if index >= 8}
    assert len(gone(masks["0"]["weight"])) == 7


def test_a_model_of_zeros():
    model = Plain().eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    scores, masks = pruned(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], X)
    assert not scores["0.weight"].any()
    assert gone(masks["0"]["weight"]) == {0, 1, 2, 3}


def test_beside_another_pruner_what_is_known_of_the_model_is_shared():
    model = randomize(Plain())
    first = L2NormPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.5}], example_inputs=X)
    second = GroupNormPruner.from_compressor(first, [{"op_names": ["0"], "sparse_ratio": 0.5}], p=1)
    _, masks = second.compress()
    second.unwrap_model()
    assert gone(masks["0"]["weight"]) == lowest(expected(model, PLAIN["0"], p=1), runs(8), 4)


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_an_element_belongs_to_the_groups_of_all_its_indices_and_to_each_once(p):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(5, 6, 4))
    along = {dim: generator.integers(-1, 3, size=size) for dim, size in ((0, 5), (1, 6), (2, 4))}
    norms = []
    for group in range(3):
        inside = np.zeros(weight.shape, dtype=bool)
        for dim, of in along.items():
            np.moveaxis(inside, dim, 0)[of == group] = True
        norms.append((np.abs(weight[inside]) ** p).sum() ** (1 / p))
    members = [(torch.from_numpy(weight), {dim: torch.from_numpy(of) for dim, of in along.items()})]
    np.testing.assert_allclose(group_norms(members, 3, p).numpy(), norms, rtol=1e-12)


def test_narrow_types_do_not_overflow():
    members = [(torch.full((2, 100), 500.0, dtype=torch.float16), {0: torch.tensor([0, 1])})] * 2
    assert group_norms(members, 2, p=2).tolist() == pytest.approx([500 * np.sqrt(200)] * 2)


@pytest.mark.parametrize("p", [0.5, 0, float("inf"), float("nan"), "2", True])
def test_orders_of_no_norm_are_refused(p):
    with pytest.raises(InvalidValueError, match=r"^p: .* is no order of a norm. Legal: a finite number from 1"):
        GroupNormPruner(Plain(), [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=X, p=p)


def test_unknown_normalizations_are_refused():
    with pytest.raises(InvalidValueError, match=r"normalize: 'max' .*'mean', None"):
        GroupNormPruner(Plain(), [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=X, normalize="max")


def test_without_example_inputs_no_group_is_known():
    model = Plain()
    with pytest.raises(ConfigError, match=r"example_inputs: .*L2NormPruner"):
        GroupNormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    L2NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}]).unwrap_model()
