"""Checkpoints: safetensors files, sharded or not, streamed tensor by tensor into the names the model is built from."""

from headrace.engine.model.weights.errors import CheckpointError
from headrace.engine.model.weights.loader import load_weights

__all__ = ["CheckpointError", "load_weights"]
