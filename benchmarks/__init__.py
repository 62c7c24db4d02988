"""Time and memory of dive_fast beside its peers: `pytest benchmarks/ --benchmark-only` (README.md in this folder)."""
