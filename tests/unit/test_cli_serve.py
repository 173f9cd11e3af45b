"""``headrace serve`` as a process: it says where it listens, serves, and drains on SIGTERM."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

SECONDS = 30
QUESTION = {"messages": [{"role": "user", "content": "hello"}], "stream": False}


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and the first line it writes."""
    program = Path(__file__).with_name("scripted_cli.py")
    argv = [sys.executable, str(program), "serve", "--port", "0", *options]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            yield process, process.stderr.readline()
        finally:
            timer.cancel()
            process.kill()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server's process and its URL."""
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with started("--api-key-file", str(keys), "--profile", "openai") as (process, line):
        pattern = r"headrace: serving scripted/model at (http://127\.0\.0\.1:\d+/v1) \(profile openai\)\n"
        found = re.fullmatch(pattern, line)
        assert found, line
        yield process, found[1]


def test_it_serves_and_ends_with_0_on_sigterm(process: tuple[subprocess.Popen[str], str]) -> None:
    server, url = process
    assert httpx.post(f"{url}/chat/completions", json=QUESTION).status_code == 401
    with httpx.Client(headers={"authorization": "Bearer secret"}, timeout=SECONDS) as client:
        body = client.post(f"{url}/chat/completions", json=QUESTION).json()
        assert body["choices"][0]["message"]["content"] == "1 messages!"
        wait = {"messages": [{"role": "user", "content": "wait"}], "stream": True}
        with client.stream("POST", f"{url}/chat/completions", json=wait) as stream:
            next(stream.iter_lines())
            server.send_signal(signal.SIGTERM)
            code = 200
            while code == 200:  # until the signal has arrived
                code = client.get(f"{url}/models").status_code
            assert code == 503
            assert server.poll() is None
        assert server.wait(SECONDS) == 0


def test_sigterm_when_idle(process: tuple[subprocess.Popen[str], str]) -> None:
    server, _ = process
    server.send_signal(signal.SIGTERM)
    assert server.wait(SECONDS) == 0
    assert server.stderr is not None
    assert server.stderr.read() == ""


def test_sigterm_while_the_model_loads() -> None:
    with started("--model", "slow") as (server, line):
        assert line == "loading\n"
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS) in (0, -signal.SIGTERM)  # the latter if the server was not up yet


def test_an_engine_that_failed_for_good_ends_the_server_with_1() -> None:
    with started("--model", "failing") as (server, line):
        url = line.split()[4]
        assert httpx.get(url.replace("/v1", "/health/live"), timeout=SECONDS).status_code == 500
        assert server.wait(SECONDS) == 1
        assert server.stderr is not None
        assert server.stderr.read() == "headrace: the device is lost\n"


def test_the_access_log_is_a_json_object_a_line() -> None:
    with started("--log-level", "info") as (server, line):
        while "serving" not in line:
            assert server.stderr is not None
            line = server.stderr.readline()
        url = line.split()[4]
        assert httpx.post(f"{url}/chat/completions", json=QUESTION, timeout=SECONDS).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS) == 0
        assert server.stderr is not None
        entries = [json.loads(line) for line in server.stderr.read().splitlines() if line.startswith("{")]
    assert [(entry["path"], entry["status"]) for entry in entries] == [("/v1/chat/completions", 200)]
    assert "hello" not in json.dumps(entries)


def test_a_server_without_keys_does_not_listen_outside() -> None:
    with started("--host", "0.0.0.0") as (server, line):
        assert "without API keys only a loopback address is allowed" in line
        assert server.wait(SECONDS) == 2
