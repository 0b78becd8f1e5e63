"""Group norm pruning: a channel is worth the norm of everything that leaves with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import values
from tersor.config.parse import ConfigList
from tersor.errors import ConfigError, InvalidValueError
from tersor.graph.coupling import Coupling
from tersor.pruning.base import Pruner
from tersor.pruning.scores import block_norm
from tersor.targets.choices import Choices, Part, choices
from tersor.targets.granularity import Blocks
from tersor.training import Evaluator


@final
class GroupNormPruner(Pruner):
    r"""Removes the choices of least norm, taken over all parameters that leave with them.

    .. math:: s_c = \Big(\sum_{w \in c} |w|^p\Big)^{1/p}, \qquad \hat s_c = \frac{s_c}{\frac1N \sum_{c'=1}^N s_{c'}}

    A choice :math:`c` is a channel, a head or a unit with its coupling group: the rows of all weights that write it,
    the columns of all that read it, and the scales and shifts that are carried along. Statistics of norms are not
    counted. An element that lies in a row and in a column of one choice counts once: it leaves once. What is compared
    by its ratio to the :math:`N` interchangeable choices can be ranked against other layers, which
    ``global_group_id`` does.

    Prefer it to :class:`L2NormPruner` where many layers hang together (residual streams, heads): a channel that one
    weight hardly writes and another reads loudly stays. Blocks that are no whole slices (single elements, 4 x 4) take
    nothing along, and are worth their own norm; so are those of inputs and outputs. The paper also trains with a
    penalty on these groups; here they are only scored.

    Paper: Fang, Ma, Song, Mi, Wang: DepGraph: Towards Any Structural Pruning (CVPR 2023).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio`` (or ``sparse_threshold``, on the score).
        evaluator: only needed when ``compress`` is to fine-tune.
        p: order of the norm, from 1.
        normalize: ``"mean"`` divides by the mean of the interchangeable choices; None leaves the norm.
        example_inputs: see :class:`tersor.compressor.Compressor`; without them no group is known.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConfigError: neither example inputs nor an evaluator's ``dummy_input`` are given.
        InvalidValueError: a norm or normalization that does not exist.

    Example:
        The first unit is written with the greater weight, and read with none.

        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[2.0], [1.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[0.0, 9.0]]))
        >>> config_list = [{"op_names": ["0"], "sparse_ratio": 0.5}]
        >>> pruner = GroupNormPruner(net, config_list, example_inputs=torch.zeros(1, 1))
        >>> pruner.compress()[1]["0"]["weight"].flatten()
        tensor([False,  True])
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        p: float = 2.0,
        normalize: Literal["mean"] | None = "mean",
        *,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("p"):
            self.p = values.number(p, kind="order of a norm", low=1)
        if normalize not in ("mean", None):
            raise InvalidValueError(f"{normalize!r} is not known here.", where="normalize", legal=["'mean'", None])
        self.normalize = normalize
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def importance(self) -> dict[str, Tensor]:
        """The score of each block is its choice's; a block that is in none, and so stays, has its own norm."""
        scores = dict(super().importance())
        for parts in choices(self.plan.targets):
            worth = self._norms(parts, scores)
            if self.normalize == "mean" and bool(worth.any()):
                worth = worth / worth.mean()
            for part in parts:
                own, blocks = scores[str(part)], _blocks(part)
                own.view(-1)[torch.from_numpy(blocks).to(own.device)] = worth[: len(blocks), None].to(own)
        return scores

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The norm of each block by itself."""
        return block_norm(values, blocks, self.p)

    def _norms(self, parts: Choices, scores: Mapping[str, Tensor]) -> Tensor:
        """The norm of each of a set of interchangeable choices; blocks that are no slices have theirs already."""
        coupling = self.plan.coupling
        assert coupling is not None
        choice_of_class = np.full(len(coupling.classes), -1)
        members: list[tuple[Tensor, Mapping[int, Tensor]]] = []
        for part in parts:
            blocks, classes, norms = _blocks(part), part.target.classes, scores[str(part)].flatten()
            number = np.arange(len(blocks))
            if classes is not None:
                choice_of_class[classes[blocks]] = number[:, None, None]
            else:
                choice_of_block = torch.full(norms.shape, -1, device="cpu")
                choice_of_block[torch.from_numpy(blocks)] = torch.from_numpy(number)[:, None]
                members.append((norms, {0: choice_of_block}))
        members += [(self._parameter(name), along) for name, along in _slices(coupling, choice_of_class).items()]
        return group_norms(members, max(part.count for part in parts), self.p)

    def _parameter(self, name: str) -> Tensor:
        module, _, target = name.rpartition(".")
        return self.wrappers[module].tensor(target).detach()

    def _wrap_targets(self) -> None:
        if self.plan.coupling is None:
            raise ConfigError(
                "what leaves with a channel is only known from a run of the model",
                where="example_inputs",
                remedy="Give a small real batch, or take L2NormPruner, which looks at each target by itself.",
            )
        super()._wrap_targets()


@torch.no_grad()
def group_norms(members: Iterable[tuple[Tensor, Mapping[int, Tensor]]], count: int, p: float) -> Tensor:
    """The p-norm of groups of slices of tensors.

    Args:
        members: tensors, each with the group of every index along some of its dimensions, shape ``(size,)``; -1 is
            none. An element belongs to the groups of all its indices, and to each of them once.
        count: the number of groups.
        p: order of the norm, from 1.

    Returns:
        one norm for each group, shape ``(count,)``, float64 on the CPU.

    Example:
        Row 0 and column 1 are group 0; the 2, in both, counts once.

        >>> weight = torch.tensor([[3.0, 2.0], [9.0, 6.0]])
        >>> group_norms([(weight, {0: torch.tensor([0, -1]), 1: torch.tensor([-1, 0])})], 1, p=1)
        tensor([11.], dtype=torch.float64)
    """
    powers = torch.zeros(count, dtype=torch.float64, device="cpu")
    for tensor, groups_along in members:
        values = tensor.unsqueeze(-1)  # a vector, too, then has a dimension to reduce
        wide = torch.promote_types(tensor.dtype, torch.float32)
        counted: list[Tensor] = []
        for dim, groups in groups_along.items():
            others = [other for other in range(values.dim()) if other != dim]
            along = groups.to(tensor.device).view([1 if other in others else -1 for other in range(values.dim())])
            inside = (groups >= 0).nonzero().view(-1)
            chosen, own = (each.index_select(dim, inside.to(tensor.device)) for each in (values, along))
            for earlier in counted:
                if torch.isin(own, earlier).any():
                    chosen = chosen.masked_fill(own == earlier, 0)
            norms = torch.linalg.vector_norm(chosen, ord=p, dim=others, dtype=wide)
            powers.index_add_(0, groups[inside], norms.cpu().double() ** p)
            counted.append(along)
    return powers ** (1 / p)


def _slices(coupling: Coupling, choice_of: np.ndarray) -> dict[str, dict[int, Tensor]]:
    """For each parameter that holds a choice: dimension to the choice of each index, -1 for none."""
    of_label = choice_of[coupling.classes]
    slices: dict[str, dict[int, Tensor]] = {}
    for axis in coupling.axes:
        own = of_label[axis.span]
        if axis.is_parameter and (own >= 0).any():
            slices.setdefault(axis.name, {})[axis.dim] = torch.from_numpy(own)
    return slices


def _blocks(part: Part) -> np.ndarray:
    """The blocks of each choice, shape (choices, blocks of one), also where each block is a choice."""
    return np.arange(part.count)[:, None] if part.blocks is None else part.blocks
