"""One row for each photograph of an archive: its columns with their units, and the names of the files it points to.

Outcome -> pyarrow row;  (entry, model, config) -> masks/<stem>-<digest>.png, overlays/<stem>-<digest>.jpg
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from ma_cluster.config import RESULT_VERSION, OperatingPoint, Recipe, deciding, digest
from ma_cluster.errors import Reason, Status
from ma_cluster.images.reading import Facts
from ma_cluster.lesions.findings import Findings
from ma_cluster.metrics import STAGES
from ma_cluster.storage.store import Entry

SECONDS = {stage: f"seconds_{stage}" for stage in STAGES}
"""The column of each stage's wall time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one photograph. Whatever was not reached is None."""

    key: str
    etag: str
    reason: Reason | None
    """None where it was scored."""
    attempts: int
    detail: str | None = None
    """The reason, or the flags, in words: no key, no name, no path."""
    facts: Facts | None = None
    findings: Findings | None = None
    mask_key: str | None = None
    overlay_key: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage of the last attempt."""

    @property
    def status(self) -> Status:
        """`scored`, or what the reason says."""
        return Status.SCORED if self.reason is None else self.reason.status


def _field(name: str, kind: pa.DataType, unit: str, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"unit": unit, "description": description})


_LESION = pa.struct(
    [
        _field("id", pa.int32(), "", "1, 2, ... from the surest down"),
        _field("row", pa.float64(), "px", "centroid; pixel centres are at integers"),
        _field("col", pa.float64(), "px", "centroid; pixel centres are at integers"),
        _field("bbox", pa.list_(pa.int32(), 4), "px", "top, left, bottom, right; the last two lie just outside"),
        _field("area_px", pa.int64(), "px^2", "area"),
        _field("diameter_px", pa.float64(), "px", "of the disc of the same area"),
        _field("score", pa.float64(), "1", "how sure: by the judge of candidates, score_max of a model without"),
        _field("score_mean", pa.float64(), "1", "mean probability within the lesion"),
        _field("score_max", pa.float64(), "1", "largest probability within the lesion"),
        _field("fov_distance_px", pa.float64(), "px", "from the centre of the field of view to the centroid"),
    ]
)

SCHEMA = pa.schema(
    [
        _field("key", pa.string(), "", "object key, relative to the source"),
        _field("etag", pa.string(), "", "the object's version when it was planned"),
        _field("status", pa.string(), "", "scored, refused (its content is the cause) or failed (we or the store are)"),
        _field("reason", pa.string(), "", "why it was not scored, from the closed list; null where it was"),
        _field("detail", pa.string(), "", "the reason or the flags in words"),
        _field("attempts", pa.int32(), "", "how often it was tried"),
        _field("height", pa.int32(), "px", "of the upright photograph, on whose grid all positions are"),
        _field("width", pa.int32(), "px", "of the upright photograph"),
        _field("fov_row", pa.float64(), "px", "centre of the field of view"),
        _field("fov_col", pa.float64(), "px", "centre of the field of view"),
        _field("fov_diameter_px", pa.float64(), "px", "diameter of the field of view"),
        _field("fov_degrees", pa.float64(), "deg", "angle of that diameter; assumed where a flag says so"),
        _field("quality_brightness", pa.float64(), "1", "mean of the green channel inside the FOV, 0..1"),
        _field("quality_contrast", pa.float64(), "1", "standard deviation of the green channel inside the FOV"),
        _field("quality_vessel_contrast", pa.float64(), "1", "by how much vessels are darker than what is around them"),
        _field("quality_sharpness", pa.float64(), "1", "contrast of the finest structures over that of small ones"),
        _field("quality_focus", pa.float64(), "1", "contrast of the smallest structures over that of vessels"),
        _field("triage", pa.string(), "", "refer, none, or ungradable: no signs seen, and that means nothing"),
        _field("image_score", pa.float64(), "1", "probability of retinopathy, 0..1; null of a model without a grading"),
        _field("quality_blocks", pa.float64(), "1", "change of light between the blocks of a JPEG over that within"),
        _field("gradable", pa.bool_(), "", "whether the lack of lesions would mean anything"),
        _field("quality", pa.float64(), "1", "the worst measure, 0..1; ungradable below 0.5"),
        _field("flags", pa.list_(pa.string()), "", "what a person should know, from the closed list"),
        _field("lesion_count", pa.int32(), "", "number of lesions"),
        _field("lesion_area_px", pa.int64(), "px^2", "area of all lesions"),
        _field("lesions", pa.list_(_LESION), "", "the lesions, surest first"),
        _field("mask_key", pa.string(), "", "1-bit PNG below the destination, white where there is a lesion"),
        _field("overlay_key", pa.string(), "", "JPEG below the destination, each lesion outlined"),
        *[_field(column, pa.float64(), "s", f"wall time of the stage {stage}") for stage, column in SECONDS.items()],
    ]
)


def to_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """The rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist([_row(outcome) for outcome in outcomes], schema=SCHEMA)


def config_digest(recipe: Recipe, decoder: str, operating_point: OperatingPoint = "default") -> str:
    """What decides an outcome beside source and weights: the numbers, the decoder, the version of the code, and which
    of the places that are outlined are called.
    """
    said = {"results": RESULT_VERSION, "decoder": decoder, "recipe": deciding(recipe)}
    return digest(said if operating_point == "default" else said | {"operating_point": operating_point})


def artefact_name(entry: Entry, model_digest: str, config_digest: str) -> str:
    """The name, without folder and suffix, of a photograph's mask and overlay.

    It follows from what went in, so that writing twice writes the same. The stem is for people: at most 40 characters
    that no file system, URL or shell takes amiss; the digest makes the name unique.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", PurePosixPath(entry.key).stem)[:40]
    return f"{stem}-{digest([entry.key, entry.etag, model_digest, config_digest])[:16]}"


def _row(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": outcome.key,
        "etag": outcome.etag,
        "status": outcome.status.value,
        "reason": outcome.reason and outcome.reason.value,
        "detail": outcome.detail,
        "attempts": outcome.attempts,
        "mask_key": outcome.mask_key,
        "overlay_key": outcome.overlay_key,
        **{column: outcome.seconds.get(stage) for stage, column in SECONDS.items()},
    }
    if (facts := outcome.facts) is not None:
        row |= {"height": facts.height, "width": facts.width}
        row |= {f"fov_{name}": value for name, value in dataclasses.asdict(facts.fov).items()}
        measures = dataclasses.asdict(facts.quality)
        row |= {"gradable": measures.pop("gradable"), "quality": measures.pop("score"), "flags": measures.pop("flags")}
        row |= {f"quality_{name}": value for name, value in measures.items()}
    if (findings := outcome.findings) is not None:
        row |= {"triage": findings.triage.value, "image_score": findings.image_score}
        row["lesion_count"] = len(findings.lesions)
        row["lesion_area_px"] = sum(lesion.area_px for lesion in findings.lesions)
        row["lesions"] = [dataclasses.asdict(lesion) for lesion in findings.lesions]
    return row
