"""The base of quantizers that never train: they look at calibration data, and are done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import InvalidValueError, TrainingError
from tersor.quantization.base import Quantizer, spec_of
from tersor.quantization.dynamic import DynamicQuantize, dynamic
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.format import Format
from tersor.quantization.observers import RangeObserver, observer_of
from tersor.quantization.uniform import UniformQuantize
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.batches import to_device
from tersor.training.evaluator import modes_kept
from tersor.training.loops import device_of
from tersor.training.stages import inputs_of
from tersor.training.timeline import Event

ObserverChoice: TypeAlias = str | Callable[[Format], RangeObserver]
"""The name of an observer, or what makes one for a format."""
SimulatedTarget: TypeAlias = tuple[PlannedTarget, FakeQuantize]
"""What is quantized, and its simulation, as :meth:`Quantizer.transforms` gives them."""


class CalibratedQuantizer(Quantizer):
    """Base of post-training quantizers.

    ``compress()`` calibrates and never trains: of ``compress(max_steps)`` the steps are the most calibration batches.
    Fused with what does train, it calibrates after the training and after pruners have finished.

    Args:
        model: the model; it is wrapped in place.
        config_list: dicts, or the path of a YAML or JSON file.
        evaluator: its evaluating function is the calibration where no ``calibration`` is given.
        calibration: batches like those of training, whose targets are not looked at; some hundred samples.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Attributes:
        observer: of inputs and outputs, where the config list names none.
        weight_observer: of parameters, likewise.
    """

    post_training: ClassVar[bool] = True
    observer: ObserverChoice = "mse"
    weight_observer: ObserverChoice = "minmax"

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        # What can be gone through once alone is kept: methods look at the data several times.
        self.calibration = list(calibration) if isinstance(calibration, Iterator) else calibration
        self._max_batches: int | None = None
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """Fixed scales, unless the target is dynamic."""
        found = dynamic(self, target)
        if found is not None:
            return found
        return UniformQuantize(target.name, self.form(target), self.cut(target), self.observer_for(target))

    def observer_for(self, target: PlannedTarget) -> RangeObserver:
        """A new observer, as the config list has it, else as the quantizer has it."""
        at_hand = not is_activation(target.config.target_name)
        choice = spec_of(target).observer or (self.weight_observer if at_hand else self.observer)
        form = self.form(target)
        return observer_of(choice, form, at_hand=at_hand) if isinstance(choice, str) else choice(form)

    def events(self) -> Iterable[Event]:
        """It calibrates when all else is over."""
        yield Event(f"calibrates {len(self._quantized())} targets, {self.types()}", None)

    @abstractmethod
    def calibrate(self) -> None:
        """Find all scales, with the model as it is by now, in eval mode and without gradients."""

    def on_train(self, max_steps: int | None, max_epochs: int | None) -> bool:
        """Training is not for this one; alone, it takes the steps as a limit of its batches."""
        self._max_batches = max_steps if all(item.post_training for item in self._chain) else None
        return False

    def on_finish(self) -> None:
        """Calibrate."""
        with torch.no_grad(), modes_kept(self.model), _without_fast_paths():
            self.model.eval()
            self.unreached = frozenset()
            self.calibrate()

    def batches(self) -> Iterable[Any]:
        """The calibration batches.

        Raises:
            InvalidValueError: there are none.
        """
        first = None if self.calibration is None else next(iter(self.calibration), None)
        if self.calibration is None or first is None:
            raise InvalidValueError(
                "there is no calibration batch",
                where="calibration",
                legal=("a data loader", "a list of batches"),
                remedy="Give some hundred samples of the data that the model is used on.",
            )
        return islice(self.calibration, self._max_batches)

    def example(self) -> Any:
        """What the model can be run on once, to see how its layers depend on each other.

        Returns:
            The example inputs; without any, the arguments in the first calibration batch.

        Raises:
            InvalidValueError: there is neither.
        """
        if self.example_inputs is not None:
            return self.example_inputs
        if self.calibration is None:
            raise InvalidValueError(
                "there is nothing to run the model on and see how its layers depend on each other",
                where="example_inputs",
                legal=("one small batch of inputs",),
                remedy="Give example_inputs, or calibration batches.",
            )
        inputs = inputs_of(to_device(next(iter(self.batches())), device_of(self.model)))
        return inputs.kwargs or inputs.args

    def run_calibration(self) -> None:
        """Run the model on all calibration batches; without any, by the evaluator's evaluating function.

        Raises:
            InvalidValueError: there is neither.
            TrainingError: the model cannot be called with what a batch holds.
        """
        if self.calibration is None and self._trainer is not None and self._trainer.evaluate(self.model) is not None:
            return
        device = device_of(self.model)
        for batch in self.batches():
            args, kwargs = inputs_of(to_device(batch, device))
            try:
                self.model(*args, **kwargs)
            except TypeError as error:
                raise TrainingError(
                    f"the model does not take what a calibration batch gives it: {error}",
                    where="calibration",
                    legal=(
                        "inputs alone",
                        "(inputs, targets)",
                        "(a, b, targets)",
                        "a mapping of the model's arguments",
                    ),
                    remedy="The last item of a tuple is taken for the targets; give a mapping where there are none.",
                ) from error

    def fix_ranges(self, found: Sequence[SimulatedTarget]) -> None:
        """Let new observers see parameters, and a run on calibration data; then fix the scales, and round.

        Dynamic targets need none; where there are no others, nothing is run.

        Raises:
            InvalidValueError: there is no calibration data, and an input or output to be seen.
            NumericalError: a target was never reached, or its values are not finite.
        """
        fixed = [(target, transform) for target, transform in found if isinstance(transform, UniformQuantize)]
        activations = [own for own in fixed if is_activation(own[0].config.target_name)]
        parameters = [own for own in fixed if own not in activations]
        if activations:
            self._observe(activations, self.run_calibration)
        self._observe(parameters, lambda: self._read(parameters))
        for target, transform in found:
            assert isinstance(transform, (UniformQuantize, DynamicQuantize))
            transform.enabled = target.name not in self.unreached

    def _observe(self, fixed: Sequence[tuple[PlannedTarget, UniformQuantize]], run: Callable[[], None]) -> None:
        for target, transform in fixed:
            transform.observer = self.observer_for(target).to(transform.scale.device)
            transform.watching = True
        try:
            run()
        finally:
            for _, transform in fixed:
                transform.watching = False
        for _, transform in fixed:
            transform.observer.synchronize()
        self.leave_out(own for own, transform in fixed if transform.unseen and not self._is_named(own))
        for target, transform in fixed:
            if target.name not in self.unreached:
                transform.settle()

    def _is_named(self, target: PlannedTarget) -> bool:
        return target.config.module_name in (self.plan.entries[target.config.entry_index].op_names or ())

    def _read(self, found: Sequence[tuple[PlannedTarget, UniformQuantize]]) -> None:
        """Compute parameters once, so that what is put on them sees them."""
        for target, _ in found:
            module, name = self.simulated_at(target)
            getattr(self.model.get_submodule(module), name)


def switch_off(found: Iterable[SimulatedTarget]) -> None:
    """Let values pass as they are."""
    for _, transform in found:
        assert isinstance(transform, (UniformQuantize, DynamicQuantize))
        transform.enabled = False


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Attention by its modules: a fused path would pass their hooks by."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
