"""Measurements behind the figures in the documents; ``python -m benchmarks.run NAME`` writes ``results/NAME.json``."""
