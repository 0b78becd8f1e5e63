"""torchvision's networks can be built and run."""

import torch

from tests.torchvision_stub import import_torchvision


def test_networks_run_and_a_second_import_is_the_same():
    torchvision = import_torchvision()
    model = torchvision.models.mobilenet_v2(num_classes=3).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert import_torchvision() is torchvision
