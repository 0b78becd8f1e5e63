"""Tersor beside Torch-Pruning on the zoo: ``python -m benchmarks.peer [--only PATTERN ...]`` -> results/zoo_peer.json.

Both cut half of all output channels but the model's own outputs, by the L1 norm, on copies of one model, in turn, in
one process on one thread. Tersor's time is that of plan, pruning and speedup with its check; Torch-Pruning's that of
building its pruner and one ``step()``, which checks nothing. Torch-Pruning is told the heads of attention modules, as
its examples for timm do, and is given a minute.

Whether its result is exact is found out in a run of its own: while it prunes a parameter it cuts the gradient alike, so
a gradient that holds 0, 1, 2 ... says afterwards which elements stayed. A copy of the original in which all others are
zero must compute what its small model does.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import tersor
from benchmarks.forked import run_each
from benchmarks.zoo import Record, parser, read, select, write
from tersor.graph import fresh_inputs, groups
from tersor.graph.inputs import map_tensors, tensors_of
from tersor.pruning import L1NormPruner
from tersor.speedup import ModelSpeedup
from tersor.speedup.verify import outputs_of, relative_error
from tests.zoo.build import built, seed_all
from tests.zoo.check import TOLERANCE, described
from tests.zoo.rows import Row

RESULT = Path(__file__).parent / "results" / "zoo_peer.json"
PATIENCE = 60
REPEATS = 3
BATCHES = (2, 16)
"""Images in the example: two samples are enough for us, Torch-Pruning runs all that it is given."""
RATIO = 0.5

Shrink = Callable[[nn.Module, Any], nn.Module]


class TooSlowError(Exception):
    """It was given a minute."""


def ours(model: nn.Module, example: Any) -> nn.Module:
    """Plan, prune and speed up with Tersor; the model's own run is shared by all three."""
    coupling = groups(model, example)
    types = {type(module).__name__ for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear))}
    config_list = [{"op_types": sorted(types), "sparse_ratio": RATIO}]
    pruner = L1NormPruner(
        model, tersor.auto_set_dependency_group_ids(model, config_list, coupling), example_inputs=coupling
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return ModelSpeedup(model, coupling, masks).speedup_model()


def theirs(model: nn.Module, example: Any) -> nn.Module:
    """The same with Torch-Pruning."""
    import torch_pruning as tp

    heads = {fused: module.num_heads for module, fused in _fused_attention(model)}
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=RATIO,
        ignored_layers=_classifiers(model, example),
        num_heads=heads,
        in_channel_groups={},  # the default is one dict for all pruners, and is written into
        out_channel_groups={},
    )
    with torch.enable_grad():
        pruner.step()
    for module, fused in _fused_attention(model):
        module.num_heads = heads[fused]
        module.head_dim = fused.out_features // (3 * module.num_heads)
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):  # as its example for torchvision does
        model.hidden_dim = model.conv_proj.out_channels
    return model


def _fused_attention(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Attention modules with one projection for queries, keys and values, and that projection."""
    for module in model.modules():
        fused = getattr(module, "qkv", None)
        if isinstance(fused, nn.Linear) and isinstance(getattr(module, "num_heads", None), int):
            yield module, fused


def _classifiers(model: nn.Module, example: Any) -> list[nn.Module]:
    """Layers as wide as an output of the model; Torch-Pruning's examples tell them so, too."""
    widths = {tensor.shape[1] for tensor in outputs_of(model, example) if tensor.dim() > 1}
    return [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) and module.out_features in widths)
        or (isinstance(module, _ConvNd) and module.out_channels in widths)
    ]


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise in the block when it takes longer."""

    def give_up(*_: Any) -> None:
        raise TooSlowError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def timed(shrink: Shrink, model: nn.Module, example: Any) -> tuple[float, nn.Module]:
    """Wall time on a fresh copy, and the small model."""
    model = copy.deepcopy(model)
    start = time.perf_counter()
    small = shrink(model, example)
    return time.perf_counter() - start, small


def parameters(model: nn.Module) -> int:
    """How many, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def their_error(model: nn.Module, example: Any) -> float:
    """How far Torch-Pruning's small model is from the original with what it removed set to zero, in double precision.

    Raises:
        Exception: whatever its small model raises.
    """
    original = copy.deepcopy(model).double()
    pruned = copy.deepcopy(original)
    for parameter in pruned.parameters():
        parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape)
    theirs(pruned, _double(example))
    kept = {name: parameter.grad for name, parameter in pruned.named_parameters()}
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            stays = torch.zeros(parameter.numel(), dtype=torch.bool)
            stays[kept[name].flatten().long()] = True
            parameter.copy_(torch.where(stays.reshape(parameter.shape), parameter, torch.zeros_like(parameter)))
    fresh = _double(fresh_inputs(example, 3, seed=1))
    return relative_error(outputs_of(pruned, fresh), outputs_of(original, fresh))


def _double(inputs: Any) -> Any:
    return map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def compare(row: Row, publish: Callable[[Record], None]) -> Record:
    """Both on one row."""
    record: Record = {"name": row.name, "source": row.source, "family": row.family}
    model = built(row)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # Torch-Pruning's examples turn it off
    seed_all(0)
    example = row.inputs()
    before = parameters(model)
    runners = {}
    for name, shrink in (("ours", ours), ("theirs", theirs)):
        publish(record)
        try:
            with patience(PATIENCE):
                _, small = timed(shrink, model, example)
            outputs_of(small, fresh_inputs(example, 3, seed=1))
            record[name] = {"ran": True, "removed": round(1 - parameters(small) / before, 4)}
            runners[name] = shrink
        except Exception as error:  # noqa: BLE001 it is what the record is for
            record[name] = {"ran": False, **described(error)}
    publish(record)
    if "theirs" in runners:
        record["theirs"] |= _exactness(model, example)
    publish(record)
    record["batch"] = {}
    for batch in BATCHES if len(runners) == 2 else ():
        inputs = fresh_inputs(example, batch, seed=2)
        try:
            with patience(3 * PATIENCE):
                runs = [{n: timed(shrink, model, inputs)[0] for n, shrink in runners.items()} for _ in range(REPEATS)]
        except TooSlowError:
            continue
        seconds = {name: round(statistics.median(run[name] for run in runs), 3) for name in runners}
        ratio = round(statistics.median(run["ours"] / run["theirs"] for run in runs), 3)
        record["batch"][str(batch)] = {**seconds, "ratio": ratio}
    return record


def _exactness(model: nn.Module, example: Any) -> Record:
    try:
        with patience(2 * PATIENCE):
            error = their_error(model, example)
    except Exception as error:  # noqa: BLE001
        return {"exact": False, "unlike": described(error)["message"]}
    return {"exact": error <= TOLERANCE, "error": float(f"{error:.3g}") if math.isfinite(error) else "another shape"}


def summary(records: Iterable[Record]) -> Record:
    """Counts, and what holds for the rows that both do exactly; a speedup of ours that is not exact is refused."""
    records = list(records)
    ran = {name: [r for r in records if r.get(name, {}).get("ran")] for name in ("ours", "theirs")}
    both = [r for r in records if r in ran["ours"] and r in ran["theirs"] and r["theirs"]["exact"] and r.get("batch")]
    fewer = [r["name"] for r in both if r["ours"]["removed"] < r["theirs"]["removed"] - 0.001]
    return {
        "rows": len(records),
        "ours_ran": len(ran["ours"]),
        "theirs_ran": len(ran["theirs"]),
        "theirs_exact": sum(r["theirs"]["exact"] for r in ran["theirs"]),
        "both_exact": len(both),
        "median_ratio": {
            str(batch): round(statistics.median(ratios), 3)
            for batch in BATCHES
            if (ratios := [r["batch"][str(batch)]["ratio"] for r in both if str(batch) in r["batch"]])
        },
        "ours_removes_less": fewer,
    }


def takes_images(row: Row) -> bool:
    """Vision, and a single argument, which is what Torch-Pruning is made for."""
    if row.source == "transformers":
        return False
    tensors: list[Tensor] = tensors_of(row.inputs())
    return len(tensors) == 1 and tensors[0].dim() in (4, 5)


def line(record: Record) -> str:
    """One row in one line."""
    parts = []
    for name in ("ours", "theirs"):
        side = record.get(name, {"ran": False, "type": "not reached", "message": ""})
        if side["ran"]:
            exact = {True: " exact", False: f" NOT exact {side.get('error', side.get('unlike'))}"}.get(
                side.get("exact"), ""
            )
            parts.append(f"{name} -{side['removed']:.0%}{exact}")
        else:
            parts.append(f"{name} {side['type']}: {side['message'][:80]}")
    ratios = {batch: timing["ratio"] for batch, timing in record.get("batch", {}).items()}
    return f"{record['name']}: {' | '.join(parts)} | ratio by batch {ratios}"


def main() -> None:
    """Compare, one row at a time."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(source=["torchvision", "timm"], limit=900.0)
    options = arguments.parse_args()
    records = read(RESULT)
    done = {name: {**record, "success": record.get("theirs", {}).get("ran", False)} for name, record in records.items()}
    rows = [row for row in select(options, done) if takes_images(row)]
    records = {name: record for name, record in records.items() if name in done}
    for outcome in run_each(compare, rows, jobs=1, limit=options.limit):
        row = outcome.item
        records[row.name] = {"name": row.name, "source": row.source, "family": row.family, **outcome.record}
        if outcome.ended is not None:
            records[row.name]["ended"] = outcome.ended
        packages = ("tersor", "torch-pruning", "torchvision", "timm")
        write(RESULT, records, packages, threads=1, repeats=REPEATS, summary=summary(records.values()))
        print(line(records[row.name]), flush=True)
    print(json.dumps(summary(records.values()), indent=1))


if __name__ == "__main__":
    main()
