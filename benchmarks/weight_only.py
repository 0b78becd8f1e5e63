"""What weights of 8 and 4 bits save, in which program: ``python -m benchmarks.run weight_only``.

A random Llama of realistic width (two blocks of 1024, 22 million weights in linear layers, a small vocabulary) is
rounded to the nearest, and written in each format. Each row is a process of its own, on one thread: resident memory
that loading and the first calls added, and CPU time of a call with one token (which reads all weights for one row of
inputs) and with 64 sequences of one token. Errors are those of the logits against the simulation's, in dB;
none where they are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from tersor.deploy import CompiledModel, QuantizationSpeedup, save_compressed_tensors, save_gguf
from tersor.deploy.agreement import agreement
from tersor.quantization import PtqQuantizer
from tests.torchvision_stub import import_torchvision

with contextlib.suppress(pytest.skip.Exception):
    import_torchvision()  # Transformers imports it where it is installed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
KEYS: dict[str, dict[str, Any]] = {
    "int8": {"quant_dtype": "int8", "granularity": [1, 32]},
    "int4": {"quant_dtype": "int4", "granularity": [1, 32]},
}
BATCHES = (1, 64)
Record = dict[str, Any]


class Logits(nn.Module):
    """Token numbers in, logits out: what engines take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits, without a cache."""
        return self.model(input_ids=tokens, use_cache=False).logits


def build() -> LlamaForCausalLM:
    """The same random model each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def tokens(batch: int) -> Tensor:
    """As many sequences of one token."""
    return (torch.arange(batch) * 61 % SIZES["vocab_size"]).view(batch, 1)


def quantizer(model: nn.Module, kind: str) -> PtqQuantizer:
    """Round to nearest, without the head, which is tied to the embeddings."""
    head = "model.lm_head" if isinstance(model, Logits) else "lm_head"
    entry = {"op_types": ["Linear"], "exclude_op_names": [head], "target_names": ["weight"], **KEYS[kind]}
    made = PtqQuantizer(model, [entry])
    made.compress()
    return made


def write(name: str, folder: Path) -> Record:
    """Write the files of one row; the logits of the simulation go beside."""
    program, kind = name.split(" ")
    net: nn.Module = Logits(build()).eval()
    own = quantizer(net, kind) if kind in KEYS else None
    with torch.no_grad():
        torch.save(net(tokens(max(BATCHES))), folder / "logits.pt")
    if program in ("onnxruntime", "openvino"):
        # ONNX Runtime rounds the inputs of such products to int8 by itself: measured here, not refused.
        speedup = QuantizationSpeedup(own or net, tokens(4), engine=program, min_snr=25, min_coverage=0, threads=1)
        compiled = speedup.compile()
        compiled.save(folder / "model")
        computing = Counter(
            f"{operator.kind} {operator.precision}" for operator in compiled.report.operators if operator.computes
        )
        return {"bytes": compiled.report.bytes, "operators": dict(computing)}
    if own is not None:
        own.unwrap_model()
        own = quantizer(plain := build(), kind)
        if program == "gguf":
            (folder / "model").mkdir()
            return {"bytes": save_gguf(own, folder / "model" / "model.gguf").bytes}
        return {"bytes": save_compressed_tensors(own, folder / "model").bytes}
    plain = build().to(torch.bfloat16 if kind == "bf16" else torch.float32)
    plain.save_pretrained(folder / "model")
    return {"bytes": sum(file.stat().st_size for file in (folder / "model").iterdir())}


def opener(name: str, folder: Path) -> Callable[[], Callable[[Tensor], Tensor]]:
    """What loads the files of one row, after everything is imported that it needs."""
    program, kind = name.split(" ")
    if program in ("onnxruntime", "openvino"):
        import onnxruntime  # noqa: F401 memory is that of the model
        import openvino  # noqa: F401

        return lambda: CompiledModel.load(folder / "model", threads=1)
    import compressed_tensors  # noqa: F401
    import gguf  # noqa: F401

    options: dict[str, Any] = {"gguf_file": "model.gguf"} if program == "gguf" else {}
    if kind == "bf16":
        options["dtype"] = torch.bfloat16
    return lambda: Logits(AutoModelForCausalLM.from_pretrained(folder / "model", **options)).eval()


@torch.no_grad()
def measure(name: str, folder: Path) -> Record:
    """One row, in a process that has done nothing else."""
    torch.set_num_threads(1)
    load = opener(name, folder)
    before = resident()
    model = load()
    loaded = resident()
    found = model(tokens(max(BATCHES)))
    called = resident()
    snr = agreement([found.float()], [torch.load(folder / "logits.pt")]).snr
    record = {
        "loaded_bytes": loaded - before,
        "called_bytes": called - before,
        "snr": round(snr, 1) if math.isfinite(snr) else None,
    }
    for batch in BATCHES:
        record[f"cpu_ms_{batch}"] = round(cpu_time(partial(model, tokens(batch))), 3)
    return record


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return psutil.Process().memory_info().rss


def cpu_time(call: Callable[[], object]) -> float:
    """Milliseconds of CPU of a call: the median of up to 50, or of two seconds."""
    for _ in range(3):
        call()
    times: list[float] = []
    while len(times) < 50 and sum(times) < 2:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


ROWS = (
    "transformers fp32",
    "transformers bf16",
    "compressed-tensors int8",
    "compressed-tensors int4",
    "gguf int8",
    "gguf int4",
    "onnxruntime fp32",
    "onnxruntime int8",
    "onnxruntime int4",
    "openvino fp32",
    "openvino int8",
    "openvino int4",
)


def run() -> Record:
    """All rows, each written and measured in processes of their own."""
    rows: dict[str, Record] = {}
    for name in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = {**_child("write", name, folder), **_child("measure", name, folder)}
        print(name, rows[name], flush=True)
    return {"sizes": SIZES, "keys": KEYS, "threads": 1, "rows": rows}


def _child(step: str, name: str, folder: str) -> Record:
    command = [sys.executable, "-m", "benchmarks.weight_only", step, name, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """One step of one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["write", "measure"])
    parser.add_argument("name", choices=ROWS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    step = write if options.step == "write" else measure
    print(json.dumps(step(options.name, options.folder)))


if __name__ == "__main__":
    main()
