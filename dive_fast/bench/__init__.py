"""Benchmark results as people read them: tables, plots, comparisons, fits and targets.

The suite that measures lives in `benchmarks/` of a checkout and is no part of the package. Its results files are the
contract between the two; `results.py` says what they hold.
"""
