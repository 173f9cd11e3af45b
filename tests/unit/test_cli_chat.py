"""``headrace chat``: through a pipe, and in a terminal with Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, answer, delta, finished

from headrace.engine import ContextExceeded
from headrace.engine.cli import common, main

ANSWER = "[reasoning]\nTwo and two.\n[answer]\nIt is 4.\n"


def talk(
    engine: ScriptedEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *lines: str,
    status: int = 0,
) -> tuple[str, str]:
    """stdout and stderr of a conversation through a pipe."""
    monkeypatch.setattr(common, "load_engine", lambda model, config=None: engine)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert main(["chat", "--seed", "1"]) == status
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out
    return captured.out, captured.err


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


def test_lines_are_questions_of_one_conversation(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = talk(engine, monkeypatch, capsys, "2 + 2?", "", "  again  ")
    assert (out, err) == (ANSWER + ANSWER, "")
    assert engine.calls[1].prompt == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."},
        {"role": "user", "content": "again"},
    ]


def test_settings(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = talk(
        engine, monkeypatch, capsys, "/effort low", "/budget 7", "/temperature 0.5", "/top-p 0.1", "/max-tokens 99",
        "/seed 18446744073709551615", "/system Be brief.", "/seed", "hello", "/seed none", "/effort none", "bye",
    )  # fmt: skip
    first, second = engine.calls
    params = first.params
    assert first.options is not None
    assert second.options is not None
    assert (first.options.reasoning_effort, second.options.reasoning_effort) == ("low", "none")
    assert (params.reasoning_budget, params.temperature, params.top_p, params.max_tokens) == (7, 0.5, 0.1, 99)
    assert (params.seed, second.params.seed) == (2**64 - 1, None)
    assert first.prompt[0] == {"role": "system", "content": "Be brief."} == second.prompt[0]
    assert "(seed 18446744073709551615)\n(a fresh conversation)\n(seed 18446744073709551615)" in out


def test_clear_and_help_and_quit(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = talk(engine, monkeypatch, capsys, "one", "/clear", "two", "/help", "/quit", "three")
    assert [len(call.prompt) for call in engine.calls] == [1, 1]
    for command in ("effort", "budget", "temperature", "seed", "system", "clear", "help", "quit"):
        assert f"/{command}" in out


@pytest.mark.parametrize(("line", "words"), [
    ("/effort huge", "reasoning_effort"), ("/budget -2", "reasoning_budget"), ("/budget x", "'x' is not a number"),
    ("/temperature 3", "temperature"), ("/seed 1.5", "'1.5' is not a number"), ("/nothing", "unknown command /nothing"),
    ("/", "unknown command /"),
])  # fmt: skip
def test_a_wrong_command_changes_nothing(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    out, err = talk(engine, monkeypatch, capsys, line, "hello", status=2)
    assert out == ANSWER
    assert words in err.splitlines()[0]
    assert engine.calls[0].params.seed == 1


@pytest.mark.parametrize(("script", "kept"), [
    (ContextExceeded(9, 8), 0), ([delta("content", "It"), finished("length")], 2), ([finished("error", error="no")], 0),
    (answer(content=(), reason="length"), 2),
])  # fmt: skip
def test_what_stays_in_the_conversation(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: Any, kept: int
) -> None:
    engine.play(script, answer())
    talk(engine, monkeypatch, capsys, "one", "two", status=2 if isinstance(script, Exception) else 0)
    assert len(engine.calls[-1].prompt) == kept + 1


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # Where the tests run in the background of a shell, SIGINT is ignored, and that is inherited.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            environment = os.environ | {"TERM": "xterm", "NO_COLOR": ""}
            os.execve(
                sys.executable, [sys.executable, str(Path(__file__).with_name("scripted_cli.py")), *argv], environment
            )
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the process waits for something: a signal just before it begins to wait shows only later."""
        stat = Path(f"/proc/{self.pid}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            pass
        self.send("\x03")

    def expect(self, needle: str, seconds: float = 30) -> None:
        """Read until the needle shows, and forget what came up to it."""
        deadline = time.monotonic() + seconds
        while needle not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{needle!r} did not show up after {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        self.seen = self.seen.partition(needle)[2]

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal_ctrl_c_stops_the_answer_and_twice_leaves() -> None:
    terminal = Terminal("chat")
    terminal.expect("/help lists the commands")
    terminal.expect("> ")
    terminal.send("hello\n")
    terminal.expect("\x1b[2mHm.\x1b[0m")
    terminal.expect("1 messages!")
    terminal.expect("> ")
    terminal.send("please wait\n")
    terminal.expect("3 messages")
    terminal.interrupt()
    terminal.expect("(stopped)")
    terminal.expect("> ")
    terminal.send("and now\n")
    terminal.expect("5 messages!")
    terminal.expect("> ")
    terminal.interrupt()
    terminal.expect("Ctrl-C again")
    terminal.expect("> ")
    terminal.send("still here\n")
    terminal.expect("7 messages!")
    terminal.expect("> ")
    terminal.interrupt()
    terminal.expect("> ")
    terminal.interrupt()
    assert terminal.status() == 0


def test_ctrl_d_leaves() -> None:
    terminal = Terminal("chat")
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.status() == 0


def test_ctrl_c_ends_generate_with_130() -> None:
    terminal = Terminal("generate", "wait")
    terminal.expect("1 messages")
    terminal.interrupt()
    assert terminal.status() == 130
