"""The model: tensors in, tensors out, no policy. ``load_model`` reads a checkpoint, ``NemotronH`` runs it."""

from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.load import load_model
from headrace.engine.model.nemotron_h import NemotronH
from headrace.engine.model.weights import CheckpointError

__all__ = ["Batch", "Caches", "CheckpointError", "NemotronH", "load_model"]
