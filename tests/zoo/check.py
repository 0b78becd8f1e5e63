"""What is checked of a row of the zoo: half of every free group is cut, and the small model must be the masked one.

Each step fills its part of a record that JSON can hold. Up to and with the comparison of the outputs a failure is the
row's failure; after it (gradient, training, export, checkpoint) it is noted in the record's own words.
"""

from __future__ import annotations

import copy
import gc
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, fx, nn

import tersor
from tersor.analysis import count
from tersor.graph import Coupling, Masks, fresh_inputs, groups
from tersor.graph.inputs import as_call, copied, map_tensors, named_tensors, tensors_of
from tersor.speedup import ModelSpeedup
from tersor.speedup.verify import outputs_of, relative_error
from tests.zoo.build import built, seed_all
from tests.zoo.rows import Row

RATIO = 0.5
TOLERANCE = 1e-4
FRESH_BATCH = 3
LATER_STEPS = ("gradient", "train", "save", "export")
"""What is tried of a small model that was found right."""

Record = dict[str, Any]


def check(
    row: Row, seed: int = 0, *, later: bool = True, publish: Callable[[Record], None] = lambda record: None
) -> Record:
    """Cut half of everything that may leave from one architecture, and find out whether that was right.

    Args:
        row: the architecture.
        seed: of the weights, the masks and the fresh inputs.
        later: also try what comes after the comparison of the outputs.
        publish: called with the record before each step, so that who waits knows how far it got.

    Returns:
        what was found. ``success`` says that the small model was made and computes what the masked one does;
        ``failure`` says else what was raised, and where.
    """
    record: Record = {"name": row.name, "source": row.source, "family": row.family, "success": False}
    case = _Case(row, seed, record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (case.build, case.shrink, case.compare):
            publish({**record, "step": step.__name__})
            try:
                step()
            except Exception as error:  # noqa: BLE001 whatever it is, it is what the record is for
                record["failure"] = {**described(error), "step": step.__name__}
                return record
        for name in LATER_STEPS if later else ():
            publish({**record, "step": name})
            record[name] = _outcome(getattr(case, name))
    return record


def described(error: BaseException) -> dict[str, str]:
    """Type, message and place of an error, without paths of this machine."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tersor" in Path(frame.filename).parts]
    return {
        "type": type(error).__name__,
        "message": _shortened(str(error)),
        "where": f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "",
    }


def _shortened(text: str, length: int = 500) -> str:
    text = re.sub(r"(/[\w.@+-]+)+/site-packages/|" + re.escape(f"{Path.cwd()}/"), "", " ".join(text.split()))
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _outcome(step: Callable[[], str | None]) -> str:
    """``ok``, or what is wrong in words."""
    try:
        return step() or "ok"
    except Exception as error:  # noqa: BLE001
        return _shortened(f"{type(error).__name__}: {error}", 160)


class _Case:
    """One row on its way through the steps."""

    small: nn.Module

    def __init__(self, row: Row, seed: int, record: Record) -> None:
        self.row = row
        self.seed = seed
        self.record = record

    def build(self) -> None:
        """The original, and that it runs."""
        self.original = built(self.row, self.seed)
        seed_all(self.seed)
        self.example = self.row.inputs()
        self.fresh = fresh_inputs(self.example, FRESH_BATCH, seed=1)
        self.counts = count(self.original, self.example)

    def shrink(self) -> None:
        """Coupling, masks and speedup, timed."""
        model = copy.deepcopy(self.original)
        seconds: dict[str, float] = {}
        held = _start_of_peak()
        with _timed(seconds, "coupling"):
            coupling = groups(model, self.example)
        with _timed(seconds, "masks"):
            masks = coupling.random_masks(RATIO, seed=self.seed)
        self._note_groups(coupling)
        with _timed(seconds, "speedup"):
            speedup = ModelSpeedup(model, coupling, masks, tolerance=TOLERANCE)
            self.small = speedup.speedup_model()
        self.record |= {
            "form": "graph" if isinstance(self.small, fx.GraphModule) else "in place",
            "cpu_seconds": round(seconds.pop("cpu"), 3),
            "seconds": round(sum(seconds.values()), 3),
            "seconds_of": {part: round(value, 3) for part, value in seconds.items()},
            "memory_mb": round(max(_peak() - held, 0) / 2**20, 1),
        }
        if speedup.report is not None:
            alone = speedup.report.left_alone
            self.record["left_alone"] = {"count": len(alone), "reasons": _tally(item.reason for item in alone)}
            self.record["unused"] = len(speedup.report.unused)
        self.masked = _baked(copy.deepcopy(self.original), coupling, masks)

    def compare(self) -> None:
        """The small model against a copy of the original with the masks burnt in, at another batch size."""
        small = count(self.small, self.example)
        before, after = self.counts.parameters, small.parameters
        self.record |= {
            "parameters": [before, after],
            "macs": [self.counts.macs, small.macs],
            "removed": round(1 - after / before, 4),
        }
        error = relative_error(outputs_of(self.small, self.fresh), outputs_of(self.masked, self.fresh))
        self.record["error"] = float(f"{error:.3g}")
        self.record |= self._sharpened()
        sharp = self.record.get("sharp_error", 0.0)
        if not (error <= TOLERANCE and sharp <= TOLERANCE):
            raise AssertionError(
                f"silently wrong: the outputs differ by {error:.3g}, in double precision by {sharp:.3g}"
            )
        self.record["success"] = True

    def _sharpened(self) -> Record:
        """The error in double precision, relative to how much the outputs change with the inputs.

        Biases may outweigh what the input still contributes at the end of a deep network with random weights; an
        error of its early layers is then far below the rounding of single precision.
        """
        batches = [fresh_inputs(self.example, FRESH_BATCH, seed=seed) for seed in range(1, 6)]
        batches = [map_tensors(b, lambda t: t.double() if t.is_floating_point() else t) for b in batches]
        masked, small = self.masked.double(), copy.deepcopy(self.small).double()
        try:
            expected, actual = outputs_of(masked, batches[0]), outputs_of(small, batches[0])
            others = (relative_error(outputs_of(masked, batch), expected) for batch in batches[1:])
            signal = next((change for change in others if change), 0.0)  # token ids may be drawn twice the same
        except Exception as error:  # noqa: BLE001 a model may insist on its own precision
            return {"not_in_double": _shortened(str(error), 100)}
        sharp = {"sharp_error": float(f"{relative_error(actual, expected) / signal:.3g}")} if signal else {}
        return {"signal": float(f"{signal:.3g}"), **sharp}

    def gradient(self) -> str | None:
        """A finite gradient reaches every parameter that had one before."""
        reached = _gradients(self.original, self.example)
        gradients = _gradients(self.small, self.example)
        names = {name for name, _ in self.small.named_parameters()}
        missing = sorted(name for name in reached if name in names and name not in gradients)
        broken = sorted(name for name, gradient in gradients.items() if not gradient.isfinite().all())
        if broken and not all(gradient.isfinite().all() for gradient in reached.values()):
            broken = []
        if not reached:
            return "no output of the original has a gradient"
        if missing or broken:
            return f"without: {missing[:3]} ({len(missing)}), not finite: {broken[:3]} ({len(broken)})"
        return None

    def train(self) -> str | None:
        """A step in training mode, where the original takes one."""
        results = []
        for model in (copy.deepcopy(self.original), copy.deepcopy(self.small)):
            results.append(_outcome(lambda model=model: _gradients(model.train(), self.example) and None))
        return f"{results[1]}; the original: {results[0]}" if results != ["ok", "ok"] else None

    def save(self) -> str | None:
        """Written, and read back into a model that is built anew."""
        with tempfile.TemporaryDirectory() as folder:
            tersor.save(self.small, f"{folder}/small")
            loaded = tersor.load(lambda: built(self.row, self.seed + 1), f"{folder}/small").eval()
        error = relative_error(outputs_of(loaded, self.fresh), outputs_of(self.small, self.fresh))
        return None if error == 0 else f"what was loaded differs by {error:.3g}"

    def export(self) -> str | None:
        """``torch.export`` of the small model; where it fails, whether the original can be exported."""
        results = []
        for model in (self.small, self.original):
            results.append(_outcome(lambda model=model: _export(model, self.example)))
            if results[-1] == "ok":
                break
        return None if len(results) == 1 else f"{results[0]}; the original: {results[1]}"

    def _note_groups(self, coupling: Coupling) -> None:
        frozen = [group.frozen for group in coupling.groups if group.frozen]
        self.record["groups"] = {
            "free": len(coupling.groups) - len(frozen),
            "frozen": len(frozen),
            "reasons": _tally(frozen),
            "unknown": {str(name): times for name, times in coupling.unknown.items()},
        }


def _tally(reasons: Any) -> dict[str, int]:
    return dict(Counter(_shortened(reason, 100) for reason in reasons).most_common(8))


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note the wall time of a part, and add what the process computed in it to ``cpu``."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[part] = time.perf_counter() - wall
    seconds["cpu"] = seconds.get("cpu", 0.0) + time.process_time() - cpu


def _start_of_peak() -> int:
    """Forget the peak so far where the system can; the bytes that are held now."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    """Most bytes held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def _baked(model: nn.Module, coupling: Coupling, masks: Masks) -> nn.Module:
    """The model with its completed masks multiplied in, without any code of the speedup."""
    tensors: Mapping[str, Tensor] = named_tensors(model)
    for module, targets in coupling.complete(masks).items():
        for target, factors in targets.items():
            tensor = tensors[f"{module}.{target}" if module else target]
            for factor in factors:
                tensor.copy_(torch.where(factor, tensor, torch.zeros_like(tensor)))
    return model


def _gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The gradient of each parameter, for a loss that looks at every value of every output."""
    model.zero_grad(set_to_none=True)
    seed_all(0)
    args, kwargs = as_call(copied(inputs))
    outputs = [tensor for tensor in tensors_of(model(*args, **kwargs)) if tensor.requires_grad]
    loss = sum(((tensor * torch.randn_like(tensor)).sum() for tensor in outputs), torch.zeros(()))
    if outputs:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def _export(model: nn.Module, inputs: Any) -> None:
    args, kwargs = as_call(copied(inputs))
    torch.export.export(model, args, kwargs)
