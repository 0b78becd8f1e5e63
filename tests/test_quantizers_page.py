"""The page of quantizers says what is so, and its examples run; so does the quantizer in the page on extending."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import tersor.testing
from tersor import quantization
from tersor.compressor import Compressor
from tersor.config.specs import GRANULARITY_NAMES, OBSERVERS, QuantizationSpec
from tersor.testing.toys import BATCHES, EXAMPLE, ToyNetwork, ToyTraining

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "quantizers.md").read_text(encoding="utf-8")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
QUANTIZERS = {
    name: kind
    for name, kind in vars(quantization).items()
    if isinstance(kind, type) and issubclass(kind, quantization.Quantizer) and not inspect.isabstract(kind)
}


def table(heading):
    """The rows of a table, by their first cell."""
    lines = PAGE[PAGE.index(f"\n\n| {heading} |") :].strip().split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in rows}


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture
def compressors(monkeypatch):
    """All that a test makes; they are unwrapped at its end."""
    made, make = [], Compressor.__init__

    def remember(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Compressor, "__init__", remember)
    yield made
    for compressor in made:
        compressor.unwrap_model()


@pytest.mark.parametrize("number", range(len(CODE.findall(PAGE))))
def test_the_examples_run_and_quantize(number, compressors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ToyNetwork().eval()
    scope = {"model": model, "x": EXAMPLE, "batches": BATCHES, "evaluator": ToyTraining(model).evaluator}
    exec(CODE.findall(PAGE)[number], scope)
    quantized = scope["model"](EXAMPLE)
    for compressor in compressors:
        compressor.unwrap_model()
    assert not torch.equal(quantized, model(EXAMPLE))


def test_all_quantizers_and_their_own_arguments_are_there():
    rows = table("quantizer")
    assert set(rows) == {f"`{name}`" for name in QUANTIZERS}
    shared = set(inspect.signature(quantization.CalibratedQuantizer.__init__).parameters)
    for name, kind in QUANTIZERS.items():
        _, needs, own, _ = rows[f"`{name}`"]
        arguments = inspect.signature(kind.__init__).parameters
        assert quoted(own) == [argument for argument in arguments if argument not in shared], name
        assert needs.startswith("batches" if kind.post_training else "training"), name


def test_all_keys_and_their_values_are_there():
    rows = table("key")
    assert {f"`{name}`" for name in QuantizationSpec.model_fields} == set(rows)
    assert quoted(rows["`observer`"][0]) == list(OBSERVERS)
    granularities = [name for cell in table("`granularity` | a scale for each") for name in quoted(cell)]
    assert set(GRANULARITY_NAMES) < set(granularities)
    for granularity in granularities:
        block = granularity if granularity in GRANULARITY_NAMES else eval(granularity)
        QuantizationSpec.parse({"granularity": block})


def test_what_folds_no_norms_is_named():
    (sentence,) = re.findall(r"([^.]*) round\s+weights\s+as\s+they\s+are: leave\s+norms", PAGE)
    named = set(re.findall(r"\w+", sentence)) - {"and"}
    assert named == {name.removesuffix("Quantizer") for name, kind in QUANTIZERS.items() if not kind.folds_norms}


(_EXAMPLE,) = [code for code in CODE.findall((DOCS / "extending.md").read_text("utf-8")) if "Quantizer" in code]
_SCOPE: dict = {}
exec(_EXAMPLE, _SCOPE)
TestTheQuantizerOfThePageOnExtending = next(
    kind
    for kind in _SCOPE.values()
    if isinstance(kind, type)
    and issubclass(kind, tersor.testing.QuantizerTestCase)
    and kind is not tersor.testing.QuantizerTestCase
)
