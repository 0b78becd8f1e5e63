"""One entry of a config list, parsed: which modules, which targets, what is done to them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import PlainValidator, model_validator
from torch import nn

from tersor.config import values
from tersor.config.specs import Mode, Parsed, TargetSpec
from tersor.errors import ConflictError, InvalidValueError

Names = Annotated[tuple[str, ...], PlainValidator(values.names)]
Patterns = Annotated[tuple[str, ...], PlainValidator(values.patterns)]
Types = Annotated[tuple[str | type[nn.Module], ...], PlainValidator(values.types)]
# An empty list of exclusions is plain: nothing is excluded. An empty selection is a mistake.
ExcludedNames = Annotated[tuple[str, ...], PlainValidator(partial(values.names, may_be_empty=True))]
ExcludedPatterns = Annotated[tuple[str, ...], PlainValidator(partial(values.patterns, may_be_empty=True))]
ExcludedTypes = Annotated[tuple[str | type[nn.Module], ...], PlainValidator(partial(values.types, may_be_empty=True))]

SELECTION_KEYS = ("op_names", "op_names_re", "op_partial_names", "op_types")
EXCLUSION_KEYS = ("exclude_op_names", "exclude_op_names_re", "exclude_op_types")


def _fuse_names(value: object) -> tuple[tuple[str, ...], ...]:
    groups = tuple(values.names(group, "module name") for group in values.items(value, "tuple of module name"))
    for group in groups:
        if len(group) not in (2, 3):
            raise InvalidValueError(
                f"{group!r} is nothing to fuse.", legal=["two or three different module names, such as ('conv', 'bn')"]
            )
    return groups


def _copied(value: Any) -> Any:
    """A copy of mappings and lists; what they hold is a value."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


class Entry(Parsed):
    """One entry of a config list.

    Its modules are those that `op_names`, `op_names_re` or `op_partial_names` name and whose type is in `op_types`, or
    all of these types where no name is given, without those that an ``exclude_`` key names.

    Attributes:
        index: its position in the list.
        where: what errors call it.
        mode: which kind of compressor it is for.
        written: a copy of what the user wrote.
        op_names: names of modules.
        op_names_re: regular expressions that match a module's name from its start.
        op_partial_names: parts of names.
        op_types: module classes, or names of classes; subclasses count. ``default`` is every type with default targets.
        exclude_op_names: names to leave out.
        exclude_op_names_re: regular expressions of names to leave out.
        exclude_op_types: types to leave out.
        exclude: take the modules out of what the entries before selected.
        target_names: the targets of each module; None is the defaults of its type.
        implied_targets: those of `target_names` that hold only in modules with a weight.
        settings: the shorthand keys, which hold for every target that owns them.
        target_settings: what holds for one target, by target name.
        fuse_names: modules that are quantized as if they were one.
        quant_start_step: how many steps a quantizer waits.
    """

    index: int
    where: str
    mode: Mode
    written: Annotated[Mapping[str, Any], PlainValidator(_copied)]
    op_names: Names | None = None
    op_names_re: Patterns | None = None
    op_partial_names: Names | None = None
    op_types: Types | None = None
    exclude_op_names: ExcludedNames | None = None
    exclude_op_names_re: ExcludedPatterns | None = None
    exclude_op_types: ExcludedTypes | None = None
    exclude: Annotated[bool, PlainValidator(values.flag)] = False
    target_names: Annotated[tuple[str, ...], PlainValidator(values.target_names)] | None = None
    implied_targets: tuple[str, ...] = ()
    settings: TargetSpec
    target_settings: Mapping[str, TargetSpec]
    fuse_names: Annotated[tuple[tuple[str, ...], ...], PlainValidator(_fuse_names)] | None = None
    quant_start_step: Annotated[int, PlainValidator(partial(values.whole, kind="number of steps", low=0))] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        if all(getattr(self, key) is None for key in SELECTION_KEYS):
            raise InvalidValueError("the entry selects nothing.", remedy=f"Give one of {', '.join(SELECTION_KEYS)}.")
        for name in (*(self.target_names or ()), *self.target_settings):
            values.check_target(name, self.mode)
        for name in self.target_settings:
            if self.target_names is not None and name not in self.target_names:
                raise ConflictError(
                    f"target_settings has {name!r}, which target_names {list(self.target_names)} leaves out.",
                    remedy="Add it to target_names, or leave its settings out.",
                )
        return self

    def as_config(self) -> dict[str, Any]:
        """The entry as the user wrote it, in a copy that may be changed."""
        return _copied(self.written)
