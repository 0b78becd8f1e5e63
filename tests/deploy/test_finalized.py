"""What was pruned, quantized and distilled at once runs on an engine."""

import copy

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault

import tersor
from tersor.deploy import engine_config
from tersor.testing.toys import BATCHES, EXAMPLE, ToyNetwork

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_fused_finalized_and_deployed():
    teacher = ToyNetwork().eval()
    model, config_list = engine_config(copy.deepcopy(teacher), EXAMPLE, "onnxruntime")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    evaluator = tersor.TorchEvaluator.from_loader(
        BATCHES, torch.nn.functional.cross_entropy, optimizer, dummy_input=EXAMPLE, progress=False
    )
    compressor = tersor.compress(
        model,
        {
            "pruning": {
                "config_list": [{"op_names": ["left", "hidden"], "sparse_ratio": 0.5}],
                "schedule": {"interval_steps": 2, "total_times": 2},
            },
            "quantization": config_list,
            "distillation": {"distiller": "LogitDistiller"},
        },
        evaluator,
        max_steps=8,
        teacher_model=teacher,
    )
    final = tersor.finalize(compressor)
    assert final.error < 1e-12  # the last digits of float32 would now and then round a value the other way
    assert final.model.left.out_channels == 3
    compiled = final.deploy("onnxruntime")
    assert compiled.report.coverage == 1
    with torch.no_grad():
        expected = final.model.eval()(EXAMPLE)
    assert torch.allclose(compiled(EXAMPLE), expected, atol=0.02 * expected.abs().max().item())
