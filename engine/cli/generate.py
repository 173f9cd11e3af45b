"""``headrace generate``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.engine.cli import options
from headrace.engine.cli.common import Printer, UserError, engine_config, open_engine

if TYPE_CHECKING:
    from headrace.engine import ChatOptions, Delta, Engine, Finished, SamplingParams, Stream, TokenLogprob


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, or - to read it from stdin.")],
    model: options.Model = None,
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    threads: options.Threads = None,
    instructions: options.Instructions = "auto",
    system: options.System = None,
    raw: options.Raw = False,
    effort: options.Effort = "high",
    budget: options.Budget = 16384,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 0.95,
    max_tokens: options.MaxTokens = 16384,
    seed: options.Seed = None,
    stop: options.Stop = None,
    n: options.Choices = 1,
    ignore_eos: options.IgnoreEos = False,
    as_json: options.Json = False,
    logprobs: options.Logprobs = False,
    top_logprobs: options.TopLogprobs = 0,
    answer_only: options.AnswerOnly = False,
) -> None:
    """Answer one question and leave."""
    from headrace.engine import ChatOptions, QueueFull, RequestError, SamplingParams

    if (logprobs or top_logprobs) and not as_json:
        raise UserError("--logprobs and --top-logprobs need --json")
    if raw and system is not None:
        raise UserError("--system has no place in a --raw prompt")
    config = engine_config(device=device, backend=backend, threads=threads, instructions=instructions)
    try:
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, stop=tuple(stop or ()), n=n,
            logprobs=logprobs or top_logprobs > 0, top_logprobs=top_logprobs, ignore_eos=ignore_eos,
            reasoning_budget=budget,
        )  # fmt: skip
        text = sys.stdin.read() if prompt == "-" else prompt
        with (
            open_engine(model, config) as engine,
            _start(engine, text, system, raw, params, ChatOptions(effort)) as stream,
        ):
            _show(engine, stream, params, as_json=as_json, answer_only=answer_only)
    except (RequestError, QueueFull) as error:
        raise UserError(str(error)) from error


def _start(
    engine: Engine, text: str, system: str | None, raw: bool, params: SamplingParams, chat_options: ChatOptions
) -> Stream:
    if raw:
        return engine.generate_stream(text, params)
    head = [] if system is None else [{"role": "system", "content": system}]
    return engine.chat_stream([*head, {"role": "user", "content": text}], params, chat_options)


def _show(engine: Engine, stream: Stream, params: SamplingParams, *, as_json: bool, answer_only: bool) -> None:
    from headrace.engine import Delta, Finished

    printer = Printer(reasoning=not answer_only)
    live = params.n == 1 and not as_json
    events: list[Delta | Finished] = []
    for event in stream:
        events.append(event)
        if live and isinstance(event, Delta):
            printer.write(event.channel, event.text)
    choices = [_choice(events, index) for index in range(params.n)]
    if as_json:
        print(json.dumps(_document(engine, choices, events), ensure_ascii=False))
    elif live:
        printer.end(_cut(choices[0]))
    else:
        for choice in choices:
            print(f"[choice {choice['index']}]")
            printer.write("reasoning", choice["reasoning_content"] or "")
            printer.write("content", choice["content"] or "")
            printer.end(_cut(choice))
    if failed := [event for event in events if isinstance(event, Finished) and event.reason == "error"]:
        print(f"headrace: {failed[0].error}", file=sys.stderr)
        raise typer.Exit(1)


def _cut(choice: dict[str, Any]) -> str:
    return "cut: max_tokens or the context is used up" if choice["finish_reason"] == "length" else ""


def _choice(events: list[Delta | Finished], index: int) -> dict[str, Any]:
    """One choice of the JSON document."""
    from headrace.engine import Delta, Finished

    mine = [event for event in events if event.index == index]
    choice: dict[str, Any] = {"index": index}
    for key, channel in (("reasoning_content", "reasoning"), ("content", "content")):
        deltas = [event for event in mine if isinstance(event, Delta) and event.channel == channel]
        choice[key] = "".join(delta.text for delta in deltas) or None
        if any(delta.logprobs is not None for delta in deltas):
            choice[f"{channel}_logprobs"] = [_logprob(item) for delta in deltas for item in delta.logprobs or ()]
    choice["token_ids"] = [token for event in mine for token in event.token_ids]
    choice["finish_reason"] = next((event.reason for event in mine if isinstance(event, Finished)), None)
    return choice


def _logprob(item: TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": token, "logprob": max(value, -9999.0)} for token, value in item.top]
    return {"token_id": item.token_id, "token": item.text, "logprob": max(item.logprob, -9999.0), "top_logprobs": top}


def _document(engine: Engine, choices: list[dict[str, Any]], events: list[Delta | Finished]) -> dict[str, Any]:
    from headrace.engine import Finished, Usage

    usage = Usage()
    for event in events:
        if isinstance(event, Finished):
            usage += event.usage
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cached_tokens": usage.cached_tokens,
    }
    return {"model": engine.model_name, "choices": choices, "usage": counts}
