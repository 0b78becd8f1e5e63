"""The conformance suite passes on a quantizer that is right and fails on each way to be wrong."""

import itertools
from unittest import SkipTest

import pytest
import torch

from tersor.errors import UnmatchedError
from tersor.quantization import CalibratedQuantizer, Cut, FakeQuantize, MinMax, Quantizer, UniformQuantize
from tersor.testing import QuantizerTestCase
from tersor.testing import quantizer as suite_module
from tersor.testing.toys import MidRise
from tersor.wrapping import Stage

TESTS = [name for name in vars(QuantizerTestCase) if name.startswith("test_")]


class MinMaxQuantizer(CalibratedQuantizer):
    """The example of the suite's docstring."""

    def fake_quantize(self, target):
        return UniformQuantize(target.name, self.form(target), self.cut(target), MinMax())

    def calibrate(self):
        transforms = [transform for _, transform in self.transforms()]
        for transform in transforms:
            transform.watching = True
        self.run_calibration()
        for transform in transforms:
            transform.watching = False
            self.settle(transform)
            transform.enabled = True

    def settle(self, transform):
        transform.observer.synchronize()
        transform.settle()


class TestMinMaxQuantizer(QuantizerTestCase):
    def quantizer(self, model, config_list, evaluator, **kwargs):
        return MinMaxQuantizer(model, config_list, evaluator, calibration=self.batches, **kwargs)


class LiveQuantizer(Quantizer):
    """Trains with the ranges of the last batch."""

    needs_training = True

    def fake_quantize(self, target):
        return UniformQuantize(target.name, self.form(target), self.cut(target), MinMax(), live=True)

    def on_start(self):
        for _, transform in self.transforms():
            transform.enabled = transform.watching = True

    def on_finish(self):
        for _, transform in self.transforms():
            transform.watching = False


class StatesOtherScales(MinMaxQuantizer):
    def get_calibration_config(self):
        config = super().get_calibration_config()
        for values in (values for targets in config.values() for values in targets.values()):
            values["scale"] *= 1.01
        return config


class StatesAnotherType(MinMaxQuantizer):
    def get_calibration_config(self):
        config = super().get_calibration_config()
        for values in (values for targets in config.values() for values in targets.values()):
            values["quant_dtype"] = "int4"
        return config


class HasOneScale(MinMaxQuantizer):
    """Whatever the granularity."""

    def cut(self, target):
        return Cut.of(target.config, None)


class PassesOverBiases(MinMaxQuantizer):
    def _quantized(self):
        return [target for target in super()._quantized() if target.config.target_name != "bias"]


class QuantizesMore(MinMaxQuantizer):
    """A weight, or an output, that nobody asked for."""

    def calibrate(self):
        super().calibrate()
        name, target = ("head", "weight") if hasattr(self.model, "stem") else ("halves", "_output_low")
        self.wrappers[name].stack(target).put(MidRise())


class ChangesTheConfigList(MinMaxQuantizer):
    def __init__(self, model, config_list, *args, **kwargs):
        config_list[0]["quant_scheme"] = "affine"
        super().__init__(model, config_list, *args, **kwargs)


class ChangesOtherTensors(MinMaxQuantizer):
    def calibrate(self):
        super().calibrate()
        self.model.head.bias.add_(0.01)


class DrawsAnew(MinMaxQuantizer):
    """Not the same twice."""

    draws = itertools.count(1)

    def settle(self, transform):
        super().settle(transform)
        transform.scale *= next(self.draws)


class AsksNoOtherProcess(MinMaxQuantizer):
    def settle(self, transform):
        transform.settle()


class LeavesAHook(MinMaxQuantizer):
    handles = []

    def calibrate(self):
        super().calibrate()
        self.handles.append(self.model.left.register_forward_hook(print_nothing))


def print_nothing(module, args, output):
    """A hook."""


class StaysInEvalMode(MinMaxQuantizer):
    def on_finish(self):
        super().on_finish()
        self.model.eval()


class MovesWeights(MinMaxQuantizer):
    """And does not say that it learns."""

    def calibrate(self):
        super().calibrate()
        for target, _ in self.transforms():
            if target.config.target_name == "weight":
                self.latent(target).mul_(1.01)


class BakesNothing(MinMaxQuantizer):
    def unwrap_model(self, *, bake=False):
        return super().unwrap_model()


class Shared(FakeQuantize):
    """One for all copies."""

    enabled = False

    def __deepcopy__(self, memo):
        return self

    def forward(self, value):
        return (value * 8).round() / 8 if self.enabled else value

    def calibration(self):
        return {"scale": torch.tensor(0.125), "zero_point": torch.tensor(0), "quant_dtype": "int8"}

    def load_calibration(self, calibration):
        self.enabled = True


class SharesWithCopies(CalibratedQuantizer):
    def fake_quantize(self, target):
        return Shared()

    def calibrate(self):
        for _, transform in self.transforms():
            transform.enabled = True

    def unwrap_model(self, *, bake=False):
        for _, transform in self.transforms():
            transform.enabled = False
        return super().unwrap_model(bake=bake)


class LoadsAndDoesNothing(MinMaxQuantizer):
    def update_calibration_config(self, config):
        super().update_calibration_config(config)
        for _, transform in self.transforms():
            transform.enabled = False


class TakesAnyCalibration(MinMaxQuantizer):
    def update_calibration_config(self, config):
        for target, transform in self.transforms():
            transform.set(config[target.place[0]][target.place[1]]["scale"], transform.zero_point)


class RefusesTooLate(MinMaxQuantizer):
    """When half of it has been taken."""

    def update_calibration_config(self, config):
        known = {target.place: transform for target, transform in self.transforms()}
        for module, targets in config.items():
            for name, calibration in targets.items():
                if (module, name) not in known:
                    raise UnmatchedError("this quantizer has no such target", where=f"{module}.{name}")
                known[module, name].load_calibration(calibration)


class OverlooksNan(MinMaxQuantizer):
    def run_calibration(self):
        for images, _ in self.batches():
            self.model(images.nan_to_num())


class LooksAtAllBatches(MinMaxQuantizer):
    def on_train(self, max_steps, max_epochs):
        return False


class TrainsForThreeSteps(LiveQuantizer):
    def on_train(self, max_steps, max_epochs):
        self._trainer.train(self.model, self, max_steps=3)
        return True


class TrainsAlone(LiveQuantizer):
    """The others get no share in the training."""

    def on_train(self, max_steps, max_epochs):
        self._trainer.train(self.model, max_steps=max_steps)
        return True


class ForgetsTheRanges(LiveQuantizer):
    def own_state(self):
        return {}

    def load_own_state(self, state):
        self.on_start()


class ForgetsTheEnd(MinMaxQuantizer):
    def own_state(self):
        return {}

    def load_own_state(self, state):
        pass


class SeesWhatIsMasked(MinMaxQuantizer):
    def calibrate(self):
        super().calibrate()
        for target, transform in self.transforms():
            if target.config.target_name == "weight":
                transform.observer = MinMax()
                transform.watch(self.latent(target))
                transform.settle()


class TakesMasksAway(MinMaxQuantizer):
    def calibrate(self):
        super().calibrate()
        for target, _ in self.transforms():
            mask = self.wrappers[target.place[0]].stack(target.place[1]).find(Stage.MASK)
            if mask is not None:
                mask.method = "bypass"


class RoundsScales(MinMaxQuantizer):
    """To the type of the model, and states them as they were."""

    def fake_quantize(self, target):
        transform = super().fake_quantize(target)
        spread = transform._spread
        transform._spread = lambda value: tuple(of.to(value.dtype).float() for of in spread(value))
        return transform


BROKEN = [
    (
        StatesOtherScales,
        "values_lie_on_the_grid_that_is_stated",
        "10 of 10 values of hidden.bias are not on the grid",
    ),
    (
        StatesAnotherType,
        "values_lie_on_the_grid_that_is_stated",
        "is stored as -?\\d+ to -?\\d+, and int4 holds -8 to 7",
    ),
    (HasOneScale, "each_block_has_its_scale", "1 scales for 10 blocks of out_channel"),
    (HasOneScale, "each_channel_of_an_activation_has_its_scale", "1 scales for 6 channels"),
    (
        PassesOverBiases,
        "what_is_asked_for_is_quantized_and_nothing_else",
        "^ are quantized; hidden.bias, left.bias were",
    ),
    (
        QuantizesMore,
        "what_is_asked_for_is_quantized_and_nothing_else",
        "head.weight, hidden.weight, left.weight are sim",
    ),
    (
        ChangesTheConfigList,
        "what_is_asked_for_is_quantized_and_nothing_else",
        "the caller's config list became .*affine",
    ),
    (ChangesOtherTensors, "what_is_asked_for_is_quantized_and_nothing_else", "after quantizing the rest: head.bias"),
    (QuantizesMore, "inputs_and_outputs_by_name", "the output 'low' is quantized"),
    (
        DrawsAnew,
        "the_same_seed_gives_the_same_scales",
        "not the same in a second run: output 0, scale of hidden._input_0",
    ),
    (
        AsksNoOtherProcess,
        "two_processes_agree",
        "not the same in the other process: scale of hidden._input_0 by evaluator",
    ),
    (LeavesAHook, "unwrapping_gives_the_model_back", "hooks are left behind: .*print_nothing.* on left"),
    (StaysInEvalMode, "unwrapping_gives_the_model_back", "modules are in another mode after compress"),
    (MovesWeights, "unwrapping_gives_the_model_back", "not the same after unwrap_model: left.weight, hidden.weight"),
    (
        BakesNothing,
        "baked_weights_are_the_simulated_ones",
        "not the same when they are baked: left.weight, hidden.weight",
    ),
    (SharesWithCopies, "a_copy_is_a_model_of_its_own", "outputs of a copy: they differ"),
    (LoadsAndDoesNothing, "calibrations_travel", "outputs under a calibration from elsewhere: they differ"),
    (StatesOtherScales, "calibrations_travel", "not the same after update_calibration_config: scale of"),
    (TakesAnyCalibration, "calibrations_that_do_not_fit_are_refused", "a calibration with an unknown module was taken"),
    (
        RefusesTooLate,
        "calibrations_that_do_not_fit_are_refused",
        "after a calibration with an unknown module was refused",
    ),
    (OverlooksNan, "values_that_are_no_numbers_are_refused", "NumericalError was not raised for a nan in batch 0"),
    (LooksAtAllBatches, "steps_limit_the_run", "4 batches were looked at; 2 were asked for"),
    (TrainsForThreeSteps, "steps_limit_the_run", r"\[3\] steps were trained; 2 were asked for"),
    (ForgetsTheRanges, "an_interrupted_run_goes_on", "not the same when step [123] was the last before a crash"),
    (ForgetsTheEnd, "an_interrupted_run_goes_on", "not the same when it was saved at the end"),
    (
        SeesWhatIsMasked,
        "masked_weights_stay_zero_and_count_for_nothing",
        "where what is masked is large: .*of hidden.weight",
    ),
    (TakesMasksAway, "masked_weights_stay_zero_and_count_for_nothing", "left.weight is not zero where it is masked"),
    (TrainsAlone, "a_distiller_beside_it", "the distiller saw 0 of 6 steps"),
    (RoundsScales, "half_precision", "are not on the grid of its calibration"),
]


def suite(quantizer_class, **attributes):
    """The suite for a quantizer that has no arguments of its own, but for the calibration data."""

    def quantizer(self, model, config_list, evaluator, **kwargs):
        if issubclass(quantizer_class, CalibratedQuantizer):
            kwargs["calibration"] = self.batches
        return quantizer_class(model, config_list, evaluator, **kwargs)

    return type("Case", (QuantizerTestCase,), {"quantizer": quantizer, **attributes})()


@pytest.mark.parametrize(("broken", "test", "message"), BROKEN, ids=[f"{of[0].__name__}-{of[1]}" for of in BROKEN])
def test_what_is_wrong_is_found(broken, test, message):
    with pytest.raises(AssertionError, match=message):
        getattr(suite(broken), f"test_{test}")()
    while LeavesAHook.handles:
        LeavesAHook.handles.pop().remove()


def test_each_test_has_a_quantizer_that_fails_it():
    assert {f"test_{test}" for _, test, _ in BROKEN} == set(TESTS)


@pytest.mark.parametrize(
    ("attributes", "test", "reason"),
    [
        ({"targets": ("_input_0",)}, "baked_weights_are_the_simulated_ones", "it quantizes no weight"),
        ({"targets": ("weight",)}, "inputs_and_outputs_by_name", "it quantizes no _input_0"),
        ({"channels": False}, "each_channel_of_an_activation_has_its_scale", "have one scale each"),
        ({"calibrates": False}, "values_that_are_no_numbers_are_refused", "looks at no calibration data"),
    ],
)
def test_what_a_quantizer_cannot_do_is_skipped_with_a_reason(attributes, test, reason):
    with pytest.raises(SkipTest, match=reason):
        getattr(suite(MinMaxQuantizer, **attributes), f"test_{test}")()


def test_where_processes_cannot_be_joined_the_test_is_skipped(monkeypatch):
    monkeypatch.setattr(suite_module, "why_not_two", lambda: "no gloo here")
    with pytest.raises(SkipTest, match="no gloo here"):
        suite(MinMaxQuantizer).test_two_processes_agree()


def test_a_suite_without_a_quantizer_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        QuantizerTestCase()
