"""What the suite of quantizers is made of: a network that is quantized alone, fused, masked, in a loop of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from tersor.pruning import RandomPruner
from tersor.quantization import Quantizer
from tersor.speedup.verify import outputs_of
from tersor.testing.calibrations import numbers_of
from tersor.testing.checks import Masks, values_of
from tersor.testing.lifecycle import AfterEach, Entry, Way, nothing, run_loop
from tersor.testing.toys import BATCHES, EXAMPLE, FRESH, Batch, ToyDistiller, ToyNetwork, ToyTraining, calm
from tersor.training import Evaluator

MODULES = ("left", "hidden")
WHOLE = ((-1,), "front", -1)
BLOCKS: Mapping[Any, int] = MappingProxyType({"out_channel": 10, "in_channel": 8, (1, 4): 20, (5, 8): 2, WHOLE: 1})
"""For each granularity, how many blocks it cuts the weight of ``hidden`` (10 by 8) into."""


PRUNED: list[Entry] = [{"op_names": list(MODULES), "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": [1]}]


@dataclass(frozen=True)
class Quantizing:
    """One network that is being quantized.

    Attributes:
        model: the network, wrapped.
        training: how it is trained.
        quantizer: the one under test.
    """

    model: nn.Module
    training: ToyTraining
    quantizer: Quantizer

    @property
    def compressor(self) -> Quantizer:
        """The quantizer."""
        return self.quantizer

    def outputs(self) -> list[Tensor]:
        """What the model computes, in eval mode, on inputs that nothing has seen before."""
        return outputs_of(self.model, FRESH.to(next(self.model.parameters()).dtype))

    def result(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """Outputs and the calibration; and what the model holds once it is unwrapped."""
        outputs = {f"output {number}": output for number, output in enumerate(self.outputs() if buffers else ())}
        numbers = numbers_of(self.quantizer.get_calibration_config())
        self.quantizer.unwrap_model()
        parameters = dict(self.model.named_parameters())
        held = {name: of for name, of in values_of(self.model).items() if buffers or name in parameters}
        return outputs | numbers | held


class QuantizationScenarios(ABC):
    """A quantizer that is tested, and what is done with it.

    Attributes:
        learns: whether it changes parameters in other ways than by the user's training: it corrects or rounds them.
        calibrates: whether it looks at data that it is given, :attr:`batches`, and at no other.
        needs_evaluator: whether it cannot do without one, not even in a training loop of one's own.
        steps: of training.
        targets: what it can quantize, of ``weight``, ``bias``, ``_input_0`` and ``_output_0``.
        setting: keys of each entry of the config list: its types.
        granularities: those of a weight that it can, of :data:`BLOCKS`.
        channels: whether it can give each channel of an input or output a scale of its own.
        tolerance: the largest difference of an output, relative to the largest output, where weights are baked.
        batches: inputs and classes, for a quantizer that is given data; each of two processes has half of them.
    """

    learns: bool = False
    calibrates: bool = True
    needs_evaluator: bool = False
    steps: int = 6
    targets: tuple[str, ...] = ("weight", "bias", "_input_0", "_output_0")
    setting: Mapping[str, Any] = MappingProxyType({"quant_dtype": "int8"})
    granularities: tuple[Any, ...] = tuple(BLOCKS)
    channels: bool = True
    tolerance: float = 1e-6
    batches: tuple[Batch, ...] = BATCHES

    @abstractmethod
    def quantizer(
        self, model: nn.Module, config_list: list[Entry], evaluator: Evaluator | None, **kwargs: Any
    ) -> Quantizer:
        """The quantizer that is tested, set for few steps.

        Args:
            model: a small network.
            config_list: what is quantized.
            evaluator: how it is trained; None for a training loop of one's own, or where ``previous`` has one.
            **kwargs: ``example_inputs`` or ``previous``, for the constructor. Give ``calibration=self.batches`` to one
                that is given data.
        """

    def _config(self, *targets: str, modules: tuple[str, ...] = MODULES, **keys: Any) -> list[Entry]:
        return [{"op_names": list(modules), "target_names": list(targets or self.targets), **self.setting, **keys}]

    def _need(self, *targets: str) -> None:
        for target in targets:
            if target not in self.targets:
                raise SkipTest(f"it quantizes no {target}")

    @contextmanager
    def _given(self, batches: tuple[Batch, ...]) -> Iterator[None]:
        """Other batches for a while."""
        before, self.batches = self.batches, batches
        try:
            yield
        finally:
            self.batches = before

    @contextmanager
    def _quantizing(
        self,
        config_list: list[Entry],
        way: Way = "evaluator",
        *,
        model: nn.Module | None = None,
        rank: int | None = None,
        prepare: Callable[[nn.Module], object] = lambda model: None,
    ) -> Iterator[Quantizing]:
        """A network that has just been wrapped, and is unwrapped in the end.

        Args:
            config_list: what is quantized.
            way: whether there is an evaluator.
            model: the network; by default a new one.
            rank: which of two processes this is: each has batches, and a seed of torch, of its own.
            prepare: is done to the model first.
        """
        with calm(0 if rank is None else rank):
            model = ToyNetwork() if model is None else model
            prepare(model)
            if rank is not None:
                self.batches = BATCHES[rank::2]
            training = ToyTraining(model, self.batches)
            evaluator = training.evaluator if way == "evaluator" or self.needs_evaluator else None
            example = EXAMPLE.to(next(model.parameters()).dtype)
            quantizer = self.quantizer(model, config_list, evaluator, example_inputs=example)
            try:
                yield Quantizing(model, training, quantizer)
            finally:
                quantizer.unwrap_model()

    @contextmanager
    def _quantized(self, config_list: list[Entry], **kwargs: Any) -> Iterator[Quantizing]:
        """A network that has been compressed."""
        with self._quantizing(config_list, **kwargs) as quantizing:
            self._compress(quantizing.quantizer)
            yield quantizing

    @contextmanager
    def _masked(self, config_list: list[Entry], *, first: bool, value: float) -> Iterator[tuple[Quantizing, Masks]]:
        """A network of which half of the weights are masked, trained in a loop of its own and quantized.

        Args:
            config_list: what is quantized.
            first: whether the pruner is made before the quantizer.
            value: what masked weights are.
        """
        with calm(seed=0):
            model, masks = ToyNetwork(), _masks()
            with torch.no_grad():
                for name, of in masks.items():
                    model.get_submodule(name).get_parameter("weight")[~of["weight"]] = value
            training = ToyTraining(model, self.batches)
            evaluator = training.evaluator if self.needs_evaluator else None
            if first:
                pruner = RandomPruner(model, PRUNED, evaluator, seed=0, example_inputs=EXAMPLE)
                quantizer = self.quantizer(model, config_list, None, previous=pruner)
            else:
                quantizer = self.quantizer(model, config_list, evaluator, example_inputs=EXAMPLE)
                pruner = RandomPruner.from_compressor(quantizer, PRUNED, seed=0)
            try:
                quantizing = Quantizing(model, training, quantizer)
                self._loop(quantizing, range(self.steps))
                yield quantizing, masks
            finally:
                quantizer.unwrap_model()

    @contextmanager
    def _fused(self, *, first: bool) -> Iterator[tuple[Quantizing, ToyDistiller]]:
        """The quantizer with a distiller, made first or last."""
        with calm(seed=0):
            model, distilled = ToyNetwork(), [{"op_names": list(MODULES)}]
            training = ToyTraining(model, self.batches)
            if first:
                quantizer = self.quantizer(model, self._config(), training.evaluator, example_inputs=EXAMPLE)
                distiller = ToyDistiller.from_compressor(quantizer, distilled)
            else:
                distiller = ToyDistiller(model, distilled, training.evaluator, example_inputs=EXAMPLE)
                quantizer = self.quantizer(model, self._config(), None, previous=distiller)
            try:
                yield Quantizing(model, training, quantizer), distiller
            finally:
                quantizer.unwrap_model()

    def _compress(self, quantizer: Quantizer) -> None:
        quantizer.compress(max_steps=self.steps if quantizer.needs_training else None)

    def _loop(self, quantizing: Quantizing, numbers: range, after_each: AfterEach = nothing) -> None:
        """A training loop of one's own, with scales at its end."""
        run_loop(quantizing, numbers, after_each)


def _masks() -> Masks:
    """Those of a pruner that decides the same whatever the weights are."""
    pruner = RandomPruner(ToyNetwork(), PRUNED, seed=0)
    pruner.prune()
    masks = pruner.get_masks()
    pruner.unwrap_model()
    return masks
