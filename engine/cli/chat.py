"""``headrace chat``: a conversation in the terminal, or with whatever writes lines to stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.engine.cli import options
from headrace.engine.cli.common import Printer, UserError, engine_config, open_engine

if TYPE_CHECKING:
    from headrace.engine import ChatOptions, Engine, SamplingParams

PROMPT = "> "
HELP = """\
/effort none|low|high   how much to reason
/budget N               tokens of reasoning before it is ended, -1: no limit
/temperature X          0 is greedy, at most 2
/top-p X                nucleus, 0 to 1
/max-tokens N           tokens per answer, reasoning included
/seed N|none            same seed, same answer
/system TEXT            system message, from a fresh start; without TEXT: none
/clear                  forget the conversation
/help                   this
/quit                   leave (also Ctrl-D, or Ctrl-C twice)
A setting without a value shows it. Ctrl-C stops an answer."""


def chat(
    model: options.Model = None,
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    threads: options.Threads = None,
    instructions: options.Instructions = "auto",
    system: options.System = None,
    effort: options.Effort = "high",
    budget: options.Budget = 16384,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 0.95,
    max_tokens: options.MaxTokens = 16384,
    seed: options.Seed = None,
) -> None:
    """Talk to the model.

    In a terminal, type questions and commands (/help lists them). Without one, every line of stdin is a question or a
    command, and the answers go to stdout as plain text.
    """
    from headrace.engine import ChatOptions, RequestError, SamplingParams

    try:
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, reasoning_budget=budget
        )
    except RequestError as error:
        raise UserError(str(error)) from error
    config = engine_config(device=device, backend=backend, threads=threads, instructions=instructions)
    with open_engine(model, config) as engine:
        conversation = Conversation(engine, params, ChatOptions(reasoning_effort=effort), system)
        if sys.stdin.isatty():
            _interactive(conversation)
        else:
            _piped(conversation)


def _interactive(conversation: Conversation) -> None:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  line editing and history in input()

    prompt = PROMPT if sys.stdout.isatty() else ""
    print(f"{conversation.model_name}. /help lists the commands, Ctrl-C stops an answer, /quit leaves.")
    interrupted = False
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if interrupted:
                print()
                return
            interrupted = True
            print("\n(Ctrl-C again, or /quit, to leave)")
            continue
        try:
            if not conversation.take(line):
                return
            # A second Ctrl-C meant for the answer that just stopped does not leave: two at the prompt do.
            interrupted = False
        except KeyboardInterrupt:
            print()
        except UserError as error:
            interrupted = False
            print(f"headrace: {error}", file=sys.stderr)


def _piped(conversation: Conversation) -> None:
    failed = False
    for line in sys.stdin:
        try:
            if not conversation.take(line):
                break
        except UserError as error:
            failed = True
            print(f"headrace: {error}", file=sys.stderr)
        if conversation.interrupted:
            raise KeyboardInterrupt
    if failed:
        raise UserError("not every line could be answered")


class Conversation:
    """The turns so far and the settings of the next answer."""

    def __init__(self, engine: Engine, params: SamplingParams, chat_options: ChatOptions, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._options = chat_options
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._printer = Printer()
        self.interrupted = False
        self._settings: Mapping[str, tuple[str, Callable[[str], Any]]] = {
            "budget": ("reasoning_budget", int),
            "temperature": ("temperature", float),
            "top-p": ("top_p", float),
            "max-tokens": ("max_tokens", int),
            "seed": ("seed", lambda text: None if text == "none" else int(text)),
        }

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self._engine.model_name

    def take(self, line: str) -> bool:
        """Answer a question or obey a command; False if it was the last. Raises UserError; nothing is lost then."""
        self.interrupted = False
        line = line.strip()
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            return self._command(name, value.strip())
        if line:
            self._ask(line)
        return True

    def _ask(self, question: str) -> None:
        from headrace.engine import Finished, QueueFull, RequestError

        turns = [*self._turns, {"role": "user", "content": question}]
        head = [{"role": "system", "content": self._system}] if self._system else []
        content: list[str] = []
        reasoning: list[str] = []
        note = ""
        try:
            with self._engine.chat_stream([*head, *turns], self._params, self._options) as stream:
                for event in stream:
                    if isinstance(event, Finished):
                        note = _note(event.reason, event.error)
                    else:
                        (content if event.channel == "content" else reasoning).append(event.text)
                        self._printer.write(event.channel, event.text)
        except (RequestError, QueueFull) as error:
            hint = "; /clear forgets the conversation" if self._turns else ""
            raise UserError(f"{error}{hint}") from error
        except KeyboardInterrupt:
            self.interrupted = True
            note = "stopped"
        self._printer.end(note)
        if content or not (self.interrupted or note.startswith("failed")):
            answer = {"role": "assistant", "content": "".join(content)}
            if reasoning:
                answer["reasoning_content"] = "".join(reasoning)
            self._turns = [*turns, answer]

    def _command(self, name: str, value: str) -> bool:
        if name in ("quit", "exit"):
            return False
        if name == "help":
            print(HELP)
        elif name == "clear":
            self._turns = []
            print("(a fresh conversation)")
        elif name == "system":
            self._system, self._turns = value or None, []
            print("(a fresh conversation)")
        elif name == "effort":
            self._set_effort(value)
        elif name in self._settings:
            self._set(name, value)
        else:
            raise UserError(f"unknown command /{name}; /help lists the commands")
        return True

    def _set_effort(self, value: str) -> None:
        from headrace.engine import RequestError

        if value:
            try:
                self._options = replace(self._options, reasoning_effort=value)  # type: ignore[arg-type]
            except RequestError as error:
                raise UserError(str(error)) from error
        print(f"(effort {self._options.reasoning_effort})")

    def _set(self, name: str, value: str) -> None:
        field, parse = self._settings[name]
        if value:
            try:
                self._params = replace(self._params, **{field: parse(value)})
            except ValueError as error:  # RequestError is one
                wrong = str(error) if hasattr(error, "param") else f"{value!r} is not a number"
                raise UserError(f"/{name}: {wrong}") from error
        current = getattr(self._params, field)
        print(f"({name} {'none' if current is None else current})")


def _note(reason: str, error: str | None) -> str:
    """What to tell about how an answer ended; nothing where it just ended."""
    if reason == "length":
        return "cut: max_tokens or the context is used up"
    return {"stop": "", "abort": "stopped"}.get(reason, f"failed: {error}")
