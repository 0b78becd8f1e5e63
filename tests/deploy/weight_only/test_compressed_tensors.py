"""Checkpoints of compressed-tensors: Transformers loads them, and computes what the simulation computes."""

import json
import sys

import pytest
import torch
from torch import nn

from tersor.deploy.weight_only import save_compressed_tensors
from tersor.errors import (
    CheckpointError,
    ConflictError,
    InvalidValueError,
    MissingExtraError,
    UnmatchedError,
    VerificationError,
    WrapError,
)
from tersor.quantization import AWQQuantizer, GPTQQuantizer, PtqQuantizer
from tersor.storage import read_tensors
from tests.deploy.weight_only.models import TOKENS, batches, entry, logits, make, transformers

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


def save(model, entries, folder, kind=PtqQuantizer, **options):
    """Quantize, save; the report and the logits of the simulation."""
    own = {} if kind is PtqQuantizer else {"calibration": batches(), "example_inputs": {"input_ids": TOKENS}}
    quantizer = kind(model, entries, **own)
    try:
        quantizer.compress()
        return save_compressed_tensors(quantizer, folder, **options), logits(model)
    finally:
        quantizer.unwrap_model()


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize(
    ("kind", "quant_dtype", "scheme", "granularity"),
    [
        (PtqQuantizer, "int4", "symmetric", (1, 32)),
        (PtqQuantizer, "uint4", "affine", (1, 32)),
        (GPTQQuantizer, "int4", "affine", (1, 32)),
        (AWQQuantizer, "int4", "symmetric", (1, 32)),
        (PtqQuantizer, "int8", "symmetric", None),
        (PtqQuantizer, "int8", "affine", "default"),
        (PtqQuantizer, "int8", "symmetric", (-1, -1)),
        (PtqQuantizer, "int3", "affine", (1, 32)),
        (PtqQuantizer, "int5", "symmetric", (2, 16)),
    ],
)
def test_logits_are_those_of_the_simulation(kind, quant_dtype, scheme, granularity, tmp_path):
    report, simulated = save(make(), [entry(quant_dtype, scheme, granularity)], tmp_path / "model", kind)
    assert float((logits(load(tmp_path / "model")) - simulated).abs().max()) == 0
    assert (report.format, report.deviation, report.fallbacks) == ("pack-quantized", 0.0, ())
    assert len(report.quantized) == 14
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "model").iterdir())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_groups(group, scheme, tmp_path):
    model = make(hidden_size=128, intermediate_size=256)
    _, simulated = save(model, [entry("int4", scheme, (1, group))], tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), simulated)
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    # rows of just one group are groups like the others
    (only,) = config["config_groups"].values()
    assert (only["targets"], only["weights"]["group_size"]) == (["Linear"], group)
    assert config["ignore"] == ["lm_head"]


def test_the_file_holds_what_the_format_says(tmp_path):
    model = make()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    save(model, [entry("uint4", "affine")], tmp_path / "model")
    tensors, _ = read_tensors(tmp_path / "model" / "model.safetensors")
    own = {name: tensors[f"model.layers.0.mlp.up_proj.weight_{name}"] for name in ("packed", "scale", "shape")}
    assert own["shape"].tolist() == [96, 64]
    blocks = weight.view(96, 2, 32)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    assert torch.allclose(own["scale"], (high - low) / 15)
    zero_point = helpers.unpack_from_int32(
        tensors["model.layers.0.mlp.up_proj.weight_zero_point"], 4, torch.Size([96, 2]), packed_dim=0
    )
    assert torch.equal(zero_point + 8, (-low / own["scale"]).round().to(torch.int8))
    numbers = helpers.unpack_from_int32(own["packed"], 4, torch.Size([96, 64])).view(96, 2, 32)
    values = (numbers - zero_point[:, :, None]) * own["scale"][:, :, None]
    assert float((values - blocks).abs().max()) <= 0.51 * float(own["scale"].max())


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_scales_are_rounded_to_the_type_of_the_model(dtype, step, scheme, tmp_path):
    report, simulated = save(make(dtype=dtype), [entry("int4", scheme)], tmp_path / "model")
    loaded = logits(load(tmp_path / "model"))
    assert loaded.dtype is dtype
    # the scale, the product with it, and the simulation's own product are rounded
    assert 0 < report.deviation <= 2 * step
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 4 * step


def test_several_types_in_one_checkpoint(tmp_path):
    entries = [entry("int4"), {**entry("int8", granularity="default"), "op_names_re": [".*down_proj"]}]
    entries[1].pop("op_types")
    _, simulated = save(make(tie_word_embeddings=True), entries, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), simulated)
    tensors, _ = read_tensors(tmp_path / "model" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].shape == (96, 64 * 4 // 32)
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].shape == (64, 96 * 8 // 32)
    assert "lm_head.weight" not in tensors
    affine = [entry("int4", "affine"), {**entries[1], "quant_scheme": "affine"}]
    with pytest.raises(ConflictError, match=r"int4 by groups of 32: .*; int8 by rows: .*by the first scheme"):
        save(make(), affine, tmp_path / "other")


def test_a_plain_model_with_its_calibration(tmp_path):
    model = make()
    quantizer = PtqQuantizer(model, [entry()])
    _, calibration = quantizer.compress()
    simulated = logits(model)
    with pytest.raises(WrapError, match="still wrapped"):
        save_compressed_tensors(model, tmp_path / "model", calibration)
    quantizer.unwrap_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    save_compressed_tensors(model, tmp_path / "model", calibration)
    assert torch.equal(logits(load(tmp_path / "model")), simulated)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


def test_models_without_a_head(tmp_path):
    model = make().model
    quantizer = PtqQuantizer(model, [entry(exclude_op_names=[])])
    quantizer.compress()
    with torch.no_grad():
        simulated = model(TOKENS).last_hidden_state
    save_compressed_tensors(quantizer, tmp_path / "model")
    quantizer.unwrap_model()
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, simulated)


def test_scales_of_inputs_are_left_out_with_a_warning(tmp_path):
    model = make()
    said = {**entry("int8", granularity=None), "target_names": ["weight", "_input_"]}
    quantizer = PtqQuantizer(model, [said], calibration=batches(), observer="minmax")
    _, calibration = quantizer.compress()
    with pytest.warns(UserWarning, match=r"stores weights alone: the scales of .*_input_0.* and 11 more are left out"):
        report = save_compressed_tensors(quantizer, tmp_path / "model")
    quantizer.unwrap_model()
    assert len(report.fallbacks) == 14
    weights = {module: {"weight": targets["weight"]} for module, targets in calibration.items()}
    again = PtqQuantizer(model, [entry("int8", granularity=None)])
    again.compress()
    again.update_calibration_config(weights)
    simulated = logits(model)
    again.unwrap_model()
    assert torch.equal(logits(load(tmp_path / "model")), simulated)


def test_tied_and_foreign_weights_are_errors_or_floats(tmp_path):
    everything = {**entry(), "op_types": ["Linear", "Embedding"]}
    del everything["exclude_op_names"]
    linear = {**everything, "op_types": ["Linear"]}
    with pytest.raises(
        InvalidValueError, match=r"cannot store it: it is model\.embed_tokens\.weight as well.*exclude_op"
    ):
        save(make(tie_word_embeddings=True), [linear], tmp_path / "model")
    with pytest.raises(InvalidValueError, match=r"embed_tokens\.weight: .*but of Embedding"):
        save(make(), [everything], tmp_path / "model")
    assert not (tmp_path / "model").exists()
    report, simulated = save(
        make(tie_word_embeddings=True),
        [{**everything, "op_types": ["Linear"]}],
        tmp_path / "model",
        unsupported="float",
    )
    assert torch.equal(logits(load(tmp_path / "model")), simulated)
    assert len(report.quantized) == 14
    (fallback,) = report.fallbacks
    assert "stored in floating point" in fallback.reason


@pytest.mark.parametrize(
    ("quant_dtype", "granularity", "match"),
    [
        ("fp8_e4m3", None, r"pack-quantized\) cannot store it: fp8_e4m3 is no type of integers"),
        ("int16", None, r"cannot store it: int16 has more than 8 bits. Legal: int2 to int8"),
        ("int4", "in_channel", r"each of its columns has a scale.*granularity: out_channel or \[1, 32\]"),
    ],
)
def test_what_the_format_lacks_is_named(quant_dtype, granularity, match, tmp_path):
    said = entry(quant_dtype, granularity=granularity)
    with pytest.raises(InvalidValueError, match=match):
        save(make(), [said], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_types_that_the_format_lacks_as_floats(tmp_path):
    entries = [entry(), {**entry("fp8_e4m3", granularity=None), "op_names_re": [".*down_proj"]}]
    entries[1].pop("op_types")
    report, simulated = save(make(), entries, tmp_path / "model", unsupported="float")
    assert torch.equal(logits(load(tmp_path / "model")), simulated)
    assert len(report.quantized) == 12
    assert [fallback.where for fallback in report.fallbacks] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)
    ]


def test_wrong_models_and_folders(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Linear(64, 64))
    quantizer = PtqQuantizer(net, [{**entry(), "exclude_op_names": []}])
    quantizer.compress()
    with pytest.raises(InvalidValueError, match="Sequential is no model of Transformers"):
        save_compressed_tensors(quantizer, tmp_path / "model")
    quantizer.unwrap_model()
    model = make()
    with pytest.raises(InvalidValueError, match="a plain model needs one"):
        save_compressed_tensors(model, tmp_path / "model")
    with pytest.raises(UnmatchedError, match=r"Did you mean 'lm_head\.weight'"):
        save_compressed_tensors(model, tmp_path / "model", {"lm_heat": {"weight": {}}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(InvalidValueError, match="mine: is there and is no checkpoint"):
        save(model, [entry()], tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"not installed: transformers.*tersor\[transformers\]"):
        save_compressed_tensors(model, tmp_path / "model")


def test_models_that_no_config_describes_are_refused(tmp_path):
    model = make()
    layer = model.model.layers[0].mlp
    layer.up_proj = nn.Linear(64, 80, bias=False)
    layer.gate_proj, layer.down_proj = nn.Linear(64, 80, bias=False), nn.Linear(80, 64, bias=False)
    with pytest.raises(InvalidValueError, match=r"shape \(80, 64\), and by the model's config \(96, 64\)"):
        save(model, [entry(granularity=None)], tmp_path / "model")


def test_an_older_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model = make()
    save(model, [entry()], tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(type(model), "save_pretrained", _fail)
    with pytest.raises(VerificationError, match="half way"):
        save(model, [entry("int8", granularity=None)], tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    _, simulated = save(model, [entry("int8", granularity=None)], tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), simulated)


def _fail(self, folder, **_):
    (folder / "config.json").write_text("{}")
    raise VerificationError("half way")


def test_numbers_that_do_not_follow_from_latent_weights_are_refused(tmp_path):
    model = make()
    quantizer = PtqQuantizer(model, [entry("int4", granularity=None)])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    as_dorefa = {
        module: {"weight": {**targets["weight"], "magnitude": torch.tensor(1.0)}}
        for module, targets in calibration.items()
    }
    with pytest.raises(CheckpointError, match="the weights are latent"):
        save_compressed_tensors(model, tmp_path / "model", as_dorefa)
