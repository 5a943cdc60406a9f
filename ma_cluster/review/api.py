"""The review page as a FastAPI application over one run: worklist, photographs, tiles, decisions. Knows no Ray.

GET /                                   the page; its files under /page/
GET /v1/run                             the run, and how many photographs there are of each kind
GET /v1/photographs                     rows of the worklist; ?start= ?count= and the fields of `Query`
GET /v1/photographs/ID                  a photograph with its lesions, their outlines, and what was said of it
GET /v1/photographs/ID/tiles/VIEW/LEVEL/COL_ROW.jpg    GET /v1/photographs/ID/thumbnail.jpg
GET /v1/reviews?seen=N                  photographs about which something was said since
POST /v1/reviews                        keep an event
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Path, Query, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from ma_cluster import __version__
from ma_cluster.archive.summary import open_run
from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag, MaClusterError, ObjectMissingError, RequestFault
from ma_cluster.http.api import NOTICE
from ma_cluster.http.connection import BoundedConnection
from ma_cluster.http.errors import RefusedError, answer_errors
from ma_cluster.http.guard import Guard, HttpLimits
from ma_cluster.http.listening import check_free, limits_of
from ma_cluster.http.pages import add_pages, read_pages
from ma_cluster.images.fundus import Fov
from ma_cluster.images.sandbox import DecodePool, SandboxConfig
from ma_cluster.review.events import GRADES, Event, append
from ma_cluster.review.pictures import TILE_PX, Kept, Pyramid, View, build_pyramid, outlines, read_mask, thumbnail
from ma_cluster.review.worklist import Query as Wanted
from ma_cluster.review.worklist import Worklist
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Store

log = logging.getLogger(__name__)
_PHOTOGRAPHS_BYTES = 384 * 2**20  # some eight photographs of 12 megapixels with their halves
_SMALL_BYTES = 32 * 2**20  # of thumbnails, and of what is known of photographs
_FOLLOW_S = 10.0
_MOST_ROWS = 500
_UM_PER_DEGREE = 288.0
"""Of the retina of an eye of usual length, micrometres (Drasdo and Fowler 1974: 0.29 mm near the fovea)."""
_Id = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]


@dataclass(frozen=True, slots=True)
class ReviewedRun:
    """A run as the page needs it."""

    dest: Store
    worklist: Worklist
    decoding: DecodePool
    reviewer: str
    """Whose name the page begins with; empty where it is to ask."""


class Photographs:
    """Pictures of a run's photographs, the latest kept in memory."""

    def __init__(self, reviewed: ReviewedRun) -> None:
        self._dest, self._worklist, self._decoding = reviewed.dest, reviewed.worklist, reviewed.decoding
        self._source = open_source(reviewed.worklist.run.source)
        self._pyramids: Kept[Pyramid] = Kept(_PHOTOGRAPHS_BYTES, lambda pyramid: pyramid.nbytes)
        self._known: Kept[dict[str, Any]] = Kept(_SMALL_BYTES, lambda known: 4096 + 1024 * len(known["lesions"]))
        self._thumbnails: Kept[bytes] = Kept(_SMALL_BYTES, len)

    def known(self, photograph: str) -> dict[str, Any]:
        """Its outcome, its lesions with their outlines, and its scale; raises ObjectMissingError."""
        _, retry, part = self._worklist.place(photograph)  # a retry supersedes what was known
        known = self._known.get(f"{photograph}/{retry}/{part}", lambda: self._look(photograph))
        return known | {"previous": self._worklist.previous(known)}

    def tile(self, photograph: str, view: View, level: int, place: tuple[int, int]) -> bytes:
        """A tile as a JPEG.

        Raises:
            ObjectMissingError: there is none.
            ImageError: the photograph cannot be decoded.
            StoreError: it is not what was scored, or the source does not answer.
        """
        try:
            return self._pyramids.get(photograph, lambda: self._decode(photograph)).tile(view, level, *place)
        except IndexError as error:
            raise ObjectMissingError("the photograph has no such tile") from error

    def thumbnail(self, photograph: str) -> bytes:
        """A small picture with the outlines; raises ObjectMissingError where it was not scored."""
        return self._thumbnails.get(photograph, lambda: self._shrink(photograph))

    def _look(self, photograph: str) -> dict[str, Any]:
        row = self._worklist.outcome(photograph)
        lesions = row.pop("lesions") or []
        if lesions:
            mask = read_mask(self._dest, row)
            lesions = [
                lesion | {"outline": outline} for lesion, outline in zip(lesions, outlines(mask, lesions), strict=True)
            ]
        assumed = Flag.FIELD_ASSUMED in (row["flags"] or ())
        degrees = row["fov_degrees"] / row["fov_diameter_px"] if row["fov_diameter_px"] else None
        scale = None if degrees is None else {"um_per_px": degrees * _UM_PER_DEGREE, "assumed": assumed}
        shown = {name: value for name, value in row.items() if not name.startswith("seconds_")}
        return shown | {
            "id": photograph,
            "lesions": lesions,
            "scale": scale,
            "tile_px": TILE_PX,
        }

    def _decode(self, photograph: str) -> Pyramid:
        row = self._worklist.outcome(photograph)
        data = self._source.get(row["key"], max_bytes=ImageConfig().max_bytes, etag=row["etag"] or None)
        pixels = self._decoding.decode(data).pixels
        height, width = pixels.shape[:2]
        middle = height / 2, width / 2, float(min(height, width))
        fov = middle if row["fov_diameter_px"] is None else (row["fov_row"], row["fov_col"], row["fov_diameter_px"])
        return build_pyramid(pixels, Fov(*fov))

    def _shrink(self, photograph: str) -> bytes:
        key = self._worklist.outcome(photograph)["overlay_key"]
        if key is None:
            raise ObjectMissingError("this photograph was not scored")
        try:
            return thumbnail(self._dest.get(key))
        except ValueError as error:
            raise ObjectMissingError("the overlay is damaged") from error


class Decision(BaseModel, extra="forbid"):
    """An event as the page sends it: the photograph by its id; the rest is that of `Event`."""

    photograph: str
    id: str
    at: str
    reviewer: str
    kind: str
    lesion: int | None = None
    polygon: list[tuple[float, float]] | None = None
    grade: str | None = None
    note: str | None = None
    undoes: str | None = None


def create_review(reviewed: ReviewedRun, limits: HttpLimits) -> FastAPI:
    """The application."""
    api = FastAPI(title="ma_cluster review", version=__version__, summary=NOTICE, docs_url=None, redoc_url=None)
    api.add_middleware(Guard, limits=limits)
    answer_errors(api)
    pages = read_pages("ma_cluster.http", "ma_cluster.review")
    add_pages(api, pages)

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return pages["review.html"]

    checked = [Depends(HTTPBearer(auto_error=False))]  # for the OpenAPI document: the guard has looked already
    _add_worklist(api, reviewed, checked)
    _add_photographs(api, Photographs(reviewed), reviewed.worklist, checked)
    _add_reviews(api, reviewed, checked)
    return api


def _add_worklist(api: FastAPI, reviewed: ReviewedRun, checked: list[Any]) -> None:
    @api.get("/v1/run", dependencies=checked)
    def run(reviewer: str = "") -> dict[str, Any]:
        """The run, and how many photographs there are of each kind."""
        told = reviewed.worklist.run
        known = {"id": told.id, "started": told.started, "finished": told.finished, "reviewer": reviewed.reviewer}
        return known | {"grades": GRADES, "version": __version__} | reviewed.worklist.counts(reviewer)

    @api.get("/v1/photographs", dependencies=checked)
    def photographs(
        wanted: Annotated[Wanted, Depends()],
        start: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        count: Annotated[int, Query(ge=1, le=_MOST_ROWS)] = 100,
    ) -> dict[str, Any]:
        """Rows of the worklist."""
        return asdict(reviewed.worklist.page(wanted, start, count))


def _add_photographs(api: FastAPI, pictures: Photographs, worklist: Worklist, checked: list[Any]) -> None:
    kept = {"Cache-Control": "private, max-age=600"}  # an id is of one run, whose photographs do not change

    @api.get("/v1/photographs/{photograph}", dependencies=checked)
    def photograph(photograph: _Id) -> dict[str, Any]:
        """A photograph with its lesions and what was said of it."""
        said = [event.model_dump(exclude_none=True) for event in worklist.events(photograph)]
        return pictures.known(photograph) | {"events": said}

    @api.get("/v1/photographs/{photograph}/thumbnail.jpg", dependencies=checked, response_class=Response)
    def small(photograph: _Id) -> Response:
        """A small picture with the outlines."""
        return Response(pictures.thumbnail(photograph), media_type="image/jpeg", headers=kept)

    @api.get("/v1/photographs/{photograph}/tiles/{view}/{level}/{col}_{row}.jpg", dependencies=checked)
    def tile(photograph: _Id, view: View, level: int, col: int, row: int) -> Response:
        """A tile of the photograph itself."""
        return Response(pictures.tile(photograph, view, level, (col, row)), media_type="image/jpeg", headers=kept)


def _add_reviews(api: FastAPI, reviewed: ReviewedRun, checked: list[Any]) -> None:
    worklist = reviewed.worklist

    @api.get("/v1/reviews", dependencies=checked)
    def since(seen: Annotated[int, Query(ge=0, lt=2**63)] = 0) -> dict[str, Any]:
        """Photographs about which something was said since event number `seen`."""
        changed, last = worklist.since(seen)
        return {"photographs": changed, "seen": last}

    @api.post("/v1/reviews", status_code=201, dependencies=checked)
    def keep(decision: Decision) -> dict[str, Any]:
        """Keep an event; sending it again changes nothing."""
        values = decision.model_dump(exclude={"photograph"})
        key, *_ = worklist.place(decision.photograph)
        try:
            event = Event.model_validate(values | {"run": worklist.run.id, "key": key})
        except ValueError as error:
            detail = "this is no event: see /openapi.json"
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, RequestFault.INVALID, detail) from error
        new = append(reviewed.dest, event)
        worklist.note([event])
        return {"id": event.id, "new": new}


@contextmanager
def reviewing(dest_url: str, reviewer: str, host: str, port: int) -> Iterator[uvicorn.Server]:
    """A server of the page that is ready to be run.

    Raises:
        UsageError: there is no run, or it would listen beyond this machine without a token.
        MaClusterError: the port is in use.
        SandboxError: the processes that decode do not start.
    """
    limits = limits_of(host, HttpLimits())
    check_free(host, port)
    dest, run = open_run(dest_url)
    worklist = Worklist(dest, run)
    decoding = DecodePool(ImageConfig(), SandboxConfig(children=3))
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(worklist, ended))
    follower.start()
    try:
        api = create_review(ReviewedRun(dest, worklist, decoding, reviewer), limits)
        yield uvicorn.Server(
            uvicorn.Config(api, host=host, port=port, http=BoundedConnection, log_level="warning", access_log=False)
        )
    finally:
        ended.set()
        follower.join()
        decoding.close()
        worklist.close()


def _follow(worklist: Worklist, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            worklist.follow()
        except MaClusterError as error:
            log.warning("the worklist waits: %s", error)
        except Exception:  # whatever it was, the page goes on taking in what comes
            log.exception("the worklist could not be brought up to date")
        ended.wait(_FOLLOW_S)
