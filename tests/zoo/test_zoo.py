"""A balanced sample of the zoo, and that what checks it would see an error."""

import json
import os
import time

import pytest
import torch
from torch import nn

from benchmarks.forked import run_each
from benchmarks.zoo import RESULT, SOURCES, concluded, line, rows_of, summary
from benchmarks.zoo_table import LITTLE, PAGE, page
from tersor.speedup import ModelSpeedup
from tests.zoo.build import built
from tests.zoo.check import TOLERANCE, check
from tests.zoo.rows import Row

KEEPS_NEARLY_ALL = {
    "timm/convnextv2_atto": "layer norms and global response norms take their statistics over every hidden channel",
    "timm/gmlp_ti16_224": "a layer norm stands between the gate's two halves, and in front of every block",
    "hard/SteppedSlices": "every second channel is taken by its position",
    "hard/ChannelShuffle": "shuffle after shuffle ties all channels of the stage",
    "hard/SplitShuffle": "shuffle after shuffle ties all channels of the stage",
    "hard/IndexedChannels": "channels are looked up by their positions",
    "hard/RepeatedChannels": "copies one behind the other tie all channels",
    "hard/WeightNormalized": "a masked row has no norm to be divided by",
    "hard/BilinearForms": "the operator has no rule",
    "hard/LinearBiases": "slopes are computed for each number of heads",
    "hard/BatchedExperts": "what is summed over experts stands beside their softmax",
}
"""Rows of the sample from which less than a twentieth can leave exactly, and why."""

REFUSED = {
    "hard/StackedGru": "len(x) fixes the batch beside a literal width",
    "hard/ScaledByWidth": "the number of channels is a number in the computation",
}
"""Rows of the sample whose only group cannot leave, which is an error that names the place, and why."""

SAMPLE = [row for source in SOURCES for row in rows_of(source) if row.in_sample]


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Overrides the leak check: other people's models come with hooks and parametrizations of their own."""


@pytest.mark.parametrize("source", SOURCES)
def test_the_sample_has_every_source(source):
    if not rows_of(source):
        pytest.skip(f"{source} is not installed")
    names = [row.name for row in rows_of(source)]
    assert len(set(names)) == len(names)
    assert any(row.source == source for row in SAMPLE)


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: row.name)
def test_half_of_everything_leaves_and_the_rest_computes_the_same(row):
    record = check(row, later=False)
    if row.name in REFUSED:
        assert record["failure"]["type"] == "VerificationError"
        assert "The model is unchanged" in record["failure"]["message"]
        return
    assert record["success"], record["failure"]
    assert record["error"] <= TOLERANCE
    assert (record["removed"] <= LITTLE) == (row.name in KEEPS_NEARLY_ALL)


@pytest.mark.skipif(not RESULT.exists(), reason="the zoo was not measured")
def test_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULT.read_text(encoding="utf-8")))


def small_row(name: str = "hard/small", build=None) -> Row:
    def default() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))

    return Row(name, "hard", "convolution", build or default, lambda: torch.randn(2, 3, 8, 8), True)


def test_record_of_a_small_network():
    record = check(small_row())
    assert record["success"]
    # 224 + 16 + 1445 before; 4 of 8 channels leave.
    assert record["parameters"] == [1685, 112 + 8 + 725]
    assert record["macs"] == [27 * 8 * 36 + 288 * 5, 27 * 4 * 36 + 144 * 5]
    assert record["error"] < 1e-6
    assert record["sharp_error"] < 1e-12
    assert record["signal"] > 0.1
    assert [record[step] for step in ("gradient", "train", "save", "export")] == ["ok"] * 4
    assert record["groups"]["free"] == 1
    json.dumps(record)


def test_nothing_starts_as_a_constant_and_batch_norm_fits_its_inputs():
    row = small_row()
    model, again = built(row), built(row)
    norm = model[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor.std() > 0.01
    assert bool((norm.running_var > 0).all())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        normalized = model[:2](torch.randn(8, 3, 8, 8))
    assert 0.3 < normalized.std() < 3
    assert not any(module.training for module in model.modules())


def test_an_error_that_the_speedup_does_not_see_is_seen(monkeypatch):
    speedup_model = ModelSpeedup.speedup_model

    def wrong(self):
        small = speedup_model(self)
        with torch.no_grad():
            small[0].weight[0, 0, 0, 0] += 1.0
        return small

    monkeypatch.setattr(ModelSpeedup, "speedup_model", wrong)
    record = check(small_row())
    assert not record["success"]
    assert record["failure"]["message"].startswith("silently wrong")
    assert record["error"] > TOLERANCE


def test_a_failure_says_what_and_in_which_step():
    def broken() -> nn.Module:
        raise KeyError("no such width")

    failure = check(small_row(build=broken))["failure"]
    assert (failure["type"], failure["step"], failure["message"]) == ("KeyError", "build", "'no such width'")


def test_rows_that_crash_or_hang_are_recorded_and_the_others_are_done():
    def work(row, publish):
        publish({"step": "shrink"})
        if row.name == "hard/crashes":
            os._exit(3)
        if row.name == "hard/hangs":
            time.sleep(60)
        return check(row)

    rows = [small_row(f"hard/{name}") for name in ("crashes", "hangs", "works")]
    records = {o.item.name: concluded(o) for o in run_each(work, rows, jobs=2, limit=6)}
    assert records["hard/crashes"]["failure"]["message"] == "ended with exit code 3"
    assert records["hard/hangs"]["failure"]["message"] == "still running after 6 s"
    assert records["hard/hangs"]["failure"]["step"] == "shrink"
    assert records["hard/works"]["success"]
    assert line(records["hard/works"]).startswith("ok     hard/works: 50%")
    assert summary(records.values()).startswith("3 rows, 1 succeed (33.3%)")


def test_a_row_that_was_right_stays_so_when_a_later_step_hangs():
    def work(row, publish):
        record = check(row, later=False)
        publish({**record, "step": "export", "gradient": "ok", "train": "ok", "save": "ok"})
        time.sleep(60)
        return record

    (outcome,) = run_each(work, [small_row()], limit=3)
    record = concluded(outcome)
    assert record["success"]
    assert (record["save"], record["export"]) == ("ok", "still running after 3 s")
