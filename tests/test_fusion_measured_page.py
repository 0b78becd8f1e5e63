"""The page of what fusion reaches says what the results do."""

from benchmarks.fusion_page import PAGE, page, spread


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_median_and_what_lies_around_it():
    assert spread([0.98, 0.99, 0.97]) == "98.00 % (97.00 to 99.00)"
    assert spread([0.9812]) == "98.12 %"
