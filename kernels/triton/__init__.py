"""Triton kernels: GPU implementations of the ops whose contracts stand in ``headrace.kernels``."""
