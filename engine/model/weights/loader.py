"""Load a checkpoint's tensors: everything is checked against the configuration before a byte is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.engine.config import ModelConfig
from headrace.engine.model.weights.errors import CheckpointError
from headrace.engine.model.weights.files import list_tensors
from headrace.engine.model.weights.header import DTYPES, Entry
from headrace.engine.model.weights.names import Place, memory_shapes, places

PREFIXES = ("backbone.", "model.")
UNPREFIXED = ("lm_head.", "mtp.")


@dataclass(frozen=True, slots=True)
class _Source:
    """A file's tensor and where it goes."""

    file: Path
    entry: Entry
    place: Place


def load_weights(
    path: str | Path, config: ModelConfig, *, device: torch.device | str = "cpu", progress: bool = False
) -> dict[str, Tensor]:
    """Name (as ``names.memory_shapes`` lists it) -> tensor in the dtype of the file.

    Stacked experts take the widest dtype among them. Nothing may be missing and nothing left over. Raises
    CheckpointError naming the file and the tensor. Bytes are copied: the files may be deleted afterwards.
    """
    sources = _match(Path(path), config)
    dtypes: dict[str, torch.dtype] = {}
    for source in sources:
        dtype = DTYPES[source.entry.dtype]
        dtypes[source.place.name] = torch.promote_types(dtypes.get(source.place.name, dtype), dtype)
    weights = {
        name: torch.empty(shape, dtype=dtypes[name], device=device) for name, shape in memory_shapes(config).items()
    }
    with _bar(sum(source.entry.num_bytes for source in sources), progress) as bar:
        for source, tensor in _stream(sources):
            target = weights[source.place.name]
            (target if source.place.row is None else target[source.place.row]).copy_(tensor)
            bar.advance(bar.task_ids[0], source.entry.num_bytes)
    return weights


def _match(folder: Path, config: ModelConfig) -> list[_Source]:
    """Every tensor of the files with its place, in the order of the files' bytes."""
    expected = places(config)
    found: dict[str, _Source] = {}
    unexpected = []
    for file, entries in list_tensors(folder).items():
        for entry in entries:
            name = _without_prefix(entry.name)
            if name is None or name not in expected:
                unexpected.append(entry.name)
                continue
            if name in found:
                raise CheckpointError(
                    f"{file}: tensor {entry.name!r} is also in {found[name].file} as {found[name].entry.name!r}"
                )
            if entry.shape != expected[name].shape:
                raise CheckpointError(
                    f"{file}: tensor {entry.name!r} has shape {list(entry.shape)}, "
                    f"config.json asks for {list(expected[name].shape)}"
                )
            found[name] = _Source(file, entry, expected[name])
    missing = [name for name in expected if name not in found]
    faults = [f"missing {_some(missing)}, which config.json asks for"] if missing else []
    faults += [f"left over {_some(unexpected)}, for which config.json has no place"] if unexpected else []
    if faults:
        raise CheckpointError(f"{folder}: {'; '.join(faults)}")
    return list(found.values())


def _without_prefix(name: str) -> str | None:
    if name.startswith(UNPREFIXED):
        return name
    for prefix in PREFIXES:
        rest = name.removeprefix(prefix)
        if rest != name:
            return None if rest.startswith(UNPREFIXED) else rest
    return None


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _stream(sources: list[_Source]) -> Iterator[tuple[_Source, Tensor]]:
    by_file: dict[Path, list[_Source]] = {}
    for source in sources:
        by_file.setdefault(source.file, []).append(source)
    for file, group in by_file.items():
        try:
            with safe_open(file, framework="pt") as reader:
                for source in group:
                    yield source, reader.get_tensor(source.entry.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {error}") from error


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Progress]:
    columns = TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        bar.add_task("", total=total)
        yield bar
