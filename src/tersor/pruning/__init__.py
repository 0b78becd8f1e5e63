"""Pruners, one file an algorithm; scores and sparsity allocation are pure functions."""

from tersor.pruning.activation import ActivationAPoZRankPruner as ActivationAPoZRankPruner
from tersor.pruning.activation import ActivationMeanRankPruner as ActivationMeanRankPruner
from tersor.pruning.admm import ADMMPruner as ADMMPruner
from tersor.pruning.agp import AGPPruner as AGPPruner
from tersor.pruning.base import Pruner as Pruner
from tersor.pruning.fixed import FixedPruner as FixedPruner
from tersor.pruning.fpgm import FPGMPruner as FPGMPruner
from tersor.pruning.group_norm import GroupNormPruner as GroupNormPruner
from tersor.pruning.level import LevelPruner as LevelPruner
from tersor.pruning.linear import LinearPruner as LinearPruner
from tersor.pruning.lottery import LotteryTicketPruner as LotteryTicketPruner
from tersor.pruning.movement import MovementPruner as MovementPruner
from tersor.pruning.norm import L1NormPruner as L1NormPruner
from tersor.pruning.norm import L2NormPruner as L2NormPruner
from tersor.pruning.obs import OBSPruner as OBSPruner
from tersor.pruning.random import RandomPruner as RandomPruner
from tersor.pruning.rounds import Round as Round
from tersor.pruning.slim import SlimPruner as SlimPruner
from tersor.pruning.sparsegpt import SparseGPTPruner as SparseGPTPruner
from tersor.pruning.sparsity import Sparsity as Sparsity
from tersor.pruning.taylor import TaylorPruner as TaylorPruner
from tersor.pruning.wanda import WandaPruner as WandaPruner
from tersor.training.recovery import correct_bias as correct_bias
from tersor.training.recovery import reestimate_batch_norm as reestimate_batch_norm
