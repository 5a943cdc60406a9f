"""What said what, and when: for each committed part one file of JSON lines, one a result, chained by their hashes.

    outcomes/part-000003.parquet -> audit/part-000003.jsonl

Each line holds the hash of the line before it, so none can be changed, taken out or put in without all that follow.
A file follows from its part of the outcomes alone: it can be written again, and checked. `check_audit` gives one hash
over all of them; whoever notes it elsewhere can prove later that nothing has changed since. No Ray in here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from ma_cluster.archive.retry import retries
from ma_cluster.archive.run import Run, audit_key, committed, committed_at, outcomes_key
from ma_cluster.errors import ObjectMissingError, PartDamagedError
from ma_cluster.storage.parquet import DAMAGED, from_parquet
from ma_cluster.storage.store import Store

_SAID = ("status", "reason", "triage", "image_score", "gradable", "lesion_count", "lesion_area_px")


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
        said = {name: values.get(name) for name in _SAID}
        line = _json(
            {"previous": previous, "row": row} | same | photograph | said | {"outcome_sha256": _sha256(_json(values))}
        )
        previous = _sha256(line)
        yield line


def audit_of(dest: Store, run: Run, number: int) -> bytes:
    """The audit that a committed part must have.

    Raises:
        PartDamagedError: the outcomes cannot be read.
    """
    try:
        outcomes = from_parquet(dest.get(outcomes_key(number)))
    except (*DAMAGED, ObjectMissingError) as error:
        raise PartDamagedError(outcomes_key(number), "it is damaged, or no table") from error
    return "".join(f"{line}\n" for line in audit_lines(run, number, outcomes)).encode()


def write_audit(dest: Store, run: Run, number: int) -> None:
    """Write the audit of a committed part, unless it is there; raises as `audit_of` does."""
    dest.create(audit_key(number), audit_of(dest, run, number))


def complete_audit(dest: Store, run: Run) -> None:
    """Write the audits that are missing, of parts whose worker died between the two files."""
    there = {entry.key for entry in dest.list("audit/")}
    for number in sorted(committed(dest)):
        if audit_key(number) not in there:
            write_audit(dest, run, number)


def check_audit(dest: Store, run: Run) -> tuple[int, str]:
    """How many results a run and its retries have, and one hash over all that their audits say. Writes nothing.

    Raises:
        PartDamagedError: an audit is missing, or is not what follows from its outcomes: one of both was changed.
    """
    results, head = 0, hashlib.sha256()
    for parts, each in [(dest, run), *retries(dest)]:
        for number in sorted(committed(parts)):
            key = audit_key(number)
            try:
                stored = parts.get(key)
            except ObjectMissingError as error:
                raise PartDamagedError(key, "it is missing") from error
            if stored != audit_of(parts, each, number):
                raise PartDamagedError(key, "it does not follow from its outcomes: one of both was changed")
            head.update(stored)
            results += stored.count(b"\n")
    return results, head.hexdigest()


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
