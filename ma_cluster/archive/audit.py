"""What said what, and when: for each committed part one file of JSON lines, one a result, chained by their hashes.

    outcomes/part-000003.parquet -> audit/part-000003.jsonl

Each line holds the hash of the line before it, so none can be changed, taken out or put in without all that follow.
A file follows from its part of the outcomes alone: it can be written again. `check_audit` holds outcomes against the
plan, audits against outcomes, and masks against both, and gives one hash over all audits; whoever notes it elsewhere
can prove later that nothing has changed since. No Ray in here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ma_cluster.archive.plan import read_shards, shards
from ma_cluster.archive.retry import latest_outcomes, retries
from ma_cluster.archive.run import Run, audit_key, committed, committed_at, outcomes_key, read_as_committed
from ma_cluster.errors import ObjectMissingError, PartDamagedError
from ma_cluster.storage.store import Entry, Store

_SAID = ("status", "reason", "triage", "image_score", "gradable", "lesion_count", "lesion_area_px")
_SAID_LATER = ("operating_point", "mask_key", "mask_sha256")
"""Which outcomes of earlier versions do not have: their audits stay what they are."""


@dataclass(frozen=True, slots=True)
class AuditCheck:
    """What a run, with its retries, can prove."""

    results: int
    """Lines of all its audits."""
    undecided: int
    """Photographs of the plan without an outcome, where the run is not finished."""
    sha256: str
    """Over all audits, in their order."""
    faults: tuple[str, ...]
    """What is missing, too much, or was changed: `KEY: how`, in the plan's order."""


def audit_lines(run: Run, number: int, outcomes: pa.Table) -> Iterator[str]:
    """The lines of a part's outcomes, as they were committed, all columns."""
    moment = datetime.fromtimestamp(committed_at(outcomes), UTC).isoformat(timespec="milliseconds")
    same = {
        "run": run.id,
        "part": number,
        "committed": moment,
        "model_digest": run.model_digest,
        "config_digest": run.config_digest,
        "code": run.versions.get("ma_cluster"),
    }
    previous = _sha256(f"{run.id}/{number}")
    for row, values in enumerate(outcomes.to_pylist()):
        photograph = {"key": values["key"], "etag": values["etag"], "input_sha256": values.get("sha256")}
        said = {name: values.get(name) for name in _SAID} | {
            name: values[name] for name in _SAID_LATER if name in values
        }
        line = _json(
            {"previous": previous, "row": row} | same | photograph | said | {"outcome_sha256": _sha256(_json(values))}
        )
        previous = _sha256(line)
        yield line


def audit_of(run: Run, number: int, outcomes: pa.Table) -> bytes:
    """The audit that a committed part must have; `outcomes` as `audit_lines` takes them."""
    return "".join(f"{line}\n" for line in audit_lines(run, number, outcomes)).encode()


def write_audit(dest: Store, run: Run, number: int) -> None:
    """Write the audit of a committed part, unless it is there.

    Raises:
        PartDamagedError: the outcomes cannot be read, or are of another run or part.
    """
    dest.create(audit_key(number), audit_of(run, number, read_as_committed(dest, run, number)))


def complete_audit(dest: Store, run: Run) -> None:
    """Write the audits that are missing, of parts whose worker died between the two files."""
    there = {entry.key for entry in dest.list("audit/")}
    for number in sorted(committed(dest)):
        if audit_key(number) not in there:
            write_audit(dest, run, number)


def check_audit(dest: Store, run: Run, *, masks: bool = False) -> AuditCheck:
    """Whether a run and its retries have all parts that they planned, no other, and each as it was committed.

    Writes nothing.

    Args:
        dest: of the run.
        run: finished or not.
        masks: where all else is whole, read the masks, too, and hold them against their digests.

    Raises:
        PartDamagedError: the plan cannot be read.
    """
    results, undecided, head, faults = 0, 0, hashlib.sha256(), list[str]()
    for parts, each in [(dest, run), *retries(dest)]:
        below = f"{parts.url}/".removeprefix(f"{dest.url}/")
        done, audits = committed(parts), {entry.key for entry in parts.list("audit/")}
        planned = list(shards(parts, each.plan))
        entries = read_shards(parts, planned)
        for shard in planned:
            own = list(islice(entries, shard.images))
            if shard.number in done:
                stored = parts.get(audit_key(shard.number)) if audit_key(shard.number) in audits else b""
                head.update(stored)
                results += stored.count(b"\n")
                found = _faults(parts, each, shard.number, own, stored)
                faults += [below + fault for fault in found]
            elif each.finished is None:
                undecided += shard.images
            else:
                faults.append(f"{below}{outcomes_key(shard.number)}: it is missing, and the run is finished")
        numbers = {shard.number for shard in planned}
        surplus = {outcomes_key(number) for number in done - numbers}
        surplus |= audits - {audit_key(number) for number in numbers & done}
        faults += [f"{below}{key}: the plan has no such part, or it has no outcomes" for key in sorted(surplus)]
    if masks and not faults:
        faults += _mask_faults(dest, run)
    return AuditCheck(results, undecided, head.hexdigest(), tuple(faults))


def _faults(parts: Store, run: Run, number: int, planned: list[Entry], stored: bytes) -> Iterator[str]:
    """Of a committed part: its outcomes against the plan, and its audit, empty where there is none, against them."""
    try:
        outcomes = read_as_committed(parts, run, number)
    except PartDamagedError as error:
        yield f"{error.part}: {error.fault}"
        return
    if outcomes.select(["key", "etag"]).to_pylist() != [{"key": entry.key, "etag": entry.etag} for entry in planned]:
        yield f"{outcomes_key(number)}: its photographs are not those of the plan"
    if not stored:
        yield f"{audit_key(number)}: it is missing"
    elif stored != audit_of(run, number, outcomes):
        yield f"{audit_key(number)}: it does not follow from its outcomes: one of both was changed"


def _mask_faults(dest: Store, run: Run) -> Iterator[str]:
    for outcomes in latest_outcomes(dest, run, ["mask_key", "mask_sha256"]):
        for row in outcomes.filter(pc.is_valid(outcomes["mask_sha256"])).to_pylist():
            try:
                same = hashlib.sha256(dest.get(row["mask_key"])).hexdigest() == row["mask_sha256"]
            except ObjectMissingError:
                yield f"{row['mask_key']}: it is missing"
            else:
                if not same:
                    yield f"{row['mask_key']}: it was changed since its result was committed"


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
