"""From photographs to patients: what a run's outcomes say of each eye, and of each visit of a patient. No Ray in here.

    patients/eyes.parquet, eyes.csv         one row for each eye of each visit
    patients/visits.parquet, visits.csv     one row for each visit of each patient
    patients/counts.json                    of both, by triage

Photographs without a patient are in none of them. All are written anew whenever asked for: they follow from the
outcomes. The triage errs towards a person: whatever could not be judged is `ungradable`, and never `none`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from ma_cluster.archive.outcomes import described
from ma_cluster.archive.plan import read_shards, shards
from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run, to_json, undecided
from ma_cluster.errors import ObjectMissingError, RunConflictError, Status, Triage, UsageError
from ma_cluster.storage.identity import SALT_VARIABLE, Pseudonyms, salts
from ma_cluster.storage.parquet import parquet_writer
from ma_cluster.storage.store import Store, temporary_database, temporary_room

log = logging.getLogger(__name__)
COUNTS = "patients/counts.json"
_EYES = ("R", "L")
_SOURCES = ("picture", "dicom", "manifest")  # the least sure first
_COLUMNS = ["patient", "visit", "eye", "eye_source", "status", "gradable", "lesion_count", "image_score", "triage"]
_INSERT = f"insert into photographs values ({', '.join('?' * len(_COLUMNS))})"
_ROWS = 10_000  # of a table that memory holds at a time
_COMMON = [
    described("photographs", pa.int32(), "", "planned, whatever became of them"),
    described("gradable", pa.int32(), "", "scored ones on which a lack of lesions means something"),
    described("refused", pa.int32(), "", "those that cannot be scored"),
    described("pending", pa.int32(), "", "those that failed or are not decided yet: --retry-failed goes over them"),
    described("lesions", pa.int32(), "", "on the photograph with the most: fields overlap, so they do not add up"),
    described("image_score", pa.float64(), "1", "the largest of the photographs'; null where none has one"),
]
_PATIENT = described("patient", pa.string(), "", "pseudonym under the site's salt, or the id where ids are kept")
_VISIT = described("visit", pa.string(), "", "YYYY-MM-DD, or another label; null where nobody says it")
EYES = pa.schema(
    [
        _PATIENT,
        _VISIT,
        described("eye", pa.string(), "", "R or L; null: photographs of which nobody knows it, in one row"),
        described("eye_source", pa.string(), "", "the least sure one: picture, dicom, manifest"),
        *_COMMON,
        described(
            "triage", pa.string(), "", "refer: a photograph is; none: a gradable one is, none is pending; or ungradable"
        ),
    ]
)
VISITS = pa.schema(
    [
        _PATIENT,
        _VISIT,
        described("eyes", pa.string(), "", "those that were photographed"),
        described("lacking", pa.string(), "", "those without a photograph that could be judged"),
        described("eye_source", pa.string(), "", "of its eyes, the least sure one: picture, dicom, manifest"),
        *_COMMON,
        described("triage", pa.string(), "", "refer: an eye is; none: both eyes are; or ungradable"),
    ]
)


@dataclass(slots=True)
class Tally:
    """What the photographs of an eye at a visit, or of a whole visit, say together."""

    photographs: int = 0
    gradable: int = 0
    refused: int = 0
    pending: int = 0
    lesions: int = 0
    image_score: float | None = None
    referred: int = 0
    clear: int = 0
    """Gradable ones that are not referred."""
    eye_source: str | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """One photograph: the columns of its outcome; status None is one that has none yet."""
        scored = row["status"] == Status.SCORED
        gradable = scored and bool(row["gradable"])
        self.photographs += 1
        self.gradable += gradable
        self.refused += row["status"] == Status.REFUSED
        self.pending += row["status"] in (Status.FAILED, None)
        self.referred += scored and row["triage"] == Triage.REFER
        self.clear += gradable and row["triage"] == Triage.NONE
        self._take(row["lesion_count"] or 0, row["image_score"])
        self._trust(row["eye_source"])

    def join(self, other: Tally) -> None:
        """All the photographs of another one, too."""
        for name in ("photographs", "gradable", "refused", "pending", "referred", "clear"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._take(other.lesions, other.image_score)
        self._trust(other.eye_source)

    @property
    def triage(self) -> Triage:
        """Of one eye, if all the photographs are of one."""
        if self.referred:
            return Triage.REFER
        return Triage.NONE if self.clear and not self.pending else Triage.UNGRADABLE

    def _take(self, lesions: int, score: float | None) -> None:
        self.lesions = max(self.lesions, lesions)
        self.image_score = max((s for s in (self.image_score, score) if s is not None), default=None)

    def _trust(self, source: str | None) -> None:
        known = (each for each in (self.eye_source, source) if each is not None)
        self.eye_source = min(known, key=_SOURCES.index, default=None)


class Rollup:
    """Eyes and visits of a run, in the order of patient and visit.

    Its photographs lie in a temporary file, as those of a large archive would fill the memory.
    """

    def __init__(self) -> None:
        self._file = temporary_database()
        self._file.execute(f"create table photographs ({', '.join(_COLUMNS)})")

    def add(self, row: Mapping[str, Any]) -> None:
        """One photograph: the columns of its outcome; one without a patient is nobody's."""
        if row["patient"]:
            values = [row["patient"], row["visit"] or "", row["eye"] or "", *(row[name] for name in _COLUMNS[3:])]
            self._file.execute(_INSERT, values)

    def patients(self) -> Iterator[str]:
        """Each once."""
        return (patient for (patient,) in self._file.execute("select distinct patient from photographs"))

    def eyes(self) -> Iterator[dict[str, Any]]:
        """The rows of `EYES`."""
        for (patient, visit, eye), tally in self._tallies():
            todo = tally.triage if eye or tally.triage is Triage.REFER else Triage.UNGRADABLE
            known = {"patient": patient, "visit": visit or None, "eye": eye or None}
            yield known | dataclasses.asdict(tally) | {"triage": todo.value}

    def visits(self) -> Iterator[dict[str, Any]]:
        """The rows of `VISITS`."""
        for (patient, visit), of_one in groupby(self._tallies(), lambda pair: pair[0][:2]):
            eyes = {eye: tally for (*_, eye), tally in of_one}
            whole = Tally()
            for tally in eyes.values():
                whole.join(tally)
            judged = [eye for eye in _EYES if eye in eyes and eyes[eye].triage is not Triage.UNGRADABLE]
            lacking = [eye for eye in _EYES if eye not in judged]
            todo = Triage.UNGRADABLE if lacking and not whole.referred else whole.triage
            known = {"patient": patient, "visit": visit or None, "triage": todo.value}
            said = {"eyes": " ".join(eye for eye in _EYES if eye in eyes), "lacking": " ".join(lacking)}
            yield dataclasses.asdict(whole) | known | said

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def _tallies(self) -> Iterator[tuple[tuple[str, str, str], Tally]]:
        """By patient, visit and eye, each "" where it is not known."""
        rows = self._file.execute("select * from photographs order by patient, visit, eye")
        for key, of_one in groupby(rows, lambda row: row[:3]):
            tally = Tally()
            for row in of_one:
                tally.add(dict(zip(_COLUMNS, row, strict=True)))
            yield key, tally


def keep_pseudonyms(dest: Store, run: Run, pseudonyms: Pseudonyms) -> Run:
    """Let run.json say what a run calls its patients. One that knows any keeps to it: else a person would become two,
    or an id come among pseudonyms.

    Raises:
        RunConflictError: it calls its patients otherwise.
        PartDamagedError: a part is damaged, or foreign.
    """
    if run.pseudonyms == pseudonyms.tag:
        return run
    if run.pseudonyms and _knows_patients(dest, run):
        was, now = (_called(tag) for tag in (run.pseudonyms, pseudonyms.tag))
        raise RunConflictError(
            f"run {run.id} of the destination calls its patients by {was}, and is to go on with {now}; nothing is "
            f"overwritten: go on as it was begun (--keep-ids, {SALT_VARIABLE}), or use an empty destination"
        )
    run = dataclasses.replace(run, pseudonyms=pseudonyms.tag)
    dest.put("run.json", to_json(run))
    return run


def _knows_patients(dest: Store, run: Run) -> bool:
    planned = (entry.patient for entry in read_shards(dest, shards(dest, run.plan)))
    found = (patient for table in latest_outcomes(dest, run, ["patient"]) for patient in table["patient"].to_pylist())
    return any(planned) or any(found)


def _called(tag: str) -> str:
    return "their ids" if tag == "ids" else f"pseudonyms of salt {tag}"


def write_patients(dest: Store, run: Run) -> dict[str, Any]:
    """Write the files of a run's patients, and return the content of counts.json.

    Photographs of patients that a manifest names count as pending while they have no outcome.

    Raises:
        UsageError: the run knows no patients.
        PartDamagedError: a part is damaged, or foreign.
        StoreError: the destination cannot be written, or the temporary folder is full.
    """
    with temporary_room(), closing(Rollup()) as found:
        for table in latest_outcomes(dest, run, _COLUMNS):
            for row in table.to_pylist():
                found.add(row)
        for entry in undecided(dest, run):
            named = {"patient": entry.patient, "visit": entry.visit, "eye": entry.eye}
            found.add(dict.fromkeys(_COLUMNS) | named | {"eye_source": "manifest" if entry.eye else None})
        patients = sum(1 for _ in found.patients())
        if not patients:
            raise UsageError("the run knows no patients: give it a manifest with the column `patient`, or DICOM files")
        if len(salts(found.patients())) > 1:
            log.warning(
                "patients of this run have pseudonyms of several salts: one person may be two; keep to one salt"
            )
        visits = _write(dest, "patients/visits", found.visits(), VISITS)
        eyes = _write(dest, "patients/eyes", found.eyes(), EYES)
    counts = {"patients": patients, "visits": visits, "eyes": eyes}
    dest.put(COUNTS, (json.dumps(counts, indent=2) + "\n").encode())
    return counts


def _write(dest: Store, name: str, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> dict[str, int]:
    """A table as Parquet and as CSV; how many rows have each triage."""
    table, text, counted = io.BytesIO(), io.BytesIO(), Counter[Triage]()
    with parquet_writer(table, schema) as out:
        while some := list(islice(rows, _ROWS)):
            out.write_table(pa.Table.from_pylist(some, schema=schema))
            text.write(to_csv(some, schema.names, header=not text.tell()))
            counted.update(row["triage"] for row in some)
    dest.put(f"{name}.parquet", table.getvalue())
    dest.put(f"{name}.csv", text.getvalue())
    return {todo.value: counted[todo] for todo in Triage}


def read_counts(dest: Store) -> dict[str, Any] | None:
    """The content of counts.json as it was last written; None where it never was."""
    try:
        counts: dict[str, Any] = json.loads(dest.get(COUNTS))
        return counts
    except ObjectMissingError:
        return None


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, header: bool = True) -> bytes:
    """Rows as CSV, each with all columns; a spreadsheet runs none of them."""
    out = io.StringIO()
    writer = csv.writer(out)
    if header:
        writer.writerow(columns)
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)
    return out.getvalue().encode()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, with the apostrophe that says it is none."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t")) else value
