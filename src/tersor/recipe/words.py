"""A recipe in words: what its run will do beside the plan's table."""

from __future__ import annotations

from tersor.config import PruningSpec
from tersor.deploy import engines
from tersor.pruning.learning import LearningPruner
from tersor.pruning.schedule import ScheduledPruner
from tersor.recipe.arguments import arguments_of
from tersor.recipe.catalogue import summary_of
from tersor.recipe.prepare import Prepared, total_steps
from tersor.recipe.spec import Recipe
from tersor.targets.plan import Plan


def describe(recipe: Recipe, prepared: Prepared) -> dict[str, str]:
    """Each part of a run in a sentence, in the order in which they come.

    Args:
        recipe: what is asked.
        prepared: what was made of it.
    """
    schedule = recipe.pruning.schedule
    told = {"pruner": _pruner(prepared)}
    if prepared.algorithm.calibration_batches is not None:
        told["calibration"] = f"on {_many(prepared.algorithm.calibration_batches, 'batch')} of the training data"
    if schedule is not None:
        told["schedule"] = _schedule(recipe, prepared)
    if (recovery := recipe.recovery) is not None:
        parts = ["batch norms are measured anew"] * recovery.batch_norm + ["biases are corrected"] * recovery.bias
        told["recovery"] = f"{' and '.join(parts)}, over {_many(recovery.batches, 'batch')}"
    told["fine-tuning"] = _tuning(recipe, prepared)
    if (asked := recipe.deployment) is not None:
        engine = "the first engine that is installed" if asked.engine == "auto" else engines()[asked.engine].title
        batches = _many(asked.calibration_batches, "batch")
        told["deployment"] = f"int8 on {engine}, calibrated on {batches} of the training data"
    return told


def _pruner(prepared: Prepared) -> str:
    algorithm = prepared.algorithm
    arguments = {name: own.default for name, own in arguments_of(algorithm.pruner).items()} | algorithm.arguments
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    text = f"{algorithm.pruner.__name__}({given}). {summary_of(algorithm.pruner)}"
    pruner = prepared.pruner.pruner if isinstance(prepared.pruner, ScheduledPruner) else prepared.pruner
    if isinstance(pruner, LearningPruner):
        back = "are then undone" if pruner.restores else "are kept"
        text += f" It trains {_many(pruner.watched_steps, 'step')} first, which {back}."
    return text


def _schedule(recipe: Recipe, prepared: Prepared) -> str:
    asked, schedule = recipe.pruning.schedule, prepared.pruner
    assert asked is not None
    assert isinstance(schedule, ScheduledPruner)
    ratio = _ratio(schedule.plan)
    steps = ", ".join(f"{schedule.ratio_at(ratio, times):.3g}" for times in range(1, asked.total_times + 1))
    text = f"{type(schedule).__name__} prunes {_many(asked.total_times, 'time')}"
    if asked.interval_steps is not None:
        text += f", every {_many(asked.interval_steps, 'step')} of the fine-tuning."
    else:
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


def _tuning(recipe: Recipe, prepared: Prepared) -> str:
    tuning = recipe.fine_tuning
    if not tuning.epochs:
        return "none"
    steps = total_steps(tuning, prepared.data.train)
    length = _many(tuning.epochs, "epoch") + ("" if steps is None else f", {_many(steps, 'step')}")
    rounds = " in each round" if prepared.algorithm.in_rounds else ""
    rate = f"learning rate {tuning.learning_rate:g} ({tuning.schedule.replace('_', ' ')})"
    return f"{length}{rounds}, with {tuning.optimizer} at {rate}"


def _many(count: int, noun: str) -> str:
    """A count and its noun.

    >>> _many(1, "batch"), _many(2, "batch")
    ('1 batch', '2 batches')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") and noun != "epoch" else "s")
