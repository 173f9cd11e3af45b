"""Who may use a server: keys, loopback, and web pages of other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, live
from scripted_engine import ScriptedEngine

from headrace.engine.serve.access import check_host, read_keys

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
