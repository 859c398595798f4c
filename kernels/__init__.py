"""Triton kernels and their launchers, one module per op; installed as `dcvit.kernels`."""
