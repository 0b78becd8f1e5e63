"""Which tensors of a model are compressed, and how each of them is."""

from tersor.targets.resolve import Resolution as Resolution
from tersor.targets.resolve import TargetConfig as TargetConfig
from tersor.targets.resolve import resolve_targets as resolve_targets
from tersor.targets.selection import select_modules as select_modules
from tersor.targets.settings import DistillationSetting as DistillationSetting
from tersor.targets.settings import PruningSetting as PruningSetting
from tersor.targets.settings import QuantizationSetting as QuantizationSetting
