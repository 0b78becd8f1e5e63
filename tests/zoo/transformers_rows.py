"""Transformers' architectures at toy size, made from configurations alone: nothing is downloaded."""

from __future__ import annotations

import inspect
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.torchvision_stub import import_torchvision
from tests.zoo.rows import Row


def rows() -> list[Row]:
    """Every architecture in ``transformers.yaml``, in its order."""
    tables = yaml.safe_load(Path(__file__).with_name("transformers.yaml").read_text(encoding="utf-8"))
    sizes = {name: size for size, names in tables["sizes"].items() for name in names}
    made = []
    for family, usual in tables["inputs"].items():
        for name, entry in tables[family].items():
            changes = {"class": entry} if isinstance(entry, str) else dict(entry)
            function, *arguments = changes.pop("inputs", usual)
            build = partial(_build, changes.pop("model_type", name), changes.pop("class"), changes, sizes)
            inputs = partial(INPUTS[function], *arguments)
            made.append(Row(f"transformers/{name}", "transformers", family, build, inputs, name in tables["sample"]))
    return made


def _build(kind: str, architecture: str, changes: dict[str, Any], sizes: dict[str, Any]) -> nn.Module:
    """Make a model with random weights.

    Args:
        kind: Transformers' name of the configuration.
        architecture: the class of the model.
        changes: what the configuration shall hold beside the sizes.
        sizes: what the configuration, and those within it, shall hold as far as they know the names.
    """
    import_torchvision()  # transformers imports it where it finds it
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()  # it advises on faster kernels

    def configure(config_class: Any, changes: dict[str, Any]) -> Any:
        known = inspect.signature(config_class).parameters
        given = {name: size for name, size in sizes.items() if name in known} | {"use_cache": False} | changes
        for name, part in config_class.sub_configs.items():
            inner = dict(given.get(name, {}))
            part = transformers.CONFIG_MAPPING[inner.pop("model_type")] if "model_type" in inner else part
            if part is not transformers.AutoConfig:
                given[name] = configure(part, inner)
        config = config_class(**given)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        return config

    return getattr(transformers, architecture)(configure(transformers.CONFIG_MAPPING[kind], deepcopy(changes)))


def tokens(length: int = 12, name: str = "input_ids") -> dict[str, Tensor]:
    """Token ids alone."""
    return {name: torch.randint(4, 99, (2, length), generator=torch.Generator().manual_seed(length))}


def text(length: int = 12) -> dict[str, Tensor]:
    """Token ids with a mask; the second sample is shorter than the first."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    return {**tokens(length), "attention_mask": mask}


def pair() -> dict[str, Tensor]:
    """A source and a target of another length."""
    return {**text(), **tokens(9, "decoder_input_ids")}


def floats(name: str, *shape: int) -> dict[str, Tensor]:
    """Videos, waveforms or spectrograms."""
    return {name: torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))}


def image(size: int = 32) -> dict[str, Tensor]:
    return floats("pixel_values", 3, size, size)


def captioned() -> dict[str, Tensor]:
    return {**text(), **image()}


def inlaid() -> dict[str, Tensor]:
    """Text in which token 99 stands for each of the 16 patches of an image."""
    inputs = {**text(24), **image()}
    inputs["input_ids"][:, 2:18] = 99
    return inputs


def transcribed(name: str, *shape: int) -> dict[str, Tensor]:
    """Sound, and the text that it becomes."""
    return {**floats(name, *shape), **tokens(9, "decoder_input_ids")}


INPUTS = {
    function.__name__: function for function in (tokens, text, pair, floats, image, captioned, inlaid, transcribed)
}
