"""The HTTP service as a FastAPI application: requests in, answers of a `Service` out. Knows no Ray.

    GET /                            what this is; for a browser a page
    POST /v1/segment                 an encoded photograph -> triage and lesions as JSON; Accept: image/png the mask,
                                     image/jpeg the overlay; ?operating_point=sensitive&field_degrees=45
    POST /v1/archives                {source, destination, the same options} -> 202 {id, ...}
    GET /v1/archives[/ID]  DELETE /v1/archives/ID  GET /healthz  GET /metrics

Every error is JSON {reason, detail}: reason is of `Reason` or `RequestFault`, detail never holds what was sent.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import anyio
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from ma_cluster import __version__
from ma_cluster.config import KnownField, OperatingPoint, ScoreOptions
from ma_cluster.errors import RequestFault
from ma_cluster.http.errors import RefusedError, answer_errors, documented
from ma_cluster.http.guard import Guard, HttpLimits
from ma_cluster.http.pages import add_pages, read_pages

NOTICE = "Research software. It is not a medical device, and nothing it says replaces the judgement of a clinician."
_Answer = TypeVar("_Answer")
_Url = Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^[^\x00]+$")]
_DEGREES = Field(
    ge=0, le=360, allow_inf_nan=False, description="Angle of the disc where it is known; 0 assumes the usual 50."
)
_NO_SURROUND = Field(description="There is no dark surround: `field_degrees` lie across the longer side.")
_ASKING = 40, 2
"""Threads that ask the stores at a time, and that ask the fleet for its health: it does not wait for those."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of a photograph: `values` as JSON has them, and the encoded files for people."""

    values: dict[str, Any]
    mask_png: bytes
    overlay_jpeg: bytes


@runtime_checkable
class Service(Protocol):
    """What stands behind the routes; every method may block, and raises MaClusterError."""

    def segment(self, data: bytes, options: ScoreOptions) -> Answer:
        """Score one encoded photograph; raises ImageError."""

    def ready(self) -> bool:
        """Whether photographs can be scored now."""

    def request_archive(self, source: str, destination: str, options: ScoreOptions) -> dict[str, Any]:
        """Ask for an archive run; what is known of it. Raises RunConflictError where it cannot be."""

    def archives(self) -> list[dict[str, Any]]:
        """All archive runs that were asked for; one that cannot be told of says why."""

    def archive(self, job_id: str) -> dict[str, Any]:
        """One of them, with its counts; raises ObjectMissingError."""

    def cancel_archive(self, job_id: str) -> dict[str, Any]:
        """End one of them; raises ObjectMissingError."""

    def metrics(self) -> bytes:
        """In Prometheus's text format."""


class ArchiveRequest(BaseModel, extra="forbid"):
    """An archive run: URLs as `ma-cluster score` takes them."""

    source: Annotated[_Url, Field(examples=["s3://archive/2026"])]
    destination: Annotated[_Url, Field(examples=["s3://results/2026"])]
    operating_point: OperatingPoint = "default"
    field_degrees: Annotated[float, _DEGREES, Field(strict=True)] = 0.0
    no_surround: Annotated[bool, _NO_SURROUND, Field(strict=True)] = False

    def options(self) -> ScoreOptions:
        """What it is asked for with; raises UsageError where the field cannot be."""
        return ScoreOptions(self.operating_point, KnownField(self.field_degrees, self.no_surround))


def create_api(service: Service, limits: HttpLimits) -> FastAPI:
    """The application."""
    api = FastAPI(
        title="ma_cluster", version=__version__, summary=NOTICE, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    api.add_middleware(Guard, limits=limits)
    answer_errors(api)
    stores, health = (_Threads(anyio.CapacityLimiter(threads), limits.answer_s) for threads in _ASKING)
    checked = [Depends(HTTPBearer(auto_error=False))]  # for the OpenAPI document: the guard has looked already
    _add_root(api, service, health)
    _add_segment(api, service, limits, checked)
    _add_archives(api, service, stores, checked)

    @api.get("/metrics", dependencies=checked, responses=documented(401, 403, 429, 503), response_class=Response)
    async def metrics() -> Response:
        """Archive metrics, computed from the stores."""
        return Response(await stores.answer(service.metrics), media_type=CONTENT_TYPE_LATEST)

    return api


@dataclass(frozen=True, slots=True)
class _Threads:
    """Some threads for what blocks, and how long an answer may take; the thread of a late one ends when it ends."""

    limiter: anyio.CapacityLimiter
    answer_s: float

    async def answer(self, function: Callable[[], _Answer]) -> _Answer:
        try:
            with anyio.fail_after(self.answer_s):
                return await run_sync(function, limiter=self.limiter, abandon_on_cancel=True)
        except TimeoutError as error:
            detail = f"the stores, or the cluster, did not answer within {self.answer_s:g} s"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, RequestFault.UNAVAILABLE, detail) from error


def _add_root(api: FastAPI, service: Service, health: _Threads) -> None:
    pages = read_pages("ma_cluster.http")
    add_pages(api, pages)

    @api.get("/", responses=documented(403) | {200: {"content": {"text/html": {}}}}, response_model=dict[str, str])
    async def root(request: Request) -> Any:
        """What this is; for a browser, which accepts text/html, a page."""
        if "text/html" in request.headers.get("accept", ""):
            return pages["service.html"]
        return {"name": "ma_cluster", "version": __version__, "notice": NOTICE, "api": "/openapi.json"}

    @api.get("/healthz", responses=documented(403, 503))
    async def healthz() -> dict[str, str]:
        """Whether photographs can be scored now."""
        if not await health.answer(service.ready):
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, RequestFault.UNAVAILABLE, "the fleet is not up")
        return {"status": "ok"}


def _add_segment(api: FastAPI, service: Service, limits: HttpLimits, checked: list[Any]) -> None:
    free = threading.BoundedSemaphore(limits.waiting)
    threads = anyio.CapacityLimiter(math.inf)  # the guard bounds the requests

    def scored(data: bytes, options: ScoreOptions) -> Answer:
        if not free.acquire(blocking=False):
            detail = "as many photographs as fit are under way"
            raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, RequestFault.BUSY, detail)
        try:  # until it is answered, though its client may have left long ago
            return service.segment(data, options)
        finally:
            free.release()

    files: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}, "image/jpeg": {}}}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {
        "required": True,
        "content": {kind: binary for kind in ("application/octet-stream", "image/*", "application/dicom")},
    }

    @api.post(
        "/v1/segment",
        dependencies=checked,
        openapi_extra={"requestBody": body},
        responses=files | documented(400, 401, 403, 413, 415, 422, 429, 503),
    )
    async def segment(
        request: Request,
        operating_point: OperatingPoint = "default",
        field_degrees: Annotated[float, _DEGREES] = 0.0,
        no_surround: Annotated[bool, _NO_SURROUND] = False,
    ) -> Response:
        """Find the lesions of one photograph: its encoded bytes are the body. At the operating point `default` the sure
        ones are called, at `sensitive` every place that is outlined.
        """
        options = ScoreOptions(operating_point, KnownField(field_degrees, no_surround))
        data = await request.body()  # which the guard holds already
        if not data:
            detail = "the body is empty; send a photograph's bytes"
            raise RefusedError(HTTPStatus.BAD_REQUEST, RequestFault.BAD_REQUEST, detail)
        # without the request's context: Serve would cancel what the fleet is asked there when the client leaves, and
        # a Segmenter goes on with what is cancelled
        answer = await run_sync(Context().run, scored, data, options, limiter=threads)
        accepted = request.headers.get("accept", "")
        if "image/png" in accepted:
            return Response(answer.mask_png, media_type="image/png")
        if "image/jpeg" in accepted:
            return Response(answer.overlay_jpeg, media_type="image/jpeg")
        return JSONResponse(answer.values)


def _add_archives(api: FastAPI, service: Service, stores: _Threads, checked: list[Any]) -> None:
    listed, one = documented(401, 403, 429, 503), documented(401, 403, 404, 429, 503)
    linked = {
        name: {"operationId": f"{name}_v1_archives__job_id__{method}", "parameters": {"job_id": "$response.body#/id"}}
        for name, method in (("archive", "get"), ("cancel_archive", "delete"))
    }
    taken = documented(400, 401, 403, 409, 413, 415, 422, 429, 503) | {202: {"links": linked}}

    @api.post("/v1/archives", status_code=202, dependencies=checked, responses=taken)
    async def request_archive(wanted: ArchiveRequest) -> dict[str, Any]:
        """Score an archive; one that was cancelled or failed goes on. 409 where the destination is another run's."""
        return await stores.answer(
            partial(service.request_archive, wanted.source, wanted.destination, wanted.options())
        )

    @api.get("/v1/archives", dependencies=checked, responses=listed)
    async def archives() -> dict[str, Any]:
        """All archives that were asked for, the earliest first."""
        return {"archives": await stores.answer(service.archives)}

    @api.get("/v1/archives/{job_id}", dependencies=checked, responses=one)
    async def archive(job_id: str) -> dict[str, Any]:
        """One of them, with its counts, and the last that its driver wrote."""
        return await stores.answer(partial(service.archive, job_id))

    @api.delete("/v1/archives/{job_id}", dependencies=checked, responses=one)
    async def cancel_archive(job_id: str) -> dict[str, Any]:
        """End one of them; what is committed stays, and asking for it again resumes it."""
        return await stores.answer(partial(service.cancel_archive, job_id))
