"""Benchmarks of the ops, one file for each, which pytest runs; `python -m benchmarks kernels` prints their results."""
