"""One server around a scripted engine and one around the real one, for the tests of a session.

Each test with the scripted engine begins with a fresh script; each with the real one must leave it idle and empty.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from live_server import LiveServer, all_free, live
from scripted_engine import ScriptedEngine

from headrace.engine import Engine, EngineConfig


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


@pytest.fixture(scope="session")
def real_shared() -> Iterator[tuple[Engine, LiveServer]]:
    config = EngineConfig(max_sequences=4, max_waiting=4, max_context=2048)
    with Engine(config=config) as engine, live(engine) as server:
        yield engine, server


@pytest.fixture
def real_engine(real_shared: tuple[Engine, LiveServer]) -> Iterator[Engine]:
    yield real_shared[0]
    all_free(real_shared[0])


@pytest.fixture
def real(real_shared: tuple[Engine, LiveServer], real_engine: Engine) -> LiveServer:
    return real_shared[1]
