"""What the benchmark on tweets takes out of them, prunes and writes."""

import importlib.util

import pytest
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
if importlib.util.find_spec("torchvision"):
    from tests.torchvision_stub import import_torchvision

    import_torchvision()
from transformers import BertConfig, BertModel

from benchmarks.fusion_tweets import encoder_parameters, ratios, tables
from benchmarks.tweets import cleaned, padded


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Debate: Should it be legal? http://n.pr/1BRvWfu", "Debate: Should it be legal?"),
        ("RT @ReutersPolitics: in our #ReutersSCOTUS chat. http:/…", "RT : in our chat."),
        ("via @LATMelissaHealy and @jan at L.A. Times' desk", "via @user and @user at ' desk"),
        ("Everyday Health Daily Digest is out! http://paper.li/E/13", "Daily Digest is out!"),
        ("NPR's lab; enprise, sCNNer", "lab; enprise, sCNNer"),
        ("USAID chief on the news today", "USAID chief on the news today"),
    ],
)
def test_what_says_whose_a_tweet_is_leaves(text, left):
    assert cleaned(text) == left


def test_batches_are_padded():
    found = padded([[5, 6], [7]], 3)
    assert found["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert padded([[5, 6], [7]])["input_ids"].shape == (2, 2)


@pytest.mark.parametrize("removed", [0.25, 0.5, 0.75])
def test_ratios_remove_what_is_asked(removed):
    """Counted on a BERT made with so many neurons, and heads of a size of their own."""
    width, heads, neurons = 48, 12, 1536
    config = BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=neurons, num_hidden_layers=1)
    config.vocab_size = 8
    model = nn.ModuleDict({"bert": BertModel(config)})
    whole = encoder_parameters(model)
    of_heads, of_neurons = ratios(removed, width, heads, neurons)
    left, kept = round((1 - of_heads) * heads), round((1 - of_neurons) * neurons)
    layer = model["bert"].encoder.layer[0]
    inner = left * width // heads
    for name in ("query", "key", "value"):
        setattr(layer.attention.self, name, nn.Linear(width, inner))
    layer.attention.output.dense = nn.Linear(inner, width)
    layer.intermediate.dense, layer.output.dense = nn.Linear(width, kept), nn.Linear(kept, width)
    assert kept % 16 == 0
    assert 0 <= 1 - encoder_parameters(model) / whole - removed < 16 * (2 * width + 1) / whole


def row(method, removed, seed, accuracy, **times):
    return {
        "method": method,
        "removed": removed,
        "seed": seed,
        "accuracy": accuracy,
        "deployed": accuracy,
        "parameters": 1 - removed,
        "bytes": 20_000_000,
        "int8": 1.0,
        "milliseconds": times,
    }


def test_tables_hold_means_and_deviations():
    rows = [
        row("taylor", 0.5, 0, 0.50, compiled=2.0, dense=8.0, eager=16.0),
        row("taylor", 0.5, 1, 0.54, compiled=2.0, dense=8.0, eager=10.0),
        row("dense", 0.0, 0, 0.6, dense=8.0, eager=16.0),
        {"method": "taylor", "removed": 0.75, "seed": 0, "error_message": "crashed"},
    ]
    assert tables({"rows": rows}).splitlines()[2:] == [
        "| dense, fp32 | 100.0 % | 60.00 | 60.00 | 20.0 | 8.00 | 1.00 | 0.50 |  |",
        "| fused: Taylor, QAT, distilled, 50% removed | 50.0 % | 52.00 ± 2.83 | 52.00 ± 2.83 | 20.0 | 2.00 | 0.25 "
        "| 0.16 ± 0.05 | 100% |",
    ]
