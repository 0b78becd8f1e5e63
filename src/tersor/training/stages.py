"""A model run over calibration batches one stage at a time: what one-shot pruners and quantizers need.

Wanda, SparseGPT, GPTQ and their kin compress a layer by looking at its inputs. The inputs of later layers are to be
those that the already compressed earlier layers give, and all inputs of all layers fit into no memory. So the model is
run stage by stage: see the inputs of some layers, change their weights, run them again with the new weights, and go on
with what they give now (Frantar & Alistarh 2023, "SparseGPT", section 4, for one transformer layer at a time).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, final

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.errors import InvalidValueError, TrainingError, UnmatchedError, nearest
from tersor.graph.inputs import copied
from tersor.training.batches import own_batch, take_apart, to_device
from tersor.training.chains import Caught, Chain, Stop, hooked, quiet, versions_of
from tersor.training.loops import device_of
from tersor.training.trail import Births, Trail, candidates

Watch = Callable[[str, tuple[Any, ...]], None]
"""Called with the name of a module and what it was given, in the order of its ``forward``'s parameters."""


class Inputs(NamedTuple):
    """A batch without its targets: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@final
class Stage:
    """What is compressed together: all wanted modules of a block, or those that share one input.

    Attributes:
        name: of the block (``model.layers.3``), or of the modules themselves where they lie in no block.
        modules: names of the wanted modules whose inputs this stage sees.
    """

    def __init__(self, name: str, modules: Sequence[str], run: Callable[[Watch], None]) -> None:
        self.name = name
        self.modules = tuple(modules)
        self._run: Callable[[Watch], None] | None = run

    def __repr__(self) -> str:
        return f"Stage({self.name!r}, modules={self.modules})"

    def run(self, watch: Watch) -> None:
        """Run all batches through the stage, in eval mode and without gradients; may be called any number of times.

        Args:
            watch: ``watch(name, inputs)``, called each time one of the modules is. It must not write into the inputs.
                The random state and the model's buffers are put back afterwards, whatever it does to them.

        Raises:
            TrainingError: the next stage was asked for already, so the inputs of this one are gone.
        """
        if self._run is None:
            raise TrainingError(
                "the stage is over, and its inputs are gone.",
                where=f"stage {self.name!r}",
                remedy="Do all work on a stage before asking for the next: for stage in stages(...): stage.run(...).",
            )
        self._run(watch)

    def close(self) -> None:
        """Let go of the inputs."""
        self._run = None


def stages(model: nn.Module, batches: Iterable[Any], modules: Sequence[str]) -> Generator[Stage, None, None]:
    """Give the stages of a model one after another, each with the inputs that all earlier ones give by then.

    While a stage is held, the weights of its modules may be changed in place or masked by parametrizations. When the
    next one is asked for, that is what it sees.

    Blocks that follow each other, such as a transformer's layers, are found by watching the model run on the first
    batch. They are the children of an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict``; each must take what
    the one before gave; whatever else it takes must be older than the first block; no other module may use its
    parameters; and run alone, the blocks must give the same numbers, bit for bit. Then each block is a stage, run
    alone, and only its own inputs are in memory. Every module elsewhere is a stage of its own, together with those that
    are called next on the same input. It is run from the model's start and no further than needed.

    If each stage is run once, a chain of blocks costs two forward passes over the batches (one more where blocks take
    different further arguments, such as masks by type of layer), and each stage elsewhere one pass up to its modules.

    Args:
        model: the model. Outside of :meth:`Stage.run` and the step to the next stage it is as it was: no hook is left
            on it, and its modes and ``config.use_cache`` are its own.
        batches: calibration data, read once and kept, so that each stage sees the same: some batches, not a whole
            training set. Each is a tensor, a tuple or list whose last item is the target, a tuple or list of one item,
            or a mapping of the model's arguments. They are moved to the model's device one by one. The model is taken
            to call its blocks alike on every batch.
        modules: names of the wanted modules.

    Yields:
        The stages, in the order in which the model first calls them.

    Raises:
        InvalidValueError: no module is wanted.
        UnmatchedError: the model has no module of such a name.
        TrainingError: there is no batch; a batch is no such thing, or holds a key-value cache; or the model calls a
            wanted module on no batch.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = nn.init.ones_(model[0].weight)
    >>> for stage in stages(model, [torch.tensor([[1.0, 2.0]])], ["0", "2"]):
    ...     stage.run(lambda name, inputs: print(name, inputs[0].tolist()))
    ...     _ = model[0].weight.data[0].zero_()
    0 [[1.0, 2.0]]
    2 [[0.0, 3.0]]
    """
    wanted = list(dict.fromkeys(modules))
    if not wanted:
        raise InvalidValueError("no module is named.", where="modules", legal=("at least one name",))
    known = dict(model.named_modules(remove_duplicate=False))
    for name in wanted:
        if name not in known:
            raise UnmatchedError(f"the model has no module {name!r}.", where="modules", remedy=nearest(name, known))
    inputs = [inputs_of(batch) for batch in batches]
    if not inputs:
        raise TrainingError("they are empty.", where="batches", remedy="Give at least one batch.")
    return _Run(model, inputs, wanted).stages()


def inputs_of(batch: Any) -> Inputs:
    """The model's arguments in a batch; as :func:`tersor.training.batches.take_apart`, or inputs without a target.

    >>> inputs_of(["x"]), inputs_of(("x", "target"))
    (Inputs(args=('x',), kwargs={}), Inputs(args=('x',), kwargs={}))

    Raises:
        TrainingError: it is of another kind, or holds a key-value cache, which would grow with each run.
    """
    batch = own_batch(batch)
    if isinstance(batch, Tensor):
        return Inputs((batch,), {})
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return Inputs(tuple(batch), {})
    args, kwargs, _ = take_apart(batch)
    if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        raise TrainingError(
            "a batch holds a key-value cache, which grows with each run.",
            where="batches",
            remedy="Give the whole sequences instead.",
        )
    return Inputs(args, dict(kwargs))


class _Run:
    """One model on its way through its stages."""

    def __init__(self, model: nn.Module, inputs: Sequence[Inputs], wanted: Sequence[str]) -> None:
        self.model = model
        self.inputs = inputs
        self.wanted = wanted

    def stages(self) -> Generator[Stage, None, None]:
        """All stages; the blocks of a chain stand where the first wanted module in them is called."""
        order, chains = self._dry_run()
        chain_of = {name: chain for chain in chains for names in chain.modules for name in names}
        for group in order.groups:
            for chain in [chain for chain in chains if any(chain_of.get(name) is chain for name in group)]:
                chains.remove(chain)
                yield from self._blocks(chain)
            alone = [name for name in group if name not in chain_of]
            if alone:
                once = all(order.calls[name] == 1 for name in alone)
                yield from _held(Stage(", ".join(alone), alone, partial(self._from_start, alone, once)))

    def _dry_run(self) -> tuple[_Order, list[Chain]]:
        """Run the first batch to learn the order of the modules and the chains, and more until all were called."""
        order, births = _Order(self.wanted), Births()
        trails = [Trail(chain, births) for chain in candidates(self.model, self.wanted)]
        blocks = [(block, index, trail) for trail in trails for index, block in enumerate(trail.chain.blocks)]
        before = {block: partial(trail.enter, index) for block, index, trail in blocks}
        after = {block: trail.leave for block, _, trail in blocks}
        with quiet(self.model), hooked(self.model, before=self._watched(self.wanted, order.see)):
            with births, hooked(self.model, before=before, after=after):
                self._forward(self.inputs[0])
            for inputs in self.inputs[1:]:
                if order.missing:
                    self._forward(inputs)
        order.finish()
        chains: list[Chain] = []
        for trail in sorted(trails, key=lambda trail: -trail.chain.breadth):
            chain = trail.chain
            alone = trail.complete and not any(chain.overlaps(other) for other in chains)
            if alone and chain.holds(self.model, partial(self._forward, self.inputs[0])):
                chains.append(chain)
        return order, chains

    def _blocks(self, chain: Chain) -> Generator[Stage, None, None]:
        """The stages of a chain."""
        with quiet(self.model):
            caught = [chain.catch(self.model, partial(self._forward, inputs)) for inputs in self.inputs]
        for index, (block, modules) in enumerate(zip(chain.blocks, chain.modules, strict=True)):
            if modules:
                yield from _held(Stage(block, modules, partial(self._through_block, chain, index, caught)))
            if index + 1 < len(chain.blocks):
                self._advance(chain, index, caught)

    def _advance(self, chain: Chain, index: int, caught: list[Caught]) -> None:
        """Put the inputs of the next block in the place of this one's, batch by batch."""
        with _running(self.model, chain.blocks[index]):
            for number, (call, others) in enumerate(caught):
                output = chain.run(self.model, index, call)
                caught[number] = Caught(chain.following(index, call, output, others), others)

    def _through_block(self, chain: Chain, index: int, caught: Sequence[Caught], watch: Watch) -> None:
        hooks = self._watched(chain.modules[index], watch)
        with _running(self.model, chain.blocks[index]), hooked(self.model, before=hooks):
            for call, _ in caught:
                chain.run(self.model, index, call)

    def _from_start(self, modules: Sequence[str], once: bool, watch: Watch) -> None:
        """Run the whole model; only as far as needed where each module is called once."""
        seen: set[str] = set()

        def see(name: str, given: tuple[Any, ...]) -> None:
            watch(name, given)
            seen.add(name)
            if once and len(seen) == len(modules):
                raise Stop

        with quiet(self.model), hooked(self.model, before=self._watched(modules, see)):
            for inputs in self.inputs:
                seen.clear()
                self._forward(inputs)

    def _forward(self, inputs: Inputs) -> bool:
        """Run the model on one batch; whether a hook stopped it."""
        args, kwargs = copied(to_device(tuple(inputs), device_of(self.model, None)))
        try:
            self.model(*args, **kwargs)
        except Stop:
            return True
        return False

    def _watched(self, modules: Sequence[str], watch: Watch) -> dict[str, Callable[..., None]]:
        def see(name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            watch(name, inspect.signature(forward).bind(*args, **kwargs).args if kwargs else args)

        return {name: partial(see, name, self.model.get_submodule(name).forward) for name in modules}


class _Order:
    """In which order modules are called, and which follow each other on the same input.

    Attributes:
        groups: names by first call; the modules of a group take the same tensor, with nothing between them.
        calls: how often each was called.
        missing: those that were not called yet.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        self.groups: list[list[str]] = []
        self.calls: Counter[str] = Counter()
        self.missing = list(wanted)
        self._last: tuple[str, Any, list[int]] = ("", None, [])

    def see(self, name: str, given: tuple[Any, ...]) -> None:
        """A module is called."""
        value = given[0] if given else None
        last, other, versions = self._last
        if name in self.missing:
            self.missing.remove(name)
            shared = isinstance(value, Tensor) and value is other and versions_of(value) == versions
            if shared and last in self.groups[-1]:
                self.groups[-1].append(name)
            else:
                self.groups.append([name])
        self.calls[name] += 1
        self._last = (name, value, versions_of(value))

    def finish(self) -> None:
        """Let go of the last input.

        Raises:
            TrainingError: a module was never called.
        """
        self._last = ("", None, [])
        if self.missing:
            raise TrainingError(
                f"the model calls {', '.join(map(repr, self.missing))} on no batch, so nothing is known of its inputs.",
                where="modules",
                remedy="Leave such modules out, or give batches that reach them.",
            )


@contextmanager
def _running(model: nn.Module, block: str) -> Iterator[None]:
    """Run one block alone; its masked weights are computed once for all batches."""
    with quiet(model, model.get_submodule(block)), parametrize.cached():
        yield


def _held(stage: Stage) -> Generator[Stage, None, None]:
    """One stage that is over when the next is asked for."""
    try:
        yield stage
    finally:
        stage.close()
