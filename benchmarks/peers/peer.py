"""What a peer is, and what those that run in a Python process of their own share. The standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers.workload import Job, Row

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("native", "avx2")
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""The environment that holds torch and its libraries to AVX2."""


class PeerError(RuntimeError):
    """A peer that cannot be installed, prepared or measured; the message says which step and why."""


class Peer(Protocol):
    """An engine to measure. Every method raises PeerError."""

    @property
    def name(self) -> str: ...

    @property
    def formats(self) -> tuple[str, ...]:
        """What it can keep the weights in."""

    def install(self) -> str:
        """Make its environment if it is not there; returns its version."""

    def prepare(self, checkpoint: Path, format: str) -> Path:
        """Make what it opens of a checkpoint in the hub layout, if it is not there; returns where it is."""

    def measure(self, job: Job) -> Iterator[Row]:
        """One turn: rows as they are known, also those before a failure."""


def run(
    command: Sequence[str | Path],
    *,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: str | None = None,
    cwd: Path | None = None,
) -> str:
    """Standard output of a command. Raises PeerError with the end of what it said; ``timeout`` in seconds."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout, cwd=cwd,
            env={**os.environ, **(environment or {})}, check=False,
        )  # fmt: skip
    except OSError as error:
        raise PeerError(f"{words[0]}: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{Path(words[0]).name} did not end within {timeout:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PeerError(f"{Path(words[0]).name} ended with {done.returncode}: " + " | ".join(said[-3:])[-600:])
    return done.stdout


@dataclass(frozen=True)
class PythonPeer:
    """A peer that worker.py drives, in the environment of ``python``; it opens the checkpoint itself."""

    name: str
    formats: tuple[str, ...]
    packages: tuple[str, ...]  # whose versions are recorded
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 1800.0  # seconds a turn may take

    def install(self) -> str:
        script = "import sys, importlib.metadata as m; print(*(f'{name} {m.version(name)}' for name in sys.argv[1:]))"
        return run([self.python, "-c", script, *self.packages]).strip()

    def prepare(self, checkpoint: Path, format: str) -> Path:
        return checkpoint

    def measure(self, job: Job) -> Iterator[Row]:
        job = replace(job, options=dict(self.options))
        failure = None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            try:
                run(
                    [self.python, "-m", "benchmarks.peers.worker", self.name, file],
                    timeout=self.timeout,
                    environment={"OMP_NUM_THREADS": str(job.threads), **self.environment},
                    stdin=job.to_json(),
                    cwd=ROOT,
                )
            except PeerError as error:
                failure = error
            rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        yield from rows
        if failure is not None:
            raise failure
