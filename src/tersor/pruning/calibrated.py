"""The base of one-shot pruners that see the inputs of each layer on calibration data, one stage after another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import Granularity, PruningSpec
from tersor.config.parse import ConfigList
from tersor.errors import ConflictError, EmptyLayerError, InvalidValueError
from tersor.pruning.base import Pruner
from tersor.pruning.decision import RatioNow, as_asked
from tersor.targets.planned import ELEMENTS, PlannedTarget
from tersor.training import Evaluator
from tersor.training.layer_inputs import unfold_inputs, weight_rows
from tersor.training.ranks import of_first_process
from tersor.training.stages import stages


class Statistics(Protocol):
    """What is gathered of a layer's inputs."""

    def add(self, x: Tensor, /) -> None:
        """Take in a batch, shape (groups, samples, columns)."""
        ...


class CalibratedPruner(Pruner):
    """Base of pruners that remove single weights by what their layer's inputs are.

    The model is run stage by stage (:mod:`tersor.training.stages`): a layer is pruned by the inputs that the already
    pruned layers before it give, and no more is in memory than one stage's inputs and statistics.

    Args:
        model: the model; it is wrapped in place.
        config_list: weights of linear layers and convolutions with ``sparse_ratio`` or ``sparse_pattern``.
        evaluator: only needed when ``compress`` is to fine-tune.
        calibration: batches like those of training, whose targets are not looked at; some hundred samples.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: a target that is no weight of such a layer, or that is to be ranked together with others.
        InvalidValueError: no calibration data.
    """

    default_granularity: Granularity = ELEMENTS

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
        self.calibration = check_calibration(calibration)
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    @abstractmethod
    def statistics(self, groups: int, columns: int) -> Statistics:
        """An empty gatherer for a layer whose weight is as many matrices of so many columns."""

    @abstractmethod
    def choose(self, target: PlannedTarget, seen: Any, ratio_now: RatioNow) -> Tensor:
        """Which blocks of one target live, as the grid or flat; the latent weight may be changed on the way.

        Args:
            target: the weight.
            seen: what :meth:`statistics` gave, by now full.
            ratio_now: see :func:`tersor.pruning.decision.decide`.
        """

    def prune(self, ratio_now: RatioNow = as_asked) -> None:
        """Stage by stage: gather, choose, mask.

        Where that fails, the masks are those from before; weights that an algorithm has adjusted by then stay so.

        Args:
            ratio_now: what each ratio of the config list is at this point of a schedule.
        """
        self.refuse_nothing()
        targets = {target.config.module_name: target for target in self._scored()}
        keep: dict[str, Tensor] = {}
        for target in targets.values():
            self._refuse_emptying(target, ratio_now)
        with torch.no_grad(), self._masks_kept_on_error():
            for stage in stages(self.model, self.calibration, list(targets)):
                seen = {name: self._gatherer(targets[name]) for name in stage.modules}
                stage.run(
                    lambda name, inputs, seen=seen: seen[name].add(
                        unfold_inputs(targets[name].config.module, inputs[0])
                    )
                )
                for name in stage.modules:
                    target = targets[name]
                    assert target.blocks is not None
                    lives = of_first_process(self.choose(target, seen.pop(name), ratio_now)).view(target.blocks.grid)
                    self.wrappers.mask(*target.place).set([target.blocks.expand_compact(lives)], lives.device)
                    keep[target.name] = lives
            self.apply_decision(keep)

    def _gatherer(self, target: PlannedTarget) -> Statistics:
        groups, _, columns = weight_rows(target.config.module, self._latent(target)).shape
        return self.statistics(groups, columns)

    def _refuse_emptying(self, target: PlannedTarget, ratio_now: RatioNow) -> None:
        spec = target.config.spec
        if isinstance(spec, PruningSpec) and spec.ratio is not None and ratio_now(spec.ratio, target) >= 1:
            raise EmptyLayerError(
                f"sparse_ratio {spec.ratio:g} would remove all of it",
                where=target.name,
                remedy="Lower sparse_ratio.",
            )

    def _wrap_targets(self) -> None:
        for target in self._scored():
            spec = target.config.spec
            assert isinstance(spec, PruningSpec)
            where = f"{target.config.where} on {target.name}"
            if target.config.target_name != "weight":
                raise ConflictError(
                    f"{type(self).__name__} prunes weights by the inputs that they multiply",
                    where=where,
                    remedy="Make the weight of a linear layer or a convolution the target.",
                )
            if target.classes is not None or spec.global_group_id or spec.dependency_group_id:
                raise ConflictError(
                    f"{type(self).__name__} prunes one layer after another, so nothing can be ranked over several",
                    where=where,
                    remedy="Leave out groups and whole channels; OBSPruner prunes channels by their inputs.",
                )
            weight_rows(target.config.module, self._latent(target))  # refuses what is no such layer
        super()._wrap_targets()


def check_calibration(calibration: Iterable[Any] | None) -> list[Any]:
    """Calibration batches as a list.

    Raises:
        InvalidValueError: it is no iterable, or empty.
    """
    try:
        batches = [] if calibration is None else list(calibration)
    except TypeError:
        batches = []
    if not batches:
        raise InvalidValueError(
            "there is no calibration batch",
            where="calibration",
            legal=("a data loader", "a list of batches"),
            remedy="Give some hundred samples of the data that the model is used on.",
        )
    return batches
