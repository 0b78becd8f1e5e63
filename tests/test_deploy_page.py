"""The page on deployment says what the results say, and its verdicts count what was asked for."""

import pytest
import torch

from benchmarks.deploy_networks import by_sixteen
from benchmarks.deploy_page import PAGE, page, share
from benchmarks.deploy_verdicts import (
    answers,
    coverage,
    exactness,
    fastest_peer,
    files,
    halved,
    latency,
    layers,
    verdict,
    verdicts,
)

SAYS = {
    "torch eager fp32": {"engine": "torch", "kind": "float", "says": "as it is"},
    "OpenVINO fp32": {"engine": "openvino", "kind": "float", "says": "as it is"},
    "NNCF": {"engine": "openvino", "kind": "peer", "says": "theirs"},
    "NNCF, mixed": {"engine": "openvino", "kind": "peer", "says": "theirs"},
    "ORT quantize_static, all": {"engine": "onnxruntime", "kind": "peer", "says": "theirs"},
    "Tersor, OpenVINO": {"engine": "openvino", "kind": "tersor", "says": "ours"},
    "Tersor, OpenVINO, half the channels": {"engine": "openvino", "kind": "tersor", "says": "ours"},
}


def built(row, **figures):
    return {"network": "net", "row": row, "seed": None, "half": 0, "snr": 30.0, "top1": 1.0, **figures}


OURS = {
    "simulation": {"snr": 31.0, "top1": 0.9},
    "batch_1": {"floor": None},
    "batch_16": {"floor": 33.0, "layers": {"snr": 61.0, "top1": 1.0}},
    "profile": {"int8": 20, "contractions": 21},
}
DOCUMENT = {
    "versions": {"python": "3", "tersor": "0"},
    "machine": {"cores": 2, "processor": "processor", "instructions": ["avx2"]},
    "networks": {"net": "Net"},
    "says": SAYS,
    "rows": [
        built("torch eager fp32", bytes=1000),
        built("OpenVINO fp32", bytes=1000),
        built("NNCF", bytes=250),
        built("NNCF, mixed", bytes=250, snr=3.0),
        {
            "network": "net",
            "row": "ORT quantize_static, all",
            "seed": None,
            "half": 0,
            "error": "ValueError: a|b\nmore",
        },
        built("Tersor, OpenVINO", bytes=280, **OURS),
        built("Tersor, OpenVINO, half the channels", bytes=80, **OURS),
    ],
    "accuracy": [],
    "times": [
        {
            "network": "net",
            "threads": 2,
            "batch": 16,
            "errors": {},
            "rows": {
                "NNCF": {"ms": 10.0},
                "NNCF, mixed": {"ms": 5.0},
                "Tersor, OpenVINO": {
                    "ms": 10.5,
                    "ratios": {"NNCF": [1.05, 1.04, 1.06], "NNCF, mixed": [2.1, 2.0, 2.2]},
                },
                "Tersor, OpenVINO, half the channels": {
                    "ms": 5.0,
                    "ratios": {"Tersor, OpenVINO": [0.4, 0.4, 0.5], "torch eager fp32": [0.1, 0.1, 0.1]},
                },
            },
        }
    ],
}


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_a_peer_that_computes_something_else_is_not_raced_with():
    assert fastest_peer(DOCUMENT, "net", "Tersor, OpenVINO", (2, 16)) == ("NNCF", [1.05, 1.04, 1.06])
    (case,) = latency(DOCUMENT, "openvino")
    assert case.surplus == pytest.approx(-0.02)
    assert case.where == "Net, OpenVINO, 2 threads, batch 16"
    assert latency(DOCUMENT, "onnxruntime") == []


def test_files_are_compared_with_fp32_on_the_same_engine():
    assert [(case.value, case.surplus >= 0) for case in files(DOCUMENT)] == [(0.28, True)]


def test_the_floor_counts_only_where_it_is_asked_for():
    assert [case.surplus for case in exactness(DOCUMENT, floor=False)] == [-9.0]
    assert [case.surplus for case in exactness(DOCUMENT, floor=True)] == [4.0]


def test_layers_are_compared_from_the_same_inputs():
    assert [case.surplus for case in layers(DOCUMENT)] == [21.0]
    assert [case.value for case in answers(DOCUMENT, layers=True)] == [1.0]
    assert [case.value for case in answers(DOCUMENT)] == [0.9]


def test_half_the_channels_are_compared_with_all_and_with_eager():
    assert [(case.value, case.surplus >= 0) for case in halved(DOCUMENT, "int8")] == [(2.5, True)]
    assert [(case.value, case.surplus >= 0) for case in halved(DOCUMENT, "eager")] == [(10.0, False)]


def test_one_operator_in_floating_point_is_one_too_many():
    assert verdict("all", coverage(DOCUMENT)).line() == "| all | **not met** | 0 of 1 | Net, OpenVINO: 20 of 21 |"


def test_what_was_not_measured_is_said():
    words = {one.what: one.line().split(" | ")[1] for one in verdicts(DOCUMENT)}
    assert words["MiniLM's correlations are at least NNCF's"] == "not measured"
    assert words["half the channels: file at most 1/12 of that in fp32"] == "met"


def test_an_error_and_a_floor_are_printed():
    text = page(DOCUMENT)
    assert "- ORT quantize_static, all, Net: `ValueError: a/b`" in text
    assert "| Tersor, OpenVINO | 0.0 (0.280) | 30.0 | 31.0 (33.0) | 61.0 | 20 of 21 |  |  |  | 10.50 |" in text
    assert "NNCF, mixed of Net has 3.0" in text


def test_a_share_is_a_mean_of_counts():
    assert share({}, "right", "known") == ""
    assert share({0: {"right": 1, "known": 4}, 1: {"right": 2, "known": 4}}, "right", "known") == "1.5 of 4 (37.5 %)"


def test_samples_are_filled_up_to_sixteen_and_cut_again():
    seen: list[int] = []

    def call(values):
        seen.append(len(values))
        return 2 * values

    values = torch.randn(19, 3)
    assert torch.equal(by_sixteen(call, (values,)), 2 * values)
    assert seen == [16, 16]
