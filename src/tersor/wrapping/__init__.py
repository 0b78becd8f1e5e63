"""How compression is simulated in forward: one wrapper a module, an ordered stack of transforms a target."""

from tersor.wrapping.stack import Mask as Mask
from tersor.wrapping.stack import Stage as Stage
from tersor.wrapping.stack import TargetStack as TargetStack
from tersor.wrapping.stack import Transform as Transform
from tersor.wrapping.wrapper import Wrapper as Wrapper
from tersor.wrapping.wrappers import ModelWrappers as ModelWrappers
from tersor.wrapping.wrappers import is_wrapped as is_wrapped
