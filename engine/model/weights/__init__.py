"""Checkpoints: safetensors files, sharded or not, read tensor by tensor as the model is built from them."""

from headrace.engine.model.weights.errors import CheckpointError
from headrace.engine.model.weights.loader import open_weights

__all__ = ["CheckpointError", "open_weights"]
