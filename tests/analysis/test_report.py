"""The report is one whole, well-formed page that fetches nothing."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from tersor.analysis import compare

VOID = {"meta", "br", "link", "img"}


class Structure(HTMLParser):
    """Checks nesting and collects text, tags and the widths of bars by kind."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.bars = [], set(), [], {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = dict(attrs)
        if tag == "rect" and float(attributes["width"]):
            self.bars.setdefault(attributes["class"], []).append(float(attributes["width"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def network(width):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


@pytest.fixture(scope="module")
def comparison():
    return compare(network(16), network(4), torch.zeros(8, 4), accuracy=(0.9, 0.8), repeats=3)


def test_page_is_well_formed_and_needs_nothing_else(comparison, tmp_path):
    path = comparison.report(tmp_path / "new" / "folder", title="A & <B>")
    page = path.read_text(encoding="utf-8")
    structure = Structure(page)
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert structure.open == []
    assert not structure.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "<h1>A &amp; &lt;B&gt;</h1>" in page
    assert "prefers-color-scheme: dark" in page
    assert "max-width: 640px" in page


def test_page_shows_figures_layers_and_environment(comparison, tmp_path):
    page = comparison.report(tmp_path).read_text(encoding="utf-8")
    text = " ".join(Structure(page).text)
    for part in (
        "Parameters",
        "File size",
        "Peak memory",
        "Latency, batch 8",
        "-10.00",
        "points",
        "16x4",
        "BatchNorm1d",
    ):
        assert part in text
    assert "0 has 4" in text  # the note on uneven widths
    assert f"PyTorch: {torch.__version__}" in text
    assert "4 of 16" in text


def test_bars_have_the_measured_lengths(comparison, tmp_path):
    page = comparison.report(tmp_path, sparsity={"0": 0.75}).read_text(encoding="utf-8")
    assert Structure(page).bars["zeros"] == [75.0]
    assert "Weights masked" in page
    plots = page[page.index("Layer by layer") :]
    # Width kept and MACs of the first layer, then of the second; the largest has 64 MACs.
    assert Structure(plots[plots.index("<div") :].split("</main>")[0]).bars["after"] == [25.0, 25.0, 100.0, 12.5]


def test_zeros_are_plotted_where_no_masks_are_given(tmp_path):
    dense, sparse = network(8), network(8)
    with torch.no_grad():
        sparse[0].weight[:2] = 0
    page = compare(dense, sparse, torch.zeros(2, 4), repeats=1).report(tmp_path).read_text(encoding="utf-8")
    assert "Weights zero" in page
    assert Structure(page).bars["zeros"] == [25.0]


def test_names_are_escaped(tmp_path):
    model = nn.ModuleDict({"<script>": nn.Linear(2, 2)})
    model.forward = model["<script>"].forward
    page = compare(model, model, torch.zeros(1, 2), repeats=1).report(tmp_path).read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
