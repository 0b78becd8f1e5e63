"""Optimal brain surgeon for channels: what the next layers can make up for leaves, and they do make up for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.errors import ConfigError, ConflictError
from tersor.graph.coupling import Coupling
from tersor.pruning.base import Pruner
from tersor.pruning.calibrated import check_calibration
from tersor.pruning.decision import RatioNow, as_asked
from tersor.pruning.reconstruction import bias_shift, greedy_removal, reconstruct
from tersor.pruning.scores import block_norm
from tersor.targets.choices import Choices, choices
from tersor.targets.granularity import Blocks
from tersor.training import Evaluator
from tersor.training.layer_inputs import SecondMoment, from_rows, unfold_inputs, weight_rows
from tersor.training.ranks import sum_over_processes
from tersor.training.stages import stages


@final
class OBSPruner(Pruner):
    r"""Removes the channels, heads or units that the layers reading them can do without, and adjusts those layers.

    A layer reads channels S' of its input x; its output's squared error, when the weights of the other channels are
    fitted anew by least squares, is what a channel is worth. Channels are taken away one at a time, always the one of
    least cost, so that of two that carry the same only one is free. A choice costs the sum over all layers that read
    it, each relative to the energy of its output, accumulated over those that leave before it: it can be compared
    across layers. Once the masks are decided, every reader's weights become the least squares fit
    :math:`\operatorname{argmin}_{W'} E \lVert W x - W' x_{S} \rVert^2`, and its bias, where it has one, keeps the mean.

    The statistics are those of the model as it is, all layers' at once: memory for the squared number of input features
    of each reader. Give more samples than these. ``unwrap_model`` gives back the adjusted weights.

    Papers: Hassibi, Stork: Second Order Derivatives for Network Pruning: Optimal Brain Surgeon (NIPS 1992); for
    structures Kurtic, Frantar, Alistarh: ZipLM (NeurIPS 2023); for least squares after channel pruning He, Zhang, Sun:
    Channel Pruning for Accelerating Very Deep Neural Networks (ICCV 2017).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio``, cut by output channels.
        evaluator: only needed when ``compress`` is to fine-tune.
        calibration: batches like those of training, whose targets are not looked at.
        damping: share of the mean diagonal that is added to second moments before they are inverted.
        example_inputs: see :class:`tersor.compressor.Compressor`; without them no reader is known.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConfigError: no example inputs.
        ConflictError: a target whose channels no linear layer or plain convolution reads.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        damping: float = 0.01,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self.calibration, self.damping = check_calibration(calibration), damping
        self._moments: dict[str, SecondMoment] = {}
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def prune(self, ratio_now: RatioNow = as_asked) -> None:
        """Gather the moments, decide, and fit the readers; where that fails, all is as it was before."""
        self.refuse_nothing()
        readers = {name: self.wrappers[name].module for name in self._readers}
        with torch.no_grad(), self._masks_kept_on_error(), ExitStack() as forgotten:
            self._moments = {name: self._empty_moment(name) for name in readers}
            forgotten.callback(self._moments.clear)
            for stage in stages(self.model, self.calibration, list(readers)) if readers else ():
                stage.run(lambda name, inputs: self._moments[name].add(unfold_inputs(readers[name], inputs[0])))
            for name, moment in self._moments.items():
                self._moments[name] = SecondMoment(*map(sum_over_processes, moment.tensors()))
            super().prune(ratio_now)
            removed = self._coupling.removed(self._merged())
            fitted = [pair for name in readers for pair in self._fitted(name, ~removed[self._columns(name)])]
            for latent, value in fitted:
                latent.copy_(value)

    def importance(self) -> dict[str, Tensor]:
        """Each block's score is its choice's cost."""
        scores = dict(super().importance())
        for parts in choices(self.plan.targets):
            worth = self._costs(parts)
            for part in parts:
                own = scores[str(part)]
                blocks = np.arange(part.count)[:, None] if part.blocks is None else part.blocks
                own.view(-1)[torch.from_numpy(blocks).to(own.device)] = worth[:, None].to(own)
        return scores

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The norm, for blocks that can leave by no choice."""
        return block_norm(values, blocks, p=2)

    def _costs(self, parts: Choices) -> Tensor:
        """The cost of each of a set of interchangeable choices, over all that read them."""
        choice_of_class = np.full(len(self._coupling.classes), -1)
        for part in parts:
            assert part.target.classes is not None
            classes = part.target.classes if part.blocks is None else part.target.classes[part.blocks]
            choice_of_class[classes] = np.arange(part.count).reshape(-1, *[1] * (classes.ndim - 1))
        costs = torch.zeros(parts[0].count, dtype=torch.float64)
        read = False
        for name, moment in self._moments.items():
            choice = choice_of_class[self._columns(name)]
            if (choice < 0).all():
                continue
            read = True
            rows = weight_rows(self.wrappers[name].module, self._weight(name))[0].double()
            matrix = _moment(moment, self._has_bias(name))
            present, numbered = np.unique(choice[choice >= 0], return_inverse=True)
            group = np.full(len(choice), -1)
            group[choice >= 0] = numbered
            columns = torch.from_numpy(np.repeat(group, rows.shape[1] // len(group)))
            order, cost = greedy_removal(
                rows.cpu(), matrix.cpu(), columns, len(present), damping=self.damping, where=name
            )
            energy = ((rows.cpu() @ matrix.cpu()) * rows.cpu()).sum().clamp(min=torch.finfo(torch.float64).tiny)
            costs[torch.from_numpy(present)[order]] += cost.cumsum(0) / energy
        if not read:
            raise ConflictError(
                "no linear layer or plain convolution reads what would leave",
                where=", ".join(map(str, parts)),
                remedy="Leave it out, or prune it with GroupNormPruner.",
            )
        return costs

    def _fitted(self, name: str, keep: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and bias of one reader, each with its least squares fit on the columns that stay."""
        if keep.all():
            return
        module, weight, moment = self.wrappers[name].module, self._weight(name), self._moments[name]
        rows = weight_rows(module, weight)
        columns = torch.from_numpy(np.repeat(keep, rows.shape[2] // len(keep))).to(weight.device)
        has_bias = self._has_bias(name)
        matrix = _moment(moment, has_bias).to(weight.device)
        fitted = reconstruct(rows[0], matrix, columns, damping=self.damping, where=name)
        if has_bias:
            bias = self.wrappers[name].tensor("bias")
            yield bias, bias + bias_shift(rows[0], fitted, moment.x_mean[0].to(weight.device)).to(bias)
        yield weight, from_rows(module, fitted.unsqueeze(0))

    @property
    def _coupling(self) -> Coupling:
        coupling = self.plan.coupling
        assert coupling is not None
        return coupling

    @property
    def _readers(self) -> list[str]:
        """The modules that read channels of targets by a weight that least squares can fit."""
        inside = np.zeros(len(self._coupling.classes), dtype=bool)
        for target in self._scored():
            if target.classes is not None:
                inside[target.classes] = True
        found: list[str] = []
        for name, module in self.model.named_modules():
            plain = (
                isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and getattr(module, "groups", 1) == 1
            )
            columns = self._coupling.axis(f"{name}.weight" if name else "weight", 1) if plain else None
            if columns is not None and inside[self._coupling.classes[columns.span]].any():
                found.append(name)
        return found

    def _columns(self, name: str) -> np.ndarray:
        """The class of each input channel of a reader."""
        axis = self._coupling.axis(f"{name}.weight" if name else "weight", 1)
        assert axis is not None
        return self._coupling.classes[axis.span]

    def _empty_moment(self, name: str) -> SecondMoment:
        groups, _, columns = weight_rows(self.wrappers[name].module, self._weight(name)).shape
        return SecondMoment.zeros(groups, columns, dtype=torch.float64)

    def _weight(self, name: str) -> Tensor:
        return self.wrappers[name].tensor("weight").detach()

    def _has_bias(self, name: str) -> bool:
        return getattr(self.wrappers[name].module, "bias", None) is not None

    def _wrap_targets(self) -> None:
        if self.plan.coupling is None:
            raise ConfigError(
                "what reads a channel is only known from a run of the model",
                where="example_inputs",
                remedy="Give a small real batch.",
            )
        super()._wrap_targets()


def _moment(moment: SecondMoment, has_bias: bool) -> Tensor:
    """What least squares minimises over: with a bias, deviations from the mean."""
    return (moment.covariance if has_bias else moment.matrix)[0]
