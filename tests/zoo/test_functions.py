"""Functions as modules on networks that others wrote."""

import pytest
import torch

from tersor.graph import functions_as_modules
from tersor.graph.operations import Operation
from tests.torchvision_stub import import_torchvision
from tests.zoo.timm_rows import import_timm


def kinds(model):
    """How many operations of each kind there are."""
    names = [type(module).__name__ for module in model.modules() if isinstance(module, Operation)]
    return {name: names.count(name) for name in names}


def resnet18():
    return import_torchvision().models.resnet18()


def vit_tiny():
    return import_timm().create_model("vit_tiny_patch16_224", pretrained=False, img_size=64)


@pytest.mark.parametrize(
    ("build", "operations"),
    [(resnet18, {"Add": 8}), (vit_tiny, {"Concat": 1, "Add": 25, "Mul": 12, "MatMul": 24})],
)
def test_networks_of_others_compute_what_they_did(build, operations):
    model = build().eval()
    result = functions_as_modules(model, torch.randn(2, 3, 64, 64))
    assert kinds(result) == operations
    assert result.state_dict().keys() == model.state_dict().keys()
    fresh = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected, actual = model(fresh), result(fresh)
    if "MatMul" in operations:  # attention is taken apart
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(actual, expected)
