"""Data-parallel workers, one thread each.

On a machine shared with others, threads inside one process wait for the slowest at every operation; processes wait
once per step, so they make use of whatever share of the cores they get.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Team:
    """The workers that share a step. All draw the same batch and keep identical weights."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this worker keeps the clock, evaluates and writes files."""
        return self.rank == 0

    def rows(self, values: Tensor) -> Tensor:
        """This worker's part of a batch."""
        return values[self.rank :: self.size]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its mean over the team, in one exchange."""
        if self.size == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor) / self.size)

    def told(self, value: Any) -> Any:
        """The leader's value, on every worker."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def _start(rank: int, size: int, meeting: str, work: Callable[[Team, Any], None], options: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        work(Team(rank, size), options)
    finally:
        dist.destroy_process_group()


def spread(work: Callable[[Team, Any], None], options: Any, workers: int) -> None:
    """Run `work` on every member of a team of `workers` processes."""
    if workers == 1:
        work(Team(), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(_start, (workers, meeting, work, options), nprocs=workers)
