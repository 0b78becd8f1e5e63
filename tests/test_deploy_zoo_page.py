"""The page of the zoo on an engine says what its results say, and counts what was asked for."""

import json

from benchmarks.channel_sizes import RESULT as SIZES
from benchmarks.deploy_zoo_page import PAGE, advice, counts, page

RESULTS = SIZES.with_name("deploy_zoo.json")


def test_the_page_is_what_the_results_say():
    written = page(json.loads(RESULTS.read_text()), json.loads(SIZES.read_text()))
    assert PAGE.read_text(encoding="utf-8") == written


def test_what_runs_in_fp32_has_to_run_in_int8():
    right, wrong = {"ok": True}, {"ok": False, "failure": {"message": "why"}}
    rows = [
        {"name": "a", "dense": {"fp32": right, "int8": right}, "pruned": {"fp32": right, "int8": wrong}},
        {"name": "b", "dense": {"fp32": wrong, "int8": wrong}},
        {"name": "c", "dense": {"build": {"message": "no"}}},
    ]
    assert counts(rows, "dense") == (3, 1, 1)
    assert counts(rows, "pruned") == (1, 1, 0)


def test_sizes_that_a_larger_one_beats_are_named():
    times = {"convolution": {"engine": {"32": 1.0, "33": 1.5, "36": 1.2, "64": 2.0}}}
    assert "33 channels take 50% more than 32; slower by 3 % or more than a larger size: 33." in advice(times)
