"""The alternating direction method of multipliers, against its three updates by hand in float64."""

import pytest
import torch
from torch import nn

from tersor.errors import ConflictError, InvalidValueError
from tersor.pruning import ADMMPruner
from tests.pruning.training import X, evaluator_of, network, removed_of

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


def project(matrix, coarse):
    """The half of the elements, or of the rows, with the largest norm."""
    scores = matrix.norm(dim=1) if coarse else matrix.abs().flatten()
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True)[: len(scores) - len(scores) // 2]] = True
    return matrix * (keep[:, None] if coarse else keep.view_as(matrix))


@pytest.mark.parametrize("coarse", [True, False])
def test_the_updates_are_the_papers(coarse):
    """Gradient descent on a quadratic loss, two rounds of three steps."""
    torch.manual_seed(0)
    start, goal, rho, lr = torch.randn(4, 3), torch.randn(4, 3), 0.5, 0.1
    weight = start.double()
    auxiliary, dual = project(weight, coarse), torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(2):
        for _ in range(3):
            weight = weight - lr * ((weight - goal.double()) + rho * (weight - auxiliary + dual))
        auxiliary = project(weight + dual, coarse)
        dual = dual + weight - auxiliary

    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(start)
    granularity = "coarse-grained" if coarse else "fine-grained"
    pruner = ADMMPruner(layer, LINEAR, iterations=2, training_steps=3, granularity=granularity, rho=rho)
    pruner.start()
    optimizer = torch.optim.SGD([layer.parametrizations.weight.original], lr=lr)
    for step in range(6):
        assert (pruner.get_masks() == {}) == (step < 6)
        optimizer.zero_grad()
        pruner.loss((layer.weight - goal).square().sum() / 2).backward()
        optimizer.step()
        pruner.step()
    masks = pruner.get_masks()
    torch.testing.assert_close(pruner._dual["weight"].double(), dual, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pruner._auxiliary["weight"].double(), auxiliary, rtol=1e-4, atol=1e-6)
    pruner.unwrap_model()
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(masks[""]["weight"], project(weight, coarse) != 0)


def test_less_is_lost_when_the_weak_half_leaves_than_without_it():
    lost = {}
    for rho in (1e-12, 1.0):
        model = network()
        config_list = [{"op_names": ["3"], "sparse_ratio": 0.5}]
        pruner = ADMMPruner(model, config_list, evaluator_of(model), 4, 20, "coarse-grained", rho=rho)
        _, masks = pruner.compress()
        assert removed_of(pruner) == {"3.weight": 3}
        pruner.unwrap_model()
        weight = model[3].weight.detach()
        lost[rho] = float((weight * ~masks["3"]["weight"]).norm() / weight.norm())
    assert lost[1.0] < 0.3 * lost[1e-12]


def test_a_target_has_a_rho_of_its_own():
    model = network()
    config_list = [{"op_names": ["0"], "sparse_ratio": 0.5, "rho": 2.0}, {"op_names": ["3"], "sparse_ratio": 0.5}]
    pruner = ADMMPruner(model, config_list, training_steps=2, rho=0.5, example_inputs=X[:2])
    pruner.start()
    penalty = pruner.loss(torch.zeros(()))
    expected = 0.0
    for name, rho in (("0", 2.0), ("3", 0.5)):
        weight = model.get_submodule(name).parametrizations.weight.original.detach().double()
        smallest = weight.abs().flatten().sort().values[: weight.numel() // 2]
        expected += rho / 2 * float(smallest.square().sum())
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    pruner.unwrap_model()


def test_refusals():
    with pytest.raises(InvalidValueError, match="granularity: 'fine' is unknown"):
        ADMMPruner(nn.Linear(3, 4), LINEAR, granularity="fine")
    with pytest.raises(InvalidValueError, match="iterations: 0"):
        ADMMPruner(nn.Linear(3, 4), LINEAR, iterations=0)
    with pytest.raises(InvalidValueError, match="rho: 0"):
        ADMMPruner(nn.Linear(3, 4), LINEAR, rho=0)
    config_list = [{"op_names": ["0"], "target_names": ["_output_0"], "sparse_ratio": 0.5}]
    with pytest.raises(ConflictError, match=r"0\._output_0: .*no latent value"):
        ADMMPruner(network(), config_list, example_inputs=X[:2])
