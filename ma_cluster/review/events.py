"""Decisions of reviewers: events, each an object of its own that is created and never changed.

    DEST/reviews/REVIEWER/20261127T193000.123Z-0123456789abcdef.json

Two reviewers cannot overwrite each other, a crash loses at most the event under way, and sending one twice creates it
once: its name follows from what the sender has put into it. What a reviewer thinks of a photograph follows from the
events in their order (`Standing`); undoing is an event, too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError, model_validator

from ma_cluster.errors import ObjectMissingError, UsageError
from ma_cluster.storage.store import Store

log = logging.getLogger(__name__)
FOLDER = "reviews/"
_READS = 16  # events read at a time: they wait for the store, not for a core
_MOST_POINTS = 600
REVIEWER = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
"""A reviewer's name: part of a key, on every file system."""
_KEY = re.compile(rf"reviews/({REVIEWER})/([0-9]{{8}}T[0-9]{{6}}\.[0-9]{{3}}Z)-([0-9a-f]{{16}})\.json")

_Place = Annotated[float, Field(ge=-1, le=100_000, allow_inf_nan=False)]
_Point = tuple[_Place, _Place]


class Kind(StrEnum):
    """What an event says of a photograph."""

    ACCEPT = "accept"  # the lesion is one
    REJECT = "reject"  # it is none
    DRAW = "draw"  # here is one that was missed
    GRADE = "grade"
    NOTE = "note"
    DONE = "done"  # all of it was looked at: what is not rejected stands
    UNDO = "undo"  # of an event of the same reviewer


GRADES = ("none", "mild", "moderate", "severe", "proliferative", "ungradable")
"""Of retinopathy: the International Clinical Diabetic Retinopathy scale from 0 to 4, and none of them."""


class Event(BaseModel, extra="forbid", frozen=True):
    """One decision. Positions are (row, col) pixels of the upright photograph, pixel centres at integers."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """Chosen at random by the sender."""
    at: Annotated[str, Field(pattern=r"^[0-9]{8}T[0-9]{6}\.[0-9]{3}Z$")]
    """When it was decided, UTC, by the sender's clock."""
    reviewer: Annotated[str, Field(pattern=f"^{REVIEWER}$")]
    run: Annotated[str, Field(max_length=64)]
    key: Annotated[str, Field(max_length=4096)]
    """Of the photograph, in the run's source."""
    kind: Kind
    lesion: Annotated[int, Field(ge=1)] | None = None
    """Its id in the photograph's outcome; of `accept` and `reject`."""
    polygon: Annotated[list[_Point], Field(min_length=3, max_length=_MOST_POINTS)] | None = None
    """Of `draw`: the outline, closed by its first point."""
    grade: str | None = None
    """Of `grade`: one of `GRADES`."""
    note: Annotated[str, Field(max_length=2000)] | None = None
    """Of `note`; the last one counts, an empty one takes it back."""
    undoes: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None
    """Of `undo`: the id of the event."""

    @model_validator(mode="after")
    def _whole(self) -> Event:
        wanted = _SAYS[self.kind]
        given = {name for name in ("lesion", "polygon", "grade", "note", "undoes") if getattr(self, name) is not None}
        if given != wanted or (self.grade is not None and self.grade not in GRADES):
            raise ValueError("an event says what its kind asks for, and nothing else")
        return self

    @property
    def object_key(self) -> str:
        """Under which it lies in the destination."""
        return f"{FOLDER}{self.reviewer}/{self.at}-{self.id}.json"


_SAYS: dict[Kind, set[str]] = {
    Kind.ACCEPT: {"lesion"},
    Kind.REJECT: {"lesion"},
    Kind.DRAW: {"polygon"},
    Kind.GRADE: {"grade"},
    Kind.NOTE: {"note"},
    Kind.DONE: set(),
    Kind.UNDO: {"undoes"},
}


@dataclass
class Standing:
    """What one reviewer thinks of one photograph."""

    verdicts: dict[int, bool] = field(default_factory=dict)
    """Lesions that were judged: True accepted, False rejected."""
    drawn: dict[str, list[_Point]] = field(default_factory=dict)
    """Outlines by the id of their event."""
    grade: str | None = None
    note: str = ""
    done: bool = False
    """Whether all of it was looked at: what is not rejected stands."""

    @property
    def empty(self) -> bool:
        """Whether nothing is left of what was said."""
        return self == Standing()


def standing(events: Iterable[Event]) -> Standing:
    """What follows from the events of one reviewer about one photograph, in any order."""
    ordered = sorted(events, key=lambda event: (event.at, event.id))
    undone = {event.undoes for event in ordered if event.kind is Kind.UNDO}
    found = Standing()
    for event in ordered:
        if event.id in undone:
            continue
        if event.kind in (Kind.ACCEPT, Kind.REJECT) and event.lesion is not None:
            found.verdicts[event.lesion] = event.kind is Kind.ACCEPT
        elif event.kind is Kind.DRAW and event.polygon is not None:
            found.drawn[event.id] = event.polygon
        elif event.kind is Kind.GRADE:
            found.grade = event.grade
        elif event.kind is Kind.NOTE:
            found.note = event.note or ""
        elif event.kind is Kind.DONE:
            found.done = True
    return found


def append(dest: Store, event: Event) -> bool:
    """Keep an event; False where it was kept before. Raises StoreError: it could not be kept."""
    return dest.create(event.object_key, (event.model_dump_json(exclude_none=True) + "\n").encode())


def read_events(dest: Store, run_id: str, known: set[str] | None = None) -> Iterator[Event]:
    """The events of a run that are not known yet, in no order; `known` gains their keys.

    What lies there and is no event of this version is passed over, and said in the log once for each call.
    """
    known = set() if known is None else known
    new = [entry.key for entry in dest.list(FOLDER) if entry.key not in known]
    foreign = 0
    with ThreadPoolExecutor(_READS) as readers:
        for key, event in zip(new, readers.map(lambda key: _read(dest, key), new), strict=True):
            known.add(key)
            if event is None:
                foreign += 1
            elif event.run == run_id:
                yield event
    if foreign:
        log.warning("%d objects under reviews/ are no events of this version", foreign)


def _read(dest: Store, key: str) -> Event | None:
    """None where it is no event, or lies under another's name."""
    if _KEY.fullmatch(key) is None:
        return None
    try:
        event = Event.model_validate_json(dest.get(key))
    except (ValidationError, ObjectMissingError):
        return None
    return event if event.object_key == key else None


def check_reviewer(name: str) -> str:
    """The name, where it can be one. Raises UsageError."""
    if re.fullmatch(REVIEWER, name) is None:
        raise UsageError("a reviewer's name is of letters, digits, dots, dashes and underscores, 40 at most")
    return name
