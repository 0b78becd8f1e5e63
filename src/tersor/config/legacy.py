"""The keys of NNI 2.x, in the keys of 3.0.

=========================== ==========================================================================================
2.x                         3.0
=========================== ==========================================================================================
``sparsity``                ``sparse_ratio`` of ``weight``; other targets, the bias too, are left alone
``sparsity_per_layer``      the same
``total_sparsity``          the same, with a ``global_group_id`` of the entry's own
``max_sparsity_per_layer``  ``max_sparse_ratio`` of ``weight``
``quant_types``             ``target_names``: ``_input_``, ``weight``, ``_output_``
``quant_bits``              a signed ``quant_dtype`` for each of these targets
=========================== ==========================================================================================

``op_types``, ``op_names``, ``op_partial_names``, ``exclude`` and ``quant_start_step`` mean the same in both.
Weight and input are always quantized together: in every module that has a weight, who asks for one gets both, with the
bits of the one where the other's are not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tersor.config import values
from tersor.config.dtypes import IntDtype
from tersor.config.specs import Mode
from tersor.errors import ConflictError, InvalidValueError

_RATIOS = {
    "sparsity": "sparse_ratio",
    "sparsity_per_layer": "sparse_ratio",
    "total_sparsity": "sparse_ratio",
    "max_sparsity_per_layer": "max_sparse_ratio",
}
_TARGETS = {"input": "_input_0", "weight": "weight", "output": "_output_0"}
_TOGETHER = ("input", "weight")

LEGACY_KEYS: Mapping[Mode, tuple[str, ...]] = {
    "pruning": tuple(_RATIOS),
    "quantization": ("quant_types", "quant_bits"),
    "distillation": (),
}


class Translation(NamedTuple):
    """An entry in the keys of 3.0.

    Attributes:
        keys: key to value.
        spelt: how the user spelt a key, where that differs.
        implied_targets: targets that were not asked for and hold only in modules with a weight.
    """

    keys: dict[str, Any]
    spelt: dict[str, str]
    implied_targets: tuple[str, ...] = ()


def translate(raw: Mapping[str, Any], mode: Mode, where: str) -> Translation:
    """Translate one entry; an entry without keys of 2.x comes back as it is.

    Args:
        raw: the entry as the user wrote it; it is not changed.
        mode: the kind of compressor it is for.
        where: the place of the entry, for errors.

    Raises:
        ConflictError: two keys give one thing.
        InvalidValueError: the quantization types or bits are unknown.

    >>> translate({"op_types": ["Linear"], "total_sparsity": 0.5}, "pruning", "config_list[0]").keys
    {'op_types': ['Linear'], 'sparse_ratio': 0.5, 'global_group_id': 'config_list[0]', 'target_names': ['weight']}
    """
    if not set(LEGACY_KEYS[mode]) & set(raw):
        return Translation(dict(raw), {})
    return _pruning(raw, where) if mode == "pruning" else _quantization(raw, where)


def _pruning(raw: Mapping[str, Any], where: str) -> Translation:
    keys = {key: value for key, value in raw.items() if key not in _RATIOS}
    spelt: dict[str, str] = {}
    for old, new in _RATIOS.items():
        if old not in raw:
            continue
        if new in keys:
            _refuse(spelt.get(new, new), old, where)
        keys[new], spelt[new] = raw[old], old
    if "total_sparsity" in raw:
        if "global_group_id" in raw:
            _refuse("global_group_id", "total_sparsity", where)
        keys["global_group_id"] = where
    if "target_names" not in raw and "target_settings" not in raw:
        keys["target_names"] = ["weight"]
    return Translation(keys, spelt)


def _quantization(raw: Mapping[str, Any], where: str) -> Translation:
    for rival in ("target_names", "target_settings", "quant_dtype"):
        if rival in raw:
            _refuse(next(key for key in LEGACY_KEYS["quantization"] if key in raw), rival, where)
    if "quant_types" not in raw:
        raise ConflictError(
            "'quant_bits' stands without 'quant_types'.", where=where, remedy="Say which types: ['weight']."
        )
    with values.at(f"{where}['quant_types']"):
        asked = [values.choice(kind, tuple(_TARGETS)) for kind in values.names(raw["quant_types"], "quantization type")]
    partners = [name for name in asked if name in _TOGETHER]
    implied = [name for name in _TOGETHER if partners and name not in asked]
    with values.at(f"{where}['quant_bits']"):
        dtypes = _dtypes(raw.get("quant_bits", 8), asked, [*asked, *implied])
        for name in implied:
            dtypes[name] = dtypes.get(name, dtypes[partners[0]])
    keys = {key: value for key, value in raw.items() if key not in LEGACY_KEYS["quantization"]}
    keys["target_names"] = [target for name, target in _TARGETS.items() if name in dtypes]
    keys["target_settings"] = {_TARGETS[name]: {"quant_dtype": dtype} for name, dtype in dtypes.items()}
    return Translation(keys, {"target_names": "quant_types"}, tuple(_TARGETS[name] for name in implied))


def _dtypes(quant_bits: object, asked: Sequence[str], welcome: Sequence[str]) -> dict[str, IntDtype]:
    """The data type of each quantization type: all that are asked for must have bits, all that are welcome may."""
    if not isinstance(quant_bits, Mapping):
        return dict.fromkeys(asked, IntDtype.parse(quant_bits))
    for name in asked:
        if name not in quant_bits:
            raise InvalidValueError(f"no bits are given for {name!r}.", remedy=f"Add {{{name!r}: 8}}.")
    dtypes: dict[str, IntDtype] = {}
    for name, bits in quant_bits.items():
        values.choice(name, welcome)
        with values.at(f"[{name!r}]"):
            dtypes[name] = IntDtype.parse(bits)
    return dtypes


def _refuse(first: str, second: str, where: str) -> None:
    raise ConflictError(f"{first!r} and {second!r} say one thing twice.", where=where, remedy="Keep one of them.")
