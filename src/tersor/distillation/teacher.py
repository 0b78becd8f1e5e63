"""The teacher: run without gradients, and what some of its modules take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tersor.errors import UnmatchedError, nearest
from tersor.graph.inputs import evaluating
from tersor.targets.activations import INPUT, OUTPUT, Place, replace_input, replace_output
from tersor.training.batches import take_apart, to_device
from tersor.training.loops import device_of

TeacherPredict = Callable[[Any, nn.Module], Any]
"""``teacher_predict(batch, teacher)`` runs the teacher on a batch."""


@final
class Teacher:
    """A trained model that shows what its modules give on a batch.

    It runs without gradients and in eval mode, on its own device, where the batch is moved to. It is not wrapped: hooks
    are on it only while it runs; but where it is compiled they stay, since compiled code does not look for new ones.

    Args:
        model: the teacher; its parameters and modes stay as they are.
        predict: runs it on a batch; by default it gets the inputs of the batch, as a model in a plain loop does.
        training: leave it in the mode that it is in, and do not put it in eval mode.
        compiled: run it by ``torch.compile``; True, or the name of a backend.

    Attributes:
        places: what is looked at, ``(module, target)``.
    """

    def __init__(
        self,
        model: nn.Module,
        predict: TeacherPredict | None = None,
        *,
        training: bool = False,
        compiled: bool | str = False,
    ) -> None:
        self.model, self.predict, self.training, self.compiled = model, predict or forward_inputs, training, compiled
        self.places: dict[Place, None] = {}
        self._run: Any = model
        if compiled:
            self._run = torch.compile(model, backend=compiled if isinstance(compiled, str) else "inductor")
        self._found: dict[str, Tensor] = {}
        self._last: tuple[Any, dict[str, Tensor]] | None = None
        self._taken: set[int] = set()

    def watch(self, places: Iterable[Place], where: str) -> None:
        """Look at more of it.

        Raises:
            UnmatchedError: it has no such module.
        """
        known = dict(self.model.named_modules(remove_duplicate=False))
        for module, target in places:
            if module not in known:
                raise UnmatchedError(
                    f"the teacher has no module {module!r}", where=where, remedy=nearest(module, [*known])
                )
            if (module, target) not in self.places:
                self.places[module, target] = None
                if self.compiled:
                    self._hook(module, target)

    def values(self, batch: Any, reader: object = None) -> dict[str, Tensor]:
        """What all places hold on a batch, by ``module.target``; those that it does not reach are left out.

        Args:
            batch: as the training loop has it.
            reader: who asks: the same batch asked for by another reader does not make the teacher run again.
        """
        if self._last is None or self._last[0] is not batch or id(reader) in self._taken:
            self._last, self._taken = (batch, self.compute(batch)), set()
        self._taken.add(id(reader))
        return self._last[1]

    def compute(self, batch: Any) -> dict[str, Tensor]:
        """As :meth:`values`, run now."""
        self._found.clear()
        with ExitStack() as context:
            for module, target in () if self.compiled else self.places:
                context.callback(self._hook(module, target).remove)
            context.enter_context(torch.no_grad())
            if not self.training:
                context.enter_context(evaluating(self.model))
            self.predict(to_device(batch, device_of(self.model)), self._run)
        return {name: value.detach() for name, value in self._found.items()}

    def forget(self) -> None:
        """Let go of the last batch."""
        self._last = None
        self._found.clear()

    def _hook(self, module: str, target: str) -> RemovableHandle:
        """Keep what passes there. It comes before all other hooks, so it sees what the module itself takes or gives."""
        name, found = qualified(module, target), self._found

        def keep(value: Any) -> Any:
            if isinstance(value, Tensor):
                found[name] = value
            return value

        if target.startswith(INPUT):

            def before(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                replace_input(owner, args, kwargs, target.removeprefix(INPUT), keep)

            return self.model.get_submodule(module).register_forward_pre_hook(
                self._uncompiled(before), prepend=True, with_kwargs=True
            )

        def after(_owner: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            replace_output(output, target.removeprefix(OUTPUT), keep)

        return self.model.get_submodule(module).register_forward_hook(self._uncompiled(after), prepend=True)

    def _uncompiled(self, hook: Any) -> Any:
        return torch.compiler.disable(hook) if self.compiled else hook


def forward_inputs(batch: Any, model: nn.Module) -> Any:
    """Run a model on the inputs of a batch: all but the last item, or all entries of a mapping."""
    args, kwargs, _ = take_apart(batch)
    return model(*args, **kwargs)


def linked_place(link: str, target: str) -> Place:
    """A teacher's module and target from what ``link`` says: a module, or ``module.target``.

    >>> linked_place("layer3", "_output_0"), linked_place("encoder._output_hidden", "_output_0")
    (('layer3', '_output_0'), ('encoder', '_output_hidden'))
    """
    module, _, last = link.rpartition(".")
    return (module, last) if last.startswith((INPUT, OUTPUT)) else (link, target)


def qualified(module: str, target: str) -> str:
    """``module.target``; the model's own targets go by their name alone."""
    return f"{module}.{target}" if module else target
