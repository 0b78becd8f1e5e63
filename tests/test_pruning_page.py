"""The page of what pruners reach says what the results do."""

from benchmarks.pruning_page import PAGE, page, spread


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_mean_and_deviation():
    assert spread([1.0, 2.0, 6.0], 2) == "3.00 ± 2.65"
    assert spread([0.5], 3) == "0.500"
    assert spread([], 3) == ""
