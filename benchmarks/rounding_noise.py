"""How far sums in float32 are off where a program rounds values, of the largest value there.

``tersor.deploy`` compares artefacts with a simulation that is shaken by as much (``SHAKEN``). Each stretch of a program
between two roundings is computed again in float64, from the same rounded values; what it gives at the next rounding is
compared. ``python -m benchmarks.run rounding_noise``.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tersor.deploy import engine_config, plain_copy
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE
from tersor.deploy.lowering import lower
from tersor.quantization import PtqQuantizer


class Beside(fx.Interpreter):
    """Runs a program in float32, and beside it in float64 from each rounding on.

    Attributes:
        off: for each rounding the root mean square and the largest difference, of the largest value.
    """

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.off: list[tuple[float, float]] = []
        self._exact: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value in float32."""
        value = super().run_node(n)
        if n.target is QUANTIZE:
            source: Any = n.args[0]
            exact = self._exact[source]
            difference, largest = (self.env[source].double() - exact).abs(), exact.abs().max()
            self.off.append((float(difference.square().mean().sqrt() / largest), float(difference.max() / largest)))
        if n.op == "call_function" and n.target not in (QUANTIZE, DEQUANTIZE):
            assert callable(n.target)
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda node: self._exact[node])
            kwargs = {key: torch.float64 if own is torch.float32 else own for key, own in kwargs.items()}
            self._exact[n] = n.target(*args, **kwargs)
        else:
            self._exact[n] = pytree.tree_map(_wide, value)
        return value


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def networks() -> dict[str, tuple[nn.Module, Any]]:
    """Random networks and inputs."""
    from tests.torchvision_stub import import_torchvision

    torchvision = import_torchvision()
    import timm
    from transformers import BertConfig, BertModel

    images, tokens = torch.randn(2, 3, 96, 96), torch.randint(0, 1000, (2, 24))
    sizes = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    return {
        "ResNet-18": (torchvision.models.resnet18(), images),
        "BERT": (BertModel(sizes), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}),
        "ViT-Tiny": (timm.create_model("vit_tiny_patch16_224", img_size=96), images),
    }


def run() -> dict[str, Any]:
    """The figures of each network."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for name, (model, example) in networks().items():
        prepared, config_list = engine_config(model.eval(), example, "onnxruntime")
        quantizer = PtqQuantizer(prepared, config_list, calibration=[example], observer="minmax")
        quantizer.compress()
        plain = plain_copy(quantizer)
        beside = Beside(lower(plain.model, example, plain.calibration).exported.module())
        with torch.no_grad():
            beside.run(*(example.values() if isinstance(example, dict) else (example,)))
        squares, largest = zip(*beside.off, strict=True)
        found[name] = {
            "roundings": len(squares),
            "root mean square": {"median": statistics.median(squares), "largest": max(squares)},
            "largest": {"median": statistics.median(largest), "largest": max(largest)},
        }
        print(name, found[name], flush=True)
    return {"networks": found}
