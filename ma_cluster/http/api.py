"""The HTTP service as a FastAPI application: requests in, answers of a `Service` out. Knows no Ray.

    POST /v1/segment                 an encoded photograph -> lesions as JSON; Accept: image/png the mask, image/jpeg
                                     the overlay
    POST /v1/archives                {source, destination} -> 202 {id, ...}
    GET /v1/archives[/ID]  DELETE /v1/archives/ID  GET /healthz  GET /metrics

Every error is JSON {reason, detail}: reason is of `Reason` or `RequestFault`, detail never holds what was sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Protocol, runtime_checkable

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from ma_cluster import __version__
from ma_cluster.errors import Reason, RequestFault
from ma_cluster.http.errors import RefusedError, answer_errors, documented

NOTICE = "Research software. It is not a medical device, and nothing it says replaces the judgement of a clinician."
_URL_CHARACTERS = 2048
_BEARER = HTTPBearer(auto_error=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of a photograph: `values` as JSON has them, and the encoded files for people."""

    values: dict[str, Any]
    mask_png: bytes
    overlay_jpeg: bytes


@runtime_checkable
class Service(Protocol):
    """What stands behind the routes; every method may block, and raises MaClusterError."""

    def segment(self, data: bytes) -> Answer:
        """Score one encoded photograph; raises ImageError."""

    def ready(self) -> bool:
        """Whether photographs can be scored now."""

    def request_archive(self, source: str, destination: str) -> dict[str, Any]:
        """Ask for an archive run; what is known of it."""

    def archives(self) -> list[dict[str, Any]]:
        """All archive runs that were asked for."""

    def archive(self, job_id: str) -> dict[str, Any]:
        """One of them, with its counts; raises ObjectMissingError."""

    def cancel_archive(self, job_id: str) -> dict[str, Any]:
        """End one of them; raises ObjectMissingError."""

    def metrics(self) -> bytes:
        """In Prometheus's text format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one client may ask of the service."""

    max_body_bytes: int = 64 * 2**20
    """Longer bodies are answered with 413, bytes."""
    body_deadline_s: float = 60.0
    """Time for a body to arrive, seconds."""
    waiting: int = 16
    """Photographs under way at a time; more are answered with 429."""
    token_sha256: str | None = None
    """Of the bearer token that every request but `/` and `/healthz` must carry; None asks for none."""


class ArchiveRequest(BaseModel):
    """An archive run: URLs as `ma-cluster score` takes them."""

    source: Annotated[str, Field(min_length=1, max_length=_URL_CHARACTERS, examples=["s3://archive/2026"])]
    destination: Annotated[str, Field(min_length=1, max_length=_URL_CHARACTERS, examples=["s3://results/2026"])]


def create_api(service: Service, limits: HttpLimits) -> FastAPI:
    """The application."""
    api = FastAPI(title="ma_cluster", version=__version__, summary=NOTICE, docs_url=None, redoc_url=None)
    answer_errors(api)
    _add_root(api, service)
    checked = [Depends(_token_check(limits.token_sha256))]
    _add_segment(api, service, limits, checked)
    _add_archives(api, service, checked)

    @api.get("/metrics", dependencies=checked, responses=documented(401, 503), response_class=Response)
    def metrics() -> Response:
        """Archive metrics, computed from the stores."""
        return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)

    return api


def _add_root(api: FastAPI, service: Service) -> None:
    @api.get("/")
    def root() -> dict[str, str]:
        """What this is."""
        return {"name": "ma_cluster", "version": __version__, "notice": NOTICE, "api": "/openapi.json"}

    @api.get("/healthz", responses=documented(503))
    def healthz() -> dict[str, str]:
        """Whether photographs can be scored now."""
        if not service.ready():
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, RequestFault.UNAVAILABLE, "the fleet is not up")
        return {"status": "ok"}


def _add_segment(api: FastAPI, service: Service, limits: HttpLimits, checked: list[Any]) -> None:
    under_way = asyncio.Semaphore(limits.waiting)
    files: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}, "image/jpeg": {}}}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {"required": True, "content": {kind: binary for kind in ("application/octet-stream", "image/*")}}

    @api.post(
        "/v1/segment",
        dependencies=checked,
        openapi_extra={"requestBody": body},
        responses=files | documented(400, 401, 413, 415, 422, 429, 503),
    )
    async def segment(request: Request) -> Response:
        """Find the lesions of one photograph: its encoded bytes are the body."""
        if under_way.locked():
            raise RefusedError(
                HTTPStatus.TOO_MANY_REQUESTS, RequestFault.BUSY, "as many photographs as fit are under way"
            )
        async with under_way:
            data = await _body(request, limits)
            answer = await run_in_threadpool(service.segment, data)
        accepted = request.headers.get("accept", "")
        if "image/png" in accepted:
            return Response(answer.mask_png, media_type="image/png")
        if "image/jpeg" in accepted:
            return Response(answer.overlay_jpeg, media_type="image/jpeg")
        return JSONResponse(answer.values)


def _add_archives(api: FastAPI, service: Service, checked: list[Any]) -> None:
    @api.post("/v1/archives", status_code=202, dependencies=checked, responses=documented(400, 401, 422, 503))
    def request_archive(wanted: ArchiveRequest) -> dict[str, Any]:
        """Score an archive; one that was cancelled or failed goes on."""
        return service.request_archive(wanted.source, wanted.destination)

    @api.get("/v1/archives", dependencies=checked, responses=documented(401, 503))
    def archives() -> dict[str, Any]:
        """All archives that were asked for."""
        return {"archives": service.archives()}

    @api.get("/v1/archives/{job_id}", dependencies=checked, responses=documented(401, 404, 503))
    def archive(job_id: str) -> dict[str, Any]:
        """One of them, with its counts."""
        return service.archive(job_id)

    @api.delete("/v1/archives/{job_id}", dependencies=checked, responses=documented(401, 404, 503))
    def cancel_archive(job_id: str) -> dict[str, Any]:
        """End one of them; what is committed stays, and asking for it again resumes it."""
        return service.cancel_archive(job_id)


def _token_check(token_sha256: str | None) -> Callable[..., None]:
    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        if token_sha256 is None:
            return
        digest = hashlib.sha256(given.credentials.encode()).hexdigest() if given else ""
        if not hmac.compare_digest(digest, token_sha256):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, RequestFault.UNAUTHORIZED, "send the service's bearer token")

    return check


async def _body(request: Request, limits: HttpLimits) -> bytes:
    """The body, read no further than the limit, and no longer."""
    too_large = RefusedError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, Reason.TOO_LARGE, f"the limit is {limits.max_body_bytes} bytes"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_body_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_deadline_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError as error:
        detail = f"the body did not arrive within {limits.body_deadline_s:g} s"
        raise RefusedError(HTTPStatus.BAD_REQUEST, RequestFault.BAD_REQUEST, detail) from error
    except ClientDisconnect as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, RequestFault.BAD_REQUEST, "the client left") from error
    if not data:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, RequestFault.BAD_REQUEST, "the body is empty; send a photograph's bytes"
        )
    return bytes(data)
