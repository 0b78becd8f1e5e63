"""The base of quantizers that never train: they look at calibration data, and are done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar

import torch

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.errors import InvalidValueError
from tersor.quantization.base import Quantizer
from tersor.training import Evaluator
from tersor.training.batches import to_device
from tersor.training.evaluator import modes_kept
from tersor.training.loops import device_of
from tersor.training.stages import inputs_of


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
    """

    post_training: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self.calibration = calibration
        self._max_batches: int | None = None
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

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

    def run_calibration(self) -> None:
        """Run the model on all calibration batches; without any, by the evaluator's evaluating function.

        Raises:
            InvalidValueError: there is neither.
        """
        if self.calibration is None and self._trainer is not None and self._trainer.evaluate(self.model) is not None:
            return
        device = device_of(self.model)
        for batch in self.batches():
            args, kwargs = inputs_of(to_device(batch, device))
            self.model(*args, **kwargs)


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Attention by its modules: a fused path would pass their hooks by."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
