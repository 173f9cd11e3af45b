"""Who may use a server: keys, loopback, and web pages of other hosts."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, live
from scripted_engine import ScriptedEngine

from headrace.engine.serve.access import PUBLIC_PATHS, Access, check_host, read_keys
from headrace.engine.serve.app import SAFE_HEADERS

KEYS = ["key-one", "schlüssel-zwei"]


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with live(ScriptedEngine(), keys=KEYS) as server:
        yield server


@pytest.mark.parametrize(("header", "status"), [
    ("Bearer key-one", 200), ("bearer   key-one", 200), ("Bearer schlüssel-zwei", 200), ("Bearer key-on", 401),
    ("Bearer key-one2", 401), ("Bearer", 401), ("Basic key-one", 401), ("key-one", 401), ("", 401), (None, 401),
    ("Bearer KEY-ONE", 401),
])  # fmt: skip
def test_keys(keyed: LiveServer, header: str | None, status: int) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    response = keyed.client.get("/v1/models", headers=headers)
    assert response.status_code == status
    assert "x-request-id" in response.headers
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_without_the_key_nothing_but_health_is_served() -> None:
    engine = ScriptedEngine()
    with live(engine, keys=KEYS) as server:
        assert server.chat().status_code == 401
        assert server.client.get("/nowhere").status_code == 401
        assert server.client.get("/health/ready").status_code == 200
        assert not engine.calls
        server.client.headers["authorization"] = "Bearer key-one"
        assert server.chat().status_code == 200


@pytest.mark.parametrize(("origin", "status"), [
    ("https://evil.example", 403), ("http://localhost.evil.example", 403), ("null", 403), ("http://10.0.0.1", 403),
    ("http://[", 403),
    ("http://localhost:3000", 200), ("http://127.0.0.1", 200), ("http://[::1]:8000", 200),
])  # fmt: skip
def test_a_server_without_keys_ignores_foreign_web_pages(server: LiveServer, origin: str, status: int) -> None:
    assert server.client.get("/v1/models", headers={"origin": origin}).status_code == status


def test_with_a_key_the_origin_does_not_matter(keyed: LiveServer) -> None:
    headers = {"origin": "https://app.example", "authorization": "Bearer key-one"}
    assert keyed.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_without_keys_loopback_is_allowed(host: str) -> None:
    check_host(host, [])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_without_keys_nothing_else_is(host: str) -> None:
    with pytest.raises(ValueError, match="without API keys only a loopback address"):
        check_host(host, [])
    check_host(host, ["key"])


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  key-one \nkey-two\n")
    assert read_keys(file) == ["key-one", "key-two"]
    file.write_text("# none yet\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_keys(file)


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200), ("app.localhost", 200),
    ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("192.0.2.7", 403), ("[", 403),
    ("", 403),
])  # fmt: skip
def test_a_server_without_keys_knows_its_name(server: LiveServer, host: str, status: int) -> None:
    """A page whose own name was pointed at this machine (DNS rebinding) sends no Origin, but it sends its name."""
    assert server.client.get("/v1/models", headers={"host": host}).status_code == status


def test_with_a_key_the_name_does_not_matter(keyed: LiveServer) -> None:
    headers = {"host": "llm.example", "authorization": "Bearer key-one"}
    assert keyed.client.get("/v1/models", headers=headers).status_code == 200


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    access = Access(KEYS)
    assert access.check("/v1/models", {b"authorization": b"Bearer key-one"}) == 1
    assert len(compared) == len(KEYS)  # the first match does not end it
    assert {len(digest) for pair in compared for digest in pair} == {32}  # nor does a length tell
    assert not any(key.encode() in repr(vars(access)).encode() for key in KEYS)


PUBLIC = ("/health/live", "/health/ready", "/openapi.json")


def test_what_needs_no_key(keyed: LiveServer) -> None:
    assert frozenset(PUBLIC) == PUBLIC_PATHS
    for path in PUBLIC:
        assert keyed.client.get(path).status_code == 200
    for path in ("/v1/models", "/v1/requests", "/metrics", "/health", "/health/live/", "/console/", "/console/x.js"):
        assert keyed.client.get(path).status_code == 401


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/models", 200), ("GET", "/health/live", 200), ("GET", "/metrics", 200), ("GET", "/nowhere", 404),
    ("POST", "/v1/chat/completions", 400), ("DELETE", "/v1/models", 405), ("GET", "/openapi.json", 200),
])  # fmt: skip
def test_safe_headers_are_on_every_response(server: LiveServer, method: str, path: str, status: int) -> None:
    response = server.client.request(method, path)
    assert response.status_code == status
    assert response.headers.items() >= SAFE_HEADERS.items()
    assert response.headers["x-request-id"].startswith("req-")
    assert "server" not in response.headers


def test_safe_headers_are_on_a_stream(server: LiveServer) -> None:
    headers = server.chat(stream=True).headers
    own = {"cache-control": "no-store, no-transform"}  # a proxy that compresses events would hold them back
    assert headers.items() >= {**SAFE_HEADERS, **own}.items()
    assert headers["x-request-id"].startswith("req-")


def test_ids_are_the_servers_and_differ(server: LiveServer) -> None:
    ids = {server.client.get("/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert "mine" not in ids
