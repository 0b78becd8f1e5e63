"""torchvision's networks beside a CPU build of torch.

The wheel's compiled operators need CUDA libraries; without them its import fails because two operators that it
describes to torch do not exist. No classification network calls them, so declaring them is enough.
"""

import sys
from types import ModuleType

import pytest
import torch

DECLARED: list[torch.library.Library] = []  # a library that is collected takes its operators along


def import_torchvision() -> ModuleType:
    """torchvision with its ``models``; skips the test or the test file where it is not installed."""
    reason = "torchvision is not installed (pip install --no-deps -c constraints.txt torchvision)"
    try:
        return pytest.importorskip("torchvision", reason=reason)
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)
        return pytest.importorskip("torchvision", reason=reason)
