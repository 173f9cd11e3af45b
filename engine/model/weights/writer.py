"""Writes a checkpoint tensor by tensor: safetensors shards of bounded size and their index."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from headrace.engine.model.weights.files import INDEX, SINGLE

MAX_SHARD_BYTES = 2 << 30
"""Of tensors in a file; also what is held in memory while writing. A larger tensor has a file of its own."""


class Writer:
    """Takes tensors in the order of the files. Without ``finish`` no index is written, and nothing can be loaded.

    Raises OSError naming the file that cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor; it may be overwritten once another one is asked for."""
        if self._held and self._held_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._held[name] = tensor.detach().cpu().contiguous().clone()
        self._held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Name the shards, now that they are counted, and write the index; a single one needs none."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            shard = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        document = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        part = self._part(len(self._shards))
        try:
            save_file(self._held, part, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{part} cannot be written: {error}") from error
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index + 1:05d}.safetensors"
