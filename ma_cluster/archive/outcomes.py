"""One row for each photograph of an archive: its columns with their units, and the names of the files it points to.

Outcome -> pyarrow row;  (entry, model, config) -> masks/<stem>-<digest>.png, overlays/<stem>-<digest>.jpg
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, cast

import pyarrow as pa

from ma_cluster.config import RESULT_VERSION, Recipe, ScoreOptions, deciding, digest
from ma_cluster.errors import Reason, Status
from ma_cluster.images.acquisition import Laterality
from ma_cluster.images.laterality import LEAST_CONFIDENCE
from ma_cluster.images.reading import Facts
from ma_cluster.lesions.findings import Findings
from ma_cluster.metrics import STAGES
from ma_cluster.storage.identity import Pseudonyms
from ma_cluster.storage.store import Entry

EyeSource = Literal["manifest", "dicom", "picture"]
SECONDS = {stage: f"seconds_{stage}" for stage in STAGES}
"""The column of each stage's wall time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who and what a photograph shows, and when it was taken; None where nobody says it, and the eye where the picture
    is not sure of it, either.
    """

    patient: str | None = None
    """The pseudonym, or the id where ids are kept."""
    eye: Laterality | None = None
    eye_source: EyeSource | None = None
    eye_confidence: float | None = None
    """0.5..1; 1 where it was said. It is there, too, where it was too low for the eye to be known."""
    visit: str | None = None
    """YYYY-MM-DD, or another label."""

    def to_values(self) -> dict[str, Any]:
        """As JSON and the columns have it."""
        return dataclasses.asdict(self)


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
    identity: Identity | None = None
    facts: Facts | None = None
    findings: Findings | None = None
    mask_key: str | None = None
    mask_sha256: str | None = None
    overlay_key: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage of the last attempt."""

    @property
    def status(self) -> Status:
        """`scored`, or what the reason says."""
        return Status.SCORED if self.reason is None else self.reason.status


def described(name: str, kind: pa.DataType, unit: str, description: str) -> pa.Field:
    """A column that says what it holds."""
    return pa.field(name, kind, metadata={"unit": unit, "description": description})


_LESION = pa.struct(
    [
        described("id", pa.int32(), "", "1, 2, ... from the surest down"),
        described("row", pa.float64(), "px", "centroid; pixel centres are at integers"),
        described("col", pa.float64(), "px", "centroid; pixel centres are at integers"),
        described("bbox", pa.list_(pa.int32(), 4), "px", "top, left, bottom, right; the last two lie just outside"),
        described("area_px", pa.int64(), "px^2", "area"),
        described("diameter_px", pa.float64(), "px", "of the disc of the same area"),
        described("score", pa.float64(), "1", "how sure: by the judge of candidates, score_max of a model without"),
        described("score_mean", pa.float64(), "1", "mean probability within the lesion"),
        described("score_max", pa.float64(), "1", "largest probability within the lesion"),
        described("fov_distance_px", pa.float64(), "px", "from the centre of the field of view to the centroid"),
    ]
)

SCHEMA = pa.schema(
    [
        described("key", pa.string(), "", "object key, relative to the source"),
        described("etag", pa.string(), "", "the object's version when it was planned"),
        described("sha256", pa.string(), "", "of the object's bytes; null where they were not read"),
        described("patient", pa.string(), "", "pseudonym under the site's salt, or the id where ids are kept; or null"),
        described("eye", pa.string(), "", "R or L; null where nobody says it and the picture does not tell"),
        described("eye_source", pa.string(), "", "who says it: manifest, dicom or picture"),
        described(
            "eye_confidence",
            pa.float64(),
            "1",
            "that it is right, by the picture, also where that is too low; 1 where it was said",
        ),
        described("visit", pa.string(), "", "YYYY-MM-DD, or the label that the manifest gives; null where unknown"),
        described(
            "status", pa.string(), "", "scored, refused (its content is the cause) or failed (we or the store are)"
        ),
        described("reason", pa.string(), "", "why it was not scored, from the closed list; null where it was"),
        described("detail", pa.string(), "", "the reason or the flags in words"),
        described("attempts", pa.int32(), "", "how often it was tried"),
        described("height", pa.int32(), "px", "of the upright photograph, on whose grid all positions are"),
        described("width", pa.int32(), "px", "of the upright photograph"),
        described("fov_row", pa.float64(), "px", "centre of the field of view"),
        described("fov_col", pa.float64(), "px", "centre of the field of view"),
        described("fov_diameter_px", pa.float64(), "px", "diameter of the field of view"),
        described("fov_degrees", pa.float64(), "deg", "angle of that diameter; assumed where a flag says so"),
        described("quality_brightness", pa.float64(), "1", "mean of the green channel inside the FOV, 0..1"),
        described("quality_contrast", pa.float64(), "1", "standard deviation of the green channel inside the FOV"),
        described(
            "quality_vessel_contrast", pa.float64(), "1", "by how much vessels are darker than what is around them"
        ),
        described("quality_sharpness", pa.float64(), "1", "contrast of the finest structures over that of small ones"),
        described("quality_focus", pa.float64(), "1", "contrast of the smallest structures over that of vessels"),
        described("triage", pa.string(), "", "refer, none, or ungradable: no signs seen, and that means nothing"),
        described(
            "image_score", pa.float64(), "1", "probability of retinopathy, 0..1; null of a model without a grading"
        ),
        described("quality_blocks", pa.float64(), "1", "change of light between the blocks of a JPEG over that within"),
        described("gradable", pa.bool_(), "", "whether the lack of lesions would mean anything"),
        described("quality", pa.float64(), "1", "the worst measure, 0..1; ungradable below 0.5"),
        described("flags", pa.list_(pa.string()), "", "what a person should know, from the closed list"),
        described("operating_point", pa.string(), "", "which of the places outlined were called: default or sensitive"),
        described("lesion_count", pa.int32(), "", "number of lesions"),
        described("lesion_area_px", pa.int64(), "px^2", "area of all lesions"),
        described("lesions", pa.list_(_LESION), "", "the lesions, surest first"),
        described("mask_key", pa.string(), "", "1-bit PNG below the destination, white where there is a lesion"),
        described("mask_sha256", pa.string(), "", "of that file's bytes"),
        described("overlay_key", pa.string(), "", "JPEG below the destination, each lesion outlined"),
        *[described(column, pa.float64(), "s", f"wall time of the stage {stage}") for stage, column in SECONDS.items()],
    ]
)


def to_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """The rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist([_row(outcome) for outcome in outcomes], schema=SCHEMA)


def config_digest(recipe: Recipe, decoder: str, options: ScoreOptions | None = None) -> str:
    """What decides an outcome beside source and weights: the numbers, the decoder, the version of the code, and what
    the run was asked for with.
    """
    options = options or ScoreOptions()
    read = dataclasses.replace(recipe, image=options.field.told(recipe.image))
    said: dict[str, Any] = {"results": RESULT_VERSION, "decoder": decoder, "recipe": deciding(read)}
    point = options.operating_point
    return digest(said if point == "default" else said | {"operating_point": point})


def identify(entry: Entry, facts: Facts | None, pseudonyms: Pseudonyms | None) -> Identity:
    """What is known of a photograph: what a manifest says goes before what its file says.

    Args:
        entry: of the plan, which has the manifest's words, and a patient's pseudonym already.
        facts: of its reading; None where it could not be read.
        pseudonyms: what a patient is called whom the file names; without them it is not said.
    """
    taken = None if facts is None else facts.acquisition
    patient = entry.patient
    if not patient and taken is not None and taken.patient_id and pseudonyms is not None:
        patient = pseudonyms.of(taken.patient_id)
    visit = entry.visit or (None if taken is None else taken.visit)
    known: dict[str, Any] = {"patient": patient or None, "visit": visit}
    if entry.eye:
        return Identity(**known, eye=cast(Laterality, entry.eye), eye_source="manifest", eye_confidence=1.0)
    if taken is not None and taken.laterality is not None:
        return Identity(**known, eye=taken.laterality, eye_source="dicom", eye_confidence=1.0)
    side = None if facts is None else facts.side
    if side is None or side.confidence < LEAST_CONFIDENCE:
        return Identity(**known, eye_confidence=None if side is None else side.confidence)
    return Identity(**known, eye=side.eye, eye_source="picture", eye_confidence=side.confidence)


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
        "mask_sha256": outcome.mask_sha256,
        "overlay_key": outcome.overlay_key,
        **{column: outcome.seconds.get(stage) for stage, column in SECONDS.items()},
        **({} if outcome.identity is None else outcome.identity.to_values()),
    }
    if (facts := outcome.facts) is not None:
        row |= {"sha256": facts.sha256, "height": facts.height, "width": facts.width}
        row |= {f"fov_{name}": value for name, value in _values(facts.fov).items()}
        measures = _values(facts.quality)
        row |= {"gradable": measures.pop("gradable"), "quality": measures.pop("score"), "flags": measures.pop("flags")}
        row |= {f"quality_{name}": value for name, value in measures.items()}
    if (findings := outcome.findings) is not None:
        row |= {"triage": findings.triage.value, "image_score": findings.image_score}
        row["operating_point"] = findings.operating_point
        row["lesion_count"] = len(findings.lesions)
        row["lesion_area_px"] = sum(lesion.area_px for lesion in findings.lesions)
        row["lesions"] = [_values(lesion) for lesion in findings.lesions]
    return row


def _values(flat: Any) -> dict[str, Any]:
    """The fields of a dataclass that holds plain values; `asdict` would copy each of them."""
    return {each.name: getattr(flat, each.name) for each in dataclasses.fields(flat)}
