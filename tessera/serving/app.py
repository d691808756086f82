"""The HTTP interface as an ASGI application."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tessera import __version__
from tessera.errors import TesseraError
from tessera.serving.errors import ApiError, ErrorBody
from tessera.serving.gate import Gate
from tessera.serving.images_api import image_router, invalid
from tessera.serving.jobs_api import job_router
from tessera.serving.runs_api import runs_router
from tessera.serving.service import Service
from tessera.serving.studio_api import STUDIO, studio_router

logger = logging.getLogger(__name__)
ERRORS = {
    400: "the request is not valid", 401: "no or a wrong API key", 403: "a foreign origin or host",
    404: "not found", 408: "the body came too slowly", 409: "the state of the job forbids it",
    413: "the body is too large", 415: "the type of the body is not accepted", 429: "the queue is full",
    500: "an error of the server", 503: "loading, or shutting down",
}  # fmt: skip


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str


def create_app(
    service: Service,
    keys: Mapping[str, str] | None = None,
    hosts: Sequence[str] | None = None,
    runs: Path | None = None,
) -> Gate:
    """The application. keys, hosts: see `Gate`. The caller starts and closes the service.

    runs: a folder with runs that the studio shows
    """

    responses: dict[int | str, Any] = {
        status: {"model": ErrorBody, "description": text} for status, text in ERRORS.items()
    }
    app = FastAPI(title="Tessera", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(image_router(service, responses))
    app.include_router(job_router(service, responses))
    app.include_router(studio_router(service, responses, runs is not None))
    if runs is not None:
        app.include_router(runs_router(service, runs, responses))

    @app.get("/health", response_model=Status, responses=responses)
    async def health() -> Status:
        """Whether the process works: its engine runs."""
        if not service.engine.alive:
            raise ApiError(503, "the engine has stopped", "engine_stopped")
        return Status(status="ok")

    @app.get("/ready", response_model=Status, responses=responses)
    async def ready() -> Status:
        """Whether requests are accepted: an image was generated, and the server is not shutting down."""
        service.check_open()
        return Status(status="ready")

    @app.get("/version", response_model=Version, responses=responses)
    async def version() -> Version:
        return Version(version=__version__)

    @app.get("/metrics", response_class=PlainTextResponse, responses=responses)
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.mount("/", StaticFiles(directory=STUDIO, html=True), name="studio")
    _handle_errors(app)
    _describe(app)
    return Gate(app, service, keys, hosts)


def _handle_errors(app: FastAPI) -> None:
    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status_code, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
            error = ApiError(error.status_code, str(error.detail), code, headers=error.headers)
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return respond(invalid(error.errors()))

    @app.exception_handler(TesseraError)
    async def refused(request: Request, error: TesseraError) -> Response:
        return respond(ApiError(400, str(error), "invalid_request"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        number = request.scope.get("state", {}).get("request_id")
        logger.error("a request failed", exc_info=error, extra={"request": number})
        return respond(ApiError(500, f"an error of the server; its log has it as request {number}", "internal_error"))


def _describe(app: FastAPI) -> None:
    """Take 422 out of the description: bodies that are not valid are answered with 400."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi
