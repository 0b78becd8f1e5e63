"""Conformance suites for extensions: subclass one in your own tests, and pytest runs it."""

from tersor.testing.distiller import DistillerTestCase as DistillerTestCase
from tersor.testing.propagation import PropagationRuleTestCase as PropagationRuleTestCase
from tersor.testing.pruner import PrunerTestCase as PrunerTestCase
from tersor.testing.quantizer import QuantizerTestCase as QuantizerTestCase
