"""CPU kernels in C++: every op of a step, on threads of the engine's own.

Weights are laid out once, at load, in panels of 32 outputs whose bytes lie in the order in which they are read; the
kernels never see a tensor, only addresses. ``simd.h`` and ``tile.h`` say why all instruction paths, batches and numbers
of threads give the same bits.
"""
