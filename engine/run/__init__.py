"""A step plan becomes tensors, a forward and decided tokens. Tensors only, no policy."""
