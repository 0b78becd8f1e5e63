"""The one lifecycle that pruners, quantizers and distillers share, alone or fused on one model."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from tersor.config import Granularity, Mode
from tersor.config.parse import ConfigList
from tersor.errors import CheckpointError, ConflictError, TrainingError
from tersor.graph.coupling import Coupling, coupling_of
from tersor.graph.inputs import evaluating, run
from tersor.targets.plan import make_plan
from tersor.targets.planned import OUT_CHANNEL
from tersor.training import Evaluator, check_limits
from tersor.training.resuming import ResumableRun
from tersor.training.timeline import Event, Timeline
from tersor.wrapping import ModelWrappers, is_sharded, refuse_sharded


class Compressor(ABC):
    """Base of all compressors.

    Making a compressor plans, checks and wraps the model; nothing changes in it until :meth:`compress`. A compressor
    made by :meth:`from_compressor` works on the same wrappers, and one training run, started from any, serves them all.

    A subclass implements what is its own: :meth:`on_start` (before training), :meth:`on_loss`, :meth:`on_gradients` and
    :meth:`on_step` (during), :meth:`on_finish` (after), :meth:`on_stop` (after, also where training failed), and
    :meth:`result`.

    Args:
        model: the model; it is wrapped in place.
        config_list: dicts, or the path of a YAML or JSON file.
        evaluator: how the model is trained and evaluated; not every compressor needs one.
        example_inputs: what the model can be run on; by default the evaluator's ``dummy_input``. With them the graph is
            known: masks are completed, and what cannot leave is left alone. What :func:`tersor.graph.groups` found on
            this very model is as good, and saves a run.
        previous: the compressor to work beside; see :meth:`from_compressor`.

    Raises:
        ConfigError: the config list is wrong or does not fit the model, which is then untouched.
        WrapError: the model is already wrapped by a compressor, or sharded by ``fully_shard``, which comes after.

    Attributes:
        plan: what the config list comes to on this model.
        works_on_shards: whether it can train a model whose parameters are shared out over processes (``fully_shard``).
    """

    mode: ClassVar[Mode]
    needs_training: ClassVar[bool] = False
    post_training: ClassVar[bool] = False
    """Whether it never trains, and looks at the model when all others have finished."""
    default_granularity: Granularity = OUT_CHANNEL
    default_balance: Granularity | None = None
    works_on_shards: bool = False

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        refuse_sharded(model, remedy="Make the compressors first, then call fully_shard, and make the optimizer last.")
        self.model = model
        self.evaluator = evaluator or (previous.evaluator if previous else None)
        if example_inputs is None and previous is not None:
            example_inputs = previous.example_inputs
        if example_inputs is None and self.evaluator is not None:
            example_inputs = self.evaluator.dummy_input
        self.example_inputs = example_inputs.example_inputs if isinstance(example_inputs, Coupling) else example_inputs
        self.wrappers = previous.wrappers if previous else ModelWrappers(model)
        self._chain: list[Compressor] = previous._chain if previous else []  # one list, shared by all that are fused
        self._config_list = config_list
        self._gradients_seen = False
        self._make_plan(previous.plan.coupling if previous else None, example_inputs)
        self._refuse_overlap()
        try:
            self._wrap_targets()
        except Exception:
            if not self._chain:
                self.wrappers.detach()
            raise
        self._chain.append(self)

    def _make_plan(self, coupling: Coupling | None, example_inputs: Any) -> None:
        with self.wrappers.detached():
            if coupling is None and example_inputs is not None:
                coupling = coupling_of(self.model, example_inputs)
            defaults = self.default_granularity, self.default_balance
            self.plan = make_plan(self.model, self._config_list, self.mode, coupling, *defaults)

    def wrap_anew(self) -> None:
        """Plan and wrap again, when the model has been made small; nothing else may be fused."""
        self.wrappers.detach()
        self.wrappers = ModelWrappers(self.model)
        self._make_plan(None, self.example_inputs)
        self._wrap_targets()

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        config_list: ConfigList,
        *args: Any,
        evaluator: Evaluator | None = None,
        **kwargs: Any,
    ) -> Self:
        """A compressor on the model of another, with the same wrappers, evaluator and training run.

        Args:
            compressor: the one made before.
            config_list: what the new one does.
            *args: the algorithm's own arguments, as in its constructor after ``evaluator``.
            evaluator: only where the others have none.
            **kwargs: likewise by name.

        Raises:
            ConflictError: both have an evaluator, or both of one kind were given the same target.
        """
        if evaluator is not None and compressor._trainer not in (None, evaluator):
            raise ConflictError(
                "a compressor on this model has an evaluator already",
                where="evaluator",
                remedy="Leave it out here: one training run serves all fused compressors.",
            )
        return cls(compressor.model, config_list, evaluator, *args, previous=compressor, **kwargs)

    def _refuse_overlap(self) -> None:
        mine = {target.name for target in self.plan.targets}
        for other in self._chain:
            both = sorted(mine & {target.name for target in other.plan.targets})
            if other.mode == self.mode and both:
                raise ConflictError(
                    f"{type(other).__name__} and {type(self).__name__} are both configured for it",
                    where=both[0],
                    remedy="Give each target to one compressor of a kind: exclude it from one of the config lists.",
                )

    def refuse_shards(self) -> None:
        """Raise where ``fully_shard`` has shared out parameters that a compressor needs whole.

        Raises:
            ConflictError: naming the compressor.
        """
        unable = [item.title for item in self._chain if not item.works_on_shards]
        if unable and is_sharded(self.model):
            raise ConflictError(
                f"{', '.join(unable)} works on whole parameters, and fully_shard has shared them out over processes",
                where=type(self.model).__name__,
                remedy="Train with DistributedDataParallel, or DeepSpeed's ZeRO; docs/many_machines.md "
                "says what goes with FSDP2.",
            )

    @property
    def chain(self) -> tuple[Compressor, ...]:
        """All compressors that work on the model together, in the order in which they were made."""
        return tuple(self._chain)

    @property
    def changes_loss(self) -> bool:
        """Whether one of the fused compressors adds to the loss, so that training must go through :meth:`loss`."""
        return any(item.adds_to_loss for item in self._chain)

    @property
    def adds_to_loss(self) -> bool:
        """Whether this compressor does."""
        return type(self).on_loss is not Compressor.on_loss

    @property
    def _trainer(self) -> Evaluator | None:
        """The evaluator that one of the fused compressors was given."""
        return next((item.evaluator for item in self._chain if item.evaluator is not None), None)

    def timeline(self) -> Timeline:
        """What all fused compressors do, and after which optimizer step.

        >>> from tersor.pruning import AGPPruner, L1NormPruner
        >>> pruner = L1NormPruner(nn.Linear(4, 4), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
        >>> print(AGPPruner(pruner, interval_steps=10, total_times=2).timeline())
        after step 10  AGPPruner(L1NormPruner): prunes, 0.5 -> 0.438
        after step 20  AGPPruner(L1NormPruner): prunes, 0.5 -> 0.5
        """
        return Timeline.of(replace(event, compressor=item.title) for item in self._chain for event in item.events())

    def status(self) -> dict[str, float | Tensor]:
        """Where all fused compressors stand: sparsity, bits, losses, by a word for each; read while they train."""
        found: dict[str, float | Tensor] = {}
        for item in self._chain:
            found |= item.own_status()
        return found

    @property
    def title(self) -> str:
        """What it is called in a timeline."""
        return type(self).__name__

    def events(self) -> Iterable[Event]:
        """What this compressor does at which step."""
        return ()

    def own_status(self) -> dict[str, float | Tensor]:
        """Where this compressor stands."""
        return {}

    @abstractmethod
    def _wrap_targets(self) -> None:
        """Put this compressor's transforms, doing nothing yet, on its targets."""

    def wrap_model(self) -> nn.Module:
        """Simulate (again): masks and fake quantization are applied in forward. Affects all fused compressors."""
        self.wrappers.attach()
        return self.model

    def unwrap_model(self, *, bake: bool = False) -> nn.Module:
        """Give the model back as it was, apart from what training changed. Affects all fused compressors.

        What watches training ends with it. A model that ``fully_shard`` was called on is gathered: each process, and
        all have to call it, has the whole model afterwards.

        Args:
            bake: write the masked or quantized values into the parameters first; otherwise the latent ones stay.
        """
        self._stop()
        self.wrappers.detach(bake=bake)
        return self.model

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once without gradients, so that the shapes of input and output targets are known.

        Args:
            *args: the model's arguments; without any, the example inputs are used.
            **kwargs: likewise by name.
        """
        with evaluating(self.model):
            if args or kwargs:
                self.model(*args, **kwargs)
            else:
                run(self.model, self.example_inputs)

    def compress(
        self,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_steps: int = 100,
    ) -> Any:
        """Compress: start every fused compressor, train for as long as is asked, finish them.

        With a `checkpoint_dir` a run that was killed goes on: make model, optimizers, schedulers and compressors as
        before, and call it again. The weights, masks and scales at the end are bit for bit those of a run that was
        never killed, where the machine computes reproducibly and all that is random comes from the generators of
        PyTorch, NumPy and Python or those of the data loader. (Workers that persist over epochs have generators of
        their own.) The file stays when the run is over; called once more, the same result comes without training.

        Args:
            max_steps: optimizer steps.
            max_epochs: passes over the data.
            checkpoint_dir: where ``training.pt`` is kept, which holds everything that a run has come to.
            checkpoint_steps: how often it is written. What a killed run did since is done again.

        Raises:
            TrainingError: training is needed or asked for, and there is no evaluator or no length; or it cannot be gone
                on with in the middle: the loop is not that of ``from_loader``, or a pruner trains in rounds, of which
                it keeps a log of its own.
            InvalidValueError: a length that is no positive int.
            CheckpointError: the file is damaged, or that of another run.
        """
        check_limits(max_steps, max_epochs)
        given = max_steps is not None or max_epochs is not None
        trains = given and not all(item.post_training for item in self._chain)
        needing = [type(item).__name__ for item in self._chain if item.needs_training]
        if needing and not trains:
            raise TrainingError(
                f"{', '.join(needing)} learns while the model trains, and no length of training is given",
                where="compress",
                remedy="Call compress(max_steps=...) or compress(max_epochs=...).",
            )
        evaluator = self._trainer
        if trains and evaluator is None:
            raise TrainingError(
                "there is no evaluator to train with",
                where="compress",
                remedy="Give a TorchEvaluator, or call compress() without a length.",
            )
        run = None
        if checkpoint_dir is not None:
            run = self._resumable(checkpoint_dir, checkpoint_steps, {"max_steps": max_steps, "max_epochs": max_epochs})
        try:
            if run is None or not run.resume():
                self.start()
            trained = any(item.on_train(max_steps, max_epochs) for item in self._chain)
            if not trained and trains and evaluator is not None:
                with run.kept() if run else nullcontext():
                    evaluator.train(self.model, self, max_steps=max_steps, max_epochs=max_epochs)
        except BaseException:
            self._stop()
            raise
        self.finish()
        return self.result()

    def _resumable(self, directory: str | os.PathLike[str], steps: int, limits: Mapping[str, Any]) -> ResumableRun:
        """What keeps a run."""
        rounds = [item.title for item in self._chain if item.trains_in_rounds]
        if self._trainer is None or rounds:
            raise TrainingError(
                f"{rounds[0]} trains in rounds" if rounds else "nothing is trained, and so there is nothing to keep",
                where="checkpoint_dir",
                remedy="Give the pruner a log_dir, which keeps the rounds." if rounds else "Leave it out.",
            )
        return ResumableRun(self, self._trainer, directory, steps, {**self.chain_described(), **limits})

    @property
    def trains_in_rounds(self) -> bool:
        """Whether :meth:`on_train` runs the training."""
        return False

    def described(self) -> dict[str, Any]:
        """What this compressor was asked for, in plain values: where they are equal, two do the same."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        plain = {name: of for name, of in own.items() if isinstance(of, (bool, int, float, str, type(None)))}
        return {
            **{f"{type(self).__name__}.{name}": value for name, value in plain.items()},
            **{f"{target.name} ({self.mode})": target.config.spec.as_config() for target in self.plan.targets},
        }

    def chain_described(self) -> dict[str, Any]:
        """The same of all fused compressors, whose order counts too."""
        found: dict[str, Any] = {"compressors": [item.title for item in self._chain]}
        for number, item in enumerate(self._chain):
            for name, value in item.described().items():
                found[name if name not in found else f"{name} [{number}]"] = value
        return found

    def start(self) -> None:
        """Before training; :meth:`compress` calls it. Call it yourself for a training loop of your own.

        Raises:
            ConflictError: the model is sharded (``fully_shard``), and a compressor needs whole parameters.
        """
        self.refuse_shards()
        self.wrappers.attach()
        for item in self._chain:
            item.on_start()

    def loss(self, loss: Tensor, batch: Any = None) -> Tensor:
        """The loss to descend: the user's, with what the compressors add. Call it before ``backward()``."""
        for item in self._chain:
            loss = item.on_loss(loss, batch)
        return loss

    def before_step(self) -> None:
        """With the gradients complete and the parameters still old.

        In a training loop of your own call it before ``optimizer.step()``; left out, :meth:`step` makes up for it, with
        the same gradients and parameters that are a step further.
        """
        for item in self._chain:
            item._gradients_seen = True
            item.on_gradients()

    def after_step(self) -> None:
        """With the parameters new."""
        for item in self._chain:
            item._gradients_seen = False
            item.on_step()

    def step(self) -> None:
        """Call it after ``optimizer.step()`` in a training loop of your own, before the gradients are forgotten."""
        if not self._gradients_seen:
            self.before_step()
        self.after_step()

    def finish(self) -> None:
        """After training; :meth:`compress` calls it. Call it yourself for a training loop of your own."""
        self._stop()
        for item in sorted(self._chain, key=lambda item: item.post_training):
            item.on_finish()

    def _stop(self) -> None:
        for item in self._chain:
            item.on_stop()

    def on_start(self) -> None:  # noqa: B027 - an algorithm takes part only where it wants to
        """Before training."""

    def on_train(self, max_steps: int | None, max_epochs: int | None) -> bool:
        """Run the training in a way of one's own and return True; False leaves it to one run of the evaluator."""
        return False

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The loss of one forward pass; add a term and return it."""
        return loss

    def on_gradients(self) -> None:  # noqa: B027
        """Gradients are complete, parameters still old."""

    def on_step(self) -> None:  # noqa: B027
        """Parameters are new."""

    def on_stop(self) -> None:  # noqa: B027
        """No more of the training is seen, whether it came to its end or failed: remove what only watches it."""

    def on_finish(self) -> None:  # noqa: B027
        """After training."""

    def state_dict(self) -> dict[str, Any]:
        """What all fused compressors know by now: tensors, numbers and strings, for ``torch.save``.

        To go on after a crash, save it beside the model's and the optimizer's own, build all of them anew, load this
        one first (it wraps what was wrapped), then the model's and the optimizer's, and go on without :meth:`start`.
        """
        return {"compressors": [(type(item).__name__, item.own_state()) for item in self._chain]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, in compressors made in the same way.

        Raises:
            CheckpointError: it was saved by other compressors.
        """
        names = [type(item).__name__ for item in self._chain]
        saved = [name for name, _ in state["compressors"]]
        if saved != names:
            raise CheckpointError(
                f"it was saved by {', '.join(saved)}, and these are {', '.join(names)}",
                where="load_state_dict",
                remedy="Make the same compressors in the same order first.",
            )
        for item, (_, own) in zip(self._chain, state["compressors"], strict=True):
            item.load_own_state(own)

    def own_state(self) -> dict[str, Any]:
        """What this compressor adds to :meth:`state_dict`; nothing unless an algorithm has a state."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what :meth:`own_state` gave."""

    @abstractmethod
    def result(self) -> Any:
        """What :meth:`compress` returns."""
