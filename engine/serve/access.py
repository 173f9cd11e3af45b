"""Who may ask: Bearer keys compared in constant time, and what a server without keys allows."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from headrace.engine.serve.errors import ApiError

PUBLIC_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json"})
"""What needs no key beside the console's files: it tells nothing that the documentation does not."""

SAFE_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""On every response that does not set its own (the console does): no page, and nothing for another site's."""


class Access:
    """The keys of a server. Without any, only programs on this machine may use it."""

    def __init__(self, keys: Iterable[str] = (), public: frozenset[str] = PUBLIC_PATHS) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._public = public

    @property
    def has_keys(self) -> bool:
        """Whether a key is wanted."""
        return bool(self._digests)

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> int:
        """The number of the key that a request has, from 1; 0 where none is wanted.

        Raises ApiError: 401, or at a server without keys 403 for what a web page of another host has sent.
        """
        if path in self._public:
            return 0
        if not self._digests:
            _check_browser(headers)
            return 0
        authorization = headers.get(b"authorization", b"")
        scheme, _, key = authorization.strip().partition(b" ")
        presented = hashlib.sha256(key.strip()).digest()
        # Every key is compared, in constant time: how long this takes tells nothing of how close a guess was.
        matches = [hmac.compare_digest(presented, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            reason = "wrong API key" if authorization else "missing API key: send 'Authorization: Bearer KEY'"
            raise ApiError(401, reason, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return matches.index(True) + 1


def _check_browser(headers: Mapping[bytes, bytes]) -> None:
    # A web page from elsewhere can make a browser on this machine post here; browsers say so in Origin. And a page
    # whose own name was pointed at this machine (DNS rebinding) reads answers too: its name then stands in Host.
    origin, host = headers.get(b"origin"), headers.get(b"host")
    if origin is not None and not is_loopback_name(_host_of(origin)):
        message = "a server without API keys does not answer web pages of other hosts"
        raise ApiError(403, message, code="foreign_origin")
    if host is not None and not is_loopback_name(_host_of(b"http://" + host)):
        message = "a server without API keys answers only to the names of this machine's loopback, as localhost"
        raise ApiError(403, message, code="foreign_host")


def _host_of(origin: bytes) -> str | None:
    try:
        return urlsplit(origin.decode("latin-1")).hostname
    except ValueError:  # not a URL, so not one of ours
        return None


def is_loopback_name(host: str | None) -> bool:
    """Whether a host name or address, unresolved, can only mean this machine."""
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_host(host: str, keys: Sequence[str]) -> None:
    """Raise ValueError if a server with these keys must not listen on this host."""
    addresses = [info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    if not keys and not all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in addresses):
        raise ValueError(f"host {host} is reachable from outside: without API keys only a loopback address is allowed")


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line; blank lines and lines with # in front are skipped. ValueError if it has none."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no API key")
    return keys
