"""The conformance suite passes on a distiller that is right and fails on each way to be wrong."""

import contextlib
import copy
import itertools
from unittest import SkipTest

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault

from tersor.distillation import LayerwiseDistiller
from tersor.distillation.teacher import Teacher
from tersor.errors import ConflictError
from tersor.testing import DistillerTestCase
from tersor.testing import distiller as suite_module
from tersor.testing.toys import ToyDistiller

TESTS = [name for name in vars(DistillerTestCase) if name.startswith("test_")]


class SquareDistiller(LayerwiseDistiller):
    """The example of the suite's docstring."""

    def link_loss(self, link, student, teachers):
        return (student - teachers[0]).square().mean()


class TestSquareDistiller(DistillerTestCase):
    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return SquareDistiller(model, config_list, evaluator, teacher, **kwargs)


class TestOneWithoutATeacher(DistillerTestCase):
    has_teacher = False

    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return ToyDistiller(model, config_list, evaluator, **kwargs)


class GivesTwoNumbers(SquareDistiller):
    def distillation_loss(self, observed, batch):
        return super().distillation_loss(observed, batch).expand(2)


class DividesByZero(SquareDistiller):
    def link_loss(self, link, student, teachers):
        return super().link_loss(link, student, teachers) / 0


class HasASign(SquareDistiller):
    def link_loss(self, link, student, teachers):
        return (teachers[0] - student - 10).mean()


class DrawsToZero(SquareDistiller):
    def link_loss(self, link, student, teachers):
        return student.square().mean() + super().link_loss(link, student, teachers)


class IsFarWhereItIsNear(SquareDistiller):
    def link_loss(self, link, student, teachers):
        return 1 / (1 + super().link_loss(link, student, teachers))


class Ascends(SquareDistiller):
    def link_loss(self, link, student, teachers):
        loss = super().link_loss(link, student, teachers)
        return 2 * loss.detach() - loss


class DetachesTheStudent(SquareDistiller):
    def link_loss(self, link, student, teachers):
        return super().link_loss(link, student.detach(), teachers)


class TeachesTheTeacher(SquareDistiller):
    def distillation_loss(self, observed, batch):
        return super().distillation_loss(observed, batch) + self.teacher.model.head.weight.square().sum()


class HoldsHalfFixed(SquareDistiller):
    def link_loss(self, link, student, teachers):
        loss = super().link_loss(link, student, teachers)
        return (loss + loss.detach()) / 2


class AsksInTrainMode(SquareDistiller):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, teacher_training=True, **kwargs)


class AsksWithGradients(SquareDistiller):
    def teacher_values(self, batch):
        found = super().teacher_values(batch)
        modes = [module.training for module in self.teacher.model.modules()]
        self.teacher.model.eval()(batch[0])
        for module, mode in zip(self.teacher.model.modules(), modes, strict=True):
            module.training = mode
        return found


class ChangesTheTeacher(SquareDistiller):
    def on_start(self):
        with torch.no_grad():
            self.teacher.model.head.bias.add_(1)


class LeavesTheTeacherInEvalMode(SquareDistiller):
    def on_finish(self):
        self.teacher.model.eval()


class LooksForEver(SquareDistiller):
    handles = []

    def on_finish(self):
        self.handles.append(self.teacher.model.head.register_forward_hook(print_nothing))


def print_nothing(module, args, output):
    """A hook."""


class AsksAgain(SquareDistiller):
    def teacher_values(self, batch):
        return self.teacher.values(getattr(batch, "batch", batch), self)


class ForgetsTheWeightOfCachedBatches(SquareDistiller):
    def distillation_loss(self, observed, batch):
        return super().distillation_loss(observed, batch) * (0 if hasattr(batch, "teacher") else 1)


class TakesTheStudent(SquareDistiller):
    @staticmethod
    def _teacher(model, teacher, *args):
        if teacher is model:
            return Teacher(copy.deepcopy(model))
        return SquareDistiller._teacher(model, teacher, *args)


class DrawsAnew(SquareDistiller):
    """Not the same twice."""

    draws = itertools.count(1)

    def link_loss(self, link, student, teachers):
        return super().link_loss(link, student, teachers) * next(self.draws)


class Remembers(SquareDistiller):
    """The mean of its losses, by which it divides."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mean = torch.tensor(1.0)

    def distillation_loss(self, observed, batch):
        loss = super().distillation_loss(observed, batch)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss / self.mean


class AsksNoOtherProcess(Remembers):
    def own_state(self):
        return {"mean": self.mean}

    def load_own_state(self, state):
        self.mean = state["mean"]


class LeavesAHook(SquareDistiller):
    handles = []

    def on_finish(self):
        self.handles.append(self.model.left.register_forward_hook(print_nothing))


class KeepsAProjectionInTheModel(SquareDistiller):
    def on_start(self):
        self.model.register_buffer("projection", torch.eye(2))


class ChangesWeights(SquareDistiller):
    def unwrap_model(self, *, bake=False):
        with torch.no_grad():
            self.model.head.bias.add_(1)
        return super().unwrap_model()


class HooksOneModuleAlone(SquareDistiller):
    """A copy computes without it."""

    def on_start(self):
        head = self.model.head
        self.handle = head.register_forward_hook(lambda module, args, out: out + 1 if module is head else out)

    def unwrap_model(self, *, bake=False):
        if hasattr(self, "handle"):
            self.handle.remove()
        return super().unwrap_model()


class SeesMore(SquareDistiller):
    def observed(self):
        return {name: value + 0.01 for name, value in super().observed().items()}


class SeesLarger(SquareDistiller):
    def observed(self):
        return {name: value * 1.01 for name, value in super().observed().items()}


class TrainsAlone(SquareDistiller):
    def on_train(self, max_steps, max_epochs):
        self._trainer.train(self.model, self, max_steps=3)
        return True


class TakesTwice(SquareDistiller):
    def _refuse_overlap(self):
        pass

    def _wrap_targets(self):
        with contextlib.suppress(ConflictError):  # of the stack, which has room for one
            super()._wrap_targets()


class OverflowsInHalfPrecision(SquareDistiller):
    def distillation_loss(self, observed, batch):
        loss = super().distillation_loss(observed, batch)
        return loss * torch.inf if torch.bfloat16 in {value.dtype for value in observed.values()} else loss


BROKEN = [
    (GivesTwoNumbers, "the_loss_is_a_finite_number", r"the loss is of shape \(2,\)"),
    (DividesByZero, "the_loss_is_a_finite_number", "the loss is inf"),
    (HasASign, "the_loss_is_a_finite_number", "which is no distance"),
    (DrawsToZero, "the_loss_is_least_where_student_and_teacher_agree", "the loss of the teacher itself is"),
    (IsFarWhereItIsNear, "the_loss_is_least_where_student_and_teacher_agree", "and that of the teacher itself 2"),
    (Ascends, "the_loss_falls", "in 20 steps"),
    (DetachesTheStudent, "gradients_reach_the_student_and_not_the_teacher", "no gradient reaches the student"),
    (TeachesTheTeacher, "gradients_reach_the_student_and_not_the_teacher", "reach the teacher: head.weight"),
    (DividesByZero, "gradients_reach_the_student_and_not_the_teacher", "gradients are not finite"),
    (HoldsHalfFixed, "gradients_are_those_of_the_loss", "the loss changes by .* and the gradient says"),
    (AsksInTrainMode, "the_teacher_is_left_as_it_is", "the teacher was asked in train mode"),
    (AsksWithGradients, "the_teacher_is_left_as_it_is", "the teacher was asked with gradients"),
    (ChangesTheTeacher, "the_teacher_is_left_as_it_is", "not the same in the teacher: head.bias"),
    (LeavesTheTeacherInEvalMode, "the_teacher_is_left_as_it_is", "modules of the teacher are in another mode"),
    (LooksForEver, "the_teacher_is_left_as_it_is", "hooks are left behind: .*print_nothing.* on head"),
    (AsksAgain, "a_cached_teacher_teaches_the_same", "asked for 96 samples; 32 were to be"),
    (ForgetsTheWeightOfCachedBatches, "a_cached_teacher_teaches_the_same", "not the same with a cached teacher: stem"),
    (TakesTheStudent, "a_teacher_that_is_none_is_refused", "the student as its teacher was taken"),
    (DrawsAnew, "the_same_seed_gives_the_same_student", "not the same in a second run: stem.weight"),
    (AsksNoOtherProcess, "two_processes_agree", "not the same in the other process: learned.compressors.0.1.mean"),
    (LeavesAHook, "unwrapping_gives_the_model_back", "hooks are left behind: .*print_nothing.* on left"),
    (
        KeepsAProjectionInTheModel,
        "unwrapping_gives_the_model_back",
        "others are there after unwrap_model: .*projection",
    ),
    (ChangesWeights, "unwrapping_gives_the_model_back", "not the same after unwrap_model: head.bias"),
    (HooksOneModuleAlone, "a_copy_is_a_model_of_its_own", "outputs of a copy: they differ"),
    (Remembers, "an_interrupted_run_goes_on", "not the same when step [123] was the last before a crash"),
    (SeesMore, "it_sees_what_is_rounded_and_masked", "left._output_0 is seen before it is masked"),
    (SeesLarger, "it_sees_what_is_rounded_and_masked", "left._output_0 is seen before it is rounded"),
    (TrainsAlone, "it_sees_what_is_rounded_and_masked", r"they ran for \[3\] steps; 6 were asked for"),
    (DividesByZero, "it_sees_what_is_rounded_and_masked", "parameters are not finite any more"),
    (TakesTwice, "a_target_is_distilled_once", "ConflictError was not raised"),
    (OverflowsInHalfPrecision, "half_precision", "parameters are not finite"),
]


def suite(distiller_class, **attributes):
    """The suite for a distiller that has no arguments of its own."""

    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return distiller_class(model, config_list, evaluator, teacher, **kwargs)

    return type("Case", (DistillerTestCase,), {"distiller": distiller, **attributes})()


@pytest.mark.parametrize(("broken", "test", "message"), BROKEN, ids=[f"{of[0].__name__}-{of[1]}" for of in BROKEN])
def test_what_is_wrong_is_found(broken, test, message):
    with pytest.raises(AssertionError, match=message):
        getattr(suite(broken), f"test_{test}")()
    for kind in (LeavesAHook, LooksForEver):
        while kind.handles:
            kind.handles.pop().remove()


def test_each_test_has_a_distiller_that_fails_it():
    assert {f"test_{test}" for _, test, _ in BROKEN} == set(TESTS)


@pytest.mark.parametrize(
    ("attributes", "test", "reason"),
    [
        ({"has_teacher": False}, "the_teacher_is_left_as_it_is", "it has no teacher"),
        ({"agrees": False}, "the_loss_is_least_where_student_and_teacher_agree", "knows nothing yet"),
        ({"exact": False}, "gradients_are_those_of_the_loss", "holds parts of its loss fixed"),
    ],
)
def test_what_a_distiller_cannot_do_is_skipped_with_a_reason(attributes, test, reason):
    with pytest.raises(SkipTest, match=reason):
        getattr(suite(SquareDistiller, **attributes), f"test_{test}")()


def test_a_loss_that_is_no_distance_may_be_below_zero():
    suite(HasASign, distance=False).test_the_loss_is_a_finite_number()


def test_where_processes_cannot_be_joined_the_test_is_skipped(monkeypatch):
    monkeypatch.setattr(suite_module, "why_not_two", lambda: "no gloo here")
    with pytest.raises(SkipTest, match="no gloo here"):
        suite(SquareDistiller).test_two_processes_agree()


def test_a_suite_without_a_distiller_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        DistillerTestCase()
