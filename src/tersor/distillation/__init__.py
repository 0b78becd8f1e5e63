"""Distillers, one file an algorithm; losses are pure functions; what a teacher gives can be kept (`cached_loader`)."""

from tersor.distillation.base import Distiller as Distiller
from tersor.distillation.base import Observer as Observer
from tersor.distillation.content import content_of as content_of
from tersor.distillation.offline import CachedLoader as CachedLoader
from tersor.distillation.offline import cached_loader as cached_loader
from tersor.distillation.teacher_cache import TeacherCache as TeacherCache
from tersor.training.batches import Distilled as Distilled
