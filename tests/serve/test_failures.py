"""What fails inside the real engine: who is told what, and what nobody is told. Ends of a process."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from live_server import SECONDS, LiveServer, all_free, connect, joined, live, receive

from headrace.engine import Engine, EngineConfig
from headrace.engine.config import ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.run.runner import Runner
from headrace.tokenizer import StopMatcher, TextStream
from headrace.tokenizer import load as load_tokenizer

SECRET = "xyzzy-plugh"
ENDLESS: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "seed": 1}


def until(ready: Callable[[], Any]) -> None:
    """Wait for a condition that nobody announces."""
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.005)


def fail_a_step(monkeypatch: pytest.MonkeyPatch, running: int) -> None:
    """The next step that decodes for so many raises, as a kernel would."""
    execute = Runner.execute
    left = [1]

    def failing(runner: Runner, plan: Any) -> Any:
        if left[0] and len(plan.decode_slots) == running:
            left[0] = 0
            raise RuntimeError(f"planted: {SECRET}")
        return execute(runner, plan)

    monkeypatch.setattr(Runner, "execute", failing)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All of our logging, at its most talkative."""
    logger = logging.getLogger("headrace")
    before = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.DEBUG)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(before)


@pytest.fixture
def faulty() -> Iterator[tuple[Engine, LiveServer]]:
    """A server of its own, whose engine a test may break."""
    with Engine(config=EngineConfig(max_sequences=1, max_context=256)) as engine, live(engine) as server:
        yield engine, server


# --- a failing step -------------------------------------------------------------------------------------------------


def test_neighbours_of_a_failing_step_may_try_again(
    real: LiveServer, real_engine: Engine, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    fail_a_step(monkeypatch, running=2)
    stream = connect(real, **ENDLESS, stream=True)
    receive(stream, b"delta")
    response = real.chat(**ENDLESS)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "step_failed")
    assert "x-should-retry" not in response.headers
    tail = receive(stream, b'"error"').decode()
    assert '"step_failed"' in tail
    stream.close()
    assert "RuntimeError at" in log.text
    assert SECRET not in response.text + tail + log.text
    assert real.chat(max_tokens=2).status_code == 200


def test_a_request_that_was_alone_in_its_step_need_not(
    real: LiveServer, real_engine: Engine, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    fail_a_step(monkeypatch, running=1)
    response = real.chat(**ENDLESS)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    assert response.headers["x-should-retry"] == "false"
    assert SECRET not in response.text + log.text


# --- what nobody is told --------------------------------------------------------------------------------------------


def test_the_message_of_a_fault_is_told_to_nobody(
    faulty: tuple[Engine, LiveServer], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    engine, server = faulty

    def broken() -> None:
        raise AssertionError(SECRET)

    monkeypatch.setattr(engine._scheduler, "schedule", broken)
    told = [server.chat().text, server.chat().text, server.client.get("/health/live").text]
    assert all("failed" in text for text in told)
    assert "AssertionError at" in log.text
    assert SECRET not in "".join(told) + log.text + str(server.service.fault)


@pytest.mark.parametrize("method", ["push", "finish"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_cannot_be_made_ends_its_request_alone(
    real: LiveServer, real_engine: Engine, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture,
    method: str, stream: bool,
) -> None:  # fmt: skip
    """With stop strings text is made on the engine's thread: what is raised there reaches the reader as an end."""
    made = getattr(TextStream, method)

    def failing(text: TextStream, *args: Any) -> Any:
        if text._content._matcher is not None and text._count > 3:
            raise ValueError(SECRET)
        return made(text, *args)

    monkeypatch.setattr(TextStream, method, failing)
    neighbour = connect(real, max_tokens=200, ignore_eos=True, stream=False)
    response = real.chat(max_tokens=10, ignore_eos=True, stop=["never"], stream=stream)
    assert response.status_code == 500 or '"error"' in response.text
    assert SECRET not in response.text + log.text
    assert b'"length"' in receive(neighbour, b'"usage"')
    neighbour.close()


def test_stop_strings_are_not_kept(real: LiveServer, real_engine: Engine) -> None:
    def matchers() -> list[StopMatcher]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is StopMatcher]

    client = connect(real, **ENDLESS, n=3, stop=[SECRET], stream=True)
    receive(client, b"delta")
    assert len(matchers()) == 1  # for all three choices
    client.close()
    all_free(real_engine)
    until(lambda: not matchers())


# --- a step that hangs ----------------------------------------------------------------------------------------------


def test_a_step_that_hangs_ends_liveness(monkeypatch: pytest.MonkeyPatch) -> None:
    hang, release = threading.Event(), threading.Event()
    execute = Runner.execute

    def held(runner: Runner, plan: Any) -> Any:
        if hang.is_set():
            assert release.wait(SECONDS)
        return execute(runner, plan)

    monkeypatch.setattr(Runner, "execute", held)
    config = EngineConfig(max_sequences=1, max_context=256)
    with Engine(config=config) as engine, live(engine, stall_seconds=0.3) as server:
        assert server.chat(max_tokens=3).status_code == 200
        time.sleep(0.4)
        assert server.client.get("/health/live").status_code == 200  # nothing to do is no stall
        hang.set()
        client = connect(server, stream=False, max_tokens=3)
        until(lambda: engine.step_seconds > 0)
        assert server.client.get("/health/live").status_code in (200, 500)
        until(lambda: engine.step_seconds > 0.3)
        response = server.client.get("/health/live")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
        release.set()
        receive(client, b'"usage"')
        assert server.client.get("/health/live").status_code == 200
        client.close()


PROGRAM = """
import sys, threading
from headrace.engine import Engine, EngineConfig
from headrace.engine.run.runner import Runner
from headrace.engine.serve import run
from headrace.engine.serve.app import create_app

run.EXIT_SECONDS = 1
engine = Engine(config=EngineConfig(max_sequences=2, max_context=1024))
execute = Runner.execute
steps = [0]

def counted(runner, plan):
    steps[0] += 1
    if steps[0] == int(sys.argv[1]):
        threading.Event().wait()
    return execute(runner, plan)

Runner.execute = counted
listener = run.listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
run.DrainingServer(create_app(engine), drain_seconds=float(sys.argv[2])).run([listener])
engine.close()
print("closed", flush=True)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Starts a process that serves the real engine: (hang at this step, seconds to drain) -> (process, port)."""
    processes: list[subprocess.Popen[str]] = []

    def begin(hang_at: int, drain_seconds: float) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(hang_at), str(drain_seconds)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        processes.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


class At:
    """As much of a server as ``connect`` needs."""

    def __init__(self, port: int) -> None:
        self.port = port


def test_sigterm_to_a_process_with_the_real_engine_under_load(start: Any) -> None:
    process, port = start(0, 60)
    clients = [connect(At(port), stream=bool(i % 2), max_tokens=300, ignore_eos=True) for i in range(4)]  # type: ignore
    receive(clients[1], b"delta")
    process.send_signal(signal.SIGTERM)
    for i, client in enumerate(clients):
        answer = receive(client, b"[DONE]" if i % 2 else b'"usage"')
        assert b'"length"' in answer
        client.close()
    assert process.wait(SECONDS) == 0
    assert process.stdout.read() == "closed\n"


def test_sigterm_while_a_step_hangs_ends_the_process(start: Any) -> None:
    process, port = start(5, 0.2)
    client = connect(At(port), stream=True, max_tokens=300)  # type: ignore[arg-type]
    receive(client, b"delta")
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 1
    client.close()


# --- whole characters, and many numbers -----------------------------------------------------------------------------


class Chain:
    """A network whose next token is a function of the last one."""

    def __init__(self, following: dict[int, int], first: int, vocab: int) -> None:
        self._table = torch.full((vocab,), first)
        for token, successor in following.items():
            self._table[token] = successor

    def forward(self, batch: Any, caches: Any) -> torch.Tensor:
        time.sleep(0.03)  # slower than a reader: each token is read alone
        return batch.token_ids[:, None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), len(self._table))
        logits[torch.arange(len(hidden)), self._table[hidden[:, 0].long()]] = 50.0
        return logits


@pytest.mark.parametrize("stop", [None, ["never"]])
def test_characters_that_are_split_over_tokens_arrive_whole(stop: list[str] | None) -> None:
    """Characters of two, three and four bytes, each byte a token of its own, through engine, stream and socket."""
    text = "é日😀"
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [by_bytes[bytes((byte,))] for byte in text.encode()]
    assert len(set(ids)) == len(ids) == 9
    [eos, *_] = tokenizer.eos_ids
    config = ModelConfig.load(EMBEDDED_MODEL)
    network = Chain(dict(zip(ids, [*ids[1:], eos], strict=True)), ids[0], config.vocab_size)
    fields: dict[str, Any] = {"prompt": "x", "temperature": 0, "max_tokens": 32} | ({"stop": stop} if stop else {})
    with Engine.from_parts(network, config, tokenizer) as engine, live(engine) as server:
        body = server.client.post("/v1/completions", json=fields).json()
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (text, "stop")
        events = server.client.post("/v1/completions", json=fields | {"stream": True}).text.split("\n\n")[:-2]
        parts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
        assert "".join(parts) == text
        assert len([part for part in parts if part]) > 1  # or the network was too fast to show anything
        cut = server.client.post("/v1/completions", json=fields | {"max_tokens": 4}).json()
        assert cut["choices"][0]["text"] == "é\ufffd"  # what never became a character


def test_log_probabilities_at_full_size(real: LiveServer, real_engine: Engine) -> None:
    """The most alternatives for a long answer: both forms say the same, and the server answers others meanwhile."""
    fields = ENDLESS | {"max_tokens": 600, "logprobs": True, "top_logprobs": 20}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(real.chat, **fields)
        while not asked.done():
            assert real.client.get("/health/live").status_code == 200
        [choice] = asked.result().json()["choices"]
    chunks = real.chunks(**fields)
    entries = 0
    for key in ("content", "reasoning_content"):
        assert joined(chunks, 0, key) == choice["message"][key]
        parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"] and c["choices"][0]["logprobs"]]
        assert [entry for part in parts for entry in part[key] or ()] == choice["logprobs"][key]
        for entry in choice["logprobs"][key]:
            tops = [top["logprob"] for top in entry["top_logprobs"]]
            assert len(tops) == 20
            assert tops == sorted(tops, reverse=True)
            assert all(bytes(top["bytes"]).decode(errors="replace") == top["token"] for top in entry["top_logprobs"])
        entries += len(choice["logprobs"][key])
    # The rest showed no text: markers, white space that was dropped, and tokens that make a character together.
    assert entries > 300
