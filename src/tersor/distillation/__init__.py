"""Distillers: a trained teacher shows the student what its layers, or its answers, should be."""

from tersor.distillation.adaptive import Adaptive1dLayerwiseDistiller as Adaptive1dLayerwiseDistiller
from tersor.distillation.attention import AttentionTransferDistiller as AttentionTransferDistiller
from tersor.distillation.base import Distiller as Distiller
from tersor.distillation.base import Observer as Observer
from tersor.distillation.cofi import CoFiDistiller as CoFiDistiller
from tersor.distillation.content import content_of as content_of
from tersor.distillation.dynamic import DynamicLayerwiseDistiller as DynamicLayerwiseDistiller
from tersor.distillation.layerwise import LayerwiseDistiller as LayerwiseDistiller
from tersor.distillation.logit import LogitDistiller as LogitDistiller
from tersor.distillation.offline import CachedLoader as CachedLoader
from tersor.distillation.offline import cached_loader as cached_loader
from tersor.distillation.relational import RelationalDistiller as RelationalDistiller
from tersor.distillation.teacher_cache import TeacherCache as TeacherCache
from tersor.training.batches import Distilled as Distilled
