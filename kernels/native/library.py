"""The compiled library: which instruction path runs, and calls that cost a microsecond.

A pool is a number of threads on one path. The GIL is released while an op runs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from headrace.kernels import native

PATHS = ("avx512_bf16", "avx512", "avx2", "portable")
"""Instruction paths; each is a library of its own. All but the first give the same bits."""

EXACT_PATHS = PATHS[1:]
"""Best first. avx512_bf16 rounds activations to bf16 before they meet bf16 weights: twice the flops."""


MAX_THREADS = 1024
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class NotBuilt(ImportError):
    """The package was installed where there was no C++ compiler."""


def find(path: str) -> Path | None:
    """A path's library, or None if it was not built. In an editable install it lies beside another copy of us."""
    files = (Path(folder) / f"headrace_{path}.so" for folder in native.__path__)
    return next((file for file in files if file.exists()), None)


@cache
def _library(path: str) -> ctypes.CDLL:
    file = find(path)
    if file is None:
        raise NotBuilt(
            f"the native kernels were not built: headrace_{path}.so is missing. Installing the package where there is "
            "a C++20 compiler builds them"
        )
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise NotBuilt(f"the native kernels cannot be loaded: {error}") from error


def available_paths() -> tuple[str, ...]:
    """The paths that were built and that this machine has the instructions for. Raises NotBuilt."""
    portable = _library("portable")
    return tuple(path for path in PATHS if find(path) and (path == "portable" or portable[f"headrace_has_{path}"]()))


def choose_path(asked: str = "auto") -> str:
    """The path asked for, or the best exact one. Raises NotBuilt, and ValueError for one that does not run here."""
    paths = available_paths()
    if asked == "auto":
        return next(path for path in EXACT_PATHS if path in paths)
    if asked not in paths:
        raise ValueError(f"instructions {asked!r} are not this machine's, which runs {', '.join(paths)}")
    return asked


def available_cores() -> int:
    """Cores that this process may use: of its affinity, and of its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # not Linux, or "max"
        return cores


def prefer_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages below memory that is not touched yet: 1/512 of the page faults, and fewer misses later."""
    if size >= 8 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
        page = mmap.PAGESIZE
        start, end = -(-address // page) * page, (address + size) // page * page
        # A request: a kernel without huge pages refuses it, and nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


class Pool:
    """``threads`` threads, the caller's included, that run one path's kernels; ``path`` as in ``choose_path``.

    Raises NotBuilt, and ValueError for a path that this machine does not run or threads that cannot be had. A child
    process begun by ``fork`` must open a pool of its own.
    """

    def __init__(self, threads: int, path: str = "auto") -> None:
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads must be 1..{MAX_THREADS}, got {threads}")
        self.threads, self.path = threads, choose_path(path)
        self.library = _library(self.path)
        self.library.headrace_open.restype = ctypes.c_void_p
        self.handle = self.library.headrace_open(ctypes.c_int(threads))
        if not self.handle:
            raise ValueError(f"threads: the system does not start {threads}")
        self.ops: dict[str, Callable[[int, bytes], int]] = {}
        self.addresses: dict[str, int] = {}
        self.queue: Queue | None = None
        self._finalizer = weakref.finalize(self, self.library.headrace_close, ctypes.c_void_p(self.handle))
        self._finalizer.atexit = False  # a thread of someone's may be inside an op when the interpreter ends

    def close(self) -> None:
        """End the threads, after the op that runs; later ops raise RuntimeError. May be called twice."""
        self.ops, self.handle = {}, None
        self._finalizer()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ops inside run in one call, at its end: nothing but further ops may read what they write. One thread's.

        The interpreter's lock is given back once and not with every op, so that other threads of a server do not hold
        up each of them. After an exception those that are left do not run.
        """
        if self.queue is not None:
            raise RuntimeError("ops are already being queued")
        queue = self.queue = Queue()
        try:
            yield
        finally:
            self.queue = None
        queue.run(self)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result."""
        return self.keep(empty(*shape, dtype=dtype))

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, an op's input or result, whose memory stays until queued ops have run."""
        if self.queue is not None:
            self.queue.keep(tensor)
        return tensor

    def contiguous(self, tensor: Tensor) -> Tensor:
        """The tensor without gaps, kept. Raises RuntimeError for a copy of what a queued op has yet to write."""
        if tensor.is_contiguous():
            return self.keep(tensor)
        if self.queue is not None:
            raise RuntimeError("a copy is needed where ops are queued: its source may not be written yet")
        return tensor.contiguous()

    def rows(self, x: Tensor) -> int:
        """The address of activations, which are kept. Raises ValueError for what a kernel would misread."""
        if x.dtype is not torch.float32 or not x.is_cpu or x.stride(-1) != 1:
            raise ValueError(
                f"expected float32 on the CPU with contiguous channels, got {x.dtype}, {x.device}, {x.stride()}"
            )
        return self.keep(x).data_ptr()

    def function(self, op: Op) -> Callable[[int, bytes], int]:
        """The library's function for an op, once its layout of arguments is seen to be ours."""
        function = self.ops.get(op.name)
        if function is None:
            if self.handle is None:
                raise RuntimeError(f"{op.name} on a pool that was closed")
            fields = self.library[f"headrace_{op.name}_fields"]()
            if fields * 8 != op.layout.size:
                raise NotBuilt(f"the native library is of another version: {op.name} takes {fields} arguments there")
            # A fresh function object: attribute access on the library would share this one between pools.
            function = self.library[f"headrace_{op.name}"]
            function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
            self.ops[op.name] = function
            self.addresses[op.name] = ctypes.cast(function, ctypes.c_void_p).value or 0
        return function


QUEUED_BYTES = 2 << 20
"""Of results that ops may wait with: what is kept cannot be used again while it is in the cache."""


class Queue:
    """Ops taken down with their arguments, to be run one after the other."""

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._list: list[bytes] = []
        self._kept: list[Tensor] = []  # whose memory they use
        self._bytes = 0

    def keep(self, tensor: Tensor) -> None:
        self._kept.append(tensor)
        self._bytes += tensor.nbytes

    def add(self, pool: Pool, op: Op, arguments: bytes) -> None:
        self._ops.append(op)
        self._list += (QUEUED.pack(pool.addresses[op.name], len(arguments)), arguments)
        if self._bytes > QUEUED_BYTES:
            self.run(pool)

    def run(self, pool: Pool) -> None:
        """Run them, and begin anew. Raises what the op that failed raises; those behind it do not run."""
        listed, failed = b"".join(self._list), ctypes.c_int64(-1)
        arguments = RUN_ALL.pack(_address(listed), len(listed), ctypes.addressof(failed))
        if status := pool.function(RUN_ALL)(pool.handle, arguments):
            self._ops[failed.value].fail(status)
        self._ops, self._list, self._kept, self._bytes = [], [], [], 0


QUEUED = struct.Struct("=qq")


def _address(data: bytes) -> int:
    """Of an object's bytes, as long as it lives."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


class Op:
    """One op of the library. ``layout``: a letter per field of its struct in ops.h, q integer or address, d double."""

    def __init__(self, name: str, layout: str) -> None:
        self.name, self.layout = name, struct.Struct("=" + layout)
        self.pack = self.layout.pack

    def __call__(self, pool: Pool, *fields: float) -> None:
        """Run it. Addresses must stay valid during the call. Raises MemoryError for scratch that cannot be had."""
        function = pool.function(self)
        if pool.queue is not None:
            pool.queue.add(pool, self, self.pack(*fields))
        elif status := function(pool.handle, self.pack(*fields)):
            self.fail(status)

    def fail(self, status: int) -> NoReturn:
        """Raise what the library's status means."""
        if status == 1:
            raise MemoryError(f"no memory for the scratch of {self.name}")
        raise ValueError(f"{self.name}: sizes that no tensor has")


RUN_ALL = Op("run_all", "qqq")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a result, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")
