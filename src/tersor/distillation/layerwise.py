"""The base of distillers with a teacher: student targets, the teacher's that they are linked to, the sum of losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tersor.compressor import Compressor
from tersor.config import DistillationSpec
from tersor.config.parse import ConfigList
from tersor.config.values import number
from tersor.distillation import losses
from tersor.distillation.base import Distiller
from tersor.distillation.content import content_of
from tersor.distillation.offline import CachedLoader, cached_loader
from tersor.distillation.teacher import Teacher, TeacherPredict, linked_place, qualified
from tersor.errors import InvalidValueError, TrainingError
from tersor.targets.resolve import TargetConfig
from tersor.training import Evaluator
from tersor.training.batches import Distilled


@dataclass(frozen=True)
class Link:
    """One target of the student and what it is compared with.

    Attributes:
        name: ``module.target`` of the student.
        module: the student's module.
        weight: of its loss.
        method: ``mse`` or ``kl``.
        teachers: ``module.target`` of the teacher's candidates.
    """

    name: str
    module: nn.Module
    weight: float
    method: str
    teachers: tuple[str, ...]


class LayerwiseDistiller(Distiller):
    r"""Base of distillers that draw the student's targets towards a teacher's.

    A new one says in :meth:`link_loss` how far one value is from the teacher's.

    The loss is :math:`\lambda_0 L + \sum_i \lambda_i d(s_i, t_i)`: the user's, and for each target its distance,
    weighted with its ``lambda``. Distances are computed in float32 at the least.

    Args:
        model: the student; it is wrapped in place.
        config_list: targets (inputs and outputs of modules) with the keys ``lambda`` (1), ``link`` (``auto``: the
            teacher's module of the same name; or names of its modules, or ``module._output_key`` where the target has
            another name there) and ``apply_method`` (``mse`` or ``kl``).
        evaluator: how the student is trained.
        teacher_model: the trained teacher; it is left as it is.
        teacher_predict: ``teacher_predict(batch, teacher)`` runs it; by default it gets the inputs of the batch.
        origin_loss_lambda: the weight of the user's loss.
        temperature: of ``kl``.
        teacher_training: leave the teacher in the mode that it is in; else it runs in eval mode.
        teacher_compiled: run the teacher by ``torch.compile``; True, or the name of a backend.
        example_inputs: as for all compressors.
        previous: see :meth:`tersor.Compressor.from_compressor`.

    Raises:
        InvalidValueError: no teacher, or the teacher is the student itself.
        UnmatchedError: the teacher lacks a module that a target is linked to.

    Attributes:
        teacher: see :class:`tersor.distillation.teacher.Teacher`; distillers of one teacher that are fused share it.
        links: the student's targets and what they are compared with.
        losses: of the last forward pass, by the name of the target, before they are weighted.
        methods: what ``apply_method`` may be; the first stands for all that the method is not asked for.
    """

    methods: ClassVar[tuple[str, ...]] = ("mse", "kl")

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        teacher_model: nn.Module | None = None,
        teacher_predict: TeacherPredict | None = None,
        origin_loss_lambda: float = 1.0,
        *,
        temperature: float = 2.0,
        teacher_training: bool = False,
        teacher_compiled: bool | str = False,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self.origin_loss_lambda = number(origin_loss_lambda, kind="weight of a loss", low=0)
        self.temperature = number(temperature, kind="temperature", low=0)
        self.losses: dict[str, Tensor] = {}
        self.teacher = self._teacher(
            model, teacher_model, teacher_predict, teacher_training, teacher_compiled, previous
        )
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def _wrap_targets(self) -> None:
        self.links = tuple(self.link_of(planned.config) for planned in self.plan.targets)
        super()._wrap_targets()

    @staticmethod
    def _teacher(
        model: nn.Module,
        teacher: nn.Module | None,
        predict: TeacherPredict | None,
        training: bool,
        compiled: bool | str,
        previous: Compressor | None,
    ) -> Teacher:
        """The teacher; the one of a fused distiller, where it is the same."""
        if not isinstance(teacher, nn.Module):
            raise InvalidValueError(
                f"a {type(teacher).__name__} is no teacher", where="teacher_model", legal=["a module"]
            )
        if teacher is model:
            raise InvalidValueError(
                "the teacher is the student itself",
                where="teacher_model",
                remedy="Give a copy from before compression: copy.deepcopy(model).",
            )
        for other in previous.chain if previous else ():
            if isinstance(other, LayerwiseDistiller) and other.teacher.model is teacher:
                same = (predict is None or other.teacher.predict is predict, other.teacher.training == training)
                if all(same):
                    return other.teacher
        return Teacher(teacher, predict, training=training, compiled=compiled)

    def link_of(self, config: TargetConfig) -> Link:
        """What one target is compared with.

        Raises:
            InvalidValueError: a distance that this distiller does not know.
            UnmatchedError: the teacher lacks the module.
        """
        spec = config.spec
        assert isinstance(spec, DistillationSpec)
        method = spec.apply_method or self.methods[0]
        if method not in self.methods:
            raise InvalidValueError(
                f"{type(self).__name__} knows no {method!r}",
                where=f"{config.where}['apply_method']",
                legal=self.methods,
            )
        names = (config.module_name,) if spec.link in (None, "auto") else spec.link
        places = [linked_place(name, config.target_name) for name in names or ()]
        self.teacher.watch(places, f"{config.where}['link'] of {qualified(config.module_name, config.target_name)}")
        return Link(
            qualified(config.module_name, config.target_name),
            config.module,
            1.0 if spec.lambda_ is None else spec.lambda_,
            method,
            tuple(qualified(*place) for place in places),
        )

    @abstractmethod
    def link_loss(self, link: Link, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """How far a target of the student is from the teacher's.

        Args:
            link: which.
            student: its value.
            teachers: the values of the candidates, in the order of ``link.teachers``, on the same device.

        Returns:
            one number, not weighted yet.
        """

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The weighted sum of the user's loss and the distances."""
        return self.origin_loss_lambda * loss + self.distillation_loss(self.observed(), batch)

    def distillation_loss(self, observed: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The weighted sum of the distances of all targets that this forward pass reached."""
        shown = self.teacher_values(batch)
        found: dict[str, tuple[float, Tensor]] = {}
        for link in self.reached(observed):
            student = wide(observed[link.name])
            found[link.name] = link.weight, self.link_loss(link, student, self.candidates(link, student, shown))
        return self.total(found)

    def reached(self, observed: Mapping[str, Tensor]) -> list[Link]:
        """The targets that this forward pass reached.

        Raises:
            TrainingError: it reached none.
        """
        reached = [link for link in self.links if link.name in observed]
        if not reached:
            raise TrainingError(
                "the forward pass reached none of the student's targets",
                where=type(self).__name__,
                remedy="training_step must call the model that it is given, and return the loss of that call.",
            )
        return reached

    def candidates(self, link: Link, student: Tensor, shown: Mapping[str, Tensor]) -> list[Tensor]:
        """The teacher's values for a target, where the student's is."""
        lacking = [name for name in link.teachers if name not in shown]
        if lacking:
            raise TrainingError(
                f"the teacher's forward pass did not reach {lacking[0]}, or it is no tensor",
                where=link.name,
                remedy="See what teacher_predict runs, or link to another module.",
            )
        return [wide(shown[name].to(student.device)) for name in link.teachers]

    def total(self, found: Mapping[str, tuple[float, Tensor]]) -> Tensor:
        """The sum of losses with their weights; the losses are kept in ``losses``."""
        self.losses = {name: loss.detach() for name, (_, loss) in found.items()}
        return torch.stack([weight * loss for weight, loss in found.values()]).sum()

    def compare(self, link: Link, student: Tensor, teacher: Tensor) -> Tensor:
        """``mse`` or ``kl`` of two values of one shape.

        Raises:
            TrainingError: the shapes differ.
        """
        if student.shape != teacher.shape:
            raise TrainingError(
                f"the student's value has shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}",
                where=f"{link.name} linked to {', '.join(link.teachers)}",
                remedy="Link to another module; or take Adaptive1dLayerwiseDistiller, which learns a projection.",
            )
        return losses.mse(student, teacher) if link.method == "mse" else losses.kl(student, teacher, self.temperature)

    def teacher_values(self, batch: Any) -> Mapping[str, Tensor]:
        """What the teacher shows on a batch, from the cache where the batch brings it along."""
        return batch.teacher if isinstance(batch, Distilled) else self.teacher.values(batch, self)

    def cached(self, loader: DataLoader[Any], **options: Any) -> CachedLoader:
        """The same data loader, with the teacher's values beside each batch, so that it runs once for each sample.

        Args:
            loader: what the student is trained on; give the evaluator what comes back.
            **options: of :func:`tersor.distillation.cached_loader`; with a ``directory`` the teacher is named by its
                weights, unless a ``fingerprint`` does.
        """
        if options.get("directory") is not None and options.get("fingerprint") is None:
            options["fingerprint"] = content_of(self.teacher.model.state_dict())
        return cached_loader(loader, self.teacher.compute, **options)

    def own_status(self) -> dict[str, float | Tensor]:
        """The sum of its losses of the last forward pass, not weighted."""
        return {"distilled": torch.stack(list(self.losses.values())).sum()} if self.losses else {}

    def on_stop(self) -> None:
        """The last batch is let go of."""
        self.teacher.forget()


def nearest(distances: Sequence[Tensor]) -> Tensor:
    """The least of some numbers, with its gradient."""
    return torch.stack(list(distances)).min()


def wide(value: Tensor) -> Tensor:
    """A value in float32 at the least."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
