"""What reviewers have made of a run: their masks and grades by photograph, and how far they and the model agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool
from numpy import ndarray

from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run
from ma_cluster.errors import Status, Triage, UsageError
from ma_cluster.evaluation.agreement import Agreement, agree, kappa
from ma_cluster.review.events import GRADES, Standing, read_events, standing
from ma_cluster.review.pictures import component, read_mask
from ma_cluster.storage.store import Store

MODEL = "the model"
_COLUMNS = ["status", "triage", "patient", "height", "width", "lesions", "mask_key"]
_UNGRADABLE = GRADES.index("ungradable")
_TRIAGES = [Triage.NONE, Triage.REFER, Triage.UNGRADABLE]


@dataclass(frozen=True)
class Reviewed:
    """A scored photograph about which somebody said something."""

    row: dict[str, Any]
    """Its outcome: the columns that a mask and a manifest need."""
    standings: dict[str, Standing]
    """By reviewer."""
    model: Bool[ndarray, "h w"]
    """The mask of the run."""

    @property
    def done(self) -> dict[str, Standing]:
        """Of those who have looked at all of it."""
        return {name: said for name, said in self.standings.items() if said.done}

    def mask(self, said: Standing) -> Bool[ndarray, "h w"]:
        """What a reviewer takes for lesions: the model's without those rejected, and those drawn."""
        mask = self.model.astype(np.uint8)
        for lesion in self.row["lesions"] or ():
            if said.verdicts.get(lesion["id"]) is False:
                top, left, bottom, right = lesion["bbox"]
                mask[top:bottom, left:right][component(self.model, lesion["bbox"])] = 0
        for polygon in said.drawn.values():
            corners = np.rint(np.array(polygon)[:, ::-1]).astype(np.int32)
            cv2.fillPoly(mask, [corners], 1)
        return mask > 0


def read_reviews(dest: Store, run: Run, reviewers: Sequence[str] = ()) -> Iterator[Reviewed]:
    """The photographs that were reviewed, by all or by some, in the order of the run. Memory holds one, and all events.

    Raises:
        UsageError: nobody has said anything.
        StoreError: an outcome or a mask cannot be read.
    """
    said = defaultdict(list)
    for event in read_events(dest, run.id):
        if not reviewers or event.reviewer in reviewers:
            said[event.key, event.reviewer].append(event)
    if not said:
        raise UsageError("there are no reviews at this destination; `ma-cluster review` is where they are made")
    by_key: dict[str, dict[str, Standing]] = defaultdict(dict)
    for (key, reviewer), events in sorted(said.items()):
        found = standing(events)
        if not found.empty:
            by_key[key][reviewer] = found
    wanted = pa.array(list(by_key), pa.string())
    for table in latest_outcomes(dest, run, _COLUMNS):
        rows = table.filter(pc.and_(pc.is_in(table["key"], wanted), pc.equal(table["status"], Status.SCORED.value)))
        for row in rows.to_pylist():
            yield Reviewed(row, by_key[row["key"]], read_mask(dest, row))


@dataclass
class Pair:
    """How far two agree: two reviewers, or one and the model."""

    one: str
    other: str
    lesions: Agreement = field(default_factory=Agreement)
    """On the photographs that both have done; the model has done all."""
    grades: list[tuple[int, int]] = field(default_factory=list)
    """Places in `GRADES`, where both graded; none of the model, which has no grades."""
    triages: list[tuple[int, int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values; a kappa is None where chance alone would agree, or there are no grades."""
        graded = [pair for pair in self.grades if _UNGRADABLE not in pair]
        return {
            "one": self.one,
            "other": self.other,
            "photographs": self.lesions.photographs,
            "lesion_f1": self.lesions.lesion_f1 if self.lesions.photographs else None,
            "pixel_f1": self.lesions.f1 if self.lesions.photographs else None,
            "graded": len(graded),
            "grade_kappa": _kappa(graded, len(GRADES) - 1, quadratic=True),
            "triaged": len(self.triages),
            "triage_kappa": _kappa(self.triages, len(_TRIAGES), quadratic=False),
        }


def compare_reviews(dest: Store, run: Run) -> dict[str, Any]:
    """How many photographs each reviewer has done, and how far they agree with each other and with the model.

    Grades are compared by Cohen's kappa with quadratic weights, triage (none, refer from mild on, ungradable) by the
    unweighted one, lesions by F1 over 8-connected components. Raises as `read_reviews` does.
    """
    counts: dict[str, dict[str, int]] = {}
    pairs: dict[tuple[str, str], Pair] = {}
    for photograph in read_reviews(dest, run):
        for name, said in photograph.standings.items():
            count = counts.setdefault(name, {"done": 0, "graded": 0, "accepted": 0, "rejected": 0, "drawn": 0})
            count["done"] += said.done
            count["graded"] += said.grade is not None
            count["accepted"] += sum(said.verdicts.values())
            count["rejected"] += sum(not verdict for verdict in said.verdicts.values())
            count["drawn"] += len(said.drawn)
        _compare(photograph, pairs)
    return {"run": run.id, "reviewers": counts, "pairs": [pairs[names].to_json() for names in sorted(pairs)]}


def _compare(photograph: Reviewed, pairs: dict[tuple[str, str], Pair]) -> None:
    masks = {name: photograph.mask(said) for name, said in photograph.done.items()} | {MODEL: photograph.model}
    grades = {name: GRADES.index(said.grade) for name, said in photograph.standings.items() if said.grade is not None}
    triages = {name: _triage(grade) for name, grade in grades.items()}
    if photograph.row["triage"] is not None:
        triages[MODEL] = _TRIAGES.index(Triage(photograph.row["triage"]))
    for one, other in combinations([*photograph.standings, MODEL], 2):
        pair = pairs.setdefault((one, other), Pair(one, other))
        if one in masks and other in masks:
            pair.lesions += agree(masks[one], masks[other])
        if one in grades and other in grades:
            pair.grades.append((grades[one], grades[other]))
        if one in triages and other in triages:
            pair.triages.append((triages[one], triages[other]))


def _triage(grade: int) -> int:
    if grade == _UNGRADABLE:
        return _TRIAGES.index(Triage.UNGRADABLE)
    return _TRIAGES.index(Triage.REFER if grade else Triage.NONE)


def _kappa(pairs: Sequence[tuple[int, int]], grades: int, *, quadratic: bool) -> float | None:
    if not pairs:
        return None
    return kappa([one for one, _ in pairs], [other for _, other in pairs], grades, quadratic=quadratic)
