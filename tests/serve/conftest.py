"""One server and one scripted engine for the tests of a session; each test begins with a fresh script."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from live_server import LiveServer, live
from scripted_engine import ScriptedEngine


@pytest.fixture(scope="session")
def shared() -> Iterator[tuple[ScriptedEngine, LiveServer]]:
    engine = ScriptedEngine()
    with live(engine) as server:
        yield engine, server


@pytest.fixture
def engine(shared: tuple[ScriptedEngine, LiveServer]) -> ScriptedEngine:
    shared[0].play()
    return shared[0]


@pytest.fixture
def server(shared: tuple[ScriptedEngine, LiveServer], engine: ScriptedEngine) -> LiveServer:
    return shared[1]
