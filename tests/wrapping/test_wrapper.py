import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tersor.errors import ConflictError, MaskError, UnmatchedError, WrapError
from tersor.targets.activations import replace_output
from tersor.wrapping import Mask, ModelWrappers, TargetStack, is_wrapped
from tersor.wrapping.stack import factorize
from tests.networks import IMAGE, Plain


def half(*shape):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[: shape[0] // 2] = False
    return mask


def test_wrap_and_unwrap_three_times_is_bit_for_bit():
    model = Plain()
    before = copy.deepcopy(model.state_dict())
    parameters, types = list(model.parameters()), [type(module) for module in model.modules()]
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"0": {"weight": [half(8, 1, 1, 1)], "bias": [half(8)], "_input_0": [half(1, 3, 1, 1)]}})
    for _ in range(3):
        wrappers.detach()
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert [type(module) for module in model.modules()] == types
        wrappers.attach()
        assert (model[0].weight[:4] == 0).all()
    wrappers.detach()


def test_an_optimizer_made_before_trains_the_latent_weights():
    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    latent, x = model.weight.detach().clone(), torch.randn(3, 4)
    wrappers = ModelWrappers(model)
    mask = torch.rand(6, 4) > 0.5
    wrappers.replace_masks({"": {"weight": [mask]}})
    model(x).pow(2).sum().backward()
    optimizer.step()
    wrappers.detach()
    assert torch.equal(model.weight[~mask], latent[~mask])
    assert not torch.equal(model.weight[mask], latent[mask])


def test_bake_writes_the_masked_values():
    model = Plain()
    weight = model[0].weight
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"0": {"weight": [half(8, 1, 1, 1)]}})
    wrappers.detach(bake=True)
    assert model[0].weight is weight
    assert (weight[:4] == 0).all()
    assert (weight[4:] != 0).all()


def test_channel_masks_cost_next_to_nothing():
    stack = Mask("w")
    stack.set([half(512, 1, 1, 1) & half(1, 256, 1, 1).expand(512, 256, 1, 1)])
    assert sum(factor.numel() for factor in stack.factors) == 512


@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 4, 5, 2)])
def test_factors_multiply_to_the_mask(shape):
    generator = torch.Generator().manual_seed(1)
    for share in (0.0, 0.3, 1.0):
        mask = torch.rand(shape, generator=generator) >= share
        product = torch.ones(shape, dtype=torch.bool)
        for factor in factorize(mask):
            product &= factor
        assert torch.equal(product, mask)


def test_add_puts_a_large_negative_number():
    mask = Mask("scores", "add", value=-50.0)
    mask.set([torch.tensor([[True, False]])])
    assert mask(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, -48.0]]
    mask.method = "bypass"
    assert mask(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 2.0]]


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    logits: torch.Tensor
    extra: object = None


@pytest.mark.parametrize(
    ("output", "key", "expected"),
    [
        (1, "0", 2),
        ((1, None), "0", (2, None)),
        ([1, 5], "1", [1, 6]),
        (Pair(1, None), "first", Pair(2, None)),
        (Pair(1, 3), "1", Pair(1, 4)),
        ({"a": 1, "b": 2}, "b", {"a": 1, "b": 3}),
        ({"a": 1, "b": 2}, "0", {"a": 2, "b": 2}),
        (Output(1), "logits", Output(2)),
        (Output(1), "0", Output(2)),
    ],
)
def test_outputs_keep_their_type(output, key, expected):
    changed = replace_output(output, key, lambda value: value + 1)
    assert changed == expected
    assert type(changed) is type(expected)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x, *, scale=None):
        return self.fc(x) * (1.0 if scale is None else scale), None


class Caller(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Keywords()

    def forward(self, x):
        return self.inner(x, scale=x.sum())


@pytest.mark.parametrize("target", ["_input_0", "_input_x"])
def test_inputs_by_position_and_name(target):
    model, x = Caller(), torch.ones(1, 2)
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"inner": {target: [torch.tensor([[True, False]])]}})
    expected = model.inner.fc(torch.tensor([[1.0, 0.0]])) * 2
    value, nothing = model(x)
    wrappers.detach()
    assert nothing is None
    assert torch.equal(value, expected)


def test_keyword_only_arguments():
    model, x = Caller(), torch.ones(1, 2)
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"inner": {"_input_scale": [torch.tensor(False)]}})
    value, _ = model(x)
    wrappers.detach()
    assert (value == 0).all()


def test_recurrent_layers_see_the_masked_weights():
    model, x = nn.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3)
    mask = torch.rand(12, 3) > 0.5
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.weight_ih_l0.mul_(mask)
    plain = model(x)[0]
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"": {"weight_ih_l0": [mask]}})
    torch.testing.assert_close(model(x)[0], reference(x)[0])
    wrappers.detach()
    assert torch.equal(model(x)[0], plain)


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"embed": {"weight": [half(5, 1)]}})
    wrappers.detach()
    assert model["head"].weight is model["embed"].weight


def test_another_parametrization_survives():
    model = parametrizations.weight_norm(nn.Linear(3, 4))
    reference = model.weight.detach().clone()
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"": {"bias": [half(4)]}})
    wrappers.detach()
    assert torch.equal(model.weight, reference)
    assert "weight" in model.parametrizations
    parametrize.remove_parametrizations(model, "weight")


def test_deepcopy_and_compile_of_a_wrapped_model():
    model, x = Plain().eval(), torch.randn(IMAGE)
    wrappers = ModelWrappers(model)
    wrappers.replace_masks({"0": {"weight": [half(8, 1, 1, 1)], "_output_0": [half(1, 8, 1, 1)]}})
    clone = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(clone(x), expected)
    assert clone[0].parametrizations.weight.original is not model[0].parametrizations.weight.original
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.compiler.reset()
    wrappers.mask("0", "bias")
    wrappers.detach()
    assert not any(isinstance(module, TargetStack) for module in model.modules())
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(clone(x), expected)  # it shared a class with the model, from which torch takes properties
    assert clone[0].weight.abs().sum() < model[0].weight.abs().sum()


def test_errors():
    model = Plain()
    wrappers = ModelWrappers(model)
    with pytest.raises(UnmatchedError, match="no module 'convv'"):
        wrappers.mask("convv", "weight")
    with pytest.raises(UnmatchedError, match=r"no tensor 'weigth'.*Did you mean 'weight'"):
        wrappers.mask("0", "weigth")
    with pytest.raises(MaskError, match=r"\(7, 1, 1, 1\).*\(8, 3, 3, 3\)"):
        wrappers.check_masks({"0": {"weight": half(7, 1, 1, 1)}})
    wrappers.mask("0", "weight")
    with pytest.raises(ConflictError, match="mask stage"):
        wrappers["0"].stack("weight").add(Mask("again"))
    with pytest.raises(WrapError, match="from_compressor"):
        ModelWrappers(model)
    wrappers.detach()


def test_a_wrapper_of_an_output_alone_is_seen():
    model = Plain()
    wrappers = ModelWrappers(model)
    wrappers.mask("0", "_output_0")
    with pytest.raises(WrapError, match="from_compressor"):
        ModelWrappers(model)
    wrappers.detach()
    assert not is_wrapped(model)


def test_masks_travel_in_the_state_dict():
    first, second = Plain(), Plain()
    wrappers = [ModelWrappers(first), ModelWrappers(second)]
    wrappers[0].replace_masks({"0": {"weight": [half(8, 1, 1, 1), half(1, 3, 1, 1)], "bias": [half(8)]}})
    for target in ("weight", "bias"):
        wrappers[1].mask("0", target)
    second.load_state_dict(first.state_dict())
    assert torch.equal(wrappers[1].masks()["0"]["weight"], wrappers[0].masks()["0"]["weight"])
    assert torch.equal(second[0].weight, first[0].weight)
    for wrapper in wrappers:
        wrapper.detach()


def test_what_hangs_on_a_gradient_stays():
    """DistributedDataParallel keeps each gradient's accumulator, and masks come in the midst of training."""
    layer = nn.Linear(4, 6)
    accumulator = layer.weight.view_as(layer.weight).grad_fn.next_functions[0][0]
    seen = []
    accumulator.register_hook(lambda *_: seen.append(layer.parametrizations.weight.original.grad is not None))
    wrappers = ModelWrappers(layer)
    for _ in range(2):
        wrappers.replace_masks({"": {"weight": [half(6, 1)]}})
        layer(torch.ones(2, 4)).sum().backward()
        wrappers.detach()
        wrappers.attach()
    assert seen == [True, True]
    wrappers.detach()
