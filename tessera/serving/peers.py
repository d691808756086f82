"""Several servers with one output folder: requests for an active job go to the server that has it.

The id of a job names its server (its replica). Each server listens at a second address for its peers and writes it,
with a secret, into the folder. Every server answers for what is in the folder, such as the results of finished jobs.
"""

import asyncio
import hmac
import json
import logging
import os
import re
import secrets
import socket

import httpx
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.serving.errors import ApiError
from tessera.serving.gate import Gate
from tessera.serving.jobs import ACTIVE, ID, UNFINISHED
from tessera.serving.service import Service

logger = logging.getLogger(__name__)
SECRET = b"x-tessera-peer"
JOB_PATH = re.compile(rf"/v1/jobs/({ID.pattern})(/.*)?")
HOP_BY_HOP = {b"connection", b"transfer-encoding", b"keep-alive", b"te", b"upgrade"}


class PeerRouter:
    """The application of a server, which passes requests for active jobs of its peers on to them."""

    def __init__(self, app: Gate, service: Service) -> None:
        self.app, self.service = app, service
        self.folder, self.replica = service.options.out / "replicas", service.options.replica
        self.secret = secrets.token_hex(32)
        self._client: httpx.AsyncClient | None = None
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peer = await asyncio.to_thread(self._peer, scope["path"])
            if peer is not None:
                await self._forward(peer, scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def listen(self, host: str) -> None:
        """Listen for peers at a free port of an address, which they can reach."""
        config = uvicorn.Config(self._only_peers, log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listening.bind((host, 0))
        self._server.capture_signals = _no_signals  # pyright: ignore (they are for the process around this)
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[listening]))
        self.folder.mkdir(parents=True, exist_ok=True)
        shown = f"[{host}]" if ":" in host else host
        path = self.folder / f"{self.replica}.json"
        data = {"address": f"http://{shown}:{listening.getsockname()[1]}", "secret": self.secret}
        partial = path.with_suffix(".new")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(data))
        os.replace(partial, path)

    async def close(self) -> None:
        (self.folder / f"{self.replica}.json").unlink(missing_ok=True)
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        if self._client is not None:
            await self._client.aclose()

    def _peer(self, path: str) -> tuple[str, str, str] | None:
        """Address and secret of the server that has the job of a path, and the job; None: this one answers."""
        match = JOB_PATH.fullmatch(path)
        if match is None or match[1].split("_")[1] == self.replica:
            return None
        record = self.service.folder.read(match[1])
        if record is None or record.state not in ACTIVE:
            return None
        try:
            data = json.loads((self.folder / f"{match[1].split('_')[1]}.json").read_text())
            return data["address"], data["secret"], match[1]
        except (OSError, ValueError, KeyError):
            self._close_job(match[1])
            return None

    def _close_job(self, job: str) -> None:
        """The server of a job is gone: it will not be finished."""
        record = self.service.folder.read(job)
        if record is not None and record.state in ACTIVE:
            self.service.folder.write(record.model_copy(update={"state": "failed", "error": UNFINISHED}))

    async def _forward(self, peer: tuple[str, str, str], scope: Scope, receive: Receive, send: Send) -> None:
        address, secret, job = peer
        self._client = self._client or httpx.AsyncClient(timeout=httpx.Timeout(10, read=None), trust_env=False)
        query = scope["query_string"].decode("latin-1")
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP_BY_HOP | {b"content-length"}]
        request = self._client.build_request(
            scope["method"],
            f"{address}{scope['path']}{'?' if query else ''}{query}",
            headers=[*headers, (SECRET, secret.encode())],
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.ConnectError:
            await asyncio.to_thread(self._close_job, job)
            await self.app(scope, receive, send)
            return
        try:
            forwarded = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in HOP_BY_HOP]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": forwarded})
            left = asyncio.ensure_future(_left(receive))
            chunks = answer.aiter_raw()
            while True:
                chunk = asyncio.ensure_future(anext(chunks, None))  # pyright: ignore
                await asyncio.wait([chunk, left], return_when=asyncio.FIRST_COMPLETED)
                if not chunk.done() or chunk.result() is None:
                    chunk.cancel()
                    break
                await send({"type": "http.response.body", "body": chunk.result(), "more_body": True})
            left.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await answer.aclose()

    @property
    def _only_peers(self) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            secret = dict(scope["headers"]).get(SECRET, b"")
            if not hmac.compare_digest(secret, self.secret.encode()):
                error = ApiError(403, "this address is for the peers of the server", "peers_only")
                await _respond(send, error)
                return
            await self.app(scope, receive, send)

        return app


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    start: Message = {"type": "http.response.start", "status": error.status_code, "headers": []}
    start["headers"] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(start)
    await send({"type": "http.response.body", "body": body})


class _no_signals:  # noqa: N801
    """Stands for uvicorn's context that catches signals."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
