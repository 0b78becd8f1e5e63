"""The wrappers of one model, shared by every compressor that works on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from tersor.errors import MaskError, UnmatchedError, WrapError, nearest
from tersor.graph.inputs import named_tensors
from tersor.targets.activations import INPUT, OUTPUT, Place
from tersor.wrapping.sharding import gather_model, refuse_sharded
from tersor.wrapping.stack import Mask, Stage, TargetStack, as_bool, check_shape
from tersor.wrapping.wrapper import SIMULATION_HOOKS, Wrapper


class ModelWrappers:
    """One :class:`Wrapper` for each module that a compressor touches.

    Raises:
        WrapError: the model is already wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        if is_wrapped(model):
            raise WrapError(
                "the model is already wrapped by a compressor",
                remedy="Call unwrap_model() of the first compressor, or build the second with from_compressor().",
            )
        self.model = model
        names: dict[int, list[Place]] = {}
        for name, tensor in named_tensors(model).items():
            module, _, target = name.rpartition(".")
            names.setdefault(id(tensor), []).append((module, target))
        self._ties = {place: places for places in names.values() if len(places) > 1 for place in places}
        self.by_module: dict[str, Wrapper] = {}
        self._modules = dict(model.named_modules())

    def __getitem__(self, name: str) -> Wrapper:
        """The wrapper of a module; made when first asked for."""
        if name not in self.by_module:
            if name not in self._modules:
                raise UnmatchedError(
                    f"the model has no module {name!r}", where=name, remedy=nearest(name, self._modules)
                )
            wrapper = Wrapper(name, self._modules[name])
            wrapper.attached = all(other.attached for other in self.by_module.values())
            self.by_module[name] = wrapper
        return self.by_module[name]

    def attach(self) -> None:
        """Simulate."""
        for wrapper in self.by_module.values():
            wrapper.attach()

    def detach(self, *, bake: bool = False) -> None:
        """Stop simulating; ``bake`` writes the simulated values into the parameters first.

        A sharded model is gathered: what shares parameters out knows where they were when it was called.
        """
        gather_model(self.model)
        baked: set[int] = set()
        for wrapper in self.by_module.values():
            wrapper.detach(bake=bake, baked=baked)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The plain model for a while.

        Raises:
            WrapError: the model is sharded (``fully_shard``).
        """
        refuse_sharded(self.model)
        attached = [wrapper for wrapper in self.by_module.values() if wrapper.attached]
        for wrapper in attached:
            wrapper.detach()
        try:
            yield
        finally:
            for wrapper in attached:
                wrapper.attach()

    def tied(self, module: str, target: str) -> list[Place]:
        """All places of a target's tensor, its own among them; several where the model shares it."""
        return self._ties.get((module, target), [(module, target)])

    def mask(self, module: str, target: str) -> Mask:
        """The mask of a target; made, masking nothing, when first asked for."""
        stack = self[module].stack(target)
        mask = stack.find(Stage.MASK)
        if mask is None:
            mask = Mask(stack.target)
            stack.add(mask)
        assert isinstance(mask, Mask)
        return mask

    def owns(self, module: str, target: str) -> bool:
        """Whether a module has a parameter to itself: not tied to another's, and not computed from others."""
        return target in self[module].own_tensors and (module, target) not in self._ties

    def check_masks(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Refuse masks that do not fit the model, before any is applied.

        Raises:
            MaskError: the model has no such module or target, a mask's shape does not broadcast to its target's, or it
                holds other values than 0 and 1.
        """
        for module, targets in masks.items():
            for target, mask in targets.items():
                where = f"{module}.{target}" if module else target
                try:
                    wrapper = self[module]
                    shape = mask.shape if target.startswith((INPUT, OUTPUT)) else wrapper.tensor(target).shape
                except UnmatchedError as error:
                    raise MaskError(error.what, where=where, legal=error.legal, remedy=error.remedy) from None
                check_shape(mask, shape, where)
                as_bool(mask, where)

    def replace_masks(self, masks: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> None:
        """Take all masks away and put others in their place.

        Args:
            masks: for each target its mask as factors: bool tensors that broadcast against it; see :class:`Mask`.
        """
        for wrapper in self.by_module.values():
            for stack in wrapper.stacks.values():
                if isinstance(mask := stack.find(Stage.MASK), Mask) and mask.factors:
                    mask.set(())
        for (module, target), factors in self._over_ties(masks).items():
            is_activation = target.startswith((INPUT, OUTPUT))
            device = None if is_activation else self[module].tensor(target).device
            self.mask(module, target).set(factors, device)

    def _over_ties(self, masks: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> dict[Place, list[Tensor]]:
        """Masks by place; what is masked under one name of a tied parameter is masked under all."""
        spread: dict[Place, list[Tensor]] = {}
        for module, targets in masks.items():
            for target, factors in targets.items():
                for place in self.tied(module, target):
                    known = spread.setdefault(place, [])
                    known += [factor for factor in factors if not any(factor is other for other in known)]
        return spread

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Every mask, ``{module: {target: bool tensor}}``; targets that lose nothing are left out.

        A parameter's mask has its shape; an input's or output's broadcasts against it, so it fits any batch size.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, wrapper in self.by_module.items():
            for target, stack in wrapper.stacks.items():
                mask = stack.find(Stage.MASK)
                if isinstance(mask, Mask) and mask.factors:
                    is_activation = target.startswith((INPUT, OUTPUT))
                    shape = None if is_activation else wrapper.tensor(target).shape
                    found.setdefault(name, {})[target] = mask.product(shape)
        return found


def is_wrapped(model: nn.Module) -> bool:
    """Whether a compressor's simulation is in place anywhere in the model."""
    return any(
        isinstance(module, TargetStack)
        or any(isinstance(hook, SIMULATION_HOOKS) for hook in module._forward_hooks.values())
        or any(isinstance(hook, SIMULATION_HOOKS) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )
