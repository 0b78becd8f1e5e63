"""The small model against the masked one, where the masked one is made by hand."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import EmptyLayerError, MaskError, TraceError, VerificationError, WrapError
from tersor.graph import groups
from tersor.speedup import ModelSpeedup
from tersor.storage import save_masks
from tersor.wrapping import ModelWrappers
from tests.networks import IMAGE, IMAGE_NETWORKS, LiteralView, Plain, Residual, Separable, Tokens, randomize


def random_masks(model, x, share=0.5, seed=0):
    """Masks that remove a share of the choices of every free group, as a user with dependency groups would."""
    coupling = groups(model, x)
    masks = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2:
            continue
        classes = coupling.classes_along(f"{name}.weight", 0)
        free = np.unique(classes[~coupling.frozen[classes]])
        drop = (
            np.random.default_rng(seed + int(free[0])).permutation(free)[: int(len(free) * share)]
            if len(free) > 1
            else []
        )
        keep = torch.from_numpy(~np.isin(classes, drop)).reshape([-1] + [1] * (weight.dim() - 1))
        masks[name] = {"weight": keep}
    return masks


def silence(model, masks):
    """The masked model by hand, in float64: whatever reads a removed channel gets a weight of zero for it."""
    masked = copy.deepcopy(model).double()
    kept = groups(model, torch.randn(IMAGE)).complete(masks)
    with torch.no_grad():
        for name, tensor in masked.named_parameters():
            module, _, target = name.rpartition(".")
            for factor in kept.get(module, {}).get(target, ()):
                tensor.mul_(factor)
    return masked


@pytest.mark.parametrize("network", IMAGE_NETWORKS)
def test_small_equals_masked_at_another_batch_size(network):
    model, x = randomize(network()), torch.randn(IMAGE)
    masks = random_masks(model, x)
    expected = silence(model, masks)
    before = sum(p.numel() for p in model.parameters())
    speedup = ModelSpeedup(model, x, masks)
    small = speedup.speedup_model()
    fresh = torch.randn(5, *IMAGE[1:])
    with torch.no_grad():
        reference, actual = expected(fresh.double()), small(fresh).double()
    assert float((actual - reference).abs().max() / reference.abs().max()) < 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.6 * before
    assert speedup.report.error < 1e-5


def test_a_removed_channel_that_is_not_zero_is_exact():
    """A masked row still carries its batch norm's shift, and a gate's sigmoid(0) is a half."""
    model = randomize(Separable())
    rows = torch.ones(12, 1, 1, 1, dtype=torch.bool)
    rows[[1, 4, 7]] = False
    masks = {name: {"weight": rows} for name in ("expand", "depthwise", "excite")}
    x = torch.randn(IMAGE)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for reader in (reference.squeeze, reference.project):
            reader.weight[:, [1, 4, 7]] = 0
    expected = reference(x)
    small = ModelSpeedup(model, x, masks).speedup_model()
    assert small.depthwise.groups == small.depthwise.in_channels == 9
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-6)


def test_modules_parameters_and_flags_stay():
    model = randomize(Plain()).train()
    model[0].weight.requires_grad_(False)
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    types = [type(module) for module in model.modules()]
    small = ModelSpeedup(model, torch.randn(IMAGE), random_masks(model, torch.randn(IMAGE))).speedup_model()
    handle.remove()
    assert small is model
    assert calls
    assert [type(module) for module in small.modules()] == types
    assert all(parameters[name] is parameter for name, parameter in small.named_parameters())
    assert all(module.training for module in small.modules())
    assert not small[0].weight.requires_grad
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == 4
    small(torch.randn(IMAGE)).sum().backward()
    assert small[3].weight.grad.shape == small[3].weight.shape


def test_gradients_are_cut_alike():
    model = randomize(Plain())
    model(torch.randn(IMAGE)).sum().backward()
    grad = model[0].weight.grad.clone()
    mask = torch.ones(8, 1, 1, 1, dtype=torch.bool)
    mask[:3] = False
    ModelSpeedup(model, torch.randn(IMAGE), {"0": {"weight": mask}}).speedup_model()
    assert torch.equal(model[0].weight.grad, grad[3:])


def test_what_cannot_leave_is_zero_and_reported():
    model, x = randomize(Residual()), torch.randn(IMAGE)
    mask = torch.ones(8, 1, 1, 1, dtype=torch.bool)
    mask[:2] = False
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.stem.weight[:2] = 0
    speedup = ModelSpeedup(model, x, {"stem": {"weight": mask}})
    small = speedup.speedup_model()
    (left,) = speedup.report.left_alone
    assert (left.target, left.count) == ("stem.weight dim 0", 2)
    assert "other layers" in left.reason
    torch.testing.assert_close(small(x), masked(x))


def test_tokens_keep_their_width_and_lose_their_hidden_units():
    model = randomize(Tokens())
    ids = torch.randint(0, 11, (2, 4))
    mask = torch.ones(10, 1, dtype=torch.bool)
    mask[::2] = False
    small = ModelSpeedup(model, ids, {"fc1": {"weight": mask}}).speedup_model()
    assert (small.fc1.out_features, small.fc2.in_features, small.embed.embedding_dim) == (5, 5, 6)


@pytest.mark.parametrize("sizes", [(-1, 128), (None, 128), (None, -1)])
def test_a_literal_size_in_a_view_is_rewritten(sizes):
    class View(LiteralView):
        def forward(self, x):
            x = nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 4)
            return self.fc(x.view(*(x.size(0) if size is None else size for size in sizes)))

    model, x = randomize(View()), torch.randn(IMAGE)
    masks = random_masks(model, x)
    expected = silence(model, masks)
    speedup = ModelSpeedup(model, x, masks)
    with pytest.warns(UserWarning, match="GraphModule") if 128 in sizes else nullcontext():
        small = speedup.speedup_model()
    fresh = torch.randn(5, *IMAGE[1:])
    assert isinstance(small, torch.fx.GraphModule) == (128 in sizes)
    assert (small.conv.out_channels, small.fc.in_features) == (4, 64)
    torch.testing.assert_close(small(fresh), expected(fresh.double()).float(), rtol=1e-5, atol=1e-6)
    assert not small.training


class HardCoded(nn.Module):
    """A result that depends on the channel count, so that it changes with it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.fc(x.sum((2, 3)) / x.shape[1])


def test_a_count_in_the_code_is_found_and_nothing_changes():
    model, x = randomize(HardCoded()), torch.randn(IMAGE)
    before, reference = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(VerificationError, match=r"fc .relative error.*x\.shape\[1\]"):
        ModelSpeedup(model, x, random_masks(model, x)).speedup_model()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.conv.out_channels == 8
    assert torch.equal(model(x), reference)


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: -x if x.mean() < 0.5 else x,
        lambda x: x * 2 if x.shape[0] > 3 else x,
        lambda x: x * max(x.shape[0], 3),
        lambda x: torch.cat([x[i : i + 1] for i in range(x.shape[0])]),
    ],
)
def test_a_model_that_decides_on_values_or_the_batch_is_not_replaced_by_a_graph(decide):
    class Deciding(LiteralView):
        def forward(self, x):
            return super().forward(decide(x))

    model, x = randomize(Deciding()), torch.randn(IMAGE)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(VerificationError, match="fc"):
        ModelSpeedup(model, x, random_masks(model, x)).speedup_model()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_partial_masks_are_burnt_in():
    model, x = randomize(Plain()), torch.randn(IMAGE)
    mask = torch.rand_like(model[3].weight) > 0.5
    small = ModelSpeedup(model, x, {"3": {"weight": mask}}).speedup_model()
    assert torch.equal(small[3].weight == 0, ~mask)


def test_masks_from_a_file(tmp_path):
    model, x = randomize(Plain()), torch.randn(IMAGE)
    masks = random_masks(model, x)
    save_masks(masks, tmp_path / "masks.safetensors")
    small = ModelSpeedup(model, x, tmp_path / "masks.safetensors").speedup_model()
    assert small[0].out_channels == 4


@pytest.mark.parametrize(
    ("masks", "error", "words"),
    [
        ({"7": {"weigth": torch.ones(7, 96)}}, MaskError, "Did you mean '7.weight'"),
        ({"conv9": {"weight": torch.ones(7, 96)}}, MaskError, "conv9.weight"),
        ({"7": {"weight": torch.ones(7, 95)}}, MaskError, r"\(7, 95\).*\(7, 96\)"),
        ({"7": {"weight": torch.full((7, 96), 0.5)}}, MaskError, "0 .removes. and 1 .keeps."),
        ({"7": {"weight": torch.zeros(7, 96)}}, EmptyLayerError, "all 7"),
    ],
)
def test_wrong_masks_leave_the_model_alone(masks, error, words):
    model = randomize(Plain())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        ModelSpeedup(model, torch.randn(IMAGE), masks).speedup_model()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_wrapped_model_is_refused():
    model = Plain()
    wrappers = ModelWrappers(model)
    wrappers.mask("0", "weight")
    with pytest.raises(WrapError, match="unwrap_model"):
        ModelSpeedup(model, torch.randn(IMAGE), {})
    wrappers.detach()


def test_a_linear_model_in_double_precision():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    mask = torch.ones(8, 1, dtype=torch.bool)
    mask[5] = False
    speedup = ModelSpeedup(model, torch.randn(3, 4, dtype=torch.float64), {"0": {"weight": mask}})
    assert speedup.speedup_model()[2].weight.dtype is torch.float64
    assert speedup.report.error < 1e-14
    assert speedup.report.shapes["0.weight"] == ((8, 4), (7, 4))


def test_a_graph_checks_what_the_code_decided():
    class Deciding(LiteralView):
        def forward(self, x):
            return super().forward(x * 2 if x.shape[1] > 2 else x)

    model, x = randomize(Deciding()), torch.randn(IMAGE)
    masks = random_masks(model, x)
    with pytest.warns(UserWarning, match="GraphModule"):
        small = ModelSpeedup(model, x, masks).speedup_model()
    assert small(torch.randn(11, *IMAGE[1:])).shape[0] == 11
    with pytest.raises(TraceError, match=r"'gt' of the model gives True, and here it gives False"):
        small(torch.randn(IMAGE)[:, :2])
