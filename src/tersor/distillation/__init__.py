"""Distillers, one file an algorithm; losses are pure functions."""

from tersor.distillation.base import Distiller as Distiller
from tersor.distillation.base import Observer as Observer
