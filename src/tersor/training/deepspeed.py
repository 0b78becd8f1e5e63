"""Training with DeepSpeed: ZeRO stages 0 to 3."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.extras import require
from tersor.training import zero3
from tersor.training.engine_state import flat_groups, left_whole
from tersor.training.evaluator import NoHooks, TrainingHooks, TrainingResult, check_limits, modes_kept
from tersor.training.function_evaluator import FunctionEvaluator, check_ownership
from tersor.training.functions import described
from tersor.training.steps import CountedSteps
from tersor.wrapping.sharding import is_sliced


@final
class DeepspeedTorchEvaluator(FunctionEvaluator):
    """Trains with the user's own function and a DeepSpeed engine.

    For each training ``deepspeed.initialize`` makes an engine of the model, and the function gets it in the place of
    the model; it calls ``engine.backward(loss)`` and ``engine.step()``. When the training is over the engine is
    destroyed, and the model is an ordinary one again, with parameters of the type that it had, which is float32 from
    the engine's master weights where they were trained in bfloat16.

    A step is one of the engine at the end of its gradient accumulation. Compressors see gradients whole, gathered from
    all processes and averaged, and before DeepSpeed clips them; mind that its ``gradient_clipping`` may not be 0 where
    the config leaves it out. What they change in parameters goes into the engine's master weights.

    Under ZeRO stage 3 each process has a slice of each parameter, whole ones only of the modules that compute; where
    compressors look, before and after a step, all parameters and gradients are whole for that moment. The model that
    is given is whole, and so is the trained one. Refused are fp16, whose gradients are scaled, bf16 without ZeRO, and
    parameters that are offloaded.

    Args:
        training_func: ``training_func(engine, optimizer, training_step, lr_scheduler, max_steps, max_epochs)`` trains.
            It must call the `training_step` with the engine as its model, and keep `max_epochs` itself.
        training_step: ``training_step(batch, model, *args, **kwargs)`` returns the loss tensor, a tuple that begins
            with it, or a dict with it under ``"loss"``.
        deepspeed: DeepSpeed's config, a dict or the path of a JSON file.
        optimizer: an optimizer, a function that makes one of parameters, or None for the one in the config. An
            optimizer has its own parameters and state back afterwards, and goes on with it in the next training.
        lr_scheduler: a scheduler, a function that makes one of an optimizer, or None for the one in the config.
        resume_from_checkpoint_args: arguments of ``engine.load_checkpoint``, with which each training begins.
        dummy_input: inputs that the model can be run on.
        evaluating_func: ``evaluating_func(model)`` gets the model itself; see `TorchEvaluator`.

    Raises:
        MissingExtraError: DeepSpeed is not installed.
        InvalidValueError: a config that is neither a dict nor a JSON file, or an argument of the wrong kind.
        ConflictError: a config with what cannot be compressed under.
        TrainingError: a function does not take the arguments that it will get.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        training_step: Callable[..., Any],
        deepspeed: Mapping[str, Any] | str | Path,
        optimizer: Optimizer | Callable[..., Optimizer] | None = None,
        lr_scheduler: Any = None,
        resume_from_checkpoint_args: Mapping[str, Any] | None = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        require("DeepspeedTorchEvaluator", "tersor[deepspeed]", "deepspeed")
        super().__init__(training_func, training_step, optimizer, lr_scheduler, dummy_input, evaluating_func)
        if optimizer is not None and not isinstance(optimizer, Optimizer) and not callable(optimizer):
            raise InvalidValueError(
                f"{described(optimizer)} is no optimizer.",
                where="optimizer",
                legal=("a torch.optim.Optimizer", "a function of parameters", None),
            )
        self.config = read_config(deepspeed)
        check_config(self.config)
        self.resume_from_checkpoint_args = resume_from_checkpoint_args

    def train(
        self,
        model: nn.Module,
        hooks: TrainingHooks | None = None,
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> TrainingResult:
        """Train `model` in place; see `Evaluator.train`.

        Raises:
            InvalidValueError: a limit is not a positive int.
            TrainingError: there is no process group to train in, the optimizer holds no parameter of this model, a
                training step returned no loss, or the engine's optimizer is of a kind that hides its master weights.
        """
        check_limits(max_steps, max_epochs)
        _check_processes()
        if isinstance(self._optimizers, Optimizer):
            check_ownership(model, self._optimizers)
        begun = perf_counter()
        with modes_kept(model), left_whole(model, self._optimizers) as kept:
            engine, optimizer, scheduler = self._engine(model)
            kept.engine = engine
            _check_engine(engine)
            kept.give_state()
            with CountedSteps(None, NoHooks() if hooks is None else hooks, max_steps) as steps:
                _accompany(engine, steps, seen=hooks is not None)
                step = steps.watch(self._training_step)
                self._training_func(engine, optimizer, step, scheduler, max_steps, max_epochs)
        return TrainingResult(steps.count, None, perf_counter() - begun, steps.stopped)

    def _engine(self, model: nn.Module) -> tuple[Any, Any, Any]:
        import deepspeed

        parameters: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, optimizer, _, scheduler = deepspeed.initialize(
            model=model,
            model_parameters=parameters,
            optimizer=self._optimizers,
            lr_scheduler=self._lr_schedulers,
            config=copy.deepcopy(self.config),
        )
        if self.resume_from_checkpoint_args is not None:
            engine.load_checkpoint(**self.resume_from_checkpoint_args)
        return engine, optimizer, scheduler

    def state_dict(self) -> dict[str, Any]:
        """The state of an optimizer and a scheduler that were given as such; what the config makes is made anew."""
        return {
            name: thing.state_dict()
            for name, thing in (("optimizer", self._optimizers), ("lr_scheduler", self._lr_schedulers))
            if hasattr(thing, "state_dict")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, thing in (("optimizer", self._optimizers), ("lr_scheduler", self._lr_schedulers)):
            if name in state:
                thing.load_state_dict(state[name])


def _check_engine(engine: Any) -> None:
    """Refuse an engine whose master weights and gradients cannot be reached."""
    zero = engine.optimizer
    if not isinstance(zero, Optimizer) and not flat_groups(zero):
        raise TrainingError(
            f"under this config it trains by a {type(zero).__name__}, whose master weights cannot be seen.",
            where="deepspeed",
            remedy="Train in float32, or in bf16 with ZeRO stage 1 to 3 and without grad_accum_dtype.",
        )
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        raise TrainingError(
            "its autocast to float16 scales the loss, and compressors would see scaled gradients.",
            where="deepspeed['torch_autocast']",
            remedy="Let its dtype be bfloat16.",
        )


def _accompany(engine: Any, steps: CountedSteps, *, seen: bool) -> None:
    """Let each step of the engine that changes parameters be counted, and seen by hooks where there are any."""
    own_step = engine.step

    def step(*args: Any, **kwargs: Any) -> Any:
        if not engine.is_gradient_accumulation_boundary():
            return own_step(*args, **kwargs)
        with _gathered(engine.module, seen=seen), _gradients(engine.module, seen=seen):
            steps.before_step()
        result = own_step(*args, **kwargs)
        if engine.was_step_applied():
            with _written_back(engine.module, seen=seen):
                steps.after_step()
        return result

    engine.step = step


@contextmanager
def _gradients(model: nn.Module, *, seen: bool) -> Iterator[None]:
    """Show whole gradients under ``parameter.grad``, where ZeRO keeps none."""
    from deepspeed.utils import safe_get_full_grad

    shown: list[Tensor] = []
    if seen:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                gradient = safe_get_full_grad(parameter)
                parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
                shown.append(parameter)
    try:
        yield
    finally:
        for parameter in shown:
            parameter.grad = None


@contextmanager
def _written_back(model: nn.Module, *, seen: bool) -> Iterator[None]:
    """Take what is written into parameters meanwhile over into the master weights, which would overwrite it."""
    from deepspeed.utils import safe_set_full_fp32_param

    with _gathered(model, seen=seen):
        before = [(parameter, parameter._version) for parameter in model.parameters()]
        yield
        written = [parameter for parameter, version in before if parameter._version != version]
        values = [parameter.detach().clone() for parameter in written]
    for parameter, value in zip(written, values, strict=True):
        if is_sliced(parameter):
            zero3.write(parameter, value)
        else:
            safe_set_full_fp32_param(parameter, value.float())


@contextmanager
def _gathered(model: nn.Module, *, seen: bool) -> Iterator[None]:
    """Show whole parameters where ZeRO leaves no process with them, if anybody looks."""
    with zero3.gathered(model.parameters() if seen else ()):
        yield


def read_config(given: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """DeepSpeed's config as a dict of its own.

    >>> read_config({"train_batch_size": 8})
    {'train_batch_size': 8}

    Raises:
        InvalidValueError: it is neither a dict nor a file with one.
    """
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given))
    if isinstance(given, (str, Path)):
        try:
            read = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidValueError(
                f"no config can be read from it: {error}.", where=f"deepspeed {str(given)!r}"
            ) from None
        if isinstance(read, dict):
            return read
    raise InvalidValueError(
        f"{described(given)} is no config.", where="deepspeed", legal=("a dict", "the path of a JSON file with one")
    )


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config under which masks and scales would not be right.

    >>> check_config({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})

    Raises:
        ConflictError: naming the setting and what to do instead.
    """
    zero = config.get("zero_optimization") or {}
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise ConflictError(
                "what is offloaded cannot be seen by compressors at each step",
                where=f"deepspeed['zero_optimization'][{key!r}]",
                remedy="Leave it out.",
            )
    if (config.get("fp16") or {}).get("enabled", False):
        raise ConflictError(
            "fp16 scales the loss, and compressors would see scaled gradients",
            where="deepspeed['fp16']",
            remedy="Train in bf16: {'bf16': {'enabled': True}}.",
        )
    if config.get("managed_gradient_accumulation", True) is False:
        raise ConflictError(
            "gradients are then complete only within engine.step(), where compressors cannot see them",
            where="deepspeed['managed_gradient_accumulation']",
            remedy="Let the engine manage gradient accumulation.",
        )


def _check_processes() -> None:
    if not dist.is_initialized() and not {"RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        raise TrainingError(
            "there is no process group, and nothing says which process this is.",
            where="DeepspeedTorchEvaluator",
            remedy="Start the script with deepspeed or torchrun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT.",
        )
