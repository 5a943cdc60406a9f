"""The photographs of a run and what reviewers have said of them, as a person walks through them: by pages, in an order.

committed parts, events -> an SQLite file in the temporary folder -> pages of rows, one photograph with its lesions

However large the archive, memory holds some parts: SQLite keeps the index on disk. It follows a run that goes on, and
events of other servers on the same destination. A walk is not disturbed by what comes in meanwhile: a page is of the
moment (`as_of`) at which its walk began.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import tempfile
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ma_cluster.archive.retry import retries
from ma_cluster.archive.run import Run, committed, read_outcomes
from ma_cluster.errors import ObjectMissingError, PartDamagedError, UsageError
from ma_cluster.review.events import Event, read_events, standing
from ma_cluster.storage.identity import is_date
from ma_cluster.storage.store import Store, temporary_room

_MOMENT = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})")
"""How many photographs and events there were."""
_VISITS = ["patient", "eye", "visit"]
COLUMNS = ["key", "status", "reason", "detail", "triage", "image_score", "gradable", "quality", "flags"]
COLUMNS += ["lesion_count", "height", "width", "overlay_key", *_VISITS]
"""What the index holds of an outcome."""
_ORDERS = {
    "worst": "urgency, image_score DESC, lesion_count DESC, photographs.rowid",
    "score": "image_score {0}, photographs.rowid",
    "lesions": "lesion_count {0}, photographs.rowid",
    "quality": "quality {0}, photographs.rowid",
    "key": "key {0}",
    "visit": "patient {0}, visit {0}, eye {0}, photographs.rowid",
}
_TABLES = f"""
CREATE TABLE photographs (id TEXT UNIQUE NOT NULL, urgency INTEGER, retry INTEGER, part INTEGER, {", ".join(COLUMNS)});
CREATE INDEX worst ON photographs (urgency, image_score DESC, lesion_count DESC);
CREATE TABLE events (key TEXT UNIQUE NOT NULL, photograph TEXT, reviewer TEXT, json TEXT);
CREATE INDEX of_photograph ON events (photograph);
CREATE TABLE standings (photograph TEXT, reviewer TEXT, done INTEGER, judged INTEGER, grade TEXT,
                        PRIMARY KEY (photograph, reviewer)) WITHOUT ROWID;
"""
_STAND = """
INSERT INTO standings VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    judged = excluded.judged, grade = excluded.grade,
    done = CASE WHEN excluded.done IS NULL THEN NULL ELSE coalesce(done, excluded.done) END
"""
"""`done` stays at the event that made it so: a later one must not take the photograph out of a walk of those done."""
_URGENCY = {"refer": 0, "ungradable": 1, "none": 2}
"""Of a triage; what was not scored comes last."""
_STATES = ("todo", "done")


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which photographs, in which order, of which moment."""

    sort: str = "worst"
    descending: bool = True
    triage: str = ""
    """refer, none, ungradable or unscored; all, where it is empty."""
    flag: str = ""
    state: str = ""
    """todo or done, as the reviewer has them; all, where it is empty."""
    reviewer: str = ""
    text: str = ""
    """A part of the key, in any case, its accents written in either way."""
    as_of: str = ""
    """The moment of an earlier page's walk; now, where it is empty."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of a walk."""

    rows: list[dict[str, Any]]
    total: int
    as_of: str


class Worklist:
    """The index of a run. Threads may share it."""

    def __init__(self, dest: Store, run: Run) -> None:
        self._dest, self.run = dest, run
        self._folder = tempfile.TemporaryDirectory(prefix="ma-cluster-review-")
        path = Path(self._folder.name) / "worklist.sqlite"
        self._index = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._index.create_function("is_date", 1, is_date, deterministic=True)
        self._index.create_function("folded", 1, _folded, deterministic=True)
        self._index.executescript("PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF;" + _TABLES)
        self._lock, self._following = threading.RLock(), threading.Lock()
        self._parts: set[tuple[int, int]] = set()
        self._keys: set[str] = set()

    def close(self) -> None:
        """Remove the index."""
        with self._lock:
            self._index.close()
        self._folder.cleanup()

    def follow(self) -> None:
        """Take in what was committed and decided since; the first time, all of it. A damaged part hides no other.

        Raises:
            StoreError: the destination does not answer, or a part is damaged.
        """
        with self._following:
            damaged: PartDamagedError | None = None
            for retry, number, store, run in self._uncounted():
                try:
                    rows = read_outcomes(store, run, number, COLUMNS).to_pylist()
                except PartDamagedError as error:
                    damaged = damaged or error
                    continue
                self._add(rows, retry, number)
                self._parts.add((retry, number))
            known = set(self._keys)  # a store that fails on the last event takes none of those before it away
            self.note(list(read_events(self._dest, self.run.id, known)))
            self._keys |= known
            if damaged is not None:
                raise damaged

    def _uncounted(self) -> Iterator[tuple[int, int, Store, Run]]:
        for number in sorted(committed(self._dest)):
            if (0, number) not in self._parts:
                yield 0, number, self._dest, self.run
        for retry, (store, run) in enumerate(retries(self._dest), 1):
            for number in sorted(committed(store)):
                if (retry, number) not in self._parts:
                    yield retry, number, store, run

    def _add(self, rows: list[dict[str, Any]], retry: int, part: int) -> None:
        names = ["id", "urgency", "retry", "part", *COLUMNS]
        values = []
        for row in rows:
            row["flags"] = " ".join(row["flags"] or ())
            urgency = _URGENCY.get(row["triage"] or ("none" if row["status"] == "scored" else ""), 3)
            values.append([self.id_of(row["key"]), urgency, retry, part, *(row[name] for name in COLUMNS)])
        places, others = ", ".join("?" * len(names)), ", ".join(f"{name} = excluded.{name}" for name in names[1:])
        with self._changing():
            self._index.executemany(
                f"INSERT INTO photographs ({', '.join(names)}) VALUES ({places}) "
                f"ON CONFLICT (id) DO UPDATE SET {others} WHERE excluded.retry >= retry",
                values,
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """All of it, or nothing; raises StoreError where the temporary folder has no room."""
        with self._lock, temporary_room():
            self._index.execute("BEGIN")
            try:
                yield
                self._index.execute("COMMIT")
            finally:
                if self._index.in_transaction:
                    self._index.execute("ROLLBACK")

    def id_of(self, key: str) -> str:
        """What a photograph is called on the page: no key stands in an address, or in a log."""
        return hashlib.sha256(f"{self.run.id}\n{key}".encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def note(self, events: Iterable[Event]) -> None:
        """Take in events that are kept."""
        with self._changing():
            touched = set()
            for event in events:
                row = event.object_key, self.id_of(event.key), event.reviewer, event.model_dump_json(exclude_none=True)
                if self._index.execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?)", row).rowcount:
                    touched.add(row[1:3])
            for photograph, reviewer in touched:
                said = [event for event in self.events(photograph) if event.reviewer == reviewer]
                found = standing(said)
                seq = self._rows("SELECT max(rowid) AS last FROM events")[0]["last"]
                done = seq if found.done else None
                values = photograph, reviewer, done, len(found.verdicts) + len(found.drawn), found.grade
                self._index.execute(_STAND, values)

    def events(self, photograph: str) -> list[Event]:
        """All events about a photograph, by its id."""
        rows = self._rows("SELECT json FROM events WHERE photograph = ?", photograph)
        return [Event.model_validate_json(row["json"]) for row in rows]

    def since(self, seen: int) -> tuple[list[str], int]:
        """The photographs about which something was said after event number `seen`, and the last number."""
        rows = self._rows("SELECT rowid AS number, photograph FROM events WHERE rowid > ? ORDER BY rowid", seen)
        last = rows[-1]["number"] if rows else seen
        return list(dict.fromkeys(row["photograph"] for row in rows)), last

    def page(self, query: Query, start: int, count: int) -> Page:
        """Some rows of a walk, and how many it has.

        Raises:
            UsageError: there is no such order, kind of photograph, or moment.
        """
        if query.sort not in _ORDERS:
            raise UsageError(f"photographs are sorted by {', '.join(_ORDERS)}")
        for name, value, known in (("triage", query.triage, [*_URGENCY, "unscored"]), ("state", query.state, _STATES)):
            if value not in ("", *known):
                raise UsageError(f"{name} is {', '.join(known)}, or empty for all")
        as_of = query.as_of or self._now()
        where, values = _conditions(query, as_of)
        order = _ORDERS[query.sort].format("DESC NULLS LAST" if query.descending else "ASC NULLS LAST")
        shown = ", ".join(f"photographs.{name}" for name in ("rowid", "id", *COLUMNS))
        own = "LEFT JOIN standings AS own ON own.photograph = photographs.id AND own.reviewer = :reviewer"
        others = "(SELECT count(*) FROM standings WHERE photograph = photographs.id AND done) AS reviewers"
        total = self._rows(f"SELECT count(*) AS n FROM photographs {own} WHERE {where}", values)[0]["n"]
        rows = self._rows(
            f"SELECT {shown}, own.done IS NOT NULL AS done, coalesce(own.judged, 0) AS judged, own.grade, {others} "
            f"FROM photographs {own} WHERE {where} ORDER BY {order} LIMIT :count OFFSET :start",
            values | {"count": count, "start": start},
        )
        return Page([_shown(row) for row in rows], total, as_of)

    def counts(self, reviewer: str) -> dict[str, Any]:
        """How many photographs there are of each kind, for the filters."""
        triage = self._rows("SELECT urgency, count(*) AS n FROM photographs GROUP BY urgency")
        flags: dict[str, int] = {}
        for row in self._rows("SELECT flags, count(*) AS n FROM photographs WHERE flags != '' GROUP BY flags"):
            for flag in row["flags"].split():
                flags[flag] = flags.get(flag, 0) + row["n"]
        names = [*_URGENCY, "unscored"]
        done = self._rows("SELECT reviewer, count(*) AS n FROM standings WHERE done IS NOT NULL GROUP BY reviewer")
        by_reviewer = {row["reviewer"]: row["n"] for row in done}
        return {
            "photographs": sum(row["n"] for row in triage),
            "planned": self.run.plan.images,
            "triage": {names[row["urgency"]]: row["n"] for row in triage},
            "flags": dict(sorted(flags.items())),
            "done": by_reviewer.get(reviewer, 0),
            "reviewers": by_reviewer,
            "sorts": list(_ORDERS),
        }

    def place(self, photograph: str) -> tuple[str, int, int]:
        """Key, retry (0 for the run itself) and part of a photograph's outcome; raises ObjectMissingError."""
        found = self._rows("SELECT key, retry, part FROM photographs WHERE id = ?", photograph)
        if not found:
            raise ObjectMissingError("there is no such photograph; the worklist has them all")
        return found[0]["key"], found[0]["retry"], found[0]["part"]

    def outcome(self, photograph: str) -> dict[str, Any]:
        """All that is known of a photograph, by its id; raises ObjectMissingError."""
        key, retry, part = self.place(photograph)
        store, run = (self._dest, self.run) if retry == 0 else retries(self._dest)[retry - 1]
        table = read_outcomes(store, run, part)
        row: dict[str, Any] = table.filter(pc.equal(table["key"], key)).to_pylist()[0]
        return row

    def previous(self, row: dict[str, Any]) -> str | None:
        """The photograph of the same eye of the same patient at the visit before, where visits are dates."""
        if not all(row[name] for name in _VISITS) or not is_date(row["visit"]):
            return None
        found = self._rows(
            "SELECT id FROM photographs WHERE patient = :patient AND eye = :eye AND visit < :visit "
            "AND is_date(visit) AND status = 'scored' ORDER BY visit DESC, quality DESC LIMIT 1",
            {name: row[name] for name in _VISITS},
        )
        return found[0]["id"] if found else None

    def _now(self) -> str:
        (row,) = self._rows(
            "SELECT (SELECT coalesce(max(rowid), 0) FROM photographs) AS photographs, "
            "(SELECT coalesce(max(rowid), 0) FROM events) AS events"
        )
        return f"{row['photographs']}.{row['events']}"

    def _rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        bound = values[0] if values and isinstance(values[0], dict) else values
        with self._lock:
            cursor = self._index.execute(sql, bound)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _conditions(query: Query, as_of: str) -> tuple[str, dict[str, Any]]:
    """The WHERE clause of a query, and what it binds."""
    moment = _MOMENT.fullmatch(as_of)
    if moment is None:
        raise UsageError("as_of is what an earlier page said")
    values: dict[str, Any] = {"photographs": int(moment[1]), "events": int(moment[2]), "reviewer": query.reviewer}
    conditions = ["photographs.rowid <= :photographs"]
    if query.triage:
        conditions.append("urgency = :urgency")
        values["urgency"] = _URGENCY.get(query.triage, 3)
    if query.flag:
        conditions.append("' ' || flags || ' ' LIKE :flag")
        values["flag"] = f"% {query.flag} %"
    if query.text:
        conditions.append("instr(folded(photographs.key), :text)")
        values["text"] = _folded(query.text)
    if query.state:
        finished = "coalesce(own.done <= :events, 0)"
        conditions.append(finished if query.state == "done" else f"NOT {finished}")
    return " AND ".join(conditions), values


def _folded(text: str) -> str:
    """Without what tells capitals, or the two ways of writing an accent, apart."""
    return unicodedata.normalize("NFC", text).casefold()


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    gradable = None if row["gradable"] is None else bool(row["gradable"])
    return row | {"flags": row["flags"].split(), "gradable": gradable, "done": bool(row["done"])}
