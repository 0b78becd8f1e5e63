"""The shipped conformance suite, on every pruner of ours."""

from tersor import pruning
from tersor.testing import PrunerTestCase as Suite


class TestLevel(Suite):
    channels = {"granularity": "out_channel"}

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.LevelPruner(model, config_list, evaluator, **kwargs)


class TestL1Norm(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.L1NormPruner(model, config_list, evaluator, **kwargs)


class TestL2Norm(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.L2NormPruner(model, config_list, evaluator, **kwargs)


class TestFPGM(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.FPGMPruner(model, config_list, evaluator, **kwargs)


class TestRandom(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.RandomPruner(model, config_list, evaluator, seed=1, **kwargs)


class TestTaylor(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.TaylorPruner(model, config_list, evaluator, training_steps=3, **kwargs)


class TestActivationAPoZRank(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.ActivationAPoZRankPruner(model, config_list, evaluator, training_steps=3, **kwargs)


class TestActivationMeanRank(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.ActivationMeanRankPruner(model, config_list, evaluator, training_steps=3, **kwargs)


class TestADMM(Suite):
    learns = True
    channels = {"granularity": "out_channel"}

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.ADMMPruner(model, config_list, evaluator, iterations=2, training_steps=2, rho=0.1, **kwargs)


class TestLinear(Suite):
    trains = True
    schedulable = False

    def pruner(self, model, config_list, evaluator, **kwargs):
        inner = pruning.L1NormPruner(model, config_list, evaluator, **kwargs)
        return pruning.LinearPruner(inner, interval_steps=2, total_times=3)


class TestAGP(Suite):
    trains = True
    schedulable = False

    def pruner(self, model, config_list, evaluator, **kwargs):
        inner = pruning.TaylorPruner(model, config_list, evaluator, training_steps=1, **kwargs)
        return pruning.AGPPruner(inner, interval_steps=2, total_times=3)


class TestLotteryTicket(Suite):
    trains = True
    schedulable = False
    channels = {"granularity": "out_channel"}

    def pruner(self, model, config_list, evaluator, **kwargs):
        inner = pruning.LevelPruner(model, config_list, evaluator, **kwargs)
        return pruning.LotteryTicketPruner(inner, interval_steps=2, total_times=3, rewind_steps=2)


class TestGroupNorm(Suite):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.GroupNormPruner(model, config_list, evaluator, **kwargs)


class TestSlim(Suite):
    learns = True

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.SlimPruner(model, config_list, evaluator, training_steps=3, **kwargs)


class TestSlimOnNorms(TestSlim):
    modules = ("left_norm",)
    joined = ()


class TestMovement(Suite):
    trains = True
    schedulable = False

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.MovementPruner(model, config_list, evaluator, 1, 4, **kwargs)


class TestWanda(Suite):
    channels = None
    groups = False

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.WandaPruner(model, config_list, evaluator, calibration=self.batches, **kwargs)


class TestSparseGPT(Suite):
    learns = True
    channels = None
    groups = False

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.SparseGPTPruner(model, config_list, evaluator, calibration=self.batches, **kwargs)


class TestOBS(Suite):
    learns = True

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruning.OBSPruner(model, config_list, evaluator, calibration=self.batches, **kwargs)
