"""The header of a safetensors file, read and checked without touching the tensors' bytes.

The file: 8 bytes header length (little endian), the header (JSON: name -> dtype, shape, data_offsets), then the data,
which the tensors cover without gap or overlap. The safetensors library checks the same when it opens a file; this
reader exists so that shapes and dtypes of all shards are known before the first byte is loaded, and so that each kind
of damage has a message of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.engine.model.weights.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

FLOATS = ("F32", "BF16", "F16")
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
"""What weights and their scales are stored as; a safetensors file may name others."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str  # as the header spells it
    shape: tuple[int, ...]
    start: int  # bytes into the data
    end: int
    data: int  # bytes of the file before the data

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> list[Entry]:
    """The file's tensors in the order of their bytes. Raises CheckpointError."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes do not hold a header of {length} bytes")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: header of {length} bytes is too long, the limit is {MAX_HEADER_BYTES}")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    entries = sorted(_entries(file, raw, 8 + length), key=lambda entry: (entry.start, entry.end))
    _check_cover(file, entries, size - 8 - length)
    return entries


def _entries(file: Path, raw: bytes, data: int) -> list[Entry]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = ""
            for name, _ in pairs:
                twice = name if name in seen else twice
                seen.add(name)
            raise CheckpointError(f"{file}: header names {twice!r} twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is not an object of strings")
    return [_entry(file, name, value, data) for name, value in header.items() if name != "__metadata__"]


def _entry(file: Path, name: str, value: Any, data: int) -> Entry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not [start, end]")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {expected} bytes, data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1], data)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(file: Path, entries: list[Entry], data_bytes: int) -> None:
    end = 0
    for entry in entries:
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {entry.name!r} at byte {entry.start} {kind}, which ends at {end}")
        end = entry.end
    if end > data_bytes:
        raise CheckpointError(f"{file}: truncated: the tensors need {end} bytes, the file holds {data_bytes}")
    if end < data_bytes:
        raise CheckpointError(f"{file}: {data_bytes - end} bytes after the last tensor")
