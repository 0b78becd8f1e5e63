"""The page of what quantizers reach says what the results do."""

from benchmarks.quantization_page import PAGE, claims, errors, page, table

NETWORKS = {"net": {"images": 100, "known": 100}, "few": {"images": 100, "known": 20}}
METHODS = {
    "fp32": {"bits": None, "trains": False},
    "PTQ": {"bits": "8/8", "trains": False},
    "odd": {"bits": "2/2", "trains": True},
}


def row(network, method, seed, accuracy):
    figures = {"accuracy": accuracy, "agreement": accuracy, "snr_db": 20.0}
    return {"network": network, "method": method, "seed": seed, **figures}


DOCUMENT = {
    "networks": NETWORKS,
    "methods": METHODS,
    "rows": [
        row("net", "fp32", 0, 0.9),
        row("net", "fp32", 1, 0.9),
        row("net", "PTQ", 0, 0.88),
        row("net", "PTQ", 1, 0.91),
        row("few", "fp32", 0, 0.5),
        row("few", "PTQ", 0, 0.4),
        {"network": "net", "method": "odd", "seed": 0, "error": "ValueError: a|b\nmore"},
        {"network": "net", "method": "odd", "seed": 1, "error": "ValueError: a|b\nmore"},
    ],
}


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_a_row_has_mean_and_deviation_and_no_noise_of_what_is_exact():
    lines = table(DOCUMENT, "net").splitlines()
    assert lines[2:] == [
        "| fp32 |  |  | 90.00 ± 0.00 | 90.00 ± 0.00 |  |",
        "| PTQ | 8/8 |  | 89.50 ± 2.12 | 89.50 ± 2.12 | 20.0 ± 0.0 |",
    ]


def test_what_is_lost_is_a_mean_over_seeds_and_needs_labels():
    assert claims(DOCUMENT).splitlines()[2:] == ["| PTQ | 0.1 | 0.50 |  |"]


def test_an_error_is_told_once():
    assert errors(DOCUMENT).splitlines()[2:] == ["- odd (net): `ValueError: a/b`"]
