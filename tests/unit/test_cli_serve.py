"""``headrace serve`` as a process: it says where it listens, serves, and drains on SIGTERM."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from safetensors import safe_open
from scripted_engine import ScriptedEngine

from headrace.engine import Engine, EngineConfig
from headrace.engine.cli import common, main, serve
from headrace.engine.cli.common import UserError
from headrace.engine.cli.inspect import size
from headrace.engine.cli.startup import loading_plan, serving_plan
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.run.memory import CacheSizes
from headrace.engine.serve.errors import ENGINE_FAILED
from headrace.engine.serve.run import DrainingServer

SECONDS = 30
QUESTION = {"messages": [{"role": "user", "content": "hello"}], "stream": False}


PLAN = re.compile(r"headrace: (model|device|weights|pages|slots|context|console) ")


def beyond_the_plan(process: subprocess.Popen[str]) -> str:
    """The first line on stderr that is not of the plan."""
    assert process.stderr is not None
    return next((line for line in process.stderr if not PLAN.match(line)), "")


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and the first line it writes behind its plan."""
    program = Path(__file__).with_name("scripted_cli.py")
    argv = [sys.executable, str(program), "serve", "--port", "0", *options]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            yield process, beyond_the_plan(process)
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
        assert server.stderr.read() == f"headrace: {ENGINE_FAILED}\n"


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


def test_keys_end_as_digests_and_options_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server runs no variable of the command has a key."""
    seen: list[tuple[DrainingServer, list[str]]] = []

    def run(self: DrainingServer, sockets: list[socket.socket]) -> None:
        frame, variables = sys._getframe(1), []
        while frame is not None:
            variables += [repr(value) for value in frame.f_locals.values()] if frame.f_code in codes else []
            frame = frame.f_back
        seen.append((self, variables))
        sockets[0].close()
        raise UserError("seen")

    codes = {function.__code__ for function in vars(serve).values() if hasattr(function, "__code__")}
    monkeypatch.setattr(DrainingServer, "run", run)
    monkeypatch.setattr(serve.Loading, "start", lambda self: None)
    monkeypatch.setenv(serve.KEY_VARIABLE, "of-the-environment")
    keys = tmp_path / "keys"
    keys.write_text("of-the-file\n")
    assert main(["serve", "--port", "0", "--api-key-file", str(keys), "--stall-seconds", "7"]) == 2
    [(server, variables)] = seen
    assert any("DrainingServer" in text for text in variables)
    assert not any(key in text for text in variables for key in ("of-the-file", "of-the-environment"))
    for number, key in enumerate((b"of-the-file", b"of-the-environment"), start=1):
        assert server.service.access.check("/v1/models", {b"authorization": b"Bearer " + key}) == number
    hangs = ScriptedEngine()
    server.service.attach(hangs)  # type: ignore[arg-type]
    for seconds, problem in ((6.9, None), (7.0, "a step has not ended within 7 seconds")):
        hangs.step_seconds = seconds
        assert server.service.hangs == problem


# --- what it says before it serves ----------------------------------------------------------------------------------

REAL = "import sys; from headrace.engine.cli import main; sys.exit(main())"


def said_to_a_terminal(*options: str) -> list[str]:
    """What a real server says, up to where it serves; its stderr is a terminal."""
    ours, theirs = os.openpty()
    argv = [sys.executable, "-c", REAL, "serve", "--port", "0", *options]
    with subprocess.Popen(argv, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        timer = threading.Timer(4 * SECONDS, process.kill)
        timer.start()
        said = b""
        try:
            while b" at http://" not in said and (part := _read(ours)):
                said += part
        finally:
            timer.cancel()
            process.kill()
            os.close(ours)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", said.decode()).splitlines()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


def test_the_plan_and_a_bar_while_loading() -> None:
    """Sizes are the engine's own: the same ones as an engine with these options has in this process."""
    options = {"max_sequences": 3, "max_waiting": 9, "max_context": 160, "threads": 1, "instructions": "portable"}
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    lines = said_to_a_terminal(*given)
    plan = {line.split()[1]: line for line in lines if line.startswith("headrace: ")}
    assert [*plan] == ["model", "device", "weights", "pages", "slots", "context", "console", "serving"]
    assert any("loading weights" in line for line in lines), lines
    assert plan["device"].endswith("cpu, native kernels (portable), 1 thread")
    assert plan["model"].endswith(" headrace-tiny")
    with Engine(config=EngineConfig(**options)) as engine:  # type: ignore[arg-type]
        sizes = engine.sizes
        assert [f"headrace: {line}" for line in serving_plan(engine)] == [
            plan[k] for k in ("pages", "slots", "context")
        ]
    assert (sizes.num_slots, sizes.num_pages, sizes.max_context) == (3, 30, 160)
    assert plan["pages"].endswith(f" 30 of 16 tokens: {size(30 * sizes.page_bytes)}")
    assert plan["slots"].endswith(f" 3: {size(3 * sizes.slot_bytes)} of Mamba state")
    assert plan["context"].endswith(" 160 tokens at most; 9 answers may wait")


def test_the_weights_by_format() -> None:
    """What the plan says of the files is what they hold."""
    with safe_open(EMBEDDED_MODEL / "model.safetensors", "pt") as file:
        sizes: dict[str, int] = {}
        for name in file.keys():  # noqa: SIM118  not a dict
            tensor = file.get_slice(name)
            width = {"BF16": 2, "F32": 4}[tensor.get_dtype()]
            sizes[tensor.get_dtype()] = sizes.get(tensor.get_dtype(), 0) + width * math.prod(tensor.get_shape())
    line = loading_plan(None, EngineConfig())[2]
    assert line.startswith(f"weights  {size(sum(sizes.values()))}: ")
    for name, num_bytes in sizes.items():
        assert f"{name} {size(num_bytes)}" in line


def test_the_name_is_that_which_clients_use(tmp_path: Path) -> None:
    """Of a checkpoint in the hub's cache the folder's own name is a commit."""
    folder = tmp_path / "models--org--model" / "snapshots" / "0a1b2c"
    shutil.copytree(EMBEDDED_MODEL, folder)
    assert loading_plan(str(folder), EngineConfig())[0] == "model    org/model"


def test_padding_rows_are_counted() -> None:
    sizes = CacheSizes(8, 100, 16, 1600, page_bytes=1 << 20, slot_bytes=1 << 10, padding=7)
    engine = SimpleNamespace(sizes=sizes, config=EngineConfig())
    pages, slots, _ = serving_plan(engine)  # type: ignore[arg-type]
    assert pages == "pages    100 of 16 tokens, 7 more for padding: 107.00 MiB"
    assert slots == "slots    8, 7 more for padding: 15.00 KiB of Mamba state"


@pytest.mark.parametrize("option", ["--backend", "--threads", "--instructions"])
@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_kernels_are_chosen_where_an_engine_is_made(command: str, option: str) -> None:
    asked: list[EngineConfig] = []

    def load_engine(model: str | None, config: EngineConfig) -> None:
        asked.append(config)
        raise UserError("seen")

    value = {"--backend": "reference", "--threads": "3", "--instructions": "portable"}[option]
    with pytest.MonkeyPatch.context() as patch:
        for module in (common, serve):
            patch.setattr(module, "load_engine", load_engine)
        arguments = {"serve": ["--port", "0"], "generate": ["hello"], "chat": []}[command]
        assert main([command, *arguments, option, value]) == 2
    assert str(getattr(asked[0], option.removeprefix("--"))) == value


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--model", str(tmp_path)]) == 2
    assert capfd.readouterr().err.count("\n") == 1
