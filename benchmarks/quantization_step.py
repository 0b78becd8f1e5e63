"""What quantization costs while a model trains: a step of QAT and of LSQ against a plain one, and against NNI 3.0's.

The residual network of ``examples/mnist.py``, int8: weights by output channel, inputs and outputs of each convolution
and linear layer as a whole. All variants take a step in turn, and the ratios of steps side by side are what counts.
Time is that of one thread on the CPU, so that what else the machine does changes little.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from examples import mnist
from tersor.quantization import LsqQuantizer, QATQuantizer

REPEATS = 41
BATCH = 128
LEARNING_RATE = 1e-3
TARGETS = ["weight", "_input_0", "_output_0"]
CONFIG: list[Any] = [{"op_types": ["Conv2d", "Linear"], "target_names": TARGETS, "quant_dtype": "int8"}]
Step = Callable[[], Any]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)


def step_of(model: nn.Module, kind: type[Any] | None, images: torch.Tensor, labels: torch.Tensor, fuse: bool) -> Step:
    """One training step of a model, quantized or not, compiled or not."""
    optimizer = optimizer_of(model)
    quantizer = None if kind is None else kind(model, CONFIG)
    if quantizer is not None:
        quantizer.start()
    forward = torch.compile(model, fullgraph=True) if fuse else model

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        if quantizer is not None:
            quantizer.before_step()
        optimizer.step()
        if quantizer is not None:
            quantizer.after_step()

    return step


def with_nni(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, go_on: Callable[[Step], None]) -> None:
    """Call a function with a step of NNI's QAT, in the middle of its training: only there does it exist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nni
        from nni.compression import TorchEvaluator
        from nni.compression.quantization import QATQuantizer as NNIQATQuantizer

    logging.getLogger("nni").setLevel(logging.ERROR)

    def train(model: Any, optimizer: Any, training_step: Any, *_: Any, **__: Any) -> None:
        def step() -> None:
            optimizer.zero_grad()
            training_step((images, labels), model).backward()
            optimizer.step()

        go_on(step)

    int8 = {"quant_dtype": "int8", "quant_scheme": "symmetric"}
    config = {
        "op_types": ["Conv2d", "Linear"],
        "target_names": ["_input_", "weight", "_output_"],
        **int8,
        "target_settings": {"weight": {**int8, "granularity": "out_channel"}},
    }
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    evaluator = TorchEvaluator(train, optimizer, lambda batch, net: F.cross_entropy(net(batch[0]), batch[1]))
    NNIQATQuantizer(model, [config], evaluator).compress(None, 1)


def measure(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Processor seconds of each, in turn."""
    for step in steps.values():
        for _ in range(4):  # the first compile, and begin to round
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    """The median over pairs of steps side by side."""
    return round(statistics.median(one / other for one, other in zip(seconds[of], seconds[to], strict=True)), 3)


def run() -> dict[str, Any]:
    """All variants, with NNI's where it is installed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    original = mnist.build_model().train()
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    kinds = {"plain": None, "QAT": QATQuantizer, "LSQ": LsqQuantizer}
    steps = {
        f"{name}, compiled" if fuse else name: step_of(copy.deepcopy(original), kind, images, labels, fuse)
        for fuse in (False, True)
        for name, kind in kinds.items()
    }
    seconds: dict[str, list[float]] = {}
    if find_spec("nni") is None:
        seconds |= measure(steps)
        peer: dict[str, Any] = {"skipped": "nni is not installed"}
    else:
        with_nni(
            copy.deepcopy(original), images, labels, lambda step: seconds.update(measure({**steps, "NNI QAT": step}))
        )
        peer = {"version": "3.0", "QAT / NNI QAT": ratio(seconds, "QAT", "NNI QAT")}
    ratios = {
        f"{name}{suffix} / plain{suffix}": ratio(seconds, name + suffix, "plain" + suffix)
        for suffix in ("", ", compiled")
        for name in ("QAT", "LSQ")
    }
    milliseconds = {name: round(statistics.median(each) * 1000, 2) for name, each in seconds.items()}
    print(milliseconds, ratios, peer, sep="\n", flush=True)
    setting = {"network": "examples/mnist.py", "batch": BATCH, "threads": 1, "repeats": REPEATS, "dtype": "int8"}
    return {**setting, "step_milliseconds": milliseconds, "ratios": ratios, "nni": peer}
