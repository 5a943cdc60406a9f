"""What has changed in an eye: two photographs compared, and every pair of visits that a run knows; figures and pages.

    BEFORE, AFTER -> lesions of both -> registered -> compare.json, compare.html
    a run's outcomes -> photographs of one eye at two visits, read again from the source -> the same
        -> turnover.parquet, turnover/<number>.html

A page holds both photographs on the earlier one's grid, and loads nothing.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster.archive.outcomes import described
from ma_cluster.archive.plan import read_shards, shards
from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run
from ma_cluster.archive.summary import open_run
from ma_cluster.config import ImageConfig, KnownField
from ma_cluster.errors import ImageError, ObjectChangedError, ObjectMissingError, Status, UsageError
from ma_cluster.images.acquisition import Acquisition
from ma_cluster.images.reading import read_bytes
from ma_cluster.images.registration import View, read_view, register
from ma_cluster.images.sandbox import DecodePool, SandboxConfig
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Lesion
from ma_cluster.lesions.turnover import Change, Taken, compare, to_values
from ma_cluster.report.charts import embedded, render
from ma_cluster.storage.identity import is_date, years_between
from ma_cluster.storage.manifest import Source, open_source
from ma_cluster.storage.parquet import to_parquet
from ma_cluster.storage.store import Store

log = logging.getLogger(__name__)
TABLE = "turnover.parquet"
_JPEG_QUALITY = 88
_ZOOM = 2  # of the grid that is registered: 1,700 pixels across the field
_GAP_PX = 6.0  # between a lesion and the circle around it, on the page's grid
_KEPT = 8  # photographs: an eye's visits share them
_FATES = ("persisting", "new", "gone", "outside")
_COLUMNS = ["patient", "eye", "visit", "status", "gradable", "lesions", "etag"]
SCHEMA = pa.schema(
    [
        described("patient", pa.string(), "", "pseudonym, or the id where ids are kept"),
        described("eye", pa.string(), "", "R or L"),
        described("before", pa.string(), "", "the earlier visit"),
        described("after", pa.string(), "", "the later visit"),
        described("key_before", pa.string(), "", "photograph of the earlier visit"),
        described("key_after", pa.string(), "", "photograph of the later visit"),
        described("registered", pa.bool_(), "", "whether they show common places"),
        described(
            "detail", pa.string(), "", "why they were not, and how many of the photographs could not be read again"
        ),
        described("residual_px", pa.float64(), "px", "of the registration, median, canonical 1x"),
        described("overlap", pa.float64(), "1", "share of the earlier field that the later one shows"),
        described("years", pa.float64(), "a", "between the visits"),
        *[
            described(f"{name}_count", pa.int32(), "", meaning)
            for name, meaning in (
                ("persisting", "pairs of lesions at one place"),
                ("new", "lesions of the later photograph alone"),
                ("gone", "lesions of the earlier photograph alone"),
                ("outside", "lesions whose place the other photograph does not show well enough"),
            )
        ],
        described("formation_per_year", pa.float64(), "1/a", "new lesions a year"),
        described("disappearance_per_year", pa.float64(), "1/a", "gone lesions a year"),
        described("turnover_per_year", pa.float64(), "1/a", "their sum"),
        described("page", pa.string(), "", "below the destination; null where it was not registered"),
    ]
)


@dataclass(frozen=True, slots=True)
class Shot:
    """A photograph as it is compared, and its upright pixels."""

    taken: Taken
    pixels: UInt8[ndarray, "h w 3"]


@dataclass(frozen=True, slots=True)
class Photograph:
    """One of a run, as its outcome knows it."""

    key: str
    etag: str
    field: KnownField
    lesions: tuple[Lesion, ...]
    gradable: bool


def compare_files(detector: Detector, files: tuple[Path, Path], years: float | None, out: Store) -> dict[str, Any]:
    """Detect, register and compare two photographs; writes compare.json and, where they register, compare.html.

    Raises:
        ImageError: one of them cannot be scored; says which.
        StoreError: the results cannot be written.
    """
    shots = _detected(detector, "BEFORE", files[0]), _detected(detector, "AFTER", files[1])
    registration = register(shots[0].taken.view, shots[1].taken.view)
    change = None if registration is None else compare(shots[0].taken, shots[1].taken, registration)
    values = {"before": files[0].name, "after": files[1].name, "model_digest": detector.digest}
    values |= to_values(change, years)
    if change is not None:
        out.put("compare.html", page_of(change, *shots, values).encode())
    out.put("compare.json", (json.dumps(values, indent=2) + "\n").encode())
    return values


def _detected(detector: Detector, side: str, file: Path) -> Shot:
    """Lesions that are called, and what is outlined beside them; on the field that the detector knows, or the file."""
    try:
        prepared, facts = read_bytes(file.read_bytes(), detector.recipe.image)
        found = detector.segment(prepared, "sensitive")
    except ImageError as error:
        raise type(error)(error.reason, f"{side}: {error.detail}") from error
    least = detector.recipe.detector.least_score
    called = tuple(lesion for lesion in found.lesions if lesion.score >= least)
    weaker = tuple(lesion for lesion in found.lesions if lesion.score < least)
    image = detector.recipe.image
    view = _view(prepared.pixels, KnownField(image.field_degrees, image.no_surround), facts.acquisition)
    return Shot(Taken(view, called, weaker, found.quality.gradable), prepared.pixels)


def _view(pixels: UInt8[ndarray, "h w 3"], known: KnownField, acquisition: Acquisition | None) -> View:
    """On the field that is known, else the one that the file's header tells."""
    told = 0.0 if acquisition is None else acquisition.field_degrees
    return read_view(pixels, known if known.degrees else KnownField(told))


def turnover_of_run(dest_url: str, on_pair: Callable[[dict[str, Any]], None]) -> str:
    """Compare the photographs of each eye at each two of its visits that are dates; returns the URL of the table.

    Of two visits those photographs are compared that show most of each other. They are read again from the run's
    source, in a process that may die of them; their lesions are those of the run. `on_pair` hears of each row.

    Raises:
        UsageError: there is no run, or it knows no eye of a patient at two visits that are dates.
        StoreError: the source does not answer, or the destination cannot be written; there is no table then.
    """
    dest, run = open_run(dest_url)
    eyes = _by_eye_and_visit(dest, run)
    pairs = [(eye, *two) for eye in sorted(eyes) for two in combinations(sorted(eyes[eye]), 2)]
    if not pairs:
        raise UsageError(
            "the run knows no eye of a patient at two visits that are dates: its manifest needs `patient` and `visit`, "
            "written YYYY-MM-DD, as labels have no order"
        )
    rows: list[dict[str, Any]] = []
    pool = DecodePool(ImageConfig(), SandboxConfig(children=1))
    try:
        read = lru_cache(_KEPT)(partial(_read, open_source(run.source), pool))
        for (patient, eye), before, after in pairs:
            shots = [[read(photograph) for photograph in eyes[patient, eye][visit]] for visit in (before, after)]
            known = {"patient": patient, "eye": eye, "before": before, "after": after} | _unread(shots)
            for first, second, change in _matched(*shots):
                row = known | {"key_before": first, "key_after": second}
                row = _figures(dest, len(rows), row, change) | row
                rows.append({name: row.get(name) for name in SCHEMA.names})  # its lesions would fill the memory
                on_pair(row)
    finally:
        pool.close()
    dest.put(TABLE, to_parquet(pa.Table.from_pylist(rows, schema=SCHEMA)))
    return f"{dest.url}/{TABLE}"


def _by_eye_and_visit(dest: Store, run: Run) -> dict[tuple[str, str], dict[str, list[Photograph]]]:
    """Scored photographs of the eyes that are known at two dates or more, by these; memory holds no others."""
    dates = _dates(dest, run)
    wanted: dict[str, dict[str, Any]] = {}
    for table in latest_outcomes(dest, run, _COLUMNS) if dates else ():
        for row in table.to_pylist():
            if row["status"] == Status.SCORED and row["visit"] in dates.get((row["patient"], row["eye"]), ()):
                wanted[row["key"]] = row
    eyes: dict[tuple[str, str], dict[str, list[Photograph]]] = {}
    for entry in read_shards(dest, shards(dest, run.plan)) if wanted else ():
        if (row := wanted.get(entry.key)) is not None:
            lesions = tuple(Lesion(**(lesion | {"bbox": tuple(lesion["bbox"])})) for lesion in row["lesions"])
            field = KnownField(entry.field_degrees, entry.no_surround)
            photograph = Photograph(entry.key, row["etag"], field, lesions, row["gradable"])
            eyes.setdefault((row["patient"], row["eye"]), {}).setdefault(row["visit"], []).append(photograph)
    return eyes


def _dates(dest: Store, run: Run) -> dict[tuple[str, str], set[str]]:
    """The visits that are dates of each eye that has two of them or more; warns of eyes whose visits are labels."""
    visits: dict[tuple[str, str], set[str]] = {}
    for table in latest_outcomes(dest, run, ["patient", "eye", "visit", "status"]):
        for row in table.to_pylist():
            if row["status"] == Status.SCORED and row["patient"] and row["eye"] and row["visit"]:
                visits.setdefault((row["patient"], row["eye"]), set()).add(row["visit"])
    dates = {eye: set(filter(is_date, own)) for eye, own in visits.items()}
    if labelled := sum(len(own) > 1 and dates[eye] != own for eye, own in visits.items()):
        log.warning("labels have no order: of %d eyes, visits that are not YYYY-MM-DD are not compared", labelled)
    return {eye: own for eye, own in dates.items() if len(own) > 1}


def _read(source: Source, pool: DecodePool, photograph: Photograph) -> tuple[str, Shot | None]:
    """A photograph with its key; None where it is gone, was replaced or cannot be decoded any more."""
    try:
        decoded = pool.decode(source.get(photograph.key, max_bytes=ImageConfig().max_bytes, etag=photograph.etag))
        view = _view(decoded.pixels, photograph.field, decoded.acquisition)
    except (ImageError, ObjectMissingError, ObjectChangedError) as error:
        log.warning("a photograph cannot be compared: %s", error)
        return photograph.key, None
    return photograph.key, Shot(Taken(view, photograph.lesions, (), photograph.gradable), decoded.pixels)


def _unread(shots: Sequence[Sequence[tuple[str, Shot | None]]]) -> dict[str, str]:
    """What a row says of photographs of its visits that could not be read again; nothing where all could."""
    read = [shot is not None for visit in shots for _, shot in visit]
    if all(read):
        return {}
    return {"detail": f"{read.count(False)} of the visits' {len(read)} photographs could not be read again"}


def _matched(
    earlier: Sequence[tuple[str, Shot | None]], later: Sequence[tuple[str, Shot | None]]
) -> Iterator[tuple[str, str, tuple[Change, Shot, Shot] | None]]:
    """Photographs of two visits that show the same field, each once, those that share most first; where none does,
    one pair without a change.
    """
    found = []
    for (first, before), (second, after) in product(earlier, later):
        if before is not None and after is not None:
            registration = register(before.taken.view, after.taken.view)
            if registration is not None:
                found.append((registration.overlap, first, second, registration, before, after))
    found.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    taken: set[str] = set()
    for _, first, second, registration, before, after in found:
        if not taken & {first, second}:
            taken |= {first, second}
            yield first, second, (compare(before.taken, after.taken, registration), before, after)
    if not found:
        yield earlier[0][0], later[0][0], None


def _figures(dest: Store, number: int, row: dict[str, Any], found: tuple[Change, Shot, Shot] | None) -> dict[str, Any]:
    """The rest of a row of the table; the page of a pair that registers is written."""
    years = years_between(row["before"], row["after"])
    values = to_values(None if found is None else found[0], years)
    if found is None:
        return values
    page = f"turnover/{number:05d}.html"
    dest.put(page, page_of(*found, values | row).encode())
    return values | {f"{name}_count": len(values[name]) for name in _FATES} | {"page": page}


def page_of(change: Change, before: Shot, after: Shot, values: dict[str, Any]) -> str:
    """Both photographs on the earlier one's grid, with their lesions marked: blinking, side by side, or one alone."""
    grid, registration = before.taken.view.grid, change.registration
    height, width = (_ZOOM * side for side in before.taken.view.seen.shape)
    places = np.stack([axis.ravel() for axis in np.indices((height, width))], axis=1).astype(float)
    reduced = (places + 0.5) / _ZOOM - 0.5
    onto = grid.to_original(reduced), after.taken.view.grid.to_original(registration.to_after(reduced))
    pictures = [_picture(shot.pixels, at, (height, width)) for shot, at in zip((before, after), onto, strict=True)]
    marks: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for kind, side, lesion in _fates(change):
        taken = before.taken if side == "before" else after.taken
        place = taken.view.grid.to_canonical(np.array([[lesion.row, lesion.col]]))
        place = place if side == "before" else registration.to_before(place)
        row, col = ((place[0] + 0.5) * _ZOOM - 0.5).tolist()
        radius = lesion.diameter_px / 2 * taken.view.grid.scale * _ZOOM + _GAP_PX
        marks[side].append({"kind": kind, "row": row, "col": col, "radius": radius, "score": lesion.score})
    return render("compare.html", values=values, pictures=pictures, marks=marks, size=(height, width), fates=_FATES)


def _fates(change: Change) -> Iterator[tuple[str, str, Lesion]]:
    for first, second in change.persisting:
        yield "persisting", "before", first
        yield "persisting", "after", second
    yield from (("new", "after", lesion) for lesion in change.new)
    yield from (("gone", "before", lesion) for lesion in change.gone)
    yield from (("outside", side, lesion) for side, lesion in change.outside)


def _picture(pixels: UInt8[ndarray, "h w 3"], at: Float[ndarray, "n 2"], shape: tuple[int, int]) -> str:
    """The pixels at those places, as the address of an <img>."""
    onto = at.reshape(*shape, 2).astype(np.float32)
    shown = cv2.remap(pixels, onto[:, :, 1], onto[:, :, 0], cv2.INTER_LINEAR)
    out = io.BytesIO()
    Image.fromarray(shown).save(out, format="JPEG", quality=_JPEG_QUALITY)
    return embedded(out.getvalue())
