"""Errors of the HTTP interface, in the form of OpenAI."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel
from starlette.exceptions import HTTPException

Kind = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error",
]  # fmt: skip
KINDS: dict[int, Kind] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: Kind
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error with its status. param: of the request that is not valid; code: for programs"""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=str(self.detail), type=kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()


def retry_later(status: int, message: str, code: str, seconds: float) -> ApiError:
    """429 or 503, with the seconds after which the client should try again."""
    return ApiError(status, message, code, headers={"Retry-After": str(max(1, round(seconds)))})
