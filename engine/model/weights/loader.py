"""A checkpoint's tensors, read when they are asked for; all is checked against the configuration before a byte is."""

from __future__ import annotations

import math
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
from headrace.engine.model.weights.names import KV_SCALES, Part, Place, places
from headrace.kernels.formats import Fp8, NotANumber, Nvfp4, Weight

PREFIXES = ("backbone.", "model.")
UNPREFIXED = ("lm_head.", "mtp.")

SCALES: tuple[Part, ...] = "weight_scale", "weight_scale_2"

MAPPED = 1 << 20
"""Bytes from which on a tensor is mapped, not read; a smaller one would keep a page of a file that may go."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file's tensor and where it goes."""

    file: Path
    entry: Entry
    place: Place

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.entry.name!r}"


_Parts = dict[Part, Source]
"""The tensors of one weight."""


class Experts:
    """The experts of one layer, each read when it is asked for: like a stacked weight, floats in the widest dtype."""

    def __init__(self, reader: _Reader, experts: list[_Parts]) -> None:
        self._reader, self._experts = reader, experts
        self.format = experts[0]["weight"].place.format
        self.dtype = torch.float32
        dtypes = {DTYPES[parts["weight"].entry.dtype] for parts in experts}
        if len(dtypes) == 1:
            [self.dtype] = dtypes  # different ones meet in fp32

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, expert: int) -> Weight:
        weight = self._reader.weight(self._experts[expert])
        return weight.to(self.dtype) if isinstance(weight, Tensor) else weight


class FileWeights(Mapping[str, Any]):
    """Name (as ``names.memory_shapes`` lists it, and KV scales) -> weight as the file has it, or ``Experts``.

    Nothing is kept: what is asked for twice is read twice. Reading raises CheckpointError naming file and tensor.
    """

    def __init__(self, weights: dict[str, list[_Parts]], reader: _Reader) -> None:
        self._weights, self._reader = weights, reader

    def __getitem__(self, name: str) -> Weight | Experts:
        weights = self._weights[name]
        if weights[0]["weight"].place.row is None:
            return self._reader.weight(weights[0])
        return Experts(self._reader, weights)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@contextmanager
def open_weights(
    path: str | Path, config: ModelConfig, *, device: torch.device | str = "cpu", progress: bool = False
) -> Iterator[FileWeights]:
    """A checkpoint's tensors, readable inside the context; progress: a bar on stderr of the bytes read so far.

    Nothing may be missing and nothing left over. Raises CheckpointError naming the file and the tensor, also for NaN
    that kernels find inside the context.
    """
    weights: dict[str, list[_Parts]] = {}
    total = 0
    for source in match_tensors(Path(path), config):
        if source.place.part == "input_scale":
            continue  # checked, and never read: activations stay as they are
        if source.place.part == "weight":
            weights.setdefault(source.place.name, []).append({})
        weights[source.place.name][-1][source.place.part] = source
        total += source.entry.num_bytes
    with _bar(total, progress) as bar, ExitStack() as files:
        try:
            yield FileWeights(weights, _Reader(files, torch.device(device), bar))
        except NotANumber as error:
            raise CheckpointError(str(error)) from error


class _Reader:
    """Open files, and the bar."""

    def __init__(self, stack: ExitStack, device: torch.device, bar: Progress) -> None:
        self._stack, self._device, self._bar = stack, device, bar
        self._files: dict[Path, FileIO] = {}

    def weight(self, parts: _Parts) -> Weight:
        """Of all its tensors, as it is stored."""
        tensors = {part: self.read(source) for part, source in parts.items()}
        values, form = tensors["weight"], parts["weight"].place.format
        if form == "float":
            return values
        if form == "fp8":
            return Fp8(values, tensors["weight_scale"], str(parts["weight"]))
        # What may hold NaN are the block scales.
        return Nvfp4(values, tensors["weight_scale"], tensors["weight_scale_2"], str(parts["weight_scale"]))

    def read(self, source: Source) -> Tensor:
        """The tensor on the device; a weight's scale is checked. A large one on a CPU is a view of the file: its pages
        are read when they are touched, and are the system's to drop and read again."""
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
            raise CheckpointError(f"{source}: {error.strerror or error}") from error
        self._bar.advance(self._bar.task_ids[0], entry.num_bytes)
        tensor = data.view(DTYPES[entry.dtype]).view(entry.shape)
        # 0 is what a weight of zeros may have.
        if source.place.part in SCALES and entry.shape == () and not 0 <= float(tensor) < math.inf:
            raise CheckpointError(f"{source} must be a finite number >= 0, got {float(tensor)}")
        return tensor.to(self._device)


def match_tensors(folder: Path, config: ModelConfig) -> list[Source]:
    """The files' tensors in the order of ``names.places``; headers are read, no tensor is.

    Raises CheckpointError for what is missing, left over, or not as the configuration asks for it.
    """
    expected = places(config)
    found: dict[str, Source] = {}
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
            place = expected[name]
            if entry.shape != place.shape:
                raise CheckpointError(
                    f"{file}: tensor {entry.name!r} has shape {list(entry.shape)}, "
                    f"config.json asks for {list(place.shape)}"
                )
            if entry.dtype not in place.dtypes:
                raise CheckpointError(
                    f"{file}: tensor {entry.name!r} has dtype {entry.dtype}; what config.json says of its quantisation "
                    f"({place.format}) asks for {' or '.join(place.dtypes)}"
                )
            found[name] = Source(file, entry, place)
    missing = [name for name, place in expected.items() if name not in found and not place.optional]
    # Without any, all are 1; a layer without its own would be read wrong.
    scales = [name for name in expected if name.endswith(KV_SCALES)]
    if any(name in found for name in scales):
        missing += [name for name in scales if name not in found]
    faults = [f"missing {_some(missing)}, which config.json asks for"] if missing else []
    faults += [f"left over {_some(unexpected)}, for which config.json has no place"] if unexpected else []
    if faults:
        raise CheckpointError(f"{folder}: {'; '.join(faults)}")
    return [found[name] for name in expected if name in found]


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
