"""The door of the server, as pure ASGI middleware: what is refused before any other code runs.

In this order: a foreign origin, a missing or wrong key, no place in the queue (before the body is read), a body that is
too large or arrives too slowly. It also logs and counts every request, and sets the headers that protect browsers.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.errors import TesseraError
from tessera.serving.errors import ApiError
from tessera.serving.service import Service

logger = logging.getLogger(__name__)
SUBMITS = {"/v1/images/generations", "/v1/images/edits", "/v1/jobs"}  # with POST
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> dict[str, str]:
    """API keys by client, from a file with a line `client key` for each. Raises TesseraError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read the keys in {path}: {error}") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] in keys or len(words[1]) < 16 or not words[1].isascii():
            raise TesseraError(
                f"line {number} of {path} is not valid: write the name of a client, which no other line has, and its "
                "key of at least 16 ASCII characters"
            )
        keys[words[0]] = words[1]
    if not keys:
        raise TesseraError(f"{path} holds no key: write a line with the name of a client and its key")
    return keys


class Gate:
    """keys: by client; empty: nobody needs one. hosts: names in the Host header that are answered; None: all"""

    def __init__(
        self, app: ASGIApp, service: Service, keys: Mapping[str, str] | None = None, hosts: Sequence[str] | None = None
    ) -> None:
        self.app, self.service = app, service
        self._digests = [(client, hashlib.sha256(key.encode()).digest()) for client, key in (keys or {}).items()]
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no websockets
        request = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request
        status, start = 500, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = {**HEADERS, "x-request-id": request}
                message["headers"] = [
                    *message.get("headers", ()), *((name.encode(), value.encode()) for name, value in added.items())
                ]  # fmt: skip
            await send(message)

        place = None
        try:
            scope["state"]["client"] = client = self._check(scope)
            body = receive
            if scope["method"] == "POST":
                if scope["path"] in SUBMITS:
                    self.service.check_open()
                    scope["state"]["place"] = place = self.service.admission.enter(client)
                body = await self._body(scope, receive)
            await self.app(scope, body, answer)
        except ApiError as error:  # the connection is closed, because the rest of the body is not read
            headers = {**(error.headers or {}), "connection": "close"}
            await JSONResponse(error.body(), error.status_code, headers)(scope, receive, answer)
        except ConnectionResetError:
            status = 499  # as nginx calls a client that left
        finally:
            if place is not None and not place.taken:
                self.service.admission.leave(place)
            self._record(scope, request, status, time.perf_counter() - start)

    def _check(self, scope: Scope) -> str:
        """The client: the name of its key, or its address. Raises ApiError."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._hosts is not None and (urlsplit(f"//{host}").hostname or "") not in self._hosts:
            # A page of another site, whose name was made to point to this machine (DNS rebinding).
            raise ApiError(403, f"this server does not answer to the name '{host[:100]}'", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            raise ApiError(403, "requests from pages of other sites are refused", "wrong_origin")
        address = scope["client"][0] if scope.get("client") else "local"
        if not self._digests or not (scope["path"].startswith("/v1/") or scope["path"] == "/metrics"):
            return address
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Every key is compared, in constant time, so the time shows nothing about the keys.
        matches = [client for client, expected in self._digests if hmac.compare_digest(digest, expected)]
        if scheme.lower() != "bearer" or not matches:
            message = "send an API key of this server as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return matches[0]

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """The body, read up to its limits. Raises ApiError, and ConnectionResetError if the client leaves."""
        limits = self.service.options.limits
        headers: MutableMapping[bytes, bytes] = dict(scope["headers"])
        length, encoding = headers.get(b"content-length", b"0"), headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise ApiError(415, "compressed bodies are not accepted: leave out Content-Encoding", "content_encoding")
        too_large = ApiError(413, f"a body has at most {limits.max_body_bytes} bytes", "body_too_large")
        if not length.isdigit() or int(length[:20]) > limits.max_body_bytes:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limits.max_body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {limits.body_seconds:g} seconds", "slow_body") from None
        messages: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    def _record(self, scope: Scope, request: str, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", "other")  # with the names of parameters, so there are few
        self.service.metrics.requests.labels(scope["method"], path, status).inc()
        self.service.metrics.request_seconds.labels(scope["method"], path).observe(seconds)
        extra = {
            "request": request, "method": scope["method"], "path": scope["path"][:200], "status": status,
            "seconds": round(seconds, 4), "client": scope["state"].get("client"),
        }  # fmt: skip
        logger.log(
            logging.DEBUG if scope["path"] in ("/health", "/ready", "/metrics") else logging.INFO, "http", extra=extra
        )
