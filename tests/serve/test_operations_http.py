"""What operators see over a real socket: history, access log, metrics, readiness."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import QUESTION, SECONDS, LiveServer, all_free, connect, live, receive
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import HOLD, ScriptedEngine, answer, delta, finished

from headrace.engine import Engine, Usage
from headrace.engine.serve import history, readiness
from headrace.engine.serve.service import Service

SECRET = "xyzzy-plugh"


@pytest.fixture
def fresh() -> Iterator[tuple[LiveServer, ScriptedEngine]]:
    """A server of its own, with two keys: nothing in it is another test's."""
    engine = ScriptedEngine()
    with live(engine, keys=["one", "two"]) as server:
        server.client.headers["authorization"] = "Bearer one"
        yield server, engine


def entries(server: LiveServer, **query: Any) -> list[dict[str, Any]]:
    response = server.client.get("/v1/requests", params=query)
    assert response.status_code == 200, response.text
    return response.json()["data"]


# --- /v1/requests ---------------------------------------------------------------------------------------------------


def test_an_entry(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, engine = fresh
    engine.play(answer(usage=Usage(11, 7, 3, 2)))
    before = int(time.time())
    response = server.chat(messages=[{"role": "user", "content": SECRET}])
    listed = server.client.get("/v1/requests").json()
    [entry] = listed["data"]
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert listed["first_id"] == listed["last_id"] == entry["id"] == response.headers["x-request-id"]
    assert 0 < entry.pop("time_to_first_token_seconds") <= entry.pop("latency_seconds") < 20
    assert before <= entry.pop("created") <= time.time()
    assert entry.pop("user_agent").startswith("python-httpx/")
    del entry["id"]
    assert entry == {
        "object": "request", "path": "/v1/chat/completions", "status": 200, "error": None, "stream": False, "n": 1,
        "prompt_tokens": 11, "completion_tokens": 7, "reasoning_tokens": 3,
    }  # fmt: skip


def test_everything_that_generates_is_there_newest_first_and_nothing_else(
    fresh: tuple[LiveServer, ScriptedEngine],
) -> None:
    server, engine = fresh
    engine.play(answer(), [delta("content", "It"), finished("error", error="no")], [HOLD], answer())
    server.chunks()
    server.chat(stream=True)
    client = connect(server, key="one", stream=False)
    engine.wait_for(lambda: engine.running == 1)
    client.close()
    while len(entries(server)) < 3:
        time.sleep(0.005)
    server.chat(temperature=7)
    server.chat(model="other")
    server.client.post("/v1/completions", json={"prompt": "x"})
    server.client.post("/tokenize", json={"prompt": "x"})
    server.client.get("/v1/models")
    server.client.get("/nowhere")
    expected = [
        ("/v1/completions", 200, None), ("/v1/chat/completions", 404, "model_not_found"),
        ("/v1/chat/completions", 422, "invalid_request"), ("/v1/chat/completions", 499, "client_closed"),
        ("/v1/chat/completions", 200, "generation_failed"), ("/v1/chat/completions", 200, None),
    ]  # fmt: skip
    assert [(e["path"], e["status"], e["error"]) for e in entries(server)] == expected


def test_pages(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, _ = fresh
    for _ in range(7):
        server.chat()
    everything = [entry["id"] for entry in entries(server)]
    assert len(set(everything)) == 7
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 3}
    while True:
        page = server.client.get("/v1/requests", params=query).json()
        seen += [entry["id"] for entry in page["data"]]
        if not page["has_more"]:
            break
        server.chat()  # what comes in meanwhile moves nothing
        query["after"] = page["last_id"]
    assert seen == everything
    assert entries(server, after=everything[-1]) == []


@pytest.mark.parametrize(("query", "param"), [
    ({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"limit": "x"}, "limit"), ({"limit": "-1"}, "limit"),
    ({"limit": "1" * 5000}, "limit"), ({"limit": ""}, "limit"), ({"after": "req-0"}, "after"),
    ({"after": ""}, "after"),
])  # fmt: skip
def test_a_bad_page(fresh: tuple[LiveServer, ScriptedEngine], query: dict[str, Any], param: str) -> None:
    response = fresh[0].client.get("/v1/requests", params=query)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)


def test_a_key_sees_its_own(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, _ = fresh
    server.chat()
    first = entries(server)[0]["id"]
    server.client.headers["authorization"] = "Bearer two"
    assert entries(server) == []
    assert server.client.get("/v1/requests", params={"after": first}).status_code == 422
    server.chat()
    assert len(entries(server)) == 1


def test_it_is_bounded(fresh: tuple[LiveServer, ScriptedEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "HISTORY_LENGTH", 5)
    server, _ = fresh
    for _ in range(8):
        server.chat()
    ids = [entry["id"] for entry in entries(server)]
    assert len(ids) == 5
    assert server.chat().headers["x-request-id"] == entries(server)[0]["id"]


def test_no_text_is_kept(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, engine = fresh
    engine.play(answer(content=(SECRET,)))
    message = {"role": "user", "content": SECRET}
    server.chat(messages=[message], user=SECRET, stop=[SECRET])
    server.chat(messages=[{"role": SECRET, "content": SECRET}])
    server.client.post("/v1/completions", json={"prompt": SECRET})
    assert SECRET not in server.client.get("/v1/requests").text
    assert SECRET not in server.client.get("/metrics").text
    engine.play()
    assert not _mentions(server.service, set())


@pytest.mark.parametrize("stream", [False, True])
def test_no_text_is_kept_around_the_real_engine(real: LiveServer, real_engine: Engine, stream: bool) -> None:
    message = {"role": "user", "content": SECRET}
    fields: dict[str, Any] = {"stop": [SECRET], "user": SECRET, "stream": stream, "max_tokens": 3, "n": 2}
    assert real.chat(messages=[message], **fields).status_code == 200
    assert real.client.post("/v1/completions", json={"prompt": SECRET} | fields).status_code == 200
    all_free(real_engine)
    assert _mentions([SECRET], set())
    assert not _mentions(real.service, set())
    assert not _mentions(real_engine, set())


def _mentions(value: Any, seen: set[int]) -> bool:
    """Whether the secret can be reached from an object through data of ours."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, str | bytes):
        return SECRET in (value if isinstance(value, str) else value.decode("latin-1"))
    if isinstance(value, dict):
        return any(_mentions(item, seen) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set) or type(value).__name__ == "deque":
        return any(_mentions(item, seen) for item in value)
    if not type(value).__module__.startswith("headrace."):
        return False
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return any(_mentions(getattr(value, name, None), seen) for name in names)


# --- the access log -------------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    """The lines, once there are so many: a line follows its answer."""
    deadline = time.monotonic() + SECONDS
    while len(found := [r for r in caplog.records if r.name == "headrace.access"]) < count:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.005)
    return [json.loads(record.getMessage()) for record in found]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All of our logging, at its most talkative."""
    for name in ("headrace", "headrace.access", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        logger.setLevel(logging.DEBUG)
    yield caplog
    for name in ("headrace", "headrace.access", "uvicorn", "uvicorn.error"):
        logging.getLogger(name).removeHandler(caplog.handler)
        logging.getLogger(name).setLevel(logging.CRITICAL)


def test_a_line_for_every_request(fresh: tuple[LiveServer, ScriptedEngine], log: pytest.LogCaptureFixture) -> None:
    server, engine = fresh
    engine.play(answer(usage=Usage(11, 7, 3, 2)))
    chat = server.chat()
    server.client.get("/nowhere?api_key=hidden", headers={"authorization": "Bearer wrong-key"})
    first, second = lines(log, 2)
    assert first["id"] == chat.headers["x-request-id"]
    assert (first["key"], first["client"], first["method"], first["status"]) == (1, "127.0.0.1", "POST", 200)
    assert (first["prompt_tokens"], first["completion_tokens"], first["reasoning_tokens"]) == (11, 7, 3)
    assert (second["path"], second["status"], second["error"], second["key"]) == ("/nowhere", 401, "invalid_api_key", 0)
    assert "hidden" not in log.text


def test_neither_keys_nor_text_are_logged(
    fresh: tuple[LiveServer, ScriptedEngine], log: pytest.LogCaptureFixture
) -> None:
    server, engine = fresh

    class Careless(RuntimeError):
        pass

    said = [{"role": "user", "content": SECRET}]
    engine.play(Careless(f"cannot render {SECRET}"), [delta("content", SECRET), "no event"], answer())  # type: ignore
    assert server.chat(messages=said).status_code == 500
    assert server.chat(messages=said, stream=True).status_code == 200
    server.chat(messages=said)
    server.chat(messages=[{"role": SECRET, "content": SECRET}])
    server.client.post("/v1/chat/completions", content=f'{{"messages": "{SECRET}'.encode())
    server.client.get("/v1/models", headers={"authorization": f"Bearer {SECRET}"})
    assert len(lines(log, 6)) == 6
    assert "Careless at" in log.text  # the failure itself is told
    assert SECRET not in log.text
    assert "Bearer" not in log.text
    assert "one" not in [line["key"] for line in lines(log, 6)]


def test_what_a_client_writes_cannot_forge_a_line(
    fresh: tuple[LiveServer, ScriptedEngine], log: pytest.LogCaptureFixture
) -> None:
    server, _ = fresh
    server.client.get("/a%0a%7b%22status%22:200%7d/" + "x" * 1000, headers={"user-agent": ("é" + "y" * 1000).encode()})
    [line] = lines(log, 1)
    assert "\n" not in log.records[-1].getMessage()
    assert line["path"].startswith('/a\n{"status":200}')
    assert len(line["path"]) == len(line["user_agent"]) == 200


# --- /metrics -------------------------------------------------------------------------------------------------------


def sample(server: LiveServer, name: str, **labels: str) -> float:
    """The value of one of our samples."""
    text = server.client.get("/metrics").text
    found = [
        s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == f"headrace:{name}" and s.labels.items() >= labels.items()
    ]
    assert found, f"no {name} {labels} in {text}"
    return sum(found)


STEMS = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "request_success_total",
    "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "reasoning_tokens_total",
    "reasoning_budget_forced_total", "reasoning_truncated_total", "aborted_total", "num_preemptions_total",
]  # fmt: skip


def test_every_name_is_there_from_the_start_with_the_model_as_label(
    fresh: tuple[LiveServer, ScriptedEngine],
) -> None:
    for stem in STEMS:
        sample(fresh[0], stem, model_name="scripted/model")


def test_counts(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, engine = fresh
    long = answer(reasoning=("abc",), content=(), reason="length", usage=Usage(7, 3, 3, 0))
    failing = [delta("content", "ab"), finished("error", error="no", usage=Usage(7, 2, 0, 0))]
    forced = answer(reasoning=("ab",), usage=Usage(7, 12, 2, 4), queue_seconds=0.25)
    engine.play(forced, long, failing)
    assert server.chat(reasoning_budget=2).status_code == 200
    server.chunks(reasoning_budget=3, max_tokens=3)
    assert server.chat().status_code == 500
    server.chat(top_p=5)
    assert sample(server, "prompt_tokens_total") == 14
    assert sample(server, "generation_tokens_total") == 2 + 8 + 3 + 2  # as they came in deltas
    assert sample(server, "reasoning_tokens_total") == 5
    assert sample(server, "reasoning_budget_forced_total") == 1
    assert sample(server, "reasoning_truncated_total") == 1
    assert sample(server, "request_success_total", finished_reason="stop") == 1
    assert sample(server, "request_success_total", finished_reason="length") == 1
    assert sample(server, "request_failed_total") == 1
    assert sample(server, "prefix_cache_hits_total") == 4
    assert sample(server, "http_requests_total", path="/v1/chat/completions", status="200") == 2
    assert sample(server, "http_requests_total", path="/v1/chat/completions", status="422") == 1
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens"):
        assert sample(server, f"{name}_count") == 2
    assert sample(server, "time_to_first_token_seconds_count") == 3
    assert sample(server, "request_queue_time_seconds_sum") == 0.25
    assert sample(server, "request_generation_tokens_sum") == 15


@pytest.mark.parametrize("fields", [
    {"reasoning_effort": "none", "reasoning_budget": 0}, {"chat_template_kwargs": {"enable_thinking": False},
    "reasoning_budget": 0}, {"reasoning_budget": -1}, {"reasoning_budget": 1},
    {"reasoning_budget": 0, "chat_template_kwargs": {"reasoning_budget": 5}},
])  # fmt: skip
def test_a_budget_that_did_not_act_is_not_counted(
    fresh: tuple[LiveServer, ScriptedEngine], fields: dict[str, Any]
) -> None:
    server, engine = fresh
    engine.play(answer(reasoning=(), usage=Usage(7, 5, 0, 0)))
    assert server.chat(**fields).status_code == 200
    assert sample(server, "reasoning_budget_forced_total") == 0


def test_aborts_by_phase(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, engine = fresh
    engine.play([HOLD], [delta("content", "It"), HOLD])
    waiting = connect(server, key="one", stream=False)
    engine.wait_for(lambda: engine.running == 1)
    waiting.close()
    engine.wait_for(lambda: engine.running == 0)
    begun = connect(server, key="one", stream=True)
    receive(begun, b'"It"')
    begun.close()
    engine.wait_for(lambda: engine.running == 0)
    server.chat(top_p=5)  # the loop has been round since
    assert sample(server, "aborted_total", phase="waiting") == 1
    assert sample(server, "aborted_total", phase="generating") == 1
    assert sample(server, "request_success_total") == 0


def test_what_clients_invent_makes_no_labels(fresh: tuple[LiveServer, ScriptedEngine]) -> None:
    server, _ = fresh
    for i in range(5):
        server.client.get(f"/nowhere/{i}")
        server.client.get(f"/v1/models/{i}")
    assert "nowhere" not in server.client.get("/metrics").text
    assert sample(server, "http_requests_total", path="other", status="404") == 5
    assert sample(server, "http_requests_total", path="/v1/models/{model}", status="404") == 5


def test_metrics_of_the_real_engine(real: LiveServer, real_engine: Engine) -> None:
    def forced() -> float:
        return sample(real, "reasoning_budget_forced_total")

    before = {name: sample(real, name) for name in STEMS if name.endswith("_total")}
    queued = sample(real, "request_queue_time_seconds_count")
    body = real.chat(reasoning_budget=2, max_tokens=6, temperature=0).json()
    usage = body["usage"]
    assert forced() == before["reasoning_budget_forced_total"] + 1
    for name, key in (("prompt_tokens_total", "prompt_tokens"), ("generation_tokens_total", "completion_tokens")):
        assert sample(real, name) - before[name] == usage[key]
    assert sample(real, "reasoning_tokens_total") - before["reasoning_tokens_total"] == 2
    assert sample(real, "request_queue_time_seconds_count") == queued + 1
    assert sample(real, "kv_cache_usage_perc") == 0
    client = connect(real, stream=True, ignore_eos=True, max_tokens=1500)
    receive(client, b"delta")
    assert sample(real, "num_requests_running") == 1
    assert 0 < sample(real, "kv_cache_usage_perc") < 1
    assert sample(real, "state_cache_usage_perc") == 0.25
    client.close()


def test_before_the_model_is_there_it_says_so() -> None:
    with live(None) as server:
        for path in ("/metrics", "/health/ready"):
            response = server.client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "starting")
        assert server.client.get("/openapi.json").status_code == 200
        assert server.client.get("/v1/requests").json()["data"] == []


# --- readiness ------------------------------------------------------------------------------------------------------


class Watched(ScriptedEngine):
    """An engine whose steps the test decides."""

    moving = 0
    busy = False

    def stats(self) -> dict[str, int]:
        self.steps = self.moving
        return super().stats() | {"steps": self.moving, "running": int(self.busy)}


def ready(server: LiveServer) -> tuple[int, str | None]:
    response = server.client.get("/health/ready")
    return response.status_code, response.json().get("error", {}).get("code")


def test_an_idle_engine_is_asked_for_a_token_and_not_again_too_soon() -> None:
    engine = Watched()
    engine.play(lambda prompt: setattr(engine, "moving", engine.moving + 1) or answer())
    with live(engine) as server:
        assert ready(server) == (200, None)
        assert ready(server) == (200, None)
        assert len(engine.calls) == 1
        assert engine.calls[0].params.max_tokens == 1
        assert server.client.get("/v1/requests").json()["data"] == []  # the probe is nobody's request


@pytest.mark.parametrize("script", [[finished("error", error="broken")], [HOLD, finished()]])
def test_a_model_that_does_not_answer_is_not_ready(monkeypatch: pytest.MonkeyPatch, script: list[Any]) -> None:
    monkeypatch.setattr(readiness, "FRESH_SECONDS", 0.05)
    engine = Watched(script)
    with live(engine) as server:
        assert ready(server) == (503, "not_answering")
        assert server.client.get("/health/live").status_code == 200
        engine.wait_for(lambda: engine.running == 0)
        engine.play()
        assert ready(server) == (200, None)


def test_a_busy_engine_must_make_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Watched()
    engine.busy = True
    with live(engine) as server:
        assert ready(server) == (503, "not_answering")  # it has never shown a step
        engine.moving = 1
        assert ready(server) == (200, None)
        monkeypatch.setattr(readiness, "FRESH_SECONDS", 0.0)
        assert ready(server) == (200, None)  # the clock of the stall begins here
        monkeypatch.setattr(readiness, "STALL_SECONDS", 0.0)
        assert ready(server) == (503, "not_answering")
        engine.moving = 2
        monkeypatch.setattr(readiness, "FRESH_SECONDS", 10.0)
        assert ready(server) == (200, None)
        assert not engine.calls


def test_the_real_engine_is_ready_because_it_answers(real: LiveServer, real_engine: Engine) -> None:
    assert ready(real) == (200, None)
    assert real_engine.stats()["steps"] > 0


# --- Retry-After ----------------------------------------------------------------------------------------------------


def test_retry_after_is_the_time_for_the_queue_at_the_present_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    with live(engine) as server:
        service: Service = server.service
        assert service.retry_after() == 1
        now = time.monotonic()
        service._ends.extend([now - 8, now - 6, now - 4, now - 2])  # one answer each two seconds
        monkeypatch.setattr(engine, "stats", lambda: {"running": 64, "waiting": 64, "total_slots": 64})
        response = server.chat()
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) == 60  # 128 s would be, but nobody is sent away for longer
        monkeypatch.setattr(engine, "stats", lambda: {"running": 64, "waiting": 5, "total_slots": 64})
        assert 10 <= service.retry_after() <= 11
        assert not engine.calls
        assert server.client.post("/v1/chat/completions", json={"messages": QUESTION}).status_code == 200
