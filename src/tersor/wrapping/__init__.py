"""How compression is simulated in forward: one wrapper a module, an ordered stack of transforms a target."""

from tersor.wrapping.sharding import gather_model as gather_model
from tersor.wrapping.sharding import is_sharded as is_sharded
from tersor.wrapping.sharding import refuse_sharded as refuse_sharded
from tersor.wrapping.sharding import whole as whole
from tersor.wrapping.stack import Mask as Mask
from tersor.wrapping.stack import Stage as Stage
from tersor.wrapping.stack import TargetStack as TargetStack
from tersor.wrapping.stack import Transform as Transform
from tersor.wrapping.wrapper import Wrapper as Wrapper
from tersor.wrapping.wrappers import ModelWrappers as ModelWrappers
from tersor.wrapping.wrappers import is_wrapped as is_wrapped
