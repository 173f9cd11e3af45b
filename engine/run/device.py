"""Where tensors live and how they travel: one stream per engine, pinned copies, nothing that waits unasked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor


class DeviceLost(RuntimeError):
    """The device answers nothing any more: after an illegal access, say, every later call fails too."""


class Device:
    """ "cpu", or a CUDA device with a stream of the engine's own.

    Copies to the device come from pinned memory, copies back go there, both in the stream: none makes the host wait.
    A copy back may be read after ``wait``.
    """

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.cuda = self.torch.type == "cuda"
        if self.cuda and self.torch.index is None and torch.cuda.is_available():
            self.torch = torch.device("cuda", torch.cuda.current_device())  # the engine's thread has its own "current"
        if self.cuda and not torch.cuda.is_available():
            raise ValueError(f"device {name!r} is not there: torch {torch.__version__} sees no CUDA device")
        if self.cuda and (self.torch.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA device(s)")
        self._stream = torch.cuda.Stream(self.torch) if self.cuda else None  # type: ignore[no-untyped-call]
        if self._stream is not None:
            # What was queued before, the loading of weights say, comes first.
            self._stream.wait_stream(torch.cuda.current_stream(self.torch))

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Everything launched inside is queued in the engine's stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.torch), torch.cuda.stream(self._stream):
            yield

    def upload(self, arrays: Sequence[npt.NDArray[np.int64]], into: Tensor | None = None) -> list[Tensor]:
        """Integer arrays of any shapes as int64 tensors on the device, in one copy.

        They lie in ``into`` [n] int64 if that has room for them: at the same addresses for the same shapes.
        """
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        flat = self.upload_tensor(flat, into)
        parts = torch.split(flat, [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def upload_tensor(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A host tensor's copy on the device, in ``into`` [n] if that has room; else, on a CPU, the tensor itself."""
        # The pinned memory goes back to torch's host allocator, which keeps it until the stream has read it.
        source = tensor.pin_memory() if self.cuda else tensor
        if into is not None and tensor.numel() <= into.numel():
            return into[: tensor.numel()].view(tensor.shape).copy_(source, non_blocking=True)
        return source.to(self.torch, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        """A host copy, to be read after ``wait``."""
        if not self.cuda:
            return tensor.clone()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Until everything queued so far is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def check(self) -> None:
        """After a failure: raises DeviceLost unless the device still works."""
        try:
            self.wait()
        except RuntimeError as error:
            raise DeviceLost(f"the device {self.torch} is lost: {error}") from error

    def available_bytes(self) -> int:
        """Memory that could still be taken."""
        if not self.cuda:
            return int(psutil.virtual_memory().available)
        free, _ = torch.cuda.mem_get_info(self.torch)
        cached = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return int(free + cached)
