"""Prune, quantize and distil at once: one description, one training run, one call to a small int8 file.

The network of the quickstart loses half of its channels on a schedule, its layers are rounded to 8 bits once the last
are gone, and it learns from its own answers before; all within one epoch. ``finalize`` then cuts masks and scales
together, and ONNX Runtime runs what is left in int8.

It takes about a minute on one core; ``--images 5000`` is a quick look, after which the network knows little.
"""

import argparse

import torch
from rich.console import Console
from torch.nn import functional as F

import tersor
from mnist import BATCH_SIZE, Batches, accuracy, load_data, trained_model
from tersor.deploy import engine_config

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--images", type=int, default=60_000, help="train on so many")
images = arguments.parse_args().images
console = Console()

data = load_data()
data.train = Batches(data.train.images[:images], data.train.labels[:images], BATCH_SIZE, shuffled=True)
teacher = trained_model()
model, layers = engine_config(teacher, data.example_input, "onnxruntime")  # a copy, and what this engine wants rounded
steps = len(data.train)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
evaluator = tersor.TorchEvaluator.from_loader(
    data.train,
    F.cross_entropy,
    optimizer,
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1),
    scheduler_interval="step",
    dummy_input=data.example_input,
)

channels = tersor.auto_set_dependency_group_ids(
    model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], data.example_input
)
compressor = tersor.compress(
    model,
    {
        "pruning": {"config_list": channels, "schedule": {"interval_steps": steps // 20, "total_times": 10}},
        "quantization": {"config_list": layers, "arguments": {"quant_start_step": steps // 2}},
        "distillation": {"distiller": "LogitDistiller"},
    },
    evaluator,
    max_steps=steps,
    teacher_model=teacher,
)
console.print(compressor.timeline())

final = tersor.finalize(compressor)
compiled = final.deploy("onnxruntime")
console.print(tersor.compare(teacher, final.plain(), data.example_input))
console.print(f"{accuracy(teacher, data):.2%} before, {accuracy(final.model.eval(), data):.2%} small and simulated,")
console.print(f"{accuracy(compiled, data):.2%} in int8 on {compiled.report.engine}: {compiled.report.bytes:,} bytes")
