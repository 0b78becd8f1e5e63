"""The shipped conformance suite, on every distiller of ours."""

import torch._dynamo  # noqa: F401 - slow to import, which is no test's fault

from tersor import distillation
from tersor.testing import DistillerTestCase as Suite


class TestDynamicLayerwise(Suite):
    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return distillation.DynamicLayerwiseDistiller(model, config_list, evaluator, teacher, **kwargs)


class TestDynamicLayerwiseOfSeveralLinksAndInputs(TestDynamicLayerwise):
    modules = ("right", "stem")
    setting = {"link": ["right", "stem"]}


class TestDynamicLayerwiseOfInputs(TestDynamicLayerwise):
    targets = ("_input_0",)


class TestAdaptive1d(Suite):
    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return distillation.Adaptive1dLayerwiseDistiller(model, config_list, evaluator, teacher, **kwargs)


class TestAdaptive1dOfAnotherWidth(TestAdaptive1d):
    agrees = False
    modules = ("left",)
    setting = {"link": ["right"]}


class TestLogit(Suite):
    modules = ("head",)

    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return distillation.LogitDistiller(model, config_list, evaluator, teacher, **kwargs)


class TestLogitBySquares(TestLogit):
    setting = {"apply_method": "mse"}


class TestAttentionTransfer(Suite):
    modules = ("stem", "left")

    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return distillation.AttentionTransferDistiller(model, config_list, evaluator, teacher, **kwargs)


class TestRelational(Suite):
    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return distillation.RelationalDistiller(model, config_list, evaluator, teacher, **kwargs)


class TestCoFi(Suite):
    modules = ("stem", "right")
    setting = {"link": ["stem", "right"]}

    def distiller(self, model, config_list, evaluator, teacher, **kwargs):
        return distillation.CoFiDistiller(model, config_list, evaluator, teacher, **kwargs)
