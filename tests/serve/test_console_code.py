"""What the console hands out is run as it stands; and axe-core, which nobody here wrote, looks at the page."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_page import DESKTOP, PHONE, ConsolePage, chromium, opened
from live_server import LiveServer, joined, live
from playwright.sync_api import Browser, expect
from scripted_engine import HOLD, ScriptedEngine, answer, delta

KEY = "a key that nobody knows"
SEED = 2**64 - 1
# What breaks a quotation of any of the four languages, if anything does.
SYSTEM = 'It\'s "quoted" `$(date)` ${HOME} $HOME \\n \\ %s {x}\n\'\'\'\n"""\nJSON\n</script> 12 ü → 🌊'
LANGUAGES = {
    "curl": (["bash"], ".sh"),
    "python": ([sys.executable], ".py"),
    "javascript": (["node"], ".mjs"),
    "engine": ([sys.executable], ".py"),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as program:
        yield program


# --- snippets -------------------------------------------------------------------------------------------------------


def start(language: str, code: str, folder: Path) -> subprocess.Popen[str]:
    """Run a snippet in its own file, in a folder in which there is nothing else."""
    command, suffix = LANGUAGES[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    folder.mkdir()
    file = folder / f"snippet{suffix}"
    file.write_text(code + "\n", encoding="utf-8")
    environment = {**os.environ, "HEADRACE_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [*command, str(file)], cwd=folder, env=environment, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def curls(text: str, stream: bool) -> str:
    """What curl printed, put as the other snippets print it."""
    if not stream:
        message = json.loads(text)["choices"][0]["message"]
        return f"{message['reasoning_content'] or ''}\n{message['content'] or ''}\n"
    parts = []
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        delta = json.loads(event.removeprefix("data: "))["choices"][0]["delta"]
        parts += [delta.get("reasoning_content") or "", delta.get("content") or ""]
    return "".join(parts) + "\n"


def codes(console: ConsolePage) -> dict[str, str]:
    return {language: console.code(language) for language in LANGUAGES}


def test_snippets_run_and_give_the_same_tokens(browser: Browser, real: LiveServer, tmp_path: Path) -> None:
    """All four, streaming or not, give what the server gives for the same request; the seed is beyond 2^53."""
    question = "What is 12 + 34?"
    messages = zip(("system", "context", "user"), (SYSTEM, "In tens.", question), strict=True)
    fields: dict[str, Any] = {
        "messages": [{"role": role, "content": content} for role, content in messages],
        "temperature": 0.9, "top_p": 1, "seed": SEED, "max_tokens": 90, "ignore_eos": True, "stop": ["\n\n\n", "~"],
        "chat_template_kwargs": {"enable_thinking": True, "low_effort": True, "reasoning_budget": 60},
    }  # fmt: skip
    message = real.chat(**fields).json()["choices"][0]["message"]
    reasoning, content = message["reasoning_content"] or "", message["content"] or ""
    assert reasoning
    assert content
    rounded = real.chat(**fields | {"seed": 2**64 - 2048}).json()["choices"][0]["message"]
    assert rounded != message  # so that a seed which went through a float shows
    with opened(browser, real) as console:
        console.open()
        console.find(".turn.system textarea").fill(SYSTEM)
        console.find(".turn.context textarea").fill("In tens.")
        console.fill(temperature="0.9", top_p="1", seed=str(SEED), max_tokens="90", reasoning_budget="60")
        console.fill(stop='"\\n\\n\\n"\n~')
        console.parameter("ignore_eos").check()
        console.parameter("reasoning_effort").select_option("low")
        console.run()
        assert console.find(".reasoning .text").text_content() == reasoning
        assert console.find(".answer").text_content() == content
        streamed = codes(console)
        console.parameter("stream").uncheck()
        whole = codes(console)
    for codes_of in (streamed, whole):
        for language, code in codes_of.items():
            assert '"reasoning_budget": 60' in code or "reasoning_budget: 60" in code, language
    running = {
        (language, stream): start(language, code, tmp_path / f"{language}-{stream}")
        for stream, snippets in ((True, streamed), (False, whole))
        for language, code in snippets.items()
    }
    printed = {at: output(process) for at, process in running.items()}
    for (language, stream), text in printed.items():
        shown = curls(text, stream) if language == "curl" else text
        assert shown == (f"{reasoning}{content}\n" if stream else f"{reasoning}\n{content}\n"), (language, stream)


def test_snippets_take_the_key_from_the_environment(browser: Browser, tmp_path: Path) -> None:
    with live(ScriptedEngine(), keys=[KEY]) as server:
        with opened(browser, server) as console:
            console.open()
            console.find("#key").fill(KEY)
            console.find("#key").press("Enter")
            expect(console.find("#context")).to_have_text("context 4096")
            snippets = codes(console)
        assert not any(KEY in code for code in snippets.values())
        for language in ("curl", "python", "javascript"):
            text = output(start(language, snippets[language], tmp_path / language))
            assert (curls(text, True) if language == "curl" else text) == "Two and two.It is 4.\n", language


def test_the_copy_button_copies_the_code(browser: Browser, server: LiveServer) -> None:
    with opened(browser, server, permissions=["clipboard-read", "clipboard-write"]) as console:
        console.open()
        code = console.code("python")
        console.find("#copy-code").click()
        expect(console.find("#copy-code")).to_have_text("Copied")
        assert console.page.evaluate("navigator.clipboard.readText()") == code


# --- numbers and examples -------------------------------------------------------------------------------------------


def test_numbers_keep_every_digit(browser: Browser, server: LiveServer) -> None:
    script = """async ([text, language]) => {
      const { compact, parse, typedNumber, write } = await import("./console/json.js");
      return [compact(parse(text)), write(parse(text), language), write(typedNumber("18446744073709551615"))];
    }"""
    value = {
        "a": [SEED, -(2**63), 2**53, 0.1, -1, 1e300, True, None],
        "9999999999999999999": f'"{SEED}"\n\\',
        "b": SYSTEM,
    }
    with opened(browser, server) as console:
        console.open()
        for language, read in (("json", json.loads), ("python", ast.literal_eval)):
            compact, written, typed = console.page.evaluate(script, [json.dumps(value), language])
            assert json.loads(compact) == value
            assert read(written) == value
            assert typed == str(SEED)


def test_examples_are_of_the_served_kind(browser: Browser, real: LiveServer) -> None:
    """Both examples are one answer, and the embedded model still gives it."""
    with opened(browser, real) as console:
        console.open()
        console.show("formats")
        expect(console.find("#example-json")).to_contain_text("chat.completion")
        body = json.loads(console.find("#example-json").text_content() or "")
        *events, done, _ = (console.find("#example-events").text_content() or "").split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert done == "data: [DONE]"
    for name in ("content", "reasoning_content"):
        assert joined(chunks, 0, name) == body["choices"][0]["message"][name]
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}
    now = real.chat(**asked).json()
    theirs = {"id": "", "created": 0, "system_fingerprint": ""}
    assert now | theirs == body | theirs
    streamed = real.chunks(**asked, stream_options={"include_usage": True})
    for at in (0, 1, -3, -2, -1):
        assert streamed[at].keys() == chunks[at].keys()
    for at in (0, -2, -1):
        assert streamed[at] | theirs == chunks[at] | theirs


# --- axe-core -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's source, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("axe")
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "axe-core@^4"]
    result = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"npm cannot install axe-core here: {result.stderr.strip()[-300:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def violations(console: ConsolePage, axe: str, part: str = "html") -> list[str]:
    """What axe-core finds in a part of the page, in words; by all of its rules, WCAG's and its best practices."""
    # Through the debugger, which the page's policy does not bind; as a function, so that nothing is evaluated twice.
    script = f"async (part) => {{ if (!window.axe) {{ {axe} }} return await window.axe.run(part); }}"
    found = console.page.evaluate(script, part)
    assert {"color-contrast", "button-name"} <= {rule["id"] for rule in found["passes"]}
    return [
        f"{rule['id']}: {node['target']} {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.npm
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, server: LiveServer, engine: ScriptedEngine, axe: str, scheme: str) -> None:
    with opened(browser, server, color_scheme=scheme) as console:
        console.open()
        console.refusals = [422]
        assert not violations(console, axe)
        engine.play([delta("reasoning", "Two and "), delta("content", "It"), HOLD, *answer()])
        console.find("#run").click()
        expect(console.find(".answer")).to_have_text("It")
        assert not violations(console, axe)  # while it streams
        engine.streams[0].release()
        console.wait_for("Done")
        console.find(".reasoning summary").click()
        console.find(".end").get_by_text("Continue from here").click()
        console.say("Again")
        console.fill(seed="7", temperature="9")  # one changed, one out of range
        for group in console.find("#parameters details, .turn-reasoning").all():
            group.evaluate("details => { details.open = true }")
        for viewport in (DESKTOP, PHONE):
            console.page.set_viewport_size(viewport)
            for tab in ("answer", "code", "requests", "formats"):
                console.show(tab)
                assert not violations(console, axe, "#result"), tab
        assert not violations(console, axe)
        console.find("#run").click()
        expect(console.find("#answer-error")).to_be_visible()
        assert not violations(console, axe)
        console.show("requests")
        expect(console.find(".pill.bad")).not_to_have_count(0)
        assert not violations(console, axe, "#result")
        console.find("#key-button").evaluate("button => { button.hidden = false; button.click() }")
        expect(console.find("#key-dialog")).to_be_visible()
        assert not violations(console, axe, "#key-dialog")
