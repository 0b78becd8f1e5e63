"""GGUF files: read by the package of llama.cpp and by Transformers, they hold what the simulation computes with."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from tersor.deploy.weight_only import save_gguf
from tersor.errors import InvalidValueError, MissingExtraError
from tersor.quantization import AWQQuantizer, GPTQQuantizer, PtqQuantizer
from tests.deploy.weight_only.models import TOKENS, batches, entry, logits, make, transformers

gguf = pytest.importorskip("gguf")


def save(model, entries, path, kind=PtqQuantizer, **options):
    """Quantize, save; the report, the simulated values of all parameters, and the simulation's logits."""
    own = {} if kind is PtqQuantizer else {"calibration": batches(), "example_inputs": {"input_ids": TOKENS}}
    quantizer = kind(model, entries, **own)
    try:
        quantizer.compress()
        report, simulated = save_gguf(quantizer, path, **options), logits(model)
    finally:
        quantizer.unwrap_model(bake=True)
    return report, {name: value.detach().clone() for name, value in model.named_parameters()}, simulated


def read(path):
    """Values and types of all tensors, by name."""
    return {
        tensor.name: (
            torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()),
            tensor.tensor_type.name,
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def load(path):
    pytest.importorskip("accelerate")  # Transformers asks for it here
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


@pytest.mark.parametrize(
    ("kind", "quant_dtype", "scheme", "granularity", "blocks", "furthest"),
    [
        (PtqQuantizer, "int4", "symmetric", (1, 32), "Q4_0", 2**-11),
        (AWQQuantizer, "int4", "symmetric", (1, 32), "Q4_0", 2**-11),
        (GPTQQuantizer, "uint4", "affine", (1, 32), "Q4_1", 2**-10),
        (PtqQuantizer, "int4", "affine", None, "Q4_1", 2**-10),
        (PtqQuantizer, "int8", "symmetric", (1, 32), "Q8_0", 2**-11),
        (PtqQuantizer, "int3", "symmetric", (-1, -1), "Q4_0", 2**-11),
        (PtqQuantizer, "uint6", "symmetric", (2, 32), "Q8_0", 2**-11),
    ],
)
def test_values_are_those_of_the_simulation(kind, quant_dtype, scheme, granularity, blocks, furthest, tmp_path):
    # llama.cpp keeps queries and keys of Qwen2 in the order of Transformers
    model = make("Qwen2")
    report, values, _ = save(model, [entry(quant_dtype, scheme, granularity)], tmp_path / "model.gguf", kind)
    tensors = read(tmp_path / "model.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    own = {names.get_name(name, try_suffixes=(".weight", ".bias")): value for name, value in values.items()}
    assert tensors.keys() == own.keys()
    deviations = []
    for name, (stored, block) in tensors.items():
        quantized = ".attn_" in name or ".ffn_" in name
        quantized = quantized and not name.endswith(("norm.weight", ".bias"))
        assert block == (blocks if quantized else "F32")
        difference = float((stored - own[name]).abs().max() / own[name].abs().max())
        assert difference <= furthest if quantized else difference == 0
        deviations.append(difference)
    assert report.deviation == pytest.approx(max(deviations), rel=1e-3)
    assert (report.format, report.bytes) == (blocks, (tmp_path / "model.gguf").stat().st_size)
    assert len(report.quantized) == 14


@pytest.mark.parametrize(("kind", "settings"), [("Llama", {}), ("Qwen2", {}), ("Mistral", {"sliding_window": None})])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_it(kind, settings, tied, tmp_path):
    path = tmp_path / "model.gguf"
    _, _, simulated = save(make(kind, tie_word_embeddings=tied, **settings), [entry("uint4", "affine")], path)
    loaded = load(path)
    assert loaded.config.tie_word_embeddings is tied
    assert float((logits(loaded) - simulated).abs().max() / simulated.abs().max()) < 2e-3
    assert ("output.weight" in read(path)) is not tied


def test_qwen3_has_norms_of_heads(tmp_path):
    path = tmp_path / "model.gguf"
    _, _, simulated = save(make("Qwen3", head_dim=128), [entry("int8")], path)  # Transformers supposes that size
    assert float((logits(load(path)) - simulated).abs().max() / simulated.abs().max()) < 1e-3


def test_values_are_exact_where_fp16_holds_the_scales(tmp_path):
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            numbers = torch.randint(-7, 8, module.weight.shape)
            numbers[:, ::32] = 7
            module.weight.data = numbers / 64
    report, _, simulated = save(model, [entry()], tmp_path / "model.gguf")
    assert report.deviation == 0
    assert float((logits(load(tmp_path / "model.gguf")) - simulated).abs().max()) < 1e-5  # other order of heads


def test_masked_weights_stay_zero_in_symmetric_blocks(tmp_path):
    model = make()
    kept = torch.rand(96, 64) > 0.5
    model.model.layers[0].mlp.up_proj.weight.data *= kept
    save(model, [entry()], tmp_path / "model.gguf")
    stored, _ = read(tmp_path / "model.gguf")["blk.0.ffn_up.weight"]
    assert bool((stored[~kept] == 0).all())


def test_embeddings_may_be_quantized_and_tied(tmp_path):
    path = tmp_path / "model.gguf"
    everything = {**entry("int8"), "op_types": ["Linear", "Embedding"], "exclude_op_names": ["lm_head"]}
    report, _, simulated = save(make(tie_word_embeddings=True), [everything], path)
    assert len(report.quantized) == 15
    assert read(path)["token_embd.weight"][1] == "Q8_0"
    assert float((logits(load(path)) - simulated).abs().max() / simulated.abs().max()) < 1e-3


@pytest.mark.parametrize(("float_type", "size"), [(None, 4), ("F16", 2), ("BF16", 2)])
def test_types_of_what_is_not_quantized(float_type, size, tmp_path):
    report, values, _ = save(make(vocab_size=1024), [entry()], tmp_path / "model.gguf", float_type=float_type)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["token_embd.weight"].n_bytes == 1024 * 64 * size
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    stored, _ = read(tmp_path / "model.gguf")["token_embd.weight"]
    embeddings = values["model.embed_tokens.weight"]
    difference = float((stored - embeddings).abs().max() / embeddings.abs().max())
    assert difference <= {None: 0, "F16": 2**-11, "BF16": 2**-8}[float_type]
    assert report.deviation >= difference


def test_metadata_says_what_the_config_says(tmp_path):
    save(make(), [entry()], tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    said = {name: field.contents() for name, field in fields.items() if name.startswith(("general", "llama", "tok"))}
    assert said == {
        "general.architecture": "llama",
        "general.name": "Llama",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_0),
        "general.quantization_version": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5e4,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.vocab_size": 64,
        "tokenizer.ggml.model": "none",
    }


def byte_level():
    """A tokenizer of the 256 bytes, a merge and a special token."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "he"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_byte_level_vocabularies_are_written(tmp_path):
    path, tokenizer = tmp_path / "model.gguf", byte_level()
    save(make(vocab_size=260), [entry()], path, tokenizer=tokenizer, pre_tokenizer="smollm")
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[256:]) == (260, ["he", "<|end|>", "[PAD258]", "[PAD259]"])
    assert fields["tokenizer.ggml.token_type"].contents()[255:] == [1, 1, 3, 5, 5]
    assert fields["tokenizer.ggml.merges"].contents() == ["h e"]
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 257
    text = "the heavy <|end|>"
    read_back = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read_back(text)["input_ids"] == tokenizer(text)["input_ids"]
    with pytest.raises(InvalidValueError, match=r"tokenizer: has token 257, and the model 64 tokens"):
        save(make(), [entry()], path, tokenizer=tokenizer)
    with pytest.raises(InvalidValueError, match="int is no byte-level BPE tokenizer"):
        save(make(), [entry()], path, tokenizer=3)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (entry("int4", granularity=(1, 16)), r"GGUF cannot store it: .*groups of 16 columns.*granularity: \[1, 32\]"),
        (entry("int8", "affine"), r"no blocks of affine int8. Legal: symmetric int2 to int8, affine int2 to int4"),
        (entry("int16"), r"no blocks of int16.*quant_dtype: int8"),
        (entry("fp8_e4m3"), r"fp8_e4m3 is no type of integers"),
    ],
)
def test_what_no_block_holds_is_named(said, match, tmp_path):
    with pytest.raises(InvalidValueError, match=match):
        save(make(), [said], tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())
    # float32, rounded
    report, values, _ = save(make(), [said], tmp_path / "model.gguf", unsupported="float")
    stored, block = read(tmp_path / "model.gguf")["blk.1.ffn_down.weight"]
    assert block == "F32"
    assert torch.equal(stored, values["model.layers.1.mlp.down_proj.weight"])
    assert (len(report.fallbacks), report.quantized) == (14, ())


@pytest.mark.parametrize("factor", [1e-8, 1e7])
def test_scales_that_fp16_does_not_hold(factor, tmp_path):
    model = make()
    model.model.layers[0].mlp.up_proj.weight.data *= factor
    with pytest.raises(InvalidValueError, match=r"layers\.0\.mlp\.up_proj\.weight: .*do not fit fp16"):
        save(model, [entry()], tmp_path / "model.gguf")


def test_a_few_tiny_weights_are_no_error(tmp_path):
    model = make()
    model.model.layers[0].mlp.up_proj.weight.data[3] *= 1e-8
    report, _, _ = save(model, [entry()], tmp_path / "model.gguf")
    assert report.deviation <= 2**-11


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: make("Mistral", sliding_window=8), r"attends in windows.*sliding_window = None"),
        (lambda: make(hidden_act="gelu"), "activation gelu"),
        (
            lambda: make(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            r"scales its positions \(linear\)",
        ),
        (lambda: make().model, r"no known names in GGUF: LlamaModel. Legal: llama for causal.*compressed_tensors"),
    ],
)
def test_models_that_the_file_could_not_describe(model, match, tmp_path):
    with pytest.raises(InvalidValueError, match=match):
        save(model(), [entry(exclude_op_names=[])], tmp_path / "model.gguf")


def test_missing_packages_and_wrong_arguments(tmp_path, monkeypatch):
    with pytest.raises(InvalidValueError, match=r"float_type: 'F8' is not accepted. Legal: F32, F16, BF16"):
        save_gguf(make(), tmp_path / "model.gguf", float_type="F8")
    with pytest.raises(InvalidValueError, match="unsupported: 'drop' is not accepted"):
        save_gguf(make(), tmp_path / "model.gguf", unsupported="drop")
    monkeypatch.setitem(sys.modules, "gguf", None)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(MissingExtraError, match=r"GGUF: not installed: gguf.*tersor\[transformers,gguf\]"):
        save_gguf(make(), tmp_path / "model.gguf")
