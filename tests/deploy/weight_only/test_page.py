"""The page on weights of a few bits: its examples run, and its figures are those that were measured."""

import json
import re
from pathlib import Path

import pytest

from tests.deploy.weight_only.models import TOKENS, make

pytest.importorskip("compressed_tensors")
pytest.importorskip("gguf")

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "weight_only.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "weight_only.json"


def test_the_examples_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {"model": make(), "tokens": TOKENS}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    try:
        for block in blocks:
            exec(block, scope)
    finally:
        scope["quantizer"].unwrap_model()
    written, before, deviation = capsys.readouterr().out.splitlines()[0].split()
    assert int(written) < int(before)
    assert float(deviation) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "small.gguf"]


def test_the_figures_are_those_that_were_measured():
    table = PAGE[PAGE.index("| program |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert [row[0] for row in rows] == list(measured)
    for name, *cells in rows:
        own = measured[name]
        memory = [f"{own[key] / 1e6:.0f}" for key in ("bytes", "loaded_bytes", "called_bytes")]
        times = [f"{own[f'cpu_ms_{batch}']:.1f}" for batch in (1, 64)]
        assert cells == [*memory, *times, "exact" if own["snr"] is None else f"{own['snr']:.0f}"], name
