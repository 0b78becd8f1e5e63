import pytest
import torch
from torch import nn

from tersor.config import Align, parse_config_list
from tersor.errors import ConfigError, InvalidValueError, UnknownKeyError, UnmatchedError
from tersor.targets import DistillationSetting, PruningSetting, QuantizationSetting, resolve_targets


class Scale(nn.Module):
    """A module type of a user."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("module", "targets"),
    [
        (nn.Linear(2, 2), ["weight", "bias"]),
        (nn.Conv1d(1, 1, 1), ["weight", "bias"]),
        (nn.Conv3d(1, 1, 1), ["weight", "bias"]),
        (nn.ConvTranspose2d(1, 1, 1), ["weight", "bias"]),
        (nn.BatchNorm3d(1), ["weight", "bias"]),
        (nn.GroupNorm(1, 1), ["weight", "bias"]),
        (nn.LayerNorm(1), ["weight", "bias"]),
        (nn.Embedding(2, 2), ["weight"]),
        (nn.PReLU(), ["weight"]),
        (nn.ReLU(), None),
        (nn.LSTM(1, 1), None),
    ],
)
def test_defaults_of_pruning(module, targets):
    setting = PruningSetting.of(module)
    assert (setting and list(setting)) == targets


@pytest.mark.parametrize(
    ("module", "targets"),
    [
        (nn.Linear(2, 2), ["_input_0", "weight", "_output_0"]),
        (nn.ConvTranspose1d(1, 1, 1), ["_input_0", "weight", "_output_0"]),
        (nn.BatchNorm2d(1), ["_input_0", "weight", "_output_0"]),
        (nn.ReLU6(), ["_output_0"]),
        (nn.MaxPool2d(2), ["_output_0"]),
        (nn.GELU(), ["_output_0"]),
        (nn.Flatten(), None),
    ],
)
def test_defaults_of_quantization(module, targets):
    setting = QuantizationSetting.of(module)
    assert (setting and list(setting)) == targets


def test_every_module_can_be_distilled():
    assert list(DistillationSetting.of(Scale())) == ["_output_0"]


def test_the_bias_of_a_transposed_convolution_follows_dimension_one():
    assert PruningSetting.of(nn.ConvTranspose2d(1, 1, 1))["bias"].align == Align(target_name="weight", dims=(1,))
    assert PruningSetting.of(nn.Conv2d(1, 1, 1))["bias"].align == Align(target_name="weight", dims=(0,))


@pytest.mark.parametrize("module_type", [Scale, "Scale"])
def test_registered_types_have_targets(module_type):
    entries = parse_config_list([{"op_types": [Scale], "sparse_ratio": 0.5}], "pruning")
    with PruningSetting.preserved():
        PruningSetting.register(module_type, {"gain": {"sparse_ratio": None, "max_sparse_ratio": 0.9}})
        (target,) = resolve_targets(nn.Sequential(Scale()), entries, "pruning").targets
        assert (target.target_name, target.spec.sparse_ratio, target.spec.max_sparse_ratio) == ("gain", 0.5, 0.9)
        PruningSetting.unregister(module_type)
        assert PruningSetting.of(Scale()) is None
    assert PruningSetting.of(Scale()) is None


def test_the_nearest_base_decides_and_the_latest_registration_replaces():
    class Narrow(nn.Linear): ...

    narrow = Narrow(2, 2)
    with PruningSetting.preserved():
        PruningSetting.register("Narrow", {"bias": {}})
        assert list(PruningSetting.of(narrow)) == ["bias"]
        PruningSetting.register(Narrow, {"weight": {}})
        assert list(PruningSetting.of(narrow)) == ["weight"]
        PruningSetting.register("Narrow", {"_input_": {}})
        assert list(PruningSetting.of(narrow)) == ["_input_0"]
        assert list(PruningSetting.of(nn.Linear(2, 2))) == ["weight", "bias"]
    assert list(PruningSetting.of(narrow)) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("registry", "module_type", "setting", "error", "texts"),
    [
        (PruningSetting, 3, {"weight": {}}, InvalidValueError, ["PruningSetting.register: 3", "torch.nn.Module"]),
        (PruningSetting, Scale, {}, InvalidValueError, ["{} has no targets"]),
        (PruningSetting, Scale, {"gain": {"sparsity": 1}}, UnknownKeyError, ["register['gain']", "sparse_ratio"]),
        (PruningSetting, Scale, {"gain": {"sparse_ratio": 2}}, InvalidValueError, ["register['gain']['sparse_ratio']"]),
        (DistillationSetting, Scale, {"gain": {}}, InvalidValueError, ["'gain' cannot be distilled", "_output_0"]),
    ],
)
def test_bad_registrations(registry, module_type, setting, error, texts):
    before = registry.types
    with pytest.raises(ConfigError) as caught:
        registry.register(module_type, setting)
    assert type(caught.value) is error
    for text in texts:
        assert text in str(caught.value)
    assert registry.types == before


def test_unregistering_a_stranger():
    with pytest.raises(UnmatchedError, match=r"'Embeding' is not registered.*Did you mean 'Embedding'"):
        PruningSetting.unregister("Embeding")
