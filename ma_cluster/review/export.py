"""Reviews as data: what `ma-cluster train --data` and `--grades` take as it is, and what other tools read.

manifest.csv    image, mask, label, split, group; every photograph that somebody has done
masks/          1-bit PNG, white where at least half of those who did it see a lesion
grades.csv      image, grade (the middle one of those given), split and group as in manifest.csv
lesions.csv     every lesion with each reviewer's verdict, for spreadsheets
coco.json       the masks as polygons
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from ma_cluster.archive.outcomes import artefact_name
from ma_cluster.archive.patients import to_csv
from ma_cluster.archive.run import Run
from ma_cluster.errors import ObjectMissingError, UsageError
from ma_cluster.lesions.findings import encode_mask
from ma_cluster.review.events import GRADES, Standing
from ma_cluster.review.reviews import Reviewed, read_reviews
from ma_cluster.storage.manifest import open_source, url_of
from ma_cluster.storage.store import Entry, Store

_VALIDATING = 5  # one group in so many validates
_UNGRADABLE = "ungradable"
_MARK, _TABLES = "coco.json", ("manifest.csv", "grades.csv", "lesions.csv")
_DESCRIPTION = "reviews of run"


@dataclass
class Exported:
    """What was written."""

    photographs: int = 0
    with_lesions: int = 0
    lesions: int = 0
    ungradable: int = 0
    """Of those done: at least half of their grades say so; they are in no manifest."""
    unfinished: int = 0
    """Nobody has done them: they are left out."""
    _manifest: list[dict[str, Any]] = field(default_factory=list)
    _grades: list[dict[str, Any]] = field(default_factory=list)
    _verdicts: list[dict[str, Any]] = field(default_factory=list)
    _images: list[dict[str, Any]] = field(default_factory=list)
    _annotations: list[dict[str, Any]] = field(default_factory=list)


def export_reviews(dest: Store, run: Run, out: Store, reviewers: Sequence[str] = ()) -> Exported:
    """Write what was reviewed, by all or by some; what an earlier export left there is replaced.

    Raises:
        UsageError: nobody has said anything, or done any photograph; or files of these names lie there that are of no
            export.
        StoreError: a mask cannot be read, or nothing be written.
    """
    _check_place(out)
    source, done = open_source(run.source), Exported()
    for photograph in read_reviews(dest, run, reviewers):
        image = url_of(source, photograph.row["key"])
        done._verdicts += [_verdict(photograph.row, name, said) for name, said in _lines(photograph)]
        grade = _middle([said.grade for said in photograph.standings.values() if said.grade is not None])
        group = photograph.row["patient"] or photograph.row["key"]
        if grade is not None:
            number = "" if grade == _UNGRADABLE else GRADES.index(grade)
            done._grades.append({"image": image, "grade": number, "group": group})
        if not photograph.done:
            done.unfinished += 1
        elif grade == _UNGRADABLE:
            done.ungradable += 1
        else:
            _add(done, photograph, out, {"image": image, "group": group, "grade": grade})
    if not done.photographs:
        raise UsageError("no photograph is done: export follows `Done` on the page, which says that all was looked at")
    _split(done._manifest, done._grades)
    out.put(_MARK, (json.dumps(_coco(done, run)) + "\n").encode())
    out.put("manifest.csv", to_csv(done._manifest, ["image", "mask", "label", "split", "group"]))
    out.put("grades.csv", to_csv(done._grades, ["image", "grade", "split", "group"]))
    columns = ["photograph", "reviewer", "done", "grade", "lesion", "verdict", "row", "col", "diameter_px", "note"]
    out.put("lesions.csv", to_csv(done._verdicts, columns))
    return done


def _check_place(out: Store) -> None:
    """Raises UsageError: what an export would replace is somebody's own, such as the list of the photographs."""
    try:
        told = json.loads(out.get(_MARK))
        if _DESCRIPTION in str(told["info"]["description"]):
            return
        own: str | None = _MARK
    except ObjectMissingError:
        own = next((name for name in _TABLES if _is_there(out, name)), None)
    except (ValueError, TypeError, LookupError, RecursionError):
        own = _MARK
    if own is not None:
        raise UsageError(f"{own} of --export is of no earlier export: give another place, or remove it")


def _is_there(out: Store, name: str) -> bool:
    try:
        out.head(name)
    except ObjectMissingError:
        return False
    return True


def consensus(masks: Sequence[Bool[ndarray, "h w"]]) -> Bool[ndarray, "h w"]:
    """What at least half of them hold."""
    votes = np.zeros(masks[0].shape, np.int32)
    for mask in masks:
        votes += mask
    return 2 * votes >= len(masks)


def _add(done: Exported, photograph: Reviewed, out: Store, known: dict[str, Any]) -> None:
    row = photograph.row
    mask = consensus([photograph.mask(said) for said in photograph.done.values()])
    sick = known["grade"] not in (None, "none")
    name = f"masks/{artefact_name(Entry(row['key'], 0, ''), '', '')}.png"
    outlined = bool(mask.any())
    if outlined or sick:  # a sick photograph without microaneurysms is no healthy one: all of it is background
        out.put(name, encode_mask(mask))
    label = "lesion" if outlined or sick else "healthy"
    kept = name if label == "lesion" else ""
    done._manifest.append({"image": known["image"], "mask": kept, "label": label, "group": known["group"]})
    done.photographs += 1
    done.with_lesions += outlined
    image_id = len(done._images) + 1
    size = {"width": row["width"], "height": row["height"]}
    file = {"file_name": PurePosixPath(row["key"]).name, "coco_url": known["image"]}
    done._images.append({"id": image_id, **file, **size})
    for annotation in _annotations(mask):
        done.lesions += 1
        done._annotations.append({"id": len(done._annotations) + 1, "image_id": image_id, **annotation})


def _split(manifest: list[dict[str, Any]], grades: list[dict[str, Any]]) -> None:
    """One group in five validates, one with lesions at least where two have some; whom follows from their names."""
    rows = [*manifest, *grades]
    digests = {row["group"]: hashlib.sha256(row["group"].encode("utf-8", "surrogatepass")).hexdigest() for row in rows}
    order = sorted(digests, key=digests.__getitem__)
    outlined = [group for group in order if any(row["group"] == group and row["mask"] for row in manifest)]
    validating = set(order[: len(order) // _VALIDATING])
    if len(outlined) > 1:
        validating = (validating | {outlined[0]}) - {outlined[-1]}
    for row in rows:
        row["split"] = "validation" if row["group"] in validating else "training"


def _lines(photograph: Reviewed) -> list[tuple[str, tuple[Standing, dict[str, Any]]]]:
    """Each lesion with each reviewer: the model's, then those drawn; one line without where there are none."""
    lines = []
    for name, said in photograph.standings.items():
        words = {True: "accepted", False: "rejected", None: "accepted" if said.done else ""}
        lesions = [
            lesion | {"lesion": lesion["id"], "verdict": words[said.verdicts.get(lesion["id"])]}
            for lesion in photograph.row["lesions"] or ()
        ]
        for polygon in said.drawn.values():
            corners = np.array(polygon)
            row, col = corners.mean(axis=0)
            size = float(np.ptp(corners, axis=0).max())
            lesions.append({"lesion": "", "verdict": "drawn", "row": row, "col": col, "diameter_px": size})
        lines += [(name, (said, lesion)) for lesion in lesions or [{}]]
    return lines


def _verdict(row: dict[str, Any], name: str, line: tuple[Standing, dict[str, Any]]) -> dict[str, Any]:
    said, lesion = line
    places = {side: f"{lesion[side]:.1f}" if side in lesion else "" for side in ("row", "col", "diameter_px")}
    told = {"photograph": row["key"], "reviewer": name, "done": int(said.done), "grade": said.grade or ""}
    return told | {"lesion": lesion.get("lesion", ""), "verdict": lesion.get("verdict", ""), "note": said.note} | places


def _middle(grades: Sequence[str]) -> str | None:
    """The lower middle of the grades, or ungradable where at least half say so; None without any."""
    if not grades:
        return None
    graded = sorted(GRADES.index(grade) for grade in grades if grade != _UNGRADABLE)
    if 2 * len(graded) <= len(grades):
        return _UNGRADABLE
    return GRADES[graded[(len(graded) - 1) // 2]]


def _annotations(mask: Bool[ndarray, "h w"]) -> list[dict[str, Any]]:
    """COCO's annotations: polygons in (x, y) of pixels' corners, so that a pixel is a square of area 1."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    found = []
    for number in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[number])
        part = (labels[top : top + height, left : left + width] == number).astype(np.uint8)
        contours, _ = cv2.findContours(
            np.pad(part.repeat(2, 0).repeat(2, 1), 1), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
        )
        corners = max(contours, key=len)[:, 0].astype(float)
        polygon = ((corners - 1 + 0.5) / 2 + (left, top)).ravel().tolist()
        shape = {"segmentation": [polygon], "bbox": [left, top, width, height], "area": area, "iscrowd": 0}
        found.append({"category_id": 1, **shape})
    return found


def _coco(done: Exported, run: Run) -> dict[str, Any]:
    return {
        "info": {"description": f"{_DESCRIPTION} {run.id}"},
        "licenses": [],
        "categories": [{"id": 1, "name": "microaneurysm", "supercategory": "lesion"}],
        "images": done._images,
        "annotations": done._annotations,
    }
