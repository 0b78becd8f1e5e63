"""Measurements behind every figure in the documentation; ``python -m benchmarks.run NAME`` writes ``results/NAME.json``."""
