"""Config lists and recipes from YAML and JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tersor.config import values
from tersor.errors import ConfigError, ConflictError

SUFFIXES = (".yaml", ".yml", ".json")


class _UniqueKeys(yaml.SafeLoader):
    """YAML without repeated keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        _refuse_repeated([key.value for key, _ in node.value])
        return super().construct_mapping(node, deep=deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[Any]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise ConflictError(f"the key {key!r} stands twice in one mapping.", remedy="Keep one.")


def read_config_file(path: str | os.PathLike[str]) -> Any:
    """Read what a YAML or JSON file holds.

    Args:
        path: a file that ends in ``.yaml``, ``.yml`` or ``.json``.

    Raises:
        ConfigError: the file is missing, of another kind or malformed; the message names it.
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError("is no config file.", where=str(path), legal=[f"a name that ends in {s}" for s in SUFFIXES])
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot be read: {reason}.", where=str(path), remedy="Check the path.") from error
    try:
        with values.at(str(path)):
            if file.suffix.lower() == ".json":
                return json.loads(text, object_pairs_hook=_unique)
            return yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        what = f"is malformed: {' '.join(str(error).split())}."
        raise ConfigError(what, where=str(path), remedy="Mend the file at that place.") from error
