"""What depends on what: tracing, label propagation, coupling groups."""

from tersor.graph.coupling import Coupling as Coupling
from tersor.graph.coupling import Masks as Masks
from tersor.graph.coupling import coupling_of as coupling_of
from tersor.graph.coupling import groups as groups
from tersor.graph.functions import functions_as_modules as functions_as_modules
from tersor.graph.inputs import fresh_inputs as fresh_inputs
from tersor.graph.members import CouplingGroup as CouplingGroup
from tersor.graph.members import Member as Member
from tersor.graph.rules import Call as Call
from tersor.graph.rules import propagate as propagate
from tersor.graph.trace import concrete_trace as concrete_trace
