"""Is a quantizer right? A suite that quantizes a small network in every way that a config list allows."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import SkipTest

import torch
from torch import Tensor, nn

from tersor.errors import NumericalError
from tersor.storage import load_calibration, save_calibration
from tersor.testing.calibrations import named, numbers_of, places_of, plain_of, refuses, unfit
from tersor.testing.checks import assert_equal, assert_same_outputs, hooks_of, values_of
from tersor.testing.grids import assert_on_grids, simulated_places, simulated_values
from tersor.testing.lifecycle import assert_goes_on, assert_nothing_left, by_both_ways
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.testing.quantizer_scenarios import BLOCKS, MODULES, QuantizationScenarios
from tersor.testing.toys import BATCHES, EXAMPLE, FRESH, Batch, ToyHalves, ToyNetwork, ToyTraining


class QuantizerTestCase(QuantizationScenarios):
    """What must hold for every quantizer; subclass it for each of your own.

    Values that lie on the grid that is stated, to the bit; what was asked for is quantized and nothing else; models
    that come back as they were; calibrations that travel; scales that see masked values as zeros and are the same on
    every process; runs that go on after a crash; a pruner and a distiller beside it; half precision; and errors where
    data or a calibration cannot be used. Each is a test on a network of 1,181 parameters; all take about a second.

    Say by :meth:`~tersor.testing.quantizer_scenarios.QuantizationScenarios.quantizer` how one is made, and by the
    attributes of :class:`tersor.testing.quantizer_scenarios.QuantizationScenarios` what it cannot do. A test of that is
    skipped with the reason.

    Example, in a file that pytest collects::

        class MinMaxQuantizer(CalibratedQuantizer):
            observer = "minmax"

            def calibrate(self):
                self.find_ranges(self.transforms())
                for _, transform in self.transforms():
                    transform.enabled = True

        class TestMinMaxQuantizer(QuantizerTestCase):
            def quantizer(self, model, config_list, evaluator, **kwargs):
                return MinMaxQuantizer(model, config_list, evaluator, calibration=self.batches, **kwargs)
    """

    # Grids

    def test_values_lie_on_the_grid_that_is_stated(self) -> None:
        """Each value is a number of the stated type, less the zero point, times the scale, to the bit."""
        with self._quantized(self._config()) as quantizing:
            assert_on_grids(quantizing.model, FRESH, quantizing.quantizer.get_calibration_config())

    def test_each_block_has_its_scale(self) -> None:
        """For each granularity of a weight there are as many scales as blocks, and values lie on the grids of these."""
        self._need("weight")
        for granularity in self.granularities:
            config = self._config("weight", modules=("hidden",), granularity=granularity)
            with self._quantized(config) as quantizing:
                calibration = quantizing.quantizer.get_calibration_config()
                count, scales = BLOCKS[granularity], calibration["hidden"]["weight"]["scale"]
                assert scales.numel() == count, f"{scales.numel()} scales for {count} blocks of {granularity}"
                assert_on_grids(quantizing.model, FRESH, calibration)

    def test_each_channel_of_an_activation_has_its_scale(self) -> None:
        """Outputs of six channels have six scales."""
        self._need("_output_0")
        if not self.channels:
            raise SkipTest("its inputs and outputs have one scale each")
        config = self._config("_output_0", modules=("left",), granularity="per_channel")
        with self._quantized(config) as quantizing:
            calibration = quantizing.quantizer.get_calibration_config()
            scales = calibration["left"]["_output_0"]["scale"]
            assert scales.numel() == 6, f"{scales.numel()} scales for 6 channels"
            assert_on_grids(quantizing.model, FRESH, calibration)

    # What is asked for, and nothing else

    def test_what_is_asked_for_is_quantized_and_nothing_else(self) -> None:
        """Targets of each kind by themselves: all of them have a grid, no other tensor is simulated or changed."""
        for target in self.targets:
            config = self._config(target)
            before, asked = copy.deepcopy(config), sorted((module, target) for module in MODULES)
            with self._quantized(config) as quantizing:
                places = places_of(quantizing.quantizer.get_calibration_config())
                assert places == asked, f"{named(places)} are quantized; {named(asked)} were asked for"
                simulated = simulated_places(quantizing.model)
                assert simulated == asked, f"{named(simulated)} are simulated; {named(asked)} were asked for"
                assert config == before, f"the caller's config list became {config}"
                if quantizing.quantizer.post_training and not self.learns:
                    quantizing.quantizer.unwrap_model()
                    assert_equal(values_of(ToyNetwork()), values_of(quantizing.model), "after quantizing the rest")

    def test_inputs_and_outputs_by_name(self) -> None:
        """Of a module that takes an argument by name and gives a mapping, one input and one output are quantized."""
        self._need("_input_0", "_output_0")
        config = self._config("_input_x", "_output_high", modules=("halves",))
        with self._quantized(config, model=ToyHalves()) as quantizing:
            calibration = quantizing.quantizer.get_calibration_config()
            asked = [("halves", "_input_x"), ("halves", "_output_high")]
            assert places_of(calibration) == asked, f"{named(places_of(calibration))} are quantized"
            assert_on_grids(quantizing.model, FRESH, calibration)
            both = simulated_values(quantizing.model, FRESH, [*asked, ("halves", "_output_low")])
            cut, low = both["halves", "_input_x"].chunk(2, -1)[0], both["halves", "_output_low"]
            assert torch.equal(cut, low), "the output 'low' is quantized; 'high' was asked for"

    # The same each time, and everywhere

    def test_the_same_seed_gives_the_same_scales(self) -> None:
        """Two runs give scales, outputs and weights that are equal bit by bit."""
        found: list[dict[str, Tensor]] = []
        for _ in range(2):
            with self._quantized(self._config()) as quantizing:
                found.append(quantizing.result())
        assert_equal(found[0], found[1], "in a second run")

    def test_two_processes_agree(self) -> None:
        """Two processes that see different halves of the data come to the same scales and weights."""
        if reason := why_not_two():
            raise SkipTest(reason)

        def on_half(rank: int) -> dict[str, Tensor]:
            return by_both_ways(
                lambda way: self._quantizing(self._config(), way, rank=rank),
                lambda quantizing: self._compress(quantizing.quantizer),
                self._loop,
                self.steps,
            )

        assert_equal(*in_two_processes(on_half), "in the other process")

    # Nobody's property

    def test_unwrapping_gives_the_model_back(self) -> None:
        """Hooks and parametrizations are gone, modes as before; and so are all values, unless it trains or learns."""
        with self._quantizing(self._config(), prepare=_mix_modes) as quantizing:
            model, quantizer = quantizing.model, quantizing.quantizer
            quantizer.unwrap_model()
            before, hooks = values_of(model), hooks_of(model)
            modes = {name: module.training for name, module in model.named_modules()}
            quantizer.wrap_model()
            self._compress(quantizer)
            after = {name: model.get_submodule(name).training for name in modes}
            quantizer.unwrap_model()
            assert_nothing_left(model, hooks)
            if not quantizer.needs_training:  # the user's training sets the mode, and changes values
                assert after == modes, "modules are in another mode after compress"
                if not self.learns:
                    assert_equal(before, values_of(model), "after unwrap_model")

    def test_baked_weights_are_the_simulated_ones(self) -> None:
        """Where weights alone are quantized, the model with their values baked computes what was simulated."""
        self._need("weight")
        with self._quantized(self._config("weight")) as quantizing:
            places = [(module, "weight") for module in MODULES]
            simulated, outputs = simulated_values(quantizing.model, FRESH, places), quantizing.outputs()
            quantizing.quantizer.unwrap_model(bake=True)
            held = {named([place]): quantizing.model.get_parameter(".".join(place)).detach() for place in places}
            assert_equal({named([place]): value for place, value in simulated.items()}, held, "when they are baked")
            assert_same_outputs(quantizing.model, FRESH, outputs, self.tolerance, "outputs of the baked model")

    def test_a_copy_is_a_model_of_its_own(self) -> None:
        """A deep copy of the wrapped model computes the same, also when the model has been unwrapped."""
        with self._quantized(self._config()) as quantizing:
            outputs, copied = quantizing.outputs(), copy.deepcopy(quantizing.model)
            quantizing.quantizer.unwrap_model()
            assert_same_outputs(copied, FRESH, outputs, 0, "outputs of a copy")

    # Calibrations

    def test_calibrations_travel(self) -> None:
        """A fresh quantizer of the same weights, given the calibration from a file, computes the same bits."""
        with self._quantized(self._config()) as quantizing, tempfile.TemporaryDirectory() as folder:
            calibration, expected = quantizing.quantizer.get_calibration_config(), quantizing.outputs()
            loaded = load_calibration(save_calibration(calibration, Path(folder) / "calibration.safetensors"))
            assert plain_of(loaded) == plain_of(calibration), "the file holds other numbers or strings"
            quantizing.quantizer.unwrap_model()
            model = copy.deepcopy(quantizing.model)
            other = self.quantizer(model, self._config(), ToyTraining(model).evaluator, example_inputs=EXAMPLE)
            try:
                other.update_calibration_config(loaded)
                found = numbers_of(other.get_calibration_config())
                assert_equal(numbers_of(calibration), found, "after update_calibration_config")
                assert_same_outputs(model, FRESH, expected, 0, "outputs under a calibration from elsewhere")
            finally:
                other.unwrap_model()

    def test_calibrations_that_do_not_fit_are_refused(self) -> None:
        """Of an unknown module, target, type or shape, or without a scale: an error, and nothing is changed."""
        with self._quantized(self._config()) as quantizing:
            before, outputs = numbers_of(quantizing.quantizer.get_calibration_config()), quantizing.outputs()
            for what, wrong in unfit(quantizing.quantizer.get_calibration_config()):
                refused = refuses(quantizing.quantizer, wrong)
                assert refused, f"a calibration with {what} was taken"
                now = numbers_of(quantizing.quantizer.get_calibration_config())
                assert_equal(before, now, f"after a calibration with {what} was refused")
                assert_same_outputs(quantizing.model, FRESH, outputs, 0, f"after a calibration with {what}")

    def test_values_that_are_no_numbers_are_refused(self) -> None:
        """A nan in any batch of the calibration data is an error."""
        if not self.calibrates:
            raise SkipTest("it looks at no calibration data")
        for number in (0, len(BATCHES) - 1):
            batches = [(images.clone(), classes) for images, classes in BATCHES]
            batches[number][0][1, 0, 2, 3] = torch.nan
            with self._given(tuple(batches)):
                assert self._is_refused(), f"NumericalError was not raised for a nan in batch {number}"

    def _is_refused(self) -> bool:
        try:
            with self._quantized(self._config()):
                return False
        except NumericalError:
            return True

    def test_steps_limit_the_run(self) -> None:
        """``compress(max_steps=2)`` trains for two steps; one that never trains looks at no more than two batches."""
        counted = _Counted(BATCHES)
        with self._given(counted), self._quantizing(self._config()) as quantizing:
            counted.most = 0
            quantizing.quantizer.compress(max_steps=2)
        runs = [len(run) for run in quantizing.training.runs]
        if quantizing.quantizer.post_training:
            assert not runs, f"{runs} steps were trained"
            most = 2 if self.calibrates else 0
            assert counted.most == most, f"{counted.most} batches were looked at; {most} were asked for"
        else:
            assert runs == [2], f"{runs} steps were trained; 2 were asked for"

    # Crashes

    def test_an_interrupted_run_goes_on(self) -> None:
        """A loop that ends after some of its steps and goes on in new objects comes to the same bits.

        New objects load what ``torch.save`` wrote, with ``weights_only=True``; also what was written after the end.
        """
        assert_goes_on(
            lambda seed: self._quantizing(self._config(), "loop", model=ToyNetwork(seed)),
            self._loop,
            self.steps,
            sorted({1, 2, self.steps // 2, self.steps - 1}),
            at_end=True,
        )

    # With others

    def test_masked_weights_stay_zero_and_count_for_nothing(self) -> None:
        """What is masked is exactly zero, and scales and outputs are those of weights that were zero there before.

        Whether the pruner was made first or last.
        """
        self._need("weight")
        for first in (True, False):
            results: list[dict[str, Tensor]] = []
            for value in (5.0, 0.0):
                with self._masked(self._config(), first=first, value=value) as (quantizing, masks):
                    for name, of in masks.items():
                        weight, mask = quantizing.model.get_submodule(name).weight, of["weight"]
                        assert isinstance(weight, Tensor)
                        assert not bool(weight[~mask].any()), f"{name}.weight is not zero where it is masked"
                        assert bool(weight[mask].any()), f"{name}.weight is zero where it is not masked"
                    outputs = {"output": quantizing.outputs()[0]}
                    results.append(outputs | numbers_of(quantizing.quantizer.get_calibration_config()))
            assert_equal(results[1], results[0], "where what is masked is large")

    def test_a_distiller_beside_it(self) -> None:
        """One training run serves both, whichever was made first, and values lie on their grids at its end."""
        for first in (True, False):
            with self._fused(first=first) as (quantizing, distiller):
                quantizing.quantizer.compress(max_steps=self.steps)
                runs = [len(run) for run in quantizing.training.runs]
                assert runs == [self.steps], f"they ran for {runs} steps; {self.steps} were asked for"
                seen = len(distiller.losses)
                assert seen == self.steps, f"the distiller saw {seen} of {self.steps} steps"
                assert_on_grids(quantizing.model, FRESH, quantizing.quantizer.get_calibration_config())

    # Half precision

    def test_half_precision(self) -> None:
        """A model in bfloat16 stays one, and its values are those of the grid as bfloat16 has them."""
        batches = tuple((images.bfloat16(), classes) for images, classes in BATCHES)
        with self._given(batches), self._quantized(self._config(), prepare=nn.Module.bfloat16) as quantizing:
            calibration = quantizing.quantizer.get_calibration_config()
            assert_on_grids(quantizing.model, FRESH.bfloat16(), calibration)
            outputs = quantizing.outputs()
            types = {of.dtype for of in (*quantizing.model.parameters(), *outputs)}
            assert types == {torch.bfloat16}, f"parameters and outputs are of {sorted(map(str, types))}"
            assert all(bool(output.isfinite().all()) for output in outputs), "outputs are not finite"


class _Counted(tuple[Batch, ...]):
    """Batches that know the most that were drawn of them in one pass."""

    most = 0

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__(), start=1):
            self.most = max(self.most, number)
            yield batch


def _mix_modes(model: nn.Module) -> None:
    """Train mode, but for one norm."""
    model.train()
    model.get_submodule("left_norm").eval()
