"""The wrappers of one model, shared by every compressor that works on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tersor.errors import MaskError, UnmatchedError, WrapError, nearest
from tersor.wrapping.stack import Mask, Stage, TargetStack
from tersor.wrapping.wrapper import INPUT, OUTPUT, Wrapper


class ModelWrappers:
    """One :class:`Wrapper` for each module that a compressor touches.

    Raises:
        WrapError: the model is already wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, TargetStack):
                raise WrapError(
                    "the model is already wrapped by a compressor",
                    where=name.split(".parametrizations")[0],
                    remedy="Call unwrap_model() of the first compressor, or build the second with from_compressor().",
                )
        self.model = model
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
        """Stop simulating; ``bake`` writes the simulated values into the parameters first."""
        for wrapper in self.by_module.values():
            wrapper.detach(bake=bake)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The plain model for a while."""
        attached = [wrapper for wrapper in self.by_module.values() if wrapper.attached]
        for wrapper in attached:
            wrapper.detach()
        try:
            yield
        finally:
            for wrapper in attached:
                wrapper.attach()

    def mask(self, module: str, target: str) -> Mask:
        """The mask of a target; made, masking nothing, when first asked for."""
        stack = self[module].stack(target)
        mask = stack.find(Stage.MASK)
        if mask is None:
            mask = Mask(stack.target)
            stack.add(mask)
        assert isinstance(mask, Mask)
        return mask

    def set_mask(self, module: str, target: str, mask: Tensor | None) -> None:
        """Replace one mask, after checking that it fits.

        Raises:
            MaskError: its shape does not broadcast to the target's.
            UnmatchedError: the model has no such module or target.
        """
        wrapper = self[module]
        if target.startswith((INPUT, OUTPUT)):
            self.mask(module, target).set(mask)
            return
        tensor = wrapper.tensor(target)
        if mask is not None and tuple(mask.shape) != tuple(tensor.shape) and not _broadcasts(mask, tensor):
            raise MaskError(
                f"a mask of shape {tuple(mask.shape)} does not fit a tensor of shape {tuple(tensor.shape)}",
                where=f"{module}.{target}",
                remedy="Were these masks made for another model, or for this one before it was made small?",
            )
        self.mask(module, target).set(mask, tensor.device)

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Every mask, ``{module: {target: bool tensor of the target's shape}}``; targets without one are left out."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, wrapper in self.by_module.items():
            for target, stack in wrapper.stacks.items():
                mask = stack.find(Stage.MASK)
                shape = stack.shape if target.startswith((INPUT, OUTPUT)) else wrapper.tensor(target).shape
                full = mask.full(shape) if isinstance(mask, Mask) and shape is not None else None
                if full is not None:
                    found.setdefault(name, {})[target] = full
        return found


def _broadcasts(mask: Tensor, tensor: Tensor) -> bool:
    return mask.dim() == tensor.dim() and all(
        own in (1, size) for own, size in zip(mask.shape, tensor.shape, strict=True)
    )


def is_wrapped(model: nn.Module) -> bool:
    """Whether a compressor's simulation is in place anywhere in the model."""
    return any(isinstance(module, TargetStack) for module in model.modules())
