"""The server process: uvicorn with the application, logs as JSON lines, and an orderly end.

At SIGTERM or Ctrl-C the server accepts no more work (503), finishes what it has accepted by a deadline, and exits with
code 0. A second signal ends it at once.
"""

import asyncio
import json
import logging
import socket
import sys
import time
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from tessera.errors import TesseraError
from tessera.serving.app import create_app
from tessera.serving.gate import LOOPBACK_NAMES, is_loopback
from tessera.serving.service import Service

logger = logging.getLogger(__name__)
STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
CLOSE_SECONDS = 5  # for responses that are being sent when all jobs are done


@dataclass(frozen=True)
class ServerOptions:
    """drain_seconds: the deadline after SIGTERM; runs: a folder with runs that the studio shows;
    open_page: in the browser, when the models are loaded"""

    host: str = "127.0.0.1"
    port: int = 7860
    drain_seconds: float = 30.0
    without_keys: bool = False
    runs: Path | None = None
    open_page: bool = False


class JsonFormatter(logging.Formatter):
    """One JSON object in each line: time, level, logger, message, and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        fields["message"] = record.getMessage()
        fields |= {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def log_json() -> None:
    """Send all logs to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def check_keys(host: str, keys: Mapping[str, str], without_keys: bool) -> None:
    """Raise TesseraError if others could use the server without a key."""
    if not keys and not without_keys and not is_loopback(host):
        raise TesseraError(
            f"--host {host} can be reached from other machines: give --keys FILE, a file with a line 'client key' for "
            "each client, or --without-keys to let everyone in"
        )


class _Server(uvicorn.Server):
    """uvicorn's server, which drains first."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self.loop: asyncio.AbstractEventLoop | None = None
        self.signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals > 1 or self.loop is None:
            self.force_exit = self.signals > 1
            self.should_exit = True
        else:
            self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self.task = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        left = await self.service.drain(self.drain_seconds)
        logger.info("drained", extra={"jobs_left": left})
        self.should_exit = True


def run(service: Service, options: ServerOptions, keys: Mapping[str, str] | None = None) -> None:
    """Serve until a signal. Raises TesseraError."""
    keys = keys or {}
    check_keys(options.host, keys, options.without_keys)
    open_to_all = bool(keys) or options.without_keys
    app = create_app(service, keys, None if open_to_all else sorted(LOOPBACK_NAMES | {options.host}), runs=options.runs)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        timeout_keep_alive=30,
        limit_concurrency=1000,
        h11_max_incomplete_event_size=2**16,
    )
    server = _Server(config, service, options.drain_seconds)
    with _listen(options.host, options.port) as listening:
        address = listening.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        page = f"http://{shown}:{address[1]}"
        print(page, flush=True)
        asyncio.run(_serve(server, service, listening, page if options.open_page else None))
    if service.startup_error is not None:
        raise service.startup_error


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises TesseraError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TesseraError(f"cannot listen at {host}, port {port}: {reason}; choose another --port") from None


async def _serve(server: _Server, service: Service, listening: socket.socket, page: str | None) -> None:
    """Serve; /health is answered while models are loaded."""
    server.loop = asyncio.get_running_loop()
    start = time.monotonic()

    async def start_service() -> None:
        try:
            await service.start()
            logger.info("started", extra={"seconds": round(time.monotonic() - start, 3)})
            if page is not None:
                await asyncio.to_thread(webbrowser.open, page)
        except BaseException as error:
            if not isinstance(error, TesseraError | asyncio.CancelledError):
                logger.exception("the service could not start")
                service.startup_error = TesseraError(f"cannot start: {type(error).__name__}: {error}")
            server.should_exit = True
            if isinstance(error, asyncio.CancelledError):
                raise

    starting = asyncio.ensure_future(start_service())
    try:
        await server.serve(sockets=[listening])
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await service.close()
