"""What a compressor leaves behind is a copy: it goes on unharmed."""

import copy

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault

from tersor.deploy.plain import plain_copy
from tersor.errors import InvalidValueError
from tersor.quantization import DoReFaQuantizer, LsqQuantizer, PtqQuantizer, QATQuantizer
from tersor.wrapping import is_wrapped
from tests.deploy.lowered import GROUPS, Net, batches, entries, ptq, simulated


def with_groups(config_list):
    return [{**entry, "fuse_names": GROUPS} for entry in config_list]


KINDS = [
    (QATQuantizer, with_groups(entries())),
    (LsqQuantizer, entries("int4", "uint4", "symmetric")),
    (DoReFaQuantizer, entries("int4", "uint4", None)),
]


def final_weights(kind, config_list, between):
    """Train in a bare loop, with something in the midst of it."""
    torch.manual_seed(3)
    model = Net()
    quantizer = kind(model, config_list)
    quantizer.start()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for index in range(6):
        if index == 3:
            between(quantizer)
        optimizer.zero_grad()
        model(batches()[index % 3]).square().mean().backward()
        optimizer.step()
        quantizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, quantizer.get_calibration_config()


@pytest.mark.parametrize(("kind", "config_list"), KINDS)
def test_training_goes_on_to_the_bit(kind, config_list):
    taken = []
    undisturbed, calibration = final_weights(kind, config_list, lambda quantizer: None)
    disturbed, other = final_weights(kind, config_list, lambda quantizer: taken.append(plain_copy(quantizer)))
    assert list(disturbed) == list(undisturbed)
    assert all(torch.equal(disturbed[name], tensor) for name, tensor in undisturbed.items())
    for module, targets in calibration.items():
        for target, said in targets.items():
            assert torch.equal(said["scale"], other[module][target]["scale"])
    assert not is_wrapped(taken[0].model)


def test_hooks_stay_in_their_order():
    model, seen = Net(), []
    quantizer = ptq(model, entries(), batches())
    model.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = batches()[0]
    model.eval()
    model(x)
    plain_copy(quantizer)
    model(x)
    assert torch.equal(seen[0], seen[-1])
    assert len(torch.unique(seen[0])) <= 256  # it sees what is rounded, before and after
    assert list(model.fc._forward_pre_hooks) == sorted(model.fc._forward_pre_hooks)


def test_the_copy_holds_what_is_simulated():
    model = Net()
    quantizer = ptq(model, entries("int4"), batches())
    plain = plain_copy(quantizer)
    assert not plain.model.training
    assert model.training
    assert torch.equal(plain.model.conv.weight, model.conv.weight)
    assert not torch.equal(plain.model.conv.weight, quantizer.wrappers["conv"].tensor("weight"))
    assert set(plain.calibration) == {"conv", "conv2", "fc", "head"}
    plain.model.conv.weight.data.zero_()
    assert bool(model.conv.weight.any())


def test_what_has_no_scales_is_refused():
    with pytest.raises(InvalidValueError, match=r"conv\.weight: has no scales yet.*PtqQuantizer\.compress"):
        plain_copy(PtqQuantizer(Net(), entries(), calibration=batches()))
    model = Net()
    waiting = QATQuantizer(model, [{**entry, "quant_start_step": 50} for entry in entries()])
    waiting.start()
    model(batches()[0])
    with pytest.raises(InvalidValueError, match="has no scales yet"):
        plain_copy(waiting)


def test_an_unwrapped_compressor_is_refused():
    quantizer = ptq(Net(), entries(), batches())
    expected = simulated(quantizer.model, batches()[0])
    quantizer.unwrap_model()
    with pytest.raises(InvalidValueError, match=r"unwrapped.*wrap_model\(\) first"):
        plain_copy(quantizer)
    quantizer.wrap_model()
    assert torch.equal(simulated(quantizer.model, batches()[0])[0], expected[0])
    assert copy.deepcopy(plain_copy(quantizer).model)(batches()[0]).shape == (6, 3)
