"""Comparisons of optimizers on real data: `python -m experiments compare --help`."""
