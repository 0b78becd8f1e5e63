"""From entries to targets: which tensor of the model is compressed, and what holds for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.config.entry import Entry
from tersor.config.specs import SPECS, Align, Mode, PruningSpec, TargetSpec
from tersor.config.values import is_activation
from tersor.errors import ConflictError, UnmatchedError, nearest
from tersor.graph.operations import Operation
from tersor.targets.selection import Modules, select
from tersor.targets.settings import SETTINGS, Setting


@dataclass(frozen=True)
class TargetConfig:
    """One tensor that is compressed.

    Attributes:
        module_name: the first of the module's names; empty for the model itself.
        module: the module.
        target_name: a parameter, a buffer, ``_input_...`` or ``_output_...``.
        spec: what holds for it, defaults included.
        entry_index: the position of the entry that decided.
        where: what errors call this entry.
    """

    module_name: str
    module: nn.Module
    target_name: str
    spec: TargetSpec
    entry_index: int
    where: str = "config_list"


@dataclass(frozen=True)
class Resolution:
    """What a config list comes to on one model.

    Attributes:
        targets: in the order of the model.
        skipped: why a module that owns parameters has no target, by module name.
    """

    targets: tuple[TargetConfig, ...]
    skipped: Mapping[str, str]


def resolve_targets(model: nn.Module, entries: Sequence[Entry], mode: Mode) -> Resolution:
    """Resolve entries on a model, which is not touched.

    A target's settings are, each over the one before: the registered setting of its module type (or the generic one,
    for a target that the type does not list), the entry's shorthand keys that the target owns, the entry's
    ``target_settings``. A later entry overrides an earlier one wholly for the same target; an entry with ``exclude``
    takes its modules out of what the entries before it selected.

    Args:
        model: the model.
        entries: a parsed config list.
        mode: the kind of compressor.

    Raises:
        UnmatchedError: a name, a type, a pattern or a target that does not exist in the model.
        ConflictError: settings that cannot hold together.

    >>> from tersor.config import parse_config_list
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> entries = parse_config_list([{"op_names": ["0"], "sparse_ratio": 0.5}], "pruning")
    >>> resolution = resolve_targets(model, entries, "pruning")
    >>> [(t.module_name, t.target_name, t.spec.sparse_ratio) for t in resolution.targets]
    [('0', 'weight', 0.5), ('0', 'bias', None)]
    >>> resolution.skipped
    {'2': 'no entry selects it'}
    """
    assert all(entry.mode == mode for entry in entries), "entries are parsed for one mode"
    modules = Modules(model)
    targets: dict[tuple[str, str], TargetConfig] = {}
    reasons: dict[str, str] = {}
    for entry in entries:
        selection = select(modules, entry, SETTINGS[mode].types)
        reasons.update(dict.fromkeys(selection.excluded, f"left out by the exclude_ keys of {entry.where}"))
        if entry.exclude:
            reasons.update(dict.fromkeys(selection.selected, f"excluded by {entry.where}"))
            targets = {key: target for key, target in targets.items() if key[0] not in selection.selected}
        else:
            _check_fused(entry, selection.selected, modules)
            chosen = {name: modules.by_name[name] for name in selection.selected}
            found = _resolve_entry(entry, chosen)
            targets.update({(target.module_name, target.target_name): target for target in found})
            reasons.update(dict.fromkeys(chosen, f"{entry.where} selects it, but none of its tensors is a target"))
    _check_groups(targets.values())
    _check_aligns(targets, modules)
    targets = {key: _by_first_name(target, modules.first_name) for key, target in targets.items()}
    position = {name: index for index, name in enumerate(modules.by_name)}
    ordered = sorted(targets.values(), key=lambda target: position[target.module_name])
    with_targets = {target.module_name for target in ordered}
    skipped = {
        name: reasons.get(name, "no entry selects it")
        for name, first in modules.first_name.items()
        if name == first and name not in with_targets and _has_parameters(modules.by_name[name])
    }
    return Resolution(tuple(ordered), skipped)


def _resolve_entry(entry: Entry, modules: Mapping[str, nn.Module]) -> list[TargetConfig]:
    """The targets of one entry, each with its settings."""
    registry = SETTINGS[entry.mode]
    keys = {key: value for key, value in entry.settings.given().items() if value is not None}
    targets: list[TargetConfig] = []
    owned: set[str] = set()
    specs: dict[tuple[type[nn.Module], str], TargetSpec] = {}
    for module_name, module in modules.items():
        setting = registry.of(module)
        if setting is None and not _names_targets(entry):
            if entry.op_types is not None or module_name in (entry.op_names or ()):
                raise _unregistered(entry, module_name, module)
            continue
        for target_name in _target_names(entry, module, setting or {}):
            defaults = (setting or {}).get(target_name, registry.generic).given()
            shorthand = {key: value for key, value in keys.items() if key in defaults}
            place = type(module), target_name
            if place not in specs:
                own = entry.target_settings.get(target_name)
                layers = (registry.generic.given(), defaults, shorthand, own.given() if own else {})
                specs[place] = SPECS[entry.mode].layered(*layers, where=entry.where)
            spec = specs[place]
            targets.append(TargetConfig(module_name, module, target_name, spec, entry.index, entry.where))
            owned.update(shorthand)
    _check_all_used(entry, modules, targets, set(keys) - owned)
    return targets


def _names_targets(entry: Entry) -> bool:
    return entry.target_names is not None or bool(entry.target_settings)


def _target_names(entry: Entry, module: nn.Module, setting: Setting) -> list[str]:
    """The targets that the entry names, else the defaults and those it has settings for; as far as they exist."""
    held = _own_tensors(module)
    names = entry.target_names
    if names is None:
        # A bias does not always follow its weight: that of a grouped transposed convolution is longer.
        defaults = [name for name, spec in setting.items() if not _misfit(_align_of(spec), held.get(name), held)]
        names = list(dict.fromkeys((*defaults, *entry.target_settings)))
    if "weight" not in held:
        names = [name for name in names if name not in entry.implied_targets]
    return [name for name in names if (_passes(module, name) if is_activation(name) else name in held)]


def _passes(module: nn.Module, name: str) -> bool:
    """Whether an input or output exists: an operation has as many inputs as it computes with tensors."""
    position = name.removeprefix("_input_")
    return not (isinstance(module, Operation) and position.isdigit() and int(position) >= module.inputs)


def _check_all_used(
    entry: Entry, modules: Mapping[str, nn.Module], targets: Sequence[TargetConfig], unowned: set[str]
) -> None:
    """Refuse an entry part of which would do nothing."""
    found = dict.fromkeys(target.target_name for target in targets)
    for name in (*(entry.target_names or ()), *entry.target_settings):
        if name not in found and name not in entry.implied_targets:
            known = list(dict.fromkeys(held for module in modules.values() for held in _own_tensors(module)))
            raise UnmatchedError(
                f"no module that the entry selects has a {name!r}, or all have None there.",
                where=entry.where,
                legal=(*known, "_input_", "_output_"),
                remedy=nearest(name, known),
            )
    if not targets:
        raise UnmatchedError(
            f"none of the {len(modules)} modules that the entry selects has a default target.",
            where=entry.where,
            remedy=f"Give target_names, or register their types with {SETTINGS[entry.mode].name}.register.",
        )
    for name, field in type(entry.settings).model_fields.items():
        if name in unowned:
            raise ConflictError(
                f"no selected target owns this key; the targets are {', '.join(found)}.",
                where=f"{entry.where}[{field.alias or name!r}]",
                remedy="Put it into target_settings, beside the name of the target that it is meant for.",
            )


def _check_fused(entry: Entry, selected: Collection[str], modules: Modules) -> None:
    """What is fused exists, and is fused into a module of the entry."""
    for group in entry.fuse_names or ():
        where = f"{entry.where}['fuse_names']"
        for name in group:
            if name not in modules.by_name:
                remedy = nearest(name, modules.by_name)
                raise UnmatchedError(f"{name!r} of {group} is no module of the model.", where=where, remedy=remedy)
        if modules.first_name[group[0]] not in selected:
            remedy = "Select it with op_names or op_types."
            raise ConflictError(f"{group[0]!r}, the first of {group}, is not selected.", where=where, remedy=remedy)


def _unregistered(entry: Entry, module_name: str, module: nn.Module) -> UnmatchedError:
    kind, registry = type(module).__name__, SETTINGS[entry.mode].name
    return UnmatchedError(
        f"module {module_name!r} is a {kind}, which has no default targets.",
        where=entry.where,
        remedy=f"Name them with target_names, or register them: {registry}.register({kind}, {{'weight': {{}}}}).",
    )


def _own_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's parameters and buffers; None for a parametrized one, which would have to be computed."""
    held = {name: tensor for name, tensor in (module._parameters | module._buffers).items() if tensor is not None}
    return held | dict.fromkeys(getattr(module, "parametrizations", ()))


def _has_parameters(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False))


def _align_of(spec: TargetSpec) -> Align | None:
    return spec.align if isinstance(spec, PruningSpec) else None


def _misfit(align: Align | None, tensor: Tensor | None, sources: Mapping[str, Tensor | None]) -> str:
    """Why a tensor cannot take its mask from its source; empty where it can, or where that is not known."""
    source = sources.get(align.target_name) if align else None
    if align is None or source is None or tensor is None:
        return ""
    if max(align.dims) >= source.dim():
        return f"dims {list(align.dims)} do not exist in a source of shape {tuple(source.shape)}"
    sizes = tuple(source.shape[dim] for dim in align.dims)
    if sizes != tensor.shape[: len(sizes)]:
        return (
            f"dims {list(align.dims)} of the source have sizes {sizes}, which {tuple(tensor.shape)} does not begin with"
        )
    return ""


def _by_first_name(target: TargetConfig, first_name: Mapping[str, str]) -> TargetConfig:
    """A shared module goes by its first name, also as the source of a mask."""
    align = _align_of(target.spec)
    if align is None or align.module_name is None or first_name[align.module_name] == align.module_name:
        return target
    source = align.model_copy(update={"module_name": first_name[align.module_name]})
    return replace(target, spec=target.spec.model_copy(update={"align": source}))


def _check_groups(targets: Iterable[TargetConfig]) -> None:
    """The targets of a global group share one ratio."""
    first: dict[str, TargetConfig] = {}
    for target in targets:
        spec = target.spec
        if not isinstance(spec, PruningSpec) or spec.global_group_id is None:
            continue
        other = first.setdefault(spec.global_group_id, target)
        assert isinstance(other.spec, PruningSpec)
        if spec.ratio != other.spec.ratio:
            raise ConflictError(
                f"sparse_ratio {spec.ratio} of global_group_id {spec.global_group_id!r} meets"
                f" {other.spec.ratio} from {other.where}.",
                where=target.where,
                remedy="Give all targets of a group one ratio; min_ and max_sparse_ratio limit single ones.",
            )


def _check_aligns(targets: Mapping[tuple[str, str], TargetConfig], modules: Modules) -> None:
    """A mask that is taken from elsewhere comes from a target, fits, and begins at one that makes its own."""
    firsts = modules.first_name
    for target in targets.values():
        seen = {(target.module_name, target.target_name)}
        link = target
        while align := _align_of(link.spec):
            where = f"{link.where}['align'] of {link.module_name}.{link.target_name}"
            module_name = link.module_name if align.module_name is None else align.module_name
            if module_name not in firsts:
                raise UnmatchedError(
                    f"{module_name!r} is no module of the model.", where=where, remedy=nearest(module_name, firsts)
                )
            key = (firsts[module_name], align.target_name)
            if key in seen:
                raise ConflictError(f"{key} takes its mask from itself.", where=where, remedy="Break the circle.")
            if key not in targets:
                raise ConflictError(
                    f"the mask comes from {align.target_name!r} of {key[0]!r}, which is no target.",
                    where=where,
                    remedy="Select that target too, or give this one a sparse_ratio in target_settings.",
                )
            tensor = _own_tensors(link.module).get(link.target_name)
            if misfit := _misfit(align, tensor, _own_tensors(modules.by_name[key[0]])):
                raise ConflictError(
                    f"{misfit}.", where=where, remedy="Give dims of the source that this target follows."
                )
            seen.add(key)
            link = targets[key]
