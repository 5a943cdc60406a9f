"""How the HTTP service says no: every error of a request as JSON {reason, detail}, with the status that fits it.

A reason is of `Reason` or `RequestFault`; the detail never holds what was sent, nor a key, nor a name.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ma_cluster.errors import (
    ImageError,
    MaClusterError,
    ObjectMissingError,
    Reason,
    RequestFault,
    RunConflictError,
    StoreError,
    UsageError,
    WorkerLostError,
)

Why = Reason | RequestFault
_RETRY_AFTER_S = "10"
_OF_REASON = {
    Reason.NOT_AN_IMAGE: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    Reason.UNSUPPORTED: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    Reason.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
}
_OF_STATUS = {
    HTTPStatus.BAD_REQUEST: RequestFault.BAD_REQUEST,
    HTTPStatus.UNAUTHORIZED: RequestFault.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN: RequestFault.FORBIDDEN,
    HTTPStatus.NOT_FOUND: RequestFault.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED: RequestFault.NOT_FOUND,
}


class Problem(BaseModel):
    """The body of an error."""

    reason: Why
    detail: str


class RefusedError(Exception):
    """A request is not answered, and why."""

    def __init__(self, status: HTTPStatus, reason: Why, detail: str) -> None:
        super().__init__(status, reason, detail)
        self.status, self.reason, self.detail = status, reason, detail


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of a route's errors."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses}


def answer_errors(api: FastAPI) -> None:
    """Have an application answer what it knows as a `Problem`. What nobody foresaw, and a `RefusedError`, is the
    guard's: starlette lets a handler of `Exception` answer, and then raises all the same.
    """

    @api.exception_handler(MaClusterError)
    async def failed(request: Request, error: MaClusterError) -> JSONResponse:
        detail = error.detail if isinstance(error, ImageError) else str(error)
        return problem(RefusedError(*_why(error), detail))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        detail = "; ".join(sorted({f"{_place(fault)}: {fault['type']}" for fault in error.errors()}))
        return problem(RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, RequestFault.INVALID, detail))

    @api.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        answer = problem(RefusedError(status, _OF_STATUS.get(status, RequestFault.INVALID), status.phrase))
        answer.headers.update(error.headers or {})
        return answer


def _place(fault: dict[str, Any]) -> str:
    """Where a fault lies: a field that nobody asked for has a name of the sender's, which is not repeated."""
    place = fault["loc"][:-1] if fault["type"] == "extra_forbidden" else fault["loc"]
    return ".".join(map(str, place))


def problem(refusal: RefusedError) -> JSONResponse:
    """The answer that says so."""
    headers = {}
    if refusal.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = _RETRY_AFTER_S
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"reason": refusal.reason, "detail": refusal.detail}, refusal.status, headers)


def _why(error: MaClusterError) -> tuple[HTTPStatus, Why]:
    if isinstance(error, ImageError):
        if isinstance(error, WorkerLostError) or error.reason in (Reason.STORE_ERROR, Reason.NOT_FINITE):
            return HTTPStatus.SERVICE_UNAVAILABLE, error.reason
        return _OF_REASON.get(error.reason, HTTPStatus.UNPROCESSABLE_ENTITY), error.reason
    if isinstance(error, ObjectMissingError):
        return HTTPStatus.NOT_FOUND, RequestFault.NOT_FOUND
    if isinstance(error, RunConflictError):
        return HTTPStatus.CONFLICT, RequestFault.CONFLICT
    if isinstance(error, UsageError):
        return HTTPStatus.UNPROCESSABLE_ENTITY, RequestFault.INVALID
    if isinstance(error, StoreError):
        return HTTPStatus.SERVICE_UNAVAILABLE, Reason.STORE_ERROR
    return HTTPStatus.SERVICE_UNAVAILABLE, RequestFault.UNAVAILABLE
