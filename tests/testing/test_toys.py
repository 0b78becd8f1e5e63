"""The toys are what their docstrings say."""

import torch

from tersor.graph import groups
from tersor.quantization import FakeQuantize, Quantizer
from tersor.testing.toys import BATCHES, EXAMPLE, FRESH, MidRise, ToyDistiller, ToyNetwork, ToyQuantizer, ToyTraining


def test_the_network_is_the_same_for_one_seed_and_no_two_values_are_alike():
    state = torch.get_rng_state()
    first, second, other = ToyNetwork(), ToyNetwork(), ToyNetwork(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.left.weight, other.left.weight)
    values = torch.cat([parameter.flatten() for parameter in first.parameters()])
    assert len(values.unique()) == len(values) == 1181


def test_what_leaves_together():
    free = [group for group in groups(ToyNetwork(), EXAMPLE).groups if group.frozen is None]
    written = {tuple(of.name for of in group.members if of.role == "written"): group.size for group in free}
    assert written == {("stem.weight", "right.weight"): 8, ("left.weight",): 6, ("hidden.weight",): 10}


def test_training_lowers_the_loss_and_a_loop_of_ones_own_does_the_same():
    model = ToyNetwork()
    training = ToyTraining(model)
    training.evaluator.train(model, max_epochs=5)
    (losses,) = training.runs
    assert len(losses) == 5 * len(BATCHES) == 20
    assert sum(losses[-4:]) < sum(losses[:4])
    assert model(FRESH).shape == (5, 3)

    own = ToyNetwork()
    loop, quantizer = ToyTraining(own), Nothing(own, [{"op_names": ["head"], "target_names": ["weight"]}])
    for number in range(20):
        loop.step(quantizer, number)
    quantizer.unwrap_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own.parameters(), strict=True))


class Bypass(FakeQuantize):
    def forward(self, value):
        return value

    def calibration(self):
        return {}

    def load_calibration(self, calibration):
        pass


class Nothing(Quantizer):
    def fake_quantize(self, target):
        return Bypass()


def test_the_quantizer_never_gives_zero():
    value = torch.tensor([0.0, 0.01, -0.01, 0.125, -1.0])
    assert MidRise()(value).tolist() == [0.0625, 0.0625, -0.0625, 0.1875, -0.9375]
    quantizer = ToyQuantizer(ToyNetwork(), [{"op_names": ["left"], "target_names": ["weight"]}])
    assert quantizer.get_calibration_config() == {"left": {"weight": {"scale": 0.125}}}
    quantizer.unwrap_model()


def test_the_distiller_adds_the_mean_square():
    model = ToyNetwork()
    distiller = ToyDistiller(model, [{"op_names": ["head"]}])
    expected = model(FRESH).square().mean().item()
    assert distiller.loss(torch.tensor(1.0)).item() == torch.tensor(1 + expected).item()
    assert distiller.losses == [expected]
    distiller.unwrap_model()
