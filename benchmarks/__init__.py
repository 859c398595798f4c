"""Benchmarks: `python -m benchmarks kernels | compress | gpu-static`."""
