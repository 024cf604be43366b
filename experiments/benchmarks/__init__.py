"""Benchmarks: commands that print ratios of alternating runs, with counted floors beside them."""
