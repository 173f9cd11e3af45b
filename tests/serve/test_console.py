"""The console at ``/``, in a headless Chromium: what people see and do, and what the page must never do."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import resources
from typing import Any

import pytest
from console_page import PHONE, ConsolePage, chromium, opened
from live_server import LiveServer, live
from playwright.sync_api import Browser, expect
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished

from headrace.engine import Usage
from headrace.engine.serve.openapi import document
from headrace.engine.serve.profiles import NIM, OPENAI, Profile
from headrace.tokenizer import template_options

LARGEST_SEED = 2**64 - 1
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;"
Opener = Callable[..., ConsolePage]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as program:
        yield program


@pytest.fixture
def visit(browser: Browser) -> Iterator[Opener]:
    """Open the console of a server; its page is checked when the test has passed."""
    with ExitStack() as pages:
        yield lambda server, **context: pages.enter_context(opened(browser, server, **context))


@pytest.fixture
def console(visit: Opener, server: LiveServer) -> ConsolePage:
    return visit(server).open()


# --- what is served -------------------------------------------------------------------------------------------------


def files() -> dict[str, str]:
    folder = resources.files("headrace.engine.serve.console")
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file() and file.name != "__init__.py"}


def test_the_files_need_no_key_and_bring_their_policy() -> None:
    names = files()
    assert {"index.html", "console.css", "console.js", "example.json", "example.sse"} <= set(names)
    with live(ScriptedEngine(), keys=["secret"]) as server:
        for name, text in names.items():
            path = "/" if name == "index.html" else f"/console/{name}"
            response = server.client.get(path)
            assert (response.status_code, response.text) == (200, text)
            policy = response.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= {
                *policy
            }
            assert "require-trusted-types-for 'script'" in policy
            assert "unsafe" not in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            tag = response.headers["etag"]
            for known in (tag, f'"other", W/{tag}', "*"):
                again = server.client.get(path, headers={"if-none-match": known})
                assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
            assert server.client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
        for path in ("/console", "/console/", "/console/__init__.py", "/console/../app.py", "/index.html"):
            assert server.client.get(path).status_code == 401
        server.client.headers["authorization"] = "Bearer secret"
        assert server.client.get("/console/__init__.py").status_code == 404


def test_nothing_in_the_files_parses_html_or_comes_from_elsewhere() -> None:
    for name, text in files().items():
        own = text.replace("http://www.w3.org/2000/svg", "").replace("'http://www", "")
        assert not re.search(r"https?://|\burl\(|@import|<style|style=|\son\w+=\"", own), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        if name.endswith((".js", ".css")):
            assert max(map(len, text.splitlines())) <= 120, name
            assert len(text.splitlines()) <= 500, name


# --- the form -------------------------------------------------------------------------------------------------------


def expected_defaults(profile: Profile, model: str) -> dict[str, Any]:
    """Path to default, read from the schema by other means than the page's."""
    schemas = document(profile, model, keys=False)["components"]["schemas"]
    chat = schemas["ChatRequest"]["properties"]
    nested = {"stream_options": "StreamOptions", "chat_template_kwargs": "TemplateArguments"}
    flat = {name: field for name, field in chat.items() if name not in (*nested, "messages")}
    for parent, name in nested.items():
        flat |= {f"{parent}.{field}": value for field, value in schemas[name]["properties"].items()}
    return {path: field["default"] for path, field in flat.items() if "default" in field}


@pytest.mark.parametrize("profile", [NIM, OPENAI], ids=["nim", "openai"])
def test_the_form_is_the_schema(visit: Opener, profile: Profile) -> None:
    with live(ScriptedEngine(), profile=profile) as server:
        console = visit(server).open()
        defaults = expected_defaults(profile, "scripted/model")
        names = console.find(".field").evaluate_all("all => all.map(field => field.dataset.path)")
        assert sorted(names) == sorted(defaults)
        assert len(defaults) > 17
        for path, default in defaults.items():
            control = console.parameter(path)
            if isinstance(default, bool):
                assert control.is_checked() is default, path
            else:
                shown = "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
                assert control.input_value() == shown, path
        hints = {path: console.find(f'[id="parameter-{path}-hint"]').text_content() or "" for path in defaults}
        assert f"0 to {profile.max_temperature:g}, default 1" in hints["temperature"]
        assert f"0 to {LARGEST_SEED}." in hints["seed"]
        assert "-1 to 32768, default 16384." in hints["reasoning_budget"]
        assert console.find("#parameter-reasoning_effort option").all_text_contents() == list(profile.efforts)
        assert "logit_bias" in (console.find(".refused").text_content() or "")
        assert console.find(".field.changed").count() == 0


def test_every_parameter_reaches_the_engine(console: ConsolePage, engine: ScriptedEngine) -> None:
    console.fill(
        reasoning_budget="-1", temperature="0.25", top_p="0.5", max_tokens="99", seed=str(LARGEST_SEED),
        stop='END\n"\\n\\n"', n="2", top_logprobs="3",
    )  # fmt: skip
    for name in ("logprobs", "ignore_eos", "return_token_ids"):
        console.parameter(name).check()
    console.parameter("reasoning_effort").select_option("low")
    console.parameter("chat_template_kwargs.truncate_history_thinking").select_option("false")
    console.parameter("chat_template_kwargs.force_nonempty_content").select_option("true")
    engine.play(several("It is 4.", "It is four."), answer())
    assert console.find(".field.changed").count() == 14
    console.run()
    [call] = engine.calls
    params = call.params
    assert params.seed == LARGEST_SEED
    assert (params.temperature, params.top_p, params.max_tokens, params.n) == (0.25, 0.5, 99, 2)
    assert (params.stop, params.logprobs, params.top_logprobs) == (("END", "\n\n"), True, 3)
    assert params.ignore_eos
    assert call.options.chat_template_kwargs == {
        "enable_thinking": True, "low_effort": True, "reasoning_budget": -1, "truncate_history_thinking": False,
        "force_nonempty_content": True,
    }  # fmt: skip
    console.find("#reset").click()
    assert console.find(".field.changed").count() == 0
    console.run()
    assert engine.calls[1].params.seed is None
    assert engine.calls[1].params.temperature == 1


def test_effort_and_arguments_become_what_the_tokenizer_makes_of_them(console: ConsolePage) -> None:
    efforts = {name: dict(template_options(name)) for name in ("none", "low", "high")}
    switches = [None, True, False]
    for effort, own in efforts.items():
        for thinking in switches:
            for low in switches:
                given = {"enable_thinking": thinking, "low_effort": low}
                given = {name: value for name, value in given.items() if value is not None}
                script = "async ([own, given]) => (await import('./console/request.js')).mergeKwargs(own, given)"
                assert console.page.evaluate(script, [own, given]) == template_options(effort, given), (effort, given)


def test_the_conversation_is_always_in_order(console: ConsolePage, engine: ScriptedEngine) -> None:
    console.find(".turn.system textarea").fill("Be brief.")
    console.find(".turn.context textarea").fill("Two is 2.")
    console.say("One?")
    console.run()
    console.find(".end").get_by_text("Continue from here").click()
    expect(console.find(".turn.user textarea").last).to_be_focused()
    console.say("And two?")
    console.run()
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."},
        {"role": "context", "content": "Two is 2."},
        {"role": "user", "content": "And two?"},
    ]
    assert engine.calls[1].prompt == expected
    console.find("#add-turn").click()
    expect(console.find(".turn.assistant textarea").nth(2)).to_be_focused()
    console.find(".turn.user button").nth(1).click()  # the middle exchange
    assert console.find(".turn.user").count() == 2
    console.find(".turn.user button").last.click()
    assert console.find(".turn.user").count() == 1
    assert not console.find(".turn.user button").is_visible()
    console.run()
    assert [turn["content"] for turn in engine.calls[2].prompt] == ["Be brief.", "Two is 2.", "One?"]


def several(*texts: str) -> list[Any]:
    """A script of as many choices, of which the second thinks."""
    parts = [delta("content", text, index=index) for index, text in enumerate(texts)]
    return [delta("reasoning", "Hm.", index=1), *parts, *(finished(index=index) for index in range(len(texts)))]


# --- an answer ------------------------------------------------------------------------------------------------------


def test_it_streams_with_the_reasoning_folded(console: ConsolePage, engine: ScriptedEngine) -> None:
    engine.play([delta("reasoning", "Two and "), HOLD, *answer(("two.",), usage=Usage(11, 18, 12, 3))])
    console.fill(reasoning_budget="48")
    console.find("#run").click()
    summary = console.find(".reasoning summary")
    expect(summary).to_have_text("Thinking: 8 of 48 budget tokens")
    console.wait_for("Thinking")
    colours = "run => [getComputedStyle(run).color, getComputedStyle(run).backgroundColor]"
    assert len(set(console.find("#run").evaluate(colours))) == 2  # also under the pointer
    assert not console.find(".reasoning .text").is_visible()
    assert abs(console.find("progress").evaluate("bar => bar.value") - 8 / 48) < 1e-6
    assert console.find("#run").get_attribute("aria-disabled") == "true"
    engine.streams[0].release()
    console.wait_for("Done")
    expect(console.find(".answer")).to_have_text("It is 4.")
    expect(summary).to_have_text("Thought: 12 of 48 budget tokens")
    summary.click()
    expect(console.find(".reasoning .text")).to_have_text("Two and two.")
    facts = console.find("#answer-facts").text_content() or ""
    assert "11 prompt (3 cached) + 18" in facts
    assert re.search(r"first token\d+\.\d\d s", facts)
    assert re.search(r"speed(, overall)?[\d.]+ tokens/s", facts)
    assert "finishstop" in facts
    assert len(engine.calls) == 1
    console.show("formats")
    raw = console.find("#last-raw").text_content() or ""
    assert raw.endswith("data: [DONE]\n\n")
    assert '"reasoning_content":"Two and "' in raw


def test_a_json_answer_and_several_choices(console: ConsolePage, engine: ScriptedEngine) -> None:
    texts = ["First.", "Second."]
    engine.play(several(*texts))
    console.fill(n="2")
    for stream in (True, False):
        console.parameter("stream").set_checked(stream)
        console.run()
        assert console.find(".choice h3").all_text_contents() == ["Choice 0", "Choice 1"]
        assert console.find(".answer").all_text_contents() == texts
        assert [folded.is_visible() for folded in console.find(".reasoning").all()] == [False, True]
    console.show("formats")
    expect(console.find("#last-type")).to_have_text("application/json")
    assert json.loads(console.find("#last-raw").text_content() or "")["object"] == "chat.completion"


def test_stop_keeps_what_came_and_frees_the_engine(console: ConsolePage, engine: ScriptedEngine) -> None:
    engine.play([delta("reasoning", "Two"), delta("content", "It is "), HOLD], [HOLD])
    for stop in (lambda: console.find("#stop").click(), lambda: console.page.keyboard.press("Escape")):
        engine.play([delta("reasoning", "Two"), delta("content", "It is "), HOLD])
        console.find("#run").click()
        expect(console.find(".answer")).to_have_text("It is")
        stop()
        console.wait_for("Stopped")
        engine.wait_for(lambda: engine.running == 0)
        assert engine.streams[-1].aborted.is_set()
        expect(console.find(".answer")).to_have_text("It is")
        expect(console.find(".end .why")).to_have_text("stopped by you")
        assert console.find("#stop").is_disabled()
    engine.play([HOLD])
    console.find("#run").click()
    engine.wait_for(lambda: engine.running == 1)
    console.page.keyboard.press("Escape")
    expect(console.find("#answer-body")).to_have_text("Stopped before the first token.")
    engine.wait_for(lambda: engine.running == 0)


def test_a_refusal_names_its_field_and_leads_to_it(console: ConsolePage, engine: ScriptedEngine) -> None:
    console.refusals = [422]
    for path, value, message in (
        ("temperature", "1.5", "temperature must be at most 1, got 1.5"),
        ("seed", "12a", 'seed must be an integer, got "12a"'),
        ("top_logprobs", "1", "top_logprobs needs logprobs to be true"),
        ("reasoning_budget", "-2", "chat_template_kwargs.reasoning_budget must be at least -1, got -2"),
    ):
        control = console.parameter(path)
        control.fill(value)
        console.find("#run").click()
        error = console.find("#answer-error")
        expect(error.locator("p").first).to_have_text(message)
        expect(error).to_contain_text("422")
        expect(control).to_have_attribute("aria-invalid", "true")
        error.locator("button").click()
        expect(control).to_be_focused()
        console.find("#reset").click()
    assert console.find("[aria-invalid]").count() == 0
    assert not engine.calls
    console.run()
    assert not console.find("#answer-error").is_visible()


def test_failures_on_the_way(console: ConsolePage, server: LiveServer, engine: ScriptedEngine) -> None:
    console.refusals = [500]
    error = console.find("#answer-error p").first
    engine.play([finished("error", error="not finite")])
    message = server.chat().json()["error"]["message"]
    engine.play([delta("content", "It is "), finished("error", error="not finite")])
    console.find("#run").click()
    expect(error).to_have_text(message)
    expect(console.find(".answer")).to_have_text("It is")
    engine.play([finished("error", error="not finite")])
    console.find("#run").click()
    expect(console.find(".answer")).to_have_count(0)
    expect(error).to_have_text(message)
    expect(console.find("#answer-error")).to_contain_text("500")
    console.page.route("**/v1/chat/completions", lambda route: route.abort())
    console.find("#run").click()
    expect(error).to_contain_text("the server cannot be reached")
    console.complaints = [text for text in console.complaints if "net::ERR_FAILED" not in text]
    console.page.unroute("**/v1/chat/completions")
    body = 'data: {"choices":[{"index":0,"delta":{"content":"It"},"finish_reason":null}]}\n\n'
    events = {"body": body, "content_type": "text/event-stream"}
    console.page.route("**/v1/chat/completions", lambda route: route.fulfill(**events))
    console.find("#run").click()
    expect(error).to_have_text("the stream broke off before its end")
    expect(console.find(".answer")).to_have_text("It")


def test_what_a_model_writes_is_text(visit: Opener, server: LiveServer, engine: ScriptedEngine) -> None:
    console = visit(server, user_agent=HOSTILE).open()
    engine.play(answer((HOSTILE,), (HOSTILE,)))
    console.say(HOSTILE)
    console.run()
    console.find(".reasoning summary").click()
    assert console.find(".reasoning .text").text_content() == HOSTILE
    assert console.find(".answer").text_content() == HOSTILE
    assert console.page.evaluate("[document.querySelector('.answer').childElementCount, document.images.length]") == [
        0,
        0,
    ]
    for language in ("curl", "python", "javascript", "engine"):
        assert json.dumps(HOSTILE) in console.code(language)
    console.show("requests")
    assert console.find("#requests-rows .agent").first.text_content() == HOSTILE
    console.show("formats")
    assert console.page.title() == "Headrace console"
    assert console.page.evaluate("document.querySelectorAll('img, iframe, script').length") == 1


# --- keys, requests, a server that is not ready -----------------------------------------------------------------------


def test_the_key_is_asked_for_and_kept_in_the_tab(visit: Opener) -> None:
    engine = ScriptedEngine()
    with live(engine, keys=["schlüssel"]) as server:
        console = visit(server).open()
        console.refusals = [401]
        dialog, key = console.find("#key-dialog"), console.find("#key")
        expect(dialog).to_be_visible()
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(console.find("#key-reason")).to_have_text("wrong API key")
        key.press("Escape")  # without a key the form and the code are there, and running asks again
        expect(dialog).not_to_be_visible()
        assert "$HEADRACE_API_KEY" in console.code("curl")
        console.find("#run").click()
        expect(dialog).to_be_visible()
        key.fill("schlüssel")
        key.press("Enter")
        console.wait_for("Done")
        expect(console.find(".answer")).to_have_text("It is 4.")
        console.find("#key-button").click()
        key.fill("schlüssel")
        key.press("Enter")
        expect(console.find("#context")).to_have_text("context 4096")
        kept = "JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])"
        assert console.page.evaluate(kept) == '[{},{},""]'
        assert "schlüssel" not in console.page.content()
        for language in ("curl", "python", "javascript", "engine"):
            assert "schlüssel" not in console.code(language)
        console.page.reload()
        expect(dialog).to_be_visible()


def test_recent_requests(visit: Opener) -> None:
    engine = ScriptedEngine()
    with live(engine) as server:
        console = visit(server).open()
        console.show("requests")
        expect(console.find("#requests-note")).to_have_text("None yet. Run a request, and it appears here.")
        engine.play(answer(usage=Usage(11, 7, 3, 2)))
        server.client.headers["user-agent"] = "probe/1"
        for _ in range(24):
            server.chat()
        server.chat(temperature=9)
        console.find("#requests-refresh").click()
        rows = console.find("#requests-rows tr")
        expect(rows).to_have_count(20)
        cells = rows.nth(0).locator("td").all_text_contents()
        assert (cells[1], cells[2], cells[3]) == ("422invalid_request", "chat/completions", "probe/1")
        cells = rows.nth(1).locator("td").all_text_contents()
        assert re.fullmatch(r"\d\d:\d\d:\d\d", cells[0])
        assert cells[1:7] == ["200", "chat/completionsjson", "probe/1", "11", "7", "3"]
        assert all(re.fullmatch(r"\d+ ms|\d+\.\d\d s", cell) for cell in cells[7:])
        console.find("#requests-older").click()
        expect(rows).to_have_count(25)
        assert not console.find("#requests-older").is_visible()


def test_it_waits_for_a_server_that_is_still_loading(visit: Opener) -> None:
    with live(None) as server:
        console = visit(server)
        console.page.goto(server.url)
        expect(console.find("#model")).to_have_text("Loading the model")
        assert console.find("#run").is_disabled()
        server.service.attach(ScriptedEngine())
        expect(console.find("#model")).to_have_text("scripted/model")
        console.run()


# --- hands and eyes -------------------------------------------------------------------------------------------------


def test_with_the_keyboard_alone(console: ConsolePage, engine: ScriptedEngine) -> None:
    keyboard = console.page.keyboard
    console.find(".turn.user textarea").focus()
    keyboard.press("Control+Enter")
    console.wait_for("Done")
    assert len(engine.calls) == 1
    console.find("#tab-answer").focus()
    for key, tab in (("ArrowRight", "code"), ("End", "formats"), ("ArrowRight", "answer"), ("ArrowLeft", "formats")):
        keyboard.press(key)
        expect(console.find(f"#tab-{tab}")).to_be_focused()
        expect(console.find(f"#{tab}")).to_be_visible()
    # Every stop of the tab key shows where it is, and the way through the page ends.
    console.page.evaluate("document.activeElement.blur(); document.querySelector('.skip').focus()")
    seen = []
    for _ in range(60):
        keyboard.press("Tab")
        script = """() => {
          const at = document.activeElement, style = getComputedStyle(at);
          const shown = at.type === "radio" ? getComputedStyle(at.nextElementSibling) : style;
          return [at.id || at.className || at.tagName, shown.outlineStyle, shown.outlineWidth];
        }"""
        name, style, width = console.page.evaluate(script)
        if name == "BODY":
            break
        assert (style, width) != ("none", "0px") and style != "none", name
        seen.append(name)
    assert {"add-turn", "parameter-temperature", "run", "tab-formats", "reset"} <= set(seen)


def test_nothing_is_wider_than_the_window(visit: Opener, server: LiveServer, engine: ScriptedEngine) -> None:
    console = visit(server, viewport=PHONE).open()
    engine.play(answer(("x" * 400 + " y",), ("z" * 400,)))
    console.say("w" * 400)
    console.fill(seed=str(LARGEST_SEED))
    console.run()
    console.find(".reasoning summary").click()
    for group in console.find("#parameters details").all():
        group.evaluate("details => { details.open = true }")
    for width in (320, PHONE["width"], 768, 1920):
        console.page.set_viewport_size({"width": width, "height": 640})
        for tab in ("answer", "code", "requests", "formats"):
            console.show(tab)
            assert console.page.evaluate("document.documentElement.scrollWidth") <= width, (width, tab)
            expect(console.find("#run")).to_be_in_viewport()
            expect(console.find("#stop")).to_be_in_viewport()


def test_a_long_answer_stays_quick(console: ConsolePage, engine: ScriptedEngine) -> None:
    """Text is appended, not written anew: 4000 deltas take seconds, not minutes, and all of them arrive."""
    words = [f"word{i} " for i in range(4000)]
    engine.play(answer(("Hm.",), words))
    before = time.monotonic()
    console.run()
    assert console.find(".answer").text_content() == "".join(words)
    assert time.monotonic() - before < 20
