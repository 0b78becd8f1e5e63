"""From what the user wrote to entries: the one door through which every config list comes in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from tersor.config import values
from tersor.config.entry import EXCLUSION_KEYS, SELECTION_KEYS, Entry
from tersor.config.files import read_config_file
from tersor.config.legacy import LEGACY_KEYS, translate
from tersor.config.specs import SPECS, Mode, TargetSpec
from tersor.errors import ConflictError, InvalidValueError, UnknownKeyError, nearest

MODES: tuple[Mode, ...] = get_args(Mode)
ConfigList = Sequence[Mapping[str, Any] | Entry] | str | os.PathLike[str]

_WHICH = (*SELECTION_KEYS, *EXCLUSION_KEYS, "exclude")
_ENTRY_KEYS: Mapping[Mode, tuple[str, ...]] = {
    "pruning": (*_WHICH, "target_names"),
    "quantization": (*_WHICH, "target_names", "fuse_names", "quant_start_step"),
    "distillation": (*_WHICH, "target_names"),
}


def parse_config_list(config_list: ConfigList, mode: Mode, *, where: str = "config_list") -> tuple[Entry, ...]:
    """Validate a config list.

    Args:
        config_list: entries as mappings, in the keys of NNI 3.0 or 2.x, or already parsed; or the path of a YAML or
            JSON file that holds such a list. It is not changed.
        mode: ``"pruning"``, ``"quantization"`` or ``"distillation"``.
        where: what errors call the list.

    Raises:
        ConfigError: one of its subclasses, which names the entry, the key, the value and what would be legal.

    >>> (entry,) = parse_config_list([{"op_types": ["Linear"], "sparse_ratio": 0.5}], "pruning")
    >>> entry.op_types, entry.settings.as_config()
    (('Linear',), {'sparse_ratio': 0.5})
    >>> parse_config_list([{"op_types": ["Linear"], "sparse_ratoi": 0.5}], "pruning")
    Traceback (most recent call last):
    tersor.errors.UnknownKeyError: config_list[0]['sparse_ratoi']: ... Did you mean 'sparse_ratio'?
    """
    with values.at("mode"):
        values.choice(mode, MODES)
    if isinstance(config_list, str | os.PathLike):
        where = f"{os.fspath(config_list)}: {where}"
        config_list = read_config_file(config_list)
    if not isinstance(config_list, Sequence) or isinstance(config_list, bytes):
        remedy = "Put the entry into a list: [{...}]." if isinstance(config_list, Mapping) else ""
        raise InvalidValueError(f"{config_list!r} is no list.", where=where, legal=["a list of entries"], remedy=remedy)
    if not config_list:
        raise InvalidValueError(
            "the list is empty.", where=where, remedy="Add an entry such as {'op_types': ['Linear'], ...}."
        )
    return tuple(_entry(raw, mode, index, f"{where}[{index}]") for index, raw in enumerate(config_list))


def _entry(raw: object, mode: Mode, index: int, where: str) -> Entry:
    if isinstance(raw, Entry):
        if raw.mode != mode:
            raise ConflictError(f"an entry for {raw.mode} stands in a list for {mode}.", where=where)
        return raw
    if not isinstance(raw, Mapping):
        raise InvalidValueError(f"{raw!r} is no mapping.", where=where, legal=["a mapping of keys to values"])
    _check_keys(raw, mode, where)
    keys, spelt, implied = translate(raw, mode, where)
    own = {key: keys[key] for key in _ENTRY_KEYS[mode] if keys.get(key) is not None}
    return Entry.parse(
        {
            **own,
            "index": index,
            "where": where,
            "mode": mode,
            "written": raw,
            "implied_targets": implied,
            "settings": SPECS[mode].parse(
                {key: keys[key] for key in SPECS[mode].legal_keys() if key in keys}, where, spelt=spelt
            ),
            "target_settings": _target_settings(keys.get("target_settings"), mode, f"{where}['target_settings']"),
        },
        where,
        spelt=spelt,
    )


def _target_settings(raw: object, mode: Mode, where: str) -> dict[str, TargetSpec]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise InvalidValueError(f"{raw!r} is no mapping.", where=where, legal=["a mapping of target names to settings"])
    settings: dict[str, TargetSpec] = {}
    for name, keys in raw.items():
        with values.at(where):
            target = values.target_name(name)
        if target in settings:
            raise ConflictError(f"{name!r} is a second name of {target!r}.", where=where, remedy="Keep one of them.")
        settings[target] = SPECS[mode].parse(keys, f"{where}[{name!r}]")
    return settings


def _legal_keys(mode: Mode) -> tuple[str, ...]:
    return (*_ENTRY_KEYS[mode], "target_settings", *SPECS[mode].legal_keys(), *LEGACY_KEYS[mode])


def _check_keys(raw: Mapping[Any, Any], mode: Mode, where: str) -> None:
    """Refuse unknown keys, and all but the selection beside ``exclude``."""
    legal = _legal_keys(mode)
    for key in raw:
        if key in legal:
            continue
        homes = [other for other in MODES if key in _legal_keys(other)]
        remedy = (
            f"It belongs to {' and '.join(homes)}, and this list is for {mode}." if homes else nearest(str(key), legal)
        )
        raise UnknownKeyError(
            f"{key!r} is no key of a {mode} entry.", where=f"{where}[{key!r}]", legal=legal, remedy=remedy
        )
    beside = [key for key in raw if key not in _WHICH]
    if raw.get("exclude") is True and beside:
        raise ConflictError(
            f"'exclude' stands beside {', '.join(map(repr, beside))}.",
            where=where,
            remedy="An entry either excludes its modules or says what is done to them: make two entries.",
        )
