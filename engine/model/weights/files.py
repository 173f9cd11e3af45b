"""Which files a checkpoint folder consists of, and which tensors each of them holds."""

from __future__ import annotations

import json
from pathlib import Path

from headrace.engine.model.weights.errors import CheckpointError
from headrace.engine.model.weights.header import Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def list_tensors(folder: Path) -> dict[Path, list[Entry]]:
    """File -> its tensors, in file order. A single file wins over an index, as in transformers.

    Raises CheckpointError if a file is missing or damaged, or if the index and the files disagree.
    """
    if (folder / SINGLE).exists():
        return {folder / SINGLE: read_header(folder / SINGLE)}
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    weight_map = _read_index(index)
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        file = folder / shard
        if not file.is_file():
            raise CheckpointError(f"{index}: shard {shard!r} does not exist")
        tensors[file] = read_header(file)
    _check_index(index, weight_map, tensors)
    return tensors


def has_tensors(folder: Path) -> bool:
    """Whether any weights are there: an index alone names what may not be downloaded yet.

    Raises CheckpointError for a damaged index.
    """
    if (folder / SINGLE).exists():
        return True
    index = folder / INDEX
    return index.exists() and any((folder / shard).is_file() for shard in set(_read_index(index).values()))


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: weight_map is missing") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that names at least one tensor")
    for name, shard in weight_map.items():
        # A shard lies beside its index: anything else could read files that are not the checkpoint's.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0:"):
            raise CheckpointError(
                f"{index}: {name!r} is said to be in {shard!r}, which is not a plain .safetensors file name"
            )
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[Path, list[Entry]]) -> None:
    held = {(file.name, entry.name) for file, entries in tensors.items() for entry in entries}
    named = {(shard, name) for name, shard in weight_map.items()}
    for shard, name in sorted(named - held):
        raise CheckpointError(f"{index}: tensor {name!r} is not in {shard!r}")
    for shard, name in sorted(held - named):
        raise CheckpointError(f"{index}: {shard!r} holds tensor {name!r}, which the index does not place there")
