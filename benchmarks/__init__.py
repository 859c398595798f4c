"""Benchmarks: `python -m benchmarks kernels | compress | recovery | gpu-static`."""
