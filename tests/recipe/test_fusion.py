"""One description of pruning, quantization and distillation: what it makes, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor import TorchEvaluator, compress, finalize, fuse
from tersor.distillation import LogitDistiller
from tersor.errors import ConfigError, InvalidValueError, TrainingError, UnknownKeyError
from tersor.wrapping import is_wrapped

X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
PRUNING = [{"op_names": ["0"], "sparse_ratio": 0.5}]
QUANTIZATION = [{"op_types": ["Linear"], "target_names": ["weight", "_input_0"], "quant_dtype": "int8"}]


pytestmark = pytest.mark.usefixtures("unwrapped")


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def evaluator_of(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return TorchEvaluator.from_loader([(X, Y)], F.cross_entropy, optimizer, progress=False)


def test_all_three_at_once():
    model = net()
    teacher = copy.deepcopy(model)
    compressor = compress(
        model,
        {
            "pruning": {"config_list": PRUNING, "schedule": {"interval_steps": 2, "total_times": 3}},
            "quantization": QUANTIZATION,
            "distillation": {"distiller": LogitDistiller, "arguments": {"temperature": 2.0}, "config_list": None},
        },
        evaluator_of(model),
        max_steps=8,
        teacher_model=teacher,
    )
    assert [item.title for item in compressor.chain] == ["AGPPruner(L1NormPruner)", "QATQuantizer", "LogitDistiller"]
    assert compressor.chain[2].temperature == 2.0
    final = finalize(compressor)
    assert final.model[0].out_features == 4
    assert final.error < 1e-4


def test_the_timeline_is_known_before_and_the_status_during_training():
    model = net()
    last = fuse(
        model,
        {
            "pruning": [
                {"config_list": PRUNING, "schedule": {"interval_steps": 2, "total_times": 2}},
                {
                    "pruner": "MovementPruner",
                    "arguments": {"warmup_step": 1, "cooldown_begin_step": 3},
                    "config_list": [{"op_names": ["2"], "sparse_ratio": 0.25}],
                },
            ],
            "quantization": {"arguments": {"quant_start_step": 3}, "config_list": QUANTIZATION},
            "distillation": [{"op_names": ["4"]}],
        },
        evaluator_of(model),
        teacher={"teacher_model": net()},
    )
    assert str(last.timeline()).splitlines() == [
        "every step, 0 to 3         MovementPruner: learns scores",
        "every step                 DynamicLayerwiseDistiller: adds what 1 targets are apart from the teacher",
        "after step 2               AGPPruner(L1NormPruner): prunes, 0.5 -> 0.438",
        "every step, 2 to 3         MovementPruner: prunes, 0 -> 0.25",
        "every step from step 3 on  QATQuantizer: rounds 6 targets, int8",
        "after step 4               AGPPruner(L1NormPruner): prunes, 0.5 -> 0.5",
    ]
    seen = []
    step = last.on_step

    def watched():
        step()
        seen.append({name: float(value) for name, value in last.status().items()})

    last.on_step = watched
    last.compress(max_steps=5)
    assert [status["bits"] for status in seen] == [8.0] * 5
    assert seen[0]["distilled"] == 0  # it begins as its teacher
    assert all(status["distilled"] > 0 for status in seen[1:])
    assert seen[-1]["sparsity"] > 0


def test_two_schedules_in_one_training_run():
    model = net()
    schedule = {"interval_steps": 2, "total_times": 2}
    compressor = compress(
        model,
        {
            "pruning": [
                {"config_list": PRUNING, "schedule": schedule},
                {
                    "pruner": "LevelPruner",
                    "config_list": [{"op_names": ["4"], "sparse_ratio": 0.5}],
                    "schedule": {"pruner": "LinearPruner", **schedule},
                },
            ]
        },
        evaluator_of(model),
        max_steps=4,
    )
    assert (model[4].weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.2)
    assert [len(item.get_masks()) for item in compressor.chain] == [2, 2]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"prunning": PRUNING}, UnknownKeyError, "'prunning' is no key here.*pruning"),
        ({}, ConfigError, "asks for nothing"),
        ([], InvalidValueError, "a list is no description"),
        ({"pruning": {"pruner": "L1NormPruner"}}, ConfigError, r"config\['pruning'\]: it has no config_list"),
        ({"pruning": {"pruner": "L1Norm", "config_list": PRUNING}}, InvalidValueError, "L1Norm.*L1NormPruner"),
        (
            {"pruning": {"config_list": PRUNING, "arguments": {"rato": 1}}},
            UnknownKeyError,
            r"config\['pruning'\]\['arguments'\]: 'rato' is no argument of L1NormPruner",
        ),
        (
            {
                "distillation": {
                    "distiller": "Adaptive1dLayerwiseDistiller",
                    "config_list": [],
                    "arguments": {"lerning": 1},
                }
            },
            UnknownKeyError,
            "'lerning' is no argument of Adaptive1dLayerwiseDistiller.*temperature.*learning_rate",
        ),
        (
            {"pruning": {"config_list": PRUNING, "schedule": {"pruner": "L2NormPruner"}}},
            InvalidValueError,
            "L2NormPruner",
        ),
        ({"quantization": QUANTIZATION}, TrainingError, "no evaluator"),
        ({"pruning": PRUNING, "distillation": [{"op_names": ["4"]}]}, InvalidValueError, "is no teacher"),
    ],
)
def test_what_is_wrong_is_named_and_the_model_left_alone(config, error, message):
    model = net()
    with pytest.raises(error, match=message):
        compress(model, config, max_steps=2, example_inputs=X)
    assert not is_wrapped(model)
