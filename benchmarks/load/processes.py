"""The processes of a measurement: the server, the Python API beside it, and what they take of the machine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import httpx
import psutil

from benchmarks.load.workload import Load, Row
from benchmarks.rows import ROOT

COMMAND = "import sys; from headrace.engine.cli import main; sys.exit(main())"
LOADING_SECONDS = 600.0
STOPPING_SECONDS = 30.0
MAX_POINTS = 300  # of a memory curve


class LoadError(Exception):
    """A measurement that could not be made."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the engine under load, the same for the server and for the Python API. None: the engine's default."""

    model: str | None = None
    backend: str | None = None
    threads: int | None = None
    max_sequences: int | None = None
    max_waiting: int | None = None

    def options(self) -> list[str]:
        """For ``headrace serve``."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


class Process:
    """A process with what it has used."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def cpu_seconds(self) -> float:
        """User and system time since it began, of all threads."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def resident_bytes(self) -> int:
        """Its resident set."""
        return int(self._process.memory_info().rss)


class Memory:
    """Looks at a process's resident set once in a while, as a context manager."""

    def __init__(self, process: Process | None, every: float = 1.0) -> None:
        self._process, self._every = process, every
        self.points: list[tuple[float, int]] = []  # (seconds since the beginning, bytes)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Memory:
        if self._process is not None:
            self._task = asyncio.create_task(self._watch(self._process))
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self, process: Process) -> None:
        start = time.monotonic()
        while True:
            self.points.append((time.monotonic() - start, process.resident_bytes()))
            await asyncio.sleep(self._every)

    def curve(self) -> list[tuple[float, int]]:
        """The points, thinned out to at most MAX_POINTS."""
        return self.points[:: -(-len(self.points) // MAX_POINTS) or 1]


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is; its process where it is ours."""

    url: str
    process: Process | None = None


@contextmanager
def serving(settings: Settings, *more: str) -> Iterator[Server]:
    """``headrace serve`` on a free loopback port, ready, in a process of its own. Raises LoadError."""
    argv = [sys.executable, "-c", COMMAND, "serve", "--port", "0", *settings.options(), *more]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        said: deque[str] = deque(maxlen=20)
        found: list[str] = []
        up = threading.Event()

        def read() -> None:
            assert child.stderr is not None
            for line in child.stderr:  # to the end: a full pipe would stop the server
                said.append(line)
                if line.startswith("headrace: serving ") and " at " in line:
                    found.append(line.rpartition(" at ")[2].split("/v1")[0])
                    up.set()
            up.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            if not up.wait(LOADING_SECONDS) or not found:
                raise LoadError(f"the server did not start: {''.join(said).strip()}")
            wait_ready(found[0])
            yield Server(found[0], Process(child.pid))
        finally:
            child.terminate()
            try:
                child.wait(STOPPING_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


def wait_ready(url: str, seconds: float = LOADING_SECONDS) -> None:
    """Until /health/ready says yes. Raises LoadError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = httpx.get(f"{url}/health/ready", timeout=seconds, trust_env=False)
            if answer.status_code == httpx.codes.OK:
                return
            said = answer.text
        except httpx.HTTPError as error:
            said = str(error)
        if time.monotonic() >= deadline:
            raise LoadError(f"{url} is not ready: {said}")
        time.sleep(0.5)


class PythonApi:
    """An engine in a process of its own, that puts loads on itself (``through_python``)."""

    def __init__(self, settings: Settings) -> None:
        argv = [sys.executable, "-m", "benchmarks.load.through_python", json.dumps(asdict(settings))]
        self._child = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, load: Load) -> Row:
        """A row's figures. Raises LoadError if the process has failed; it says on stderr why."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with suppress(BrokenPipeError):  # the answer that does not come tells
            print(load.to_json(), file=self._child.stdin, flush=True)
        line = self._child.stdout.readline()
        if not line:
            raise LoadError(f"the process of the Python API ended with status {self._child.wait()}")
        row: Row = json.loads(line)
        return row

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(STOPPING_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> PythonApi:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def load_average() -> list[float]:
    """Of 1, 5 and 15 minutes: what else the machine was doing."""
    return [round(value, 2) for value in os.getloadavg()]
