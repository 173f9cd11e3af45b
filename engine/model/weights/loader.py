"""A checkpoint's tensors, read when they are asked for; all is checked against the configuration before a byte is."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from headrace.engine.config import ModelConfig
from headrace.engine.model.weights.errors import CheckpointError
from headrace.engine.model.weights.files import list_tensors
from headrace.engine.model.weights.header import DTYPES, Entry
from headrace.engine.model.weights.names import Place, memory_shapes, places

PREFIXES = ("backbone.", "model.")
UNPREFIXED = ("lm_head.", "mtp.")

MAPPED = 1 << 20
"""Bytes from which on a tensor is mapped, not read; a smaller one would keep a page of a file that may go."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A file's tensor and where it goes."""

    file: Path
    entry: Entry
    place: Place


class Experts:
    """The experts of one layer, each read when it is asked for: like a stacked tensor, in the widest dtype of them."""

    def __init__(self, reader: _Reader, sources: list[_Source]) -> None:
        self._reader, self._sources = reader, sources
        self.dtype = torch.float32
        dtypes = {DTYPES[source.entry.dtype] for source in sources}
        if len(dtypes) == 1:
            [self.dtype] = dtypes  # different ones meet in fp32

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, expert: int) -> Tensor:
        return self._reader.read(self._sources[expert]).to(self.dtype)


class FileWeights(Mapping[str, Any]):
    """Name (as ``names.memory_shapes`` lists it) -> tensor in the dtype of the file, or ``Experts``.

    Nothing is kept: what is asked for twice is read twice. Reading raises CheckpointError naming file and tensor.
    """

    def __init__(self, sources: dict[str, list[_Source]], reader: _Reader) -> None:
        self._sources, self._reader = sources, reader

    def __getitem__(self, name: str) -> Tensor | Experts:
        sources = self._sources[name]
        if sources[0].place.row is None:
            return self._reader.read(sources[0])
        return Experts(self._reader, sources)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


@contextmanager
def open_weights(
    path: str | Path, config: ModelConfig, *, device: torch.device | str = "cpu", progress: bool = False
) -> Iterator[FileWeights]:
    """A checkpoint's tensors, readable inside the context; progress: a bar on stderr of the bytes read so far.

    Nothing may be missing and nothing left over. Raises CheckpointError naming the file and the tensor.
    """
    found = _match(Path(path), config)
    by_name: dict[str, list[_Source]] = {name: [] for name in memory_shapes(config)}
    for name in places(config):
        by_name[found[name].place.name].append(found[name])
    with _bar(sum(source.entry.num_bytes for source in found.values()), progress) as bar, ExitStack() as files:
        yield FileWeights(by_name, _Reader(files, torch.device(device), bar))


class _Reader:
    """Open files, and the bar."""

    def __init__(self, stack: ExitStack, device: torch.device, bar: Progress) -> None:
        self._stack, self._device, self._bar = stack, device, bar
        self._files: dict[Path, FileIO] = {}

    def read(self, source: _Source) -> Tensor:
        """The tensor on the device. A large one on a CPU is a view of the file: its pages are read when they are
        touched, and are the system's to drop and read again."""
        file, entry = source.file, source.entry
        start, end = entry.data + entry.start, entry.data + entry.end
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(file.open("rb", buffering=0))
            stream = self._files[file]
            if os.fstat(stream.fileno()).st_size < end:  # touching what is not there would end the process
                raise CheckpointError(f"{file}: ends inside tensor {entry.name!r}")
            if entry.num_bytes >= MAPPED:
                first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
                # A private copy on write: torch has no read-only tensors.
                view = mmap.mmap(stream.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
                if hasattr(mmap, "MADV_WILLNEED"):
                    view.madvise(mmap.MADV_WILLNEED)
                data = torch.frombuffer(view, dtype=torch.uint8, offset=start - first)
            else:
                stream.seek(start)
                data = torch.frombuffer(bytearray(stream.read(entry.num_bytes)), dtype=torch.uint8)
        except OSError as error:
            raise CheckpointError(f"{file}: tensor {entry.name!r}: {error.strerror or error}") from error
        self._bar.advance(self._bar.task_ids[0], entry.num_bytes)
        return data.view(DTYPES[entry.dtype]).view(entry.shape).to(self._device)


def _match(folder: Path, config: ModelConfig) -> dict[str, _Source]:
    """Name (as ``names.places`` lists it) -> the file's tensor."""
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
    return found


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


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Progress]:
    columns = TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        bar.add_task("", total=total)
        yield bar
