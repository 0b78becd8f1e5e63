"""What a config list is parsed into: frozen, validated values.

A field that is None was not set. Which fields were given, even as None, is kept (`Spec.given`), so that settings can be
laid over each other: the defaults of a module type, then an entry's shorthand keys, then its ``target_settings``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from tersor.config import values
from tersor.config.dtypes import FloatDtype, IntDtype, QuantDtype, parse_dtype
from tersor.errors import ConfigError, ConflictError, InvalidValueError, UnknownKeyError, nearest

Mode = Literal["pruning", "quantization", "distillation"]
ParsedT = TypeVar("ParsedT", bound="Parsed")
SpecT = TypeVar("SpecT", bound="Spec")

GRANULARITY_NAMES = ("default", "in_channel", "out_channel", "per_channel")


@dataclass(frozen=True)
class Granularity:
    """The block in which values live and die together, or share a scale.

    Either a `name`, whose dimensions depend on the module type, or a `block`.

    Attributes:
        block: sizes; -1 is a whole dimension.
        pad: the side on which dimensions that `block` lacks are added.
        fill: what they are filled with: 1 (each index by itself) or -1 (all of them together).
        name: ``default`` (the algorithm's own), ``in_channel``, ``out_channel`` or ``per_channel``; None for a block.

    >>> Granularity.parse([4, 4])
    Granularity(block=(4, 4), pad='front', fill=1, name=None)
    >>> Granularity.parse([[1], "back", -1])
    Granularity(block=(1,), pad='back', fill=-1, name=None)
    """

    block: tuple[int, ...] = ()
    pad: Literal["front", "back"] = "front"
    fill: Literal[1, -1] = 1
    name: str | None = None

    @classmethod
    def parse(cls, value: object) -> Granularity:
        """Read a granularity: a name, a block of the last dimensions, or ``[block, pad, fill]``.

        Raises:
            InvalidValueError: for anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value in GRANULARITY_NAMES:
            return cls(name=value)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            block, *rest = value if isinstance(value[0], Sequence) else (value,)
            pad, fill = (*rest, *("front", 1)[len(rest) :])[:2]
            fits = len(rest) < 3 and pad in ("front", "back") and fill in (1, -1)
            if fits and block and all(_is_size(size) for size in block):
                return cls(tuple(int(size) for size in block), cast("Any", pad), cast("Any", fill))
        legal = [*GRANULARITY_NAMES, "a block such as [4, 4] or [1, -1, -1, -1]", "[[1], 'back', -1]"]
        remedy = nearest(value, GRANULARITY_NAMES) if isinstance(value, str) else "Sizes are -1 or at least 1."
        raise InvalidValueError(f"{value!r} is no granularity.", legal=legal, remedy=remedy)

    def as_config(self) -> Any:
        """The shortest form that `parse` reads back."""
        plain = list(self.block)
        return self.name or (plain if (self.pad, self.fill) == ("front", 1) else [plain, self.pad, self.fill])


def _is_size(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and (value == -1 or int(value) > 0)


class Parsed(BaseModel):
    """Base of all that is parsed. Make one with `parse`, whose errors name the place."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, arbitrary_types_allowed=True)

    @classmethod
    def legal_keys(cls) -> tuple[str, ...]:
        """The keys that a user may write."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def parse(
        cls: type[ParsedT], keys: Mapping[str, Any], where: str = "", *, spelt: Mapping[str, str] | None = None
    ) -> ParsedT:
        """Validate keys.

        Args:
            keys: key to value, as the user wrote them or already parsed.
            where: the place, for errors.
            spelt: how the user spelt a key, where that differs.

        Raises:
            ConfigError: one of its subclasses, with the key's place, its value and what would be legal.
        """
        legal = cls.legal_keys()
        if not isinstance(keys, Mapping):
            raise InvalidValueError(f"{keys!r} is no mapping.", where=where, legal=legal)
        for key in keys:
            if key not in legal and key not in cls.model_fields:
                remedy = nearest(str(key), legal)
                raise UnknownKeyError(f"{key!r} is no key here.", where=where, legal=legal, remedy=remedy)
        try:
            return cls.model_validate(dict(keys))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        key = first["loc"][0] if first["loc"] else None
        place = where if key is None else f"{where}[{(spelt or {}).get(str(key), key)!r}]"
        if first["type"] == "missing":
            raise InvalidValueError(f"{key!r} is missing.", where=where, legal=legal)
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            with values.at(place):
                raise cause
        raise InvalidValueError(f"{first['input']!r} is not accepted.", where=place)

    def as_config(self) -> dict[str, Any]:
        """What is set, as a user would write it, ready for JSON; `parse` reads it back."""
        fields = type(self).model_fields.items()
        written = {field.alias or name: (getattr(self, name), field.default) for name, field in fields}
        return {key: _as_config(value) for key, (value, default) in written.items() if value != default}


def _as_config(value: object) -> Any:
    if isinstance(value, Parsed | Granularity | Pattern | IntDtype | FloatDtype):
        return value.as_config()
    return list(value) if isinstance(value, tuple) else value


class Spec(Parsed):
    """Base of what holds for one target."""

    rivals: ClassVar[frozenset[str]] = frozenset()
    """Fields of which only one can hold: setting one unsets the others of the settings below."""

    def given(self) -> dict[str, Any]:
        """The fields that were set, by name, also those set to None."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @classmethod
    def layered(cls: type[SpecT], *layers: Mapping[str, Any], where: str = "") -> SpecT:
        """Settings laid over each other: the later layer wins, and a rival in it unsets those below.

        >>> PruningSpec.layered({"sparse_ratio": 0.5, "apply_method": "mul"}, {"sparse_threshold": 0.1}).as_config()
        {'sparse_threshold': 0.1, 'apply_method': 'mul'}
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            if any(layer.get(name) is not None for name in cls.rivals):
                merged = {name: value for name, value in merged.items() if name not in cls.rivals}
            merged.update(layer)
        return cls.parse(merged, where)


GranularityField = Annotated[Granularity, PlainValidator(Granularity.parse)]
Ratio = Annotated[float, PlainValidator(values.ratio)]
Group = Annotated[str, PlainValidator(values.identifier)]


def _dims(value: object) -> tuple[int, ...]:
    dims = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not dims or len(set(dims)) < len(dims):
        raise InvalidValueError(f"{value!r} is no choice of dimensions.", legal=["distinct integers, such as [0]"])
    return tuple(values.whole(dim, "dimension", 0) for dim in dims)


class Align(Parsed):
    """Take the mask from another target.

    Attributes:
        module_name: the module of the other target; None is the same module.
        target_name: the other target.
        dims: the dimensions of the other target that this target's first dimensions are, in this target's order.
    """

    module_name: Annotated[str, PlainValidator(values.identifier)] | None = None
    target_name: Annotated[str, PlainValidator(values.target_name)]
    dims: Annotated[tuple[int, ...], PlainValidator(_dims)]


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: ``keep`` of every ``of`` consecutive blocks along the input dimension stay.

    >>> Pattern.parse("2:4")
    Pattern(keep=2, of=4)
    """

    keep: int
    of: int

    @classmethod
    def parse(cls, value: object) -> Pattern:
        """Read ``"2:4"``.

        Raises:
            InvalidValueError: for anything else, or where it keeps none or all.
        """
        if isinstance(value, cls):
            return value
        keep, _, of = value.partition(":") if isinstance(value, str) else ("", "", "")
        if keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of):
            return cls(int(keep), int(of))
        raise InvalidValueError(f"{value!r} is no pattern.", legal=["N:M with 0 < N < M, such as '2:4'"])

    @property
    def ratio(self) -> float:
        """The share that it removes."""
        return (self.of - self.keep) / self.of

    def as_config(self) -> str:
        """What `parse` reads back."""
        return f"{self.keep}:{self.of}"


def _align(value: object) -> Align:
    return value if isinstance(value, Align) else Align.parse(cast("Mapping[str, Any]", value))


def _one_of(*legal: str) -> PlainValidator:
    return PlainValidator(partial(values.choice, legal=legal))


class PruningSpec(Spec):
    """How one target is pruned.

    Attributes:
        sparse_ratio: the share that is removed (of the group, where `global_group_id` is set).
        max_sparse_ratio: at most this share of the target is removed.
        min_sparse_ratio: at least this share of the target is removed.
        sparse_threshold: remove what scores below it, in place of a ratio.
        sparse_pattern: ``"2:4"`` keeps two of every four consecutive elements along the input dimension, in place of a
            ratio.
        global_group_id: targets of one group share one ratio, spread as the scores demand.
        global_normalize: ``mean`` divides each target's scores by their mean before those of a global group are ranked
            together, so that a layer of small weights is not emptied first.
        dependency_group_id: targets of one group share one mask.
        granularity: the block that lives or dies together.
        internal_metric_block: split the blocks into this many runs and prune each alike (groups of a convolution).
        balance_granularity: a block, as for `granularity`; each of these loses the same share (``[1, 4]``: of every
            four consecutive elements; ``[[1], "back", -1]``: of every row).
        rho: weight of the penalty of :class:`tersor.pruning.ADMMPruner`, the only one to use it.
        align: take the mask from another target.
        apply_method: ``mul`` zeroes what is masked, ``add`` adds `apply_value` there, ``bypass`` does nothing.
        apply_value: what ``add`` adds; for what feeds a softmax.
    """

    rivals: ClassVar[frozenset[str]] = frozenset({"sparse_ratio", "sparse_threshold", "sparse_pattern", "align"})

    sparse_ratio: Ratio | None = None
    max_sparse_ratio: Ratio | None = None
    min_sparse_ratio: Ratio | None = None
    sparse_threshold: Annotated[float, PlainValidator(partial(values.number, kind="threshold"))] | None = None
    sparse_pattern: Annotated[Pattern, PlainValidator(Pattern.parse)] | None = None
    global_group_id: Group | None = None
    global_normalize: Annotated[Literal["mean"], _one_of("mean")] | None = None
    dependency_group_id: Group | None = None
    granularity: GranularityField | None = None
    internal_metric_block: (
        Annotated[int, PlainValidator(partial(values.whole, kind="number of blocks", low=1))] | None
    ) = None
    balance_granularity: GranularityField | None = None
    rho: Annotated[float, PlainValidator(partial(values.number, kind="weight of a penalty", low=0))] | None = None
    align: Annotated[Align, PlainValidator(_align)] | None = None
    apply_method: Annotated[Literal["bypass", "mul", "add"], _one_of("bypass", "mul", "add")] | None = None
    apply_value: Annotated[float, PlainValidator(values.negative)] = -1000.0

    @model_validator(mode="after")
    def _consistent(self) -> PruningSpec:
        rivals = [name for name in type(self).model_fields if name in self.rivals and getattr(self, name) is not None]
        if len(rivals) > 1:
            raise ConflictError(f"{' and '.join(map(repr, rivals))} exclude each other.", remedy="Keep one of them.")
        parts = [
            n
            for n in ("sparse_pattern", "balance_granularity", "internal_metric_block")
            if getattr(self, n) is not None
        ]
        if len(parts) > 1:
            raise ConflictError(
                f"{' and '.join(map(repr, parts))} both say what is balanced.", remedy="Keep one of them."
            )
        counts = ("global_group_id", "min_sparse_ratio", "max_sparse_ratio")
        others = [name for name in counts if getattr(self, name) is not None]
        if self.sparse_pattern is not None and others:
            raise ConflictError(
                f"a pattern says how many leave, and so does {others[0]!r}.",
                remedy=f"Leave out {others[0]}, or give sparse_ratio with balance_granularity in place of the pattern.",
            )
        low, high = self.min_sparse_ratio, self.max_sparse_ratio
        if low is not None and high is not None and low > high:
            raise ConflictError(
                f"min_sparse_ratio {low} is above max_sparse_ratio {high}.", remedy="Swap them, or leave one out."
            )
        return self

    @property
    def ratio(self) -> float | None:
        """The share to remove, be it given as such or by a pattern."""
        return self.sparse_ratio if self.sparse_pattern is None else self.sparse_pattern.ratio


QUANT_METHODS = (
    "bypass",
    "clamp_round",
    "qat_clamp_round",
    "dorefa_clamp_round_weight",
    "dorefa_clamp_round_output",
    "lsq_clamp_round",
    "lsq_plus_clamp_round",
    "bnn_clamp_round",
)


OBSERVERS = ("minmax", "moving_average", "percentile", "entropy", "mse")


class QuantizationSpec(Spec):
    """How one target is quantized.

    Attributes:
        quant_dtype: the type of the stored values: ``int2`` to ``int32``, ``uint1`` to ``uint32``, ``fp8_e4m3``,
            ``fp8_e5m2``; ``int1`` for the methods that binarize.
        quant_scheme: ``symmetric`` (the zero point is fixed) or ``affine`` (it follows the range).
        quant_range: ``narrow`` leaves the lowest value of a signed type out (``int8``: -127 to 127), so that each value
            has its negative; ``full`` uses it (-128 to 127). By default signed symmetric types are narrow, all others
            full; the quantizers of single papers have the paper's.
        granularity: the block that shares a scale. ``default`` is one for each output channel of the weight of a linear
            layer or convolution, and one for any other tensor as a whole; some quantizers have another. ``per_channel``
            holds for inputs and outputs too. ``[1, 128]`` is every 128 values of a row, ``[-1]`` every row.
        observer: how the range is found on calibration data: ``minmax``, ``moving_average``, ``percentile``,
            ``entropy`` or ``mse``; each quantizer has its own default.
        dynamic: the range of an input or output is found at run time, for each value by itself.
        apply_method: how fake quantization is applied; each quantizer sets its own. ``bypass`` leaves the target as it
            is.
    """

    quant_dtype: Annotated[QuantDtype, PlainValidator(parse_dtype)] | None = None
    quant_scheme: Annotated[Literal["affine", "symmetric"], _one_of("affine", "symmetric")] | None = None
    quant_range: Annotated[Literal["narrow", "full"], _one_of("narrow", "full")] | None = None
    granularity: GranularityField | None = None
    observer: Annotated[str, _one_of(*OBSERVERS)] | None = None
    dynamic: Annotated[bool, PlainValidator(values.flag)] | None = None
    apply_method: Annotated[str, _one_of(*QUANT_METHODS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> QuantizationSpec:
        if isinstance(self.quant_dtype, FloatDtype) and self.quant_scheme == "affine":
            raise ConflictError(
                f"{self.quant_dtype.as_config()} has no zero point.", remedy="Set quant_scheme to 'symmetric'."
            )
        if self.dynamic and self.observer is not None:
            raise ConflictError(
                "'dynamic' finds each range at run time, and 'observer' before.", remedy="Keep one of them."
            )
        return self


def _link(value: object) -> Literal["auto"] | tuple[str, ...]:
    return "auto" if value == "auto" else values.names(value, "module name")


class DistillationSpec(Spec):
    """How one target is drawn towards the teacher's.

    Attributes:
        lambda_: the weight of this target's loss; its key is ``lambda``.
        link: the teacher's modules to compare with; ``auto`` is the module of the same name.
        apply_method: ``mse`` or ``kl``.
    """

    lambda_: Annotated[float, PlainValidator(partial(values.number, kind="weight of a loss", low=0))] | None = Field(
        None, alias="lambda"
    )
    link: Annotated[Literal["auto"] | tuple[str, ...], PlainValidator(_link)] | None = None
    apply_method: Annotated[Literal["mse", "kl"], _one_of("mse", "kl")] | None = None


TargetSpec = PruningSpec | QuantizationSpec | DistillationSpec
SPECS: Mapping[Mode, type[TargetSpec]] = {
    "pruning": PruningSpec,
    "quantization": QuantizationSpec,
    "distillation": DistillationSpec,
}
