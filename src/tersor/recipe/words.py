"""A recipe in words: what its run will do beside the plan's table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tersor.compressor import Compressor
from tersor.config import PruningSpec
from tersor.deploy import engines
from tersor.pruning.learning import LearningPruner
from tersor.pruning.schedule import ScheduledPruner
from tersor.recipe.arguments import arguments_of
from tersor.recipe.catalogue import summary_of
from tersor.recipe.compression import Distillation
from tersor.recipe.fields import several
from tersor.recipe.fused import DISTILLER_PARTS, PreparedFusion
from tersor.recipe.prepare import Built, Prepared, total_steps
from tersor.recipe.source import ModelSource
from tersor.recipe.spec import Recipe
from tersor.targets.plan import Plan


def describe(recipe: Recipe, prepared: Prepared | PreparedFusion) -> dict[str, str]:
    """Each part of a run in a sentence, in the order in which they come.

    Args:
        recipe: what is asked.
        prepared: what was made of it.
    """
    told = _pruning(recipe, prepared) if isinstance(prepared, Prepared) else _fusion(recipe, prepared)
    if (asked := recipe.deployment) is not None:
        engine = "the first engine that is installed" if asked.engine == "auto" else engines()[asked.engine].title
        batches = f"calibrated on {_many(asked.calibration_batches, 'batch')} of the training data"
        told["deployment"] = f"int8 on {engine}, {'as it was quantized' if recipe.quantization else batches}"
    return told


def _pruning(recipe: Recipe, prepared: Prepared) -> dict[str, str]:
    schedule = prepared.pruner if isinstance(prepared.pruner, ScheduledPruner) else None
    algorithm = prepared.algorithm
    told = {"pruner": _pruner(prepared.pruner if schedule is None else schedule.pruner, algorithm.arguments)}
    if algorithm.calibration_batches is not None:
        told["calibration"] = _calibration(algorithm.calibration_batches)
    if schedule is not None:
        told["schedule"] = _schedule(recipe, schedule)
    if (recovery := recipe.recovery) is not None:
        parts = ["batch norms are measured anew"] * recovery.batch_norm + ["biases are corrected"] * recovery.bias
        told["recovery"] = f"{' and '.join(parts)}, over {_many(recovery.batches, 'batch')}"
    told["fine-tuning"] = _tuning(recipe, prepared, in_rounds=algorithm.in_rounds)
    return told


def _fusion(recipe: Recipe, prepared: PreparedFusion) -> dict[str, str]:
    told: dict[str, str] = {}
    counts: Counter[str] = Counter()
    asked = {
        "pruner": several(recipe.pruning),
        "quantizer": several(recipe.quantization),
        "distiller": several(recipe.distillation),
    }
    for item in prepared.compressor.chain:
        kind = {"pruning": "pruner", "quantization": "quantizer", "distillation": "distiller"}[item.mode]
        part = asked[kind][counts[kind]]
        counts[kind] += 1
        number = f" {counts[kind]}" if len(asked[kind]) > 1 else ""
        own = item.pruner if isinstance(item, ScheduledPruner) else item
        told[f"{kind}{number}"] = _pruner(own, part.arguments)
        batches = getattr(own, "calibration", None)
        if batches is not None:
            told[f"calibration{number}"] = _calibration(len(batches))
        if isinstance(item, ScheduledPruner):
            told[f"schedule{number}"] = _schedule(recipe, item)
        if isinstance(part, Distillation):
            told[f"teacher{number}"] = _teacher(part.teacher)
    told["training"] = _tuning(recipe, prepared, in_rounds=False) if prepared.trains else "none"
    return told


def _teacher(source: ModelSource | None) -> str:
    if source is None:
        return "the model itself, as it was"
    return source.build if source.checkpoint is None else f"{source.build} with {source.checkpoint}"


def _calibration(batches: int) -> str:
    return f"on {_many(batches, 'batch')} of the training data"


def _pruner(compressor: Compressor, arguments: Mapping[str, Any]) -> str:
    cls = type(compressor)
    shown = {name: own.default for name, own in arguments_of(cls, DISTILLER_PARTS).items()} | dict(arguments)
    given = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
    text = f"{cls.__name__}({given}). {summary_of(cls)}"
    if isinstance(compressor, LearningPruner):
        back = "are then undone" if compressor.restores else "are kept"
        text += f" It trains {_many(compressor.watched_steps, 'step')} first, which {back}."
    return text


def _schedule(recipe: Recipe, schedule: ScheduledPruner) -> str:
    ratio = _ratio(schedule.plan)
    steps = ", ".join(f"{schedule.ratio_at(ratio, times):.3g}" for times in range(1, schedule.total_times + 1))
    text = f"{type(schedule).__name__} prunes {_many(schedule.total_times, 'time')}"
    if schedule.interval_steps is not None:
        text += f", every {_many(schedule.interval_steps, 'step')} of the fine-tuning."
    else:
        asked = recipe.alone.schedule if recipe.alone is not None else None
        assert asked is not None
        small = ", makes the model small" if asked.speedup else ""
        text += f", in rounds: each prunes{small}, fine-tunes and evaluates; "
        text += {
            "latest": "the last one's model is kept.",
            "maximize": "the model of the highest metric is kept.",
            "minimize": "the model of the lowest metric is kept.",
        }[asked.best]
    return f"{text} Of a ratio of {ratio:g} it reaches {steps}."


def _ratio(plan: Plan) -> float:
    """The highest ratio of a plan, to explain a schedule by; 1 where there are only thresholds."""
    specs = [target.config.spec for target in plan.targets]
    return max((spec.ratio for spec in specs if isinstance(spec, PruningSpec) and spec.ratio is not None), default=1.0)


def _tuning(recipe: Recipe, prepared: Built, *, in_rounds: bool) -> str:
    tuning = recipe.fine_tuning
    if not tuning.epochs:
        return "none"
    steps = total_steps(tuning, prepared.data.train)
    length = _many(tuning.epochs, "epoch") + ("" if steps is None else f", {_many(steps, 'step')}")
    rounds = " in each round" if in_rounds else ""
    rate = f"learning rate {tuning.learning_rate:g} ({tuning.schedule.replace('_', ' ')})"
    return f"{length}{rounds}, with {tuning.optimizer} at {rate}"


def _many(count: int, noun: str) -> str:
    """A count and its noun.

    >>> _many(1, "batch"), _many(2, "batch")
    ('1 batch', '2 batches')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") and noun != "epoch" else "s")
