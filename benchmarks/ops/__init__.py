"""One file for each op, which pytest runs; `python -m benchmarks kernels` prints what they find."""
