"""Is a propagation rule or a replacer right? A suite that shrinks the user's own module and looks at what comes out."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tersor.graph import Coupling, Masks, fresh_inputs, groups
from tersor.graph.inputs import batch_size, copied, named_tensors, run, tensors_of
from tersor.speedup import ModelSpeedup, SpeedupReport
from tersor.speedup.slicing import bake
from tersor.speedup.verify import outputs_of, relative_error


@dataclass(frozen=True)
class Shrunk:
    """One module before and after.

    Attributes:
        full: the module as it was.
        small: what the speedup made of it.
        coupling: what the propagation found.
        masks: what was asked for.
        report: what the speedup did.
        inputs: fresh inputs at another batch size.
    """

    full: nn.Module
    small: nn.Module
    coupling: Coupling
    masks: Masks
    report: SpeedupReport
    inputs: Any

    @cached_property
    def masked(self) -> nn.Module:
        """The full module with the completed masks as values."""
        masked = copy.deepcopy(self.full)
        bake(named_tensors(masked), self.coupling.complete(self.masks))
        return masked


class PropagationRuleTestCase(ABC):
    """What must hold for a module that users can prune; subclass it for each of your own.

    Half of the choices of every free coupling group leave, at random and once for each seed, with all norms, biases
    and other constant parameters randomised first. A rule that joins too little, a replacer that forgets a size, a
    ``forward`` that counts on a number: each fails a test here.

    Attributes:
        seeds: of the module's values and of what leaves.
        share: how much of each group leaves.
        tolerance: the largest difference of an output, relative to the largest output.

    Example, in a file that pytest collects::

        class Turn(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.turn = nn.Parameter(torch.randn(channels, 2, 2))

            def forward(self, x):
                return torch.linalg.matrix_exp(self.turn) @ x

        @tersor.graph.propagate(Turn)
        def turn(call):
            channels = call.labels("x").get(1)
            call.join(channels, call.labels("turn").get(0), "is turned")
            return {} if channels is None else {1: channels}

        class TestTurn(PropagationRuleTestCase):
            def module(self):
                return nn.Sequential(nn.Conv2d(3, 8, 1), Turn(8), nn.Conv2d(8, 4, 1))

            def inputs(self):
                return torch.randn(2, 3, 2, 6)
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 0.5
    tolerance: float = 1e-5

    @abstractmethod
    def module(self) -> nn.Module:
        """The module under test, inside a small model with something to prune before and after it."""

    @abstractmethod
    def inputs(self) -> Any:
        """A batch of at least two: a tensor, a tuple of arguments or a mapping of keyword arguments."""

    def speedup(self, model: nn.Module, coupling: Coupling, masks: Masks) -> ModelSpeedup:
        """How the model is shrunk; override it to give options, replacers for example."""
        return ModelSpeedup(model, coupling, masks)

    def cases(self) -> Iterator[Shrunk]:
        """The module before and after, once for each seed."""
        return (self._shrink(seed) for seed in self.seeds)

    def _shrink(self, seed: int) -> Shrunk:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sizes stand in the code of forward")
            torch.manual_seed(seed)
            model, inputs = self.module(), self.inputs()
            _randomize(model)
            for number, module in enumerate(model.modules()):
                module.training = number % 2 == seed % 2
            full, coupling = copy.deepcopy(model), groups(model, inputs)
            masks = coupling.random_masks(self.share, seed)
            speedup = self.speedup(model, coupling, masks)
            small = speedup.speedup_model()
        assert speedup.report is not None
        fresh = fresh_inputs(inputs, batch_size(inputs) + 1, seed=seed)
        return Shrunk(full, small, coupling, masks, speedup.report, fresh)

    def test_something_is_removed(self) -> None:
        """Parameters are fewer afterwards."""
        for case in self.cases():
            before, after = _count(case.full), _count(case.small)
            unknown = ", ".join(case.coupling.unknown) or "none"
            assert after < before, f"all {before} are still there; without a rule: {unknown}\n{case.coupling}"

    def test_small_equals_masked(self) -> None:
        """The small module computes what the masked one does, at another batch size."""
        for case in self.cases():
            error = relative_error(outputs_of(case.small, case.inputs), outputs_of(case.masked, case.inputs))
            assert error <= self.tolerance, f"outputs differ by {error:.2g} of the largest:\n{case.coupling}"

    def test_what_is_left_alone_has_a_reason(self) -> None:
        """What is left alone or frozen says why."""
        for case in self.cases():
            for left in case.report.left_alone:
                assert left.reason, f"{left.count} of {left.target} are left alone without a reason"
            for group in case.coupling.groups:
                assert group.frozen is None or group.frozen.strip(), f"frozen without a reason:\n{group}"

    def test_gradients_flow(self) -> None:
        """Whatever got a gradient before gets one afterwards, and all of them are finite."""
        for case in self.cases():
            before, after = (_gradients(model, case.inputs) for model in (case.full, case.small))
            lost = [name for name, _ in case.small.named_parameters() if name in before and name not in after]
            assert not lost, f"without a gradient: {', '.join(lost)}"
            for name, gradient in after.items():
                assert bool(gradient.isfinite().all()), f"the gradient of {name} is not finite"

    def test_it_can_be_copied(self) -> None:
        """A deep copy of the small module computes the same and shares no parameter with it."""
        for case in self.cases():
            twin = copy.deepcopy(case.small)
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in case.small.parameters()}
            self._assert_equal(twin, case)

    def test_state_dict_round_trip(self) -> None:
        """The small module's state dict loads into a copy that has other values."""
        for case in self.cases():
            state = {name: value.clone() for name, value in case.small.state_dict().items()}
            twin = copy.deepcopy(case.small)
            with torch.no_grad():
                for tensor in twin.state_dict().values():
                    tensor.zero_()
            twin.load_state_dict(state, strict=True)
            self._assert_equal(twin, case)

    def test_train_flags_are_kept(self) -> None:
        """Each module stays in the mode, train or eval, that it was in."""
        for case in self.cases():
            before = {name: module.training for name, module in case.full.named_modules()}
            wrong = [
                name
                for name, module in case.small.named_modules()
                if before.get(name, module.training) is not module.training
            ]
            assert not wrong, f"in another mode than before: {', '.join(map(repr, wrong))}"

    def _assert_equal(self, twin: nn.Module, case: Shrunk) -> None:
        error = relative_error(outputs_of(twin, case.inputs), outputs_of(case.small, case.inputs))
        assert error <= self.tolerance, f"outputs differ by {error:.2g} of the largest"


def _randomize(model: nn.Module) -> None:
    """Give values to what is constant at first: zeros and ones hide which of them was cut."""
    buffers = (
        tensor for module in model.modules() if isinstance(module, _NormBase) for tensor in module._buffers.values()
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), *buffers):
            if tensor is not None and tensor.is_floating_point() and len(tensor.unique()) == 1:
                tensor += 0.5 * torch.rand_like(tensor)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _gradients(model: nn.Module, inputs: Any) -> Mapping[str, Tensor]:
    """Gradients by parameter name, of a sum over the outputs in eval mode."""
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    outputs = [output for output in tensors_of(run(model, copied(inputs))) if output.requires_grad]
    torch.autograd.backward([output.square().mean() for output in outputs])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
