"""Pruners, one file an algorithm; scores and sparsity allocation are pure functions."""

from tersor.pruning.base import Pruner as Pruner
from tersor.pruning.fpgm import FPGMPruner as FPGMPruner
from tersor.pruning.level import LevelPruner as LevelPruner
from tersor.pruning.norm import L1NormPruner as L1NormPruner
from tersor.pruning.norm import L2NormPruner as L2NormPruner
from tersor.pruning.random import RandomPruner as RandomPruner
from tersor.pruning.sparsity import Sparsity as Sparsity
