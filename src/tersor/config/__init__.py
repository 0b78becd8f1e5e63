"""What the user asks for: config lists in, frozen and validated entries out."""

from tersor.config.dtypes import FloatDtype as FloatDtype
from tersor.config.dtypes import IntDtype as IntDtype
from tersor.config.dtypes import QuantDtype as QuantDtype
from tersor.config.dtypes import parse_dtype as parse_dtype
from tersor.config.entry import Entry as Entry
from tersor.config.files import read_config_file as read_config_file
from tersor.config.parse import ConfigList as ConfigList
from tersor.config.parse import parse_config_list as parse_config_list
from tersor.config.specs import Align as Align
from tersor.config.specs import DistillationSpec as DistillationSpec
from tersor.config.specs import Granularity as Granularity
from tersor.config.specs import Mode as Mode
from tersor.config.specs import PruningSpec as PruningSpec
from tersor.config.specs import QuantizationSpec as QuantizationSpec
from tersor.config.specs import TargetSpec as TargetSpec
