"""torchvision's networks with everything drawn at random: statistics, shifts and biases that are zero hide errors."""

from __future__ import annotations

import torch
from torch import nn


def build(name: str, *, biases: bool = True) -> nn.Module:
    """One network in eval mode; ``biases`` gives every convolution one, torchvision leaves them out before a norm."""
    torch.manual_seed(0)
    model: nn.Module = _torchvision().models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None and biases:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def _torchvision() -> object:
    """Torchvision beside a CPU build of torch: two operators that its compiled part would bring are declared first."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision.library = library  # type: ignore[attr-defined]
        import torchvision
    return torchvision
