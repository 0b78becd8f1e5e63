"""Is a distiller right? A suite that teaches a small network in every way that distillers are used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest import SkipTest
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.distillation import Distilled, LayerwiseDistiller
from tersor.errors import ConfigError, ConflictError
from tersor.speedup.verify import outputs_of
from tersor.testing.checks import assert_equal, assert_same_outputs, hooks_of, values_of
from tersor.testing.distiller_scenarios import TEACHER, DistillationScenarios, Distilling
from tersor.testing.lifecycle import assert_goes_on, assert_nothing_left, by_both_ways, run_loop
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.testing.toys import FRESH, ToyNetwork
from tersor.wrapping import is_wrapped


class DistillerTestCase(DistillationScenarios):
    """What must hold for every distiller; subclass it for each of your own.

    A loss that is a number, least where the student is its teacher, whose gradient reaches the student and nothing
    else, and which falls; a teacher that is asked in eval mode and left as it is; the same with its values cached;
    models that come back as they were; one result for one seed and on every process; runs that go on after a crash;
    values seen behind rounding and masks, whichever compressor was made first; half precision; and errors where nothing
    can be taught. Each is a test on a network of 1,181 parameters; all take about a second.

    Say by :meth:`~tersor.testing.distiller_scenarios.DistillationScenarios.distiller` how one is made, and by the
    attributes of :class:`tersor.testing.distiller_scenarios.DistillationScenarios` what it looks at and cannot do. A
    test of that is skipped with the reason.

    Example, in a file that pytest collects::

        class SquareDistiller(LayerwiseDistiller):
            def link_loss(self, link, student, teachers):
                return (student - teachers[0]).square().mean()

        class TestSquareDistiller(DistillerTestCase):
            def distiller(self, model, config_list, evaluator, teacher, **kwargs):
                return SquareDistiller(model, config_list, evaluator, teacher, **kwargs)
    """

    # The loss

    def test_the_loss_is_a_finite_number(self) -> None:
        """One number on each batch, in train and in eval mode; no less than 0 where it is a distance."""
        with self._distilling() as distilling:
            distilling.distiller.start()
            for training in (True, False):
                distilling.model.train(training)
                for batch in distilling.training.batches:
                    loss = distilling.loss(batch)
                    assert loss.numel() == 1, f"the loss is of shape {tuple(loss.shape)}"
                    assert bool(loss.isfinite()), f"the loss is {loss.item()}"
                    assert not self.distance or loss.item() >= 0, f"the loss is {loss.item()}, which is no distance"

    def test_the_loss_is_least_where_student_and_teacher_agree(self) -> None:
        """It is 0 there where it is a distance, and larger for each of three other students."""
        self._need_teacher()
        if not self.agrees:
            raise SkipTest("what it learns beside the student knows nothing yet")
        with self._distilling(seed=TEACHER) as distilling:
            distilling.distiller.start()
            same = distilling.mean_loss()
        for seed in range(3):
            with self._distilling(seed=seed) as distilling:
                distilling.distiller.start()
                other = distilling.mean_loss()
            assert other > same, (
                f"the loss of another student is {other:.3g}, and that of the teacher itself {same:.3g}"
            )
            if self.distance:
                share = same / other
                assert share <= self.tolerance, f"the loss of the teacher itself is {share:.2g} of another student's"

    def test_the_loss_falls(self) -> None:
        """Twenty steps that descend it, and nothing else, bring it down."""
        with self._distilling("loop", alone=True) as distilling:
            distilling.distiller.start()
            before = distilling.mean_loss()
            run_loop(distilling, range(20))
            after = distilling.mean_loss()
        assert after <= self.falls * before, f"the loss went from {before:.3g} to {after:.3g} in 20 steps"

    # Gradients

    def test_gradients_reach_the_student_and_not_the_teacher(self) -> None:
        """Parameters before what is looked at get gradients that are finite; the teacher's get none."""
        with self._distilling() as distilling:
            distilling.distiller.start()
            distilling.loss(distilling.training.batches[0]).backward()
            gradients = [own.grad for own in distilling.model.parameters() if own.grad is not None]
            assert any(bool(own.any()) for own in gradients), "no gradient reaches the student"
            assert all(bool(own.isfinite().all()) for own in gradients), "gradients are not finite"
            taught = [name for name, own in distilling.teacher.named_parameters() if own.grad is not None]
            assert not taught, f"gradients reach the teacher: {', '.join(taught)}"

    def test_gradients_are_those_of_the_loss(self) -> None:
        """Along the gradient the loss changes by the gradient's length: central differences, in double precision."""
        if not self.exact:
            raise SkipTest("it holds parts of its loss fixed")
        with self._distilling(prepare=nn.Module.double) as distilling:
            distilling.distiller.start()
            distilling.model.eval()
            batch = distilling.training.batches[0]
            distilling.loss(batch).backward()
            parameters = [own for own in distilling.model.parameters() if own.grad is not None]
            gradients = [own.grad.clone() for own in parameters if own.grad is not None]
            length = torch.stack([own.square().sum() for own in gradients]).sum().sqrt()
            step, losses = 1e-6, list[float]()
            with torch.no_grad():
                for sign in (1, -2):  # there, and to the other side
                    for own, gradient in zip(parameters, gradients, strict=True):
                        own.add_(gradient / length, alpha=sign * step)
                    losses.append(distilling.loss(batch).item())
            slope = (losses[0] - losses[1]) / (2 * step)
        error = abs(slope - length.item()) / length.item()
        assert error < 1e-3, f"the loss changes by {slope:.4g}, and the gradient says {length.item():.4g}"

    # The teacher

    def test_the_teacher_is_left_as_it_is(self) -> None:
        """It is asked in eval mode and without gradients; values, modes and hooks are as before after training."""
        self._need_teacher()
        with self._distilling() as distilling:
            teacher = distilling.teacher.train()
            teacher.get_submodule("left_norm").eval()
            asked: list[tuple[bool, bool]] = []
            before, hooks = values_of(teacher), hooks_of(teacher)
            modes = [own.training for own in teacher.modules()]

            def look(*_: object) -> None:
                asked.append((any(own.training for own in teacher.modules()), torch.is_grad_enabled()))

            with _hooked(teacher, look):
                distilling.distiller.compress(max_steps=self.steps)
            assert asked, "the teacher was never asked"
            assert not any(training for training, _ in asked), "the teacher was asked in train mode"
            assert not any(recorded for _, recorded in asked), "the teacher was asked with gradients"
            assert_equal(before, values_of(teacher), "in the teacher")
            assert [own.training for own in teacher.modules()] == modes, "modules of the teacher are in another mode"
            assert_nothing_left(teacher, hooks)

    def test_a_cached_teacher_teaches_the_same(self) -> None:
        """With its values kept beside the loader's batches it is asked once a sample, and the student is the same."""
        self._need_teacher()
        found: list[dict[str, Tensor]] = []
        for cached in (False, True):
            with self._distilling("loop") as distilling:
                if not isinstance(distilling.distiller, LayerwiseDistiller):
                    raise SkipTest("its teacher's values are not cached")
                found.append(_trained_by_loader(distilling, distilling.distiller, cached=cached))
        differing = [name for name, of in found[0].items() if not torch.allclose(of, found[1][name], atol=1e-5)]
        assert not differing, f"not the same with a cached teacher: {', '.join(differing)}"

    def test_a_teacher_that_is_none_is_refused(self) -> None:
        """Without one, or with the student itself: an error, and the model is not wrapped."""
        self._need_teacher()
        model = ToyNetwork()
        for what, teacher in (("no teacher", None), ("the student as its teacher", model)):
            with suppress(ConfigError):
                self.distiller(model, self._config(), None, teacher).unwrap_model()
                raise AssertionError(f"{what} was taken")
            assert not is_wrapped(model), f"the model is wrapped after {what} was refused"

    # The same each time, and everywhere

    def test_the_same_seed_gives_the_same_student(self) -> None:
        """Two runs give weights, and what is learned beside them, that are equal bit by bit."""
        found: list[dict[str, Tensor]] = []
        for _ in range(2):
            with self._distilling() as distilling:
                distilling.distiller.compress(max_steps=self.steps)
                found.append(distilling.result())
        assert_equal(found[0], found[1], "in a second run")

    def test_two_processes_agree(self) -> None:
        """Two processes that see different halves of the data come to the same weights."""
        if reason := why_not_two():
            raise SkipTest(reason)

        def on_half(rank: int) -> dict[str, Tensor]:
            return by_both_ways(
                lambda way: self._distilling(way, rank=rank),
                lambda distilling: distilling.distiller.compress(max_steps=self.steps),
                run_loop,
                self.steps,
            )

        assert_equal(*in_two_processes(on_half), "in the other process")

    # Nobody's property

    def test_unwrapping_gives_the_model_back(self) -> None:
        """Hooks are gone, and what was learned beside the student is not in it; without training all is as before."""
        with self._distilling() as distilling:
            model, distiller = distilling.model, distilling.distiller
            distiller.unwrap_model()
            before, hooks, config = values_of(model), hooks_of(model), self._config()
            distiller.wrap_model()
            distiller.start()
            model.eval()
            distilling.loss(distilling.training.batches[0])
            distiller.unwrap_model()
            assert_equal(before, values_of(model), "after unwrap_model")
            distiller.wrap_model()
            distiller.compress(max_steps=self.steps)
            distiller.unwrap_model()
            assert_nothing_left(model, hooks)
            others = sorted(before.keys() ^ values_of(model).keys())
            assert not others, f"the student holds other tensors than before: {', '.join(others)}"
            assert config == self._config(), f"the caller's config list became {config}"

    def test_a_copy_is_a_model_of_its_own(self) -> None:
        """A deep copy of the wrapped model, in the middle of training, computes the same."""
        with self._distilling("loop") as distilling:
            distilling.distiller.start()
            distilling.training.step(distilling.distiller, 0)
            distilling.model(distilling.training.batches[0][0])
            copied, outputs = copy.deepcopy(distilling.model), outputs_of(distilling.model, FRESH)
            distilling.distiller.unwrap_model()
            assert_same_outputs(copied, FRESH, outputs, 0, "outputs of a copy")

    # Crashes

    def test_an_interrupted_run_goes_on(self) -> None:
        """A loop that ends after some of its steps and goes on in new objects comes to the same bits.

        New objects load what ``torch.save`` wrote, with ``weights_only=True``; also what was written after the end.
        """
        crashes = sorted({1, 2, self.steps // 2, self.steps - 1})
        assert_goes_on(lambda seed: self._distilling("loop", seed=seed), run_loop, self.steps, crashes, at_end=True)

    # With others

    def test_it_sees_what_is_rounded_and_masked(self) -> None:
        """One training run serves a pruner and a quantizer too, and what they leave is seen, whoever was made first."""
        for first in (True, False):
            with self._fused(first=first) as (distilling, masks):
                seen: list[dict[str, Tensor]] = []
                with patch.object(distilling.distiller, "observed", _kept(distilling.distiller.observed, seen)):
                    distilling.distiller.compress(max_steps=self.steps)
                values = values_of(distilling.model)
                assert all(bool(of.isfinite().all()) for of in values.values()), "parameters are not finite any more"
                runs = [len(run) for run in distilling.training.runs]
                assert runs == [self.steps], f"they ran for {runs} steps; {self.steps} were asked for"
                assert len(seen) == self.steps, f"the distiller saw {len(seen)} of {self.steps} steps"
                for name, value in seen[-1].items():
                    module, _, target = name.rpartition(".")
                    mask = masks[module][target].expand_as(value)
                    assert not bool(value[~mask].any()), f"{name} is seen before it is masked"
                    steps = value[mask] * 8 - 0.5
                    assert torch.equal(steps, steps.round()), f"{name} is seen before it is rounded"

    def test_a_target_is_distilled_once(self) -> None:
        """A second distiller of the same target is refused by name, and the first goes on."""
        with self._distilling() as distilling:
            first = distilling.distiller
            refused = ""
            try:
                self.distiller(distilling.model, self._config(), None, distilling.teacher, previous=first)
            except ConflictError as error:
                refused = error.where
            names = sorted(target.name for target in first.plan.targets)
            assert refused, "ConflictError was not raised for a second distiller of the same targets"
            assert refused in names, f"the error names {refused!r}, which is none of {', '.join(names)}"
            assert first.chain == (first,), f"{len(first.chain)} compressors are fused"
            first.compress(max_steps=1)

    # Half precision

    def test_half_precision(self) -> None:
        """A model in bfloat16 stays one, and losses and gradients are finite."""
        with self._distilling("loop", prepare=nn.Module.bfloat16) as distilling:
            run_loop(distilling, range(2))
            types = {own.dtype for own in distilling.model.parameters()}
            assert types == {torch.bfloat16}, f"parameters are of {sorted(map(str, types))}"
            values = values_of(distilling.model).values()
            assert all(bool(of.isfinite().all()) for of in values), "parameters are not finite"
            assert bool(distilling.loss(distilling.training.batches[0]).isfinite()), "the loss is not finite"

    def _need_teacher(self) -> None:
        if not self.has_teacher:
            raise SkipTest("it has no teacher")


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """A forward hook for a while."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _kept(observed: Callable[[], dict[str, Tensor]], seen: list[dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """The same function, whose results are kept."""

    def watched() -> dict[str, Tensor]:
        seen.append(observed())
        return seen[-1]

    return watched


def _trained_by_loader(distilling: Distilling, distiller: LayerwiseDistiller, *, cached: bool) -> dict[str, Tensor]:
    """Two passes over a data loader, in a loop of one's own; how often the teacher is asked is checked."""
    training, rows = distilling.training, list[int]()
    images, classes = (torch.cat(part) for part in zip(*training.batches, strict=True))
    loader = DataLoader(TensorDataset(images, classes), batch_size=len(training.batches[0][0]))
    batches = distiller.cached(loader) if cached else loader
    distiller.start()
    distilling.model.train()
    with _hooked(distilling.teacher, lambda _module, args, _output: rows.append(len(args[0]))):
        for _ in range(2):
            for batch in batches:
                training.optimizer.zero_grad()
                plain = batch.batch if isinstance(batch, Distilled) else batch
                loss = training.training_step(plain, distilling.model)
                distiller.loss(loss, batch).backward()
                distiller.before_step()
                training.optimizer.step()
                distiller.step()
    distiller.finish()
    asked = len(images) if cached else 2 * len(images)
    assert sum(rows) == asked, f"the teacher was asked for {sum(rows)} samples; {asked} were to be"
    return distilling.result()
