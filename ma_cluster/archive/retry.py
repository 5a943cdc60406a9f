"""Doing parts of a run again: photographs that failed, what of the run is damaged. Nothing is deleted or overwritten.

    retries/0001/run.json, plan/, outcomes/, summary.json     as of any run; masks and overlays lie beside the run's own
    retries/0001/run_summary.json                             of the whole run, as it stands after this retry
    damaged/0001/outcomes/part-000003.parquet                 as it was found, under the name that it had

A retry is a run of its own inside the run, of the photographs that had failed: it is resumed as a run is, the run's own
outcomes keep one row for each key, and a retry's row supersedes it. Of what is damaged, and put aside, a part of the
outcomes is scored again; a part of the plan is listed again, which needs the source as it was; a retry without its plan
is put aside as a whole, and so can be done again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from ma_cluster.archive.plan import damaged_parts, plan_again, plan_key, read_shard, shards
from ma_cluster.archive.run import (
    Listing,
    Run,
    audit_key,
    begin_run,
    committed,
    outcomes_key,
    read_outcomes,
    read_run,
    to_json,
)
from ma_cluster.errors import ObjectMissingError, PartDamagedError, Reason, RunConflictError, Status, UsageError
from ma_cluster.storage.manifest import AND_MISSING, Source
from ma_cluster.storage.store import Entry, Store, open_store

RUN_SUMMARY = "run_summary.json"
"""Beside the summary of a retry: that of its whole run, after the retry."""
_READS = 8  # parts read at a time: they wait for the store, not for a core


def begin_retry(source: Source, dest: Store, run: Run) -> tuple[Store, Run] | None:
    """The first retry that is unfinished, else a new one; None where no photograph has failed.

    Args:
        source: of the run.
        dest: of the run.
        run: finished.

    Returns:
        the store of the retry's own parts, and the retry.
    """
    earlier = retries(dest)
    for parts, retry in earlier:
        if retry.finished is None:
            return parts, retry
    failed = _failed(source, dest, run, earlier)
    first = next(failed, None)
    if first is None:
        return None
    names = {entry.key.split("/")[1] for entry in dest.list("retries/")}  # also of a driver that died while it planned
    number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
    new = open_store(f"{dest.url}/retries/{number:04d}")
    return new, begin_run(source, new, run.model_digest, run.config_digest, chain([first], failed))


def retry_folders(dest: Store) -> list[Store]:
    """The stores of a run's retries, in their order."""
    keys = (entry.key.split("/") for entry in dest.list("retries/"))
    found = sorted({parts[1] for parts in keys if parts[2:] == ["run.json"] and parts[1].isdecimal()})
    return [open_store(f"{dest.url}/retries/{number}") for number in found]


def retries(dest: Store) -> list[tuple[Store, Run]]:
    """A run's retries in their order: the store of each one's parts, and what its run.json says.

    Raises:
        UsageError: a run.json is damaged.
    """
    return [(parts, run) for parts in retry_folders(dest) if (run := read_run(parts)) is not None]


def latest_outcomes(dest: Store, run: Run, columns: list[str]) -> Iterator[pa.Table]:
    """Columns of all committed outcomes, each key once: the last retry's row where there is one.

    Memory holds some parts and the keys that were retried.

    Raises:
        PartDamagedError: a part is damaged, or foreign.
    """
    wanted = ["key", *(column for column in columns if column != "key")]
    superseded: set[str] = set()
    for parts, retry in reversed(retries(dest)):
        retried: set[str] = set()  # each once
        for number in sorted(committed(parts)):
            table = _without(read_outcomes(parts, retry, number, wanted), superseded)
            retried.update(table["key"].to_pylist())
            yield table
        superseded |= retried
    waiting = iter(sorted(committed(dest)))
    with ThreadPoolExecutor(_READS) as readers:
        while chunk := list(islice(waiting, _READS)):
            for table in readers.map(lambda number: read_outcomes(dest, run, number, wanted), chunk):
                yield _without(table, superseded)


def _failed(source: Source, dest: Store, run: Run, earlier: Sequence[tuple[Store, Run]]) -> Iterator[Entry]:
    """The photographs that failed when they were last tried, as they were planned; those that had changed or were
    missing, as they are now. Memory holds the keys that were retried.
    """
    columns = ["key", "etag", "status", "reason"]
    last: dict[str, dict[str, Any]] = {}
    for parts, retry in earlier:
        for number in sorted(committed(parts)):
            last.update({row["key"]: row for row in read_outcomes(parts, retry, number, columns).to_pylist()})
    for shard in shards(dest, run.plan):
        rows = read_outcomes(dest, run, shard.number, columns).to_pylist()
        outcomes = [last.get(row["key"], row) for row in rows]
        if any(outcome["status"] == Status.FAILED for outcome in outcomes):
            for entry, outcome in zip(read_shard(dest, shard), outcomes, strict=True):
                if outcome["status"] == Status.FAILED:
                    moved = outcome["reason"] in (Reason.CHANGED, Reason.MISSING) or outcome["etag"] != entry.etag
                    yield _as_it_is_now(source, entry) if moved else entry


def _as_it_is_now(source: Source, entry: Entry) -> Entry:
    """The photograph where it has come; what is wrong about the words of its manifest's row stays."""
    try:
        found = source.head(entry.key)
        return replace(entry, size=found.size, etag=found.etag, fault=entry.fault.rpartition(AND_MISSING)[0])
    except (ObjectMissingError, UsageError):
        return entry


def _without(outcomes: pa.Table, superseded: set[str]) -> pa.Table:
    if not superseded:
        return outcomes
    return outcomes.filter(pa.array([key not in superseded for key in outcomes["key"].to_pylist()], pa.bool_()))


@dataclass(frozen=True, slots=True)
class PutAside:
    """What was done about one part: where it is now, None where it had been missing and is there again."""

    part: str
    fault: str
    now: str | None


def repair_run(source: Source, dest: Store) -> list[PutAside]:
    """Put aside all that is damaged, foreign or too much in a run and its retries, and bring its plan back.

    No driver may work on the run meanwhile.

    Raises:
        UsageError: there is no run, or its run.json is damaged.
        RunConflictError: the run is of another source, or its plan is damaged and the source has changed since.
    """
    run = read_run(dest)
    if run is None:
        raise UsageError("there is no run at this destination: it has no run.json; check the URL")
    if run.source != source.url:
        raise RunConflictError(f"the destination holds run {run.id} of another source; nothing was touched")
    folders = {entry.key.split("/")[1] for entry in dest.list("damaged/")}
    aside = f"damaged/{len(folders) + 1:04d}"
    done = list(_mend_plan(source, dest, run, aside))
    reopened = [*_clear_outcomes(dest, run, dest, "", aside)]
    for parts in retry_folders(dest):
        prefix = parts.url.removeprefix(f"{dest.url}/") + "/"
        try:
            retry = read_run(parts)
            fault = "" if retry is None else next(iter(damaged_parts(parts, retry.plan).values()), "")
        except UsageError:
            retry, fault = None, "the run.json of this retry is damaged"
        if fault:
            reopened += [_put_aside(dest, key, fault, aside) for key in [entry.key for entry in dest.list(prefix)]]
        elif retry is not None:
            reopened += _clear_outcomes(parts, retry, dest, prefix, aside)
    if reopened:
        reopened += _reopen(dest, run, "", aside)
    return done + reopened


def _mend_plan(source: Source, dest: Store, run: Run, aside: str) -> Iterator[PutAside]:
    damaged = damaged_parts(dest, run.plan)
    if not damaged:
        return
    again = plan_again(Listing(source, dest), run.plan, damaged)
    for number, data in again.items():
        key = plan_key(number)
        try:
            yield _put_aside(dest, key, damaged[number], aside)
        except ObjectMissingError:
            yield PutAside(key, damaged[number], None)
        dest.create(key, data)


def _clear_outcomes(parts: Store, run: Run, dest: Store, prefix: str, aside: str) -> list[PutAside]:
    """Put aside the outcomes of a run, or of a retry below `prefix` of its run, that are not whole."""
    known = {outcomes_key(shard.number): shard for shard in shards(parts, run.plan)}
    found = []
    for key in [entry.key for entry in parts.list("outcomes/")]:
        try:
            if key not in known:
                raise PartDamagedError(key, "the plan has no such part")
            rows = read_outcomes(parts, run, known[key].number, ["key", "etag"]).to_pylist()
            if rows != [{"key": entry.key, "etag": entry.etag} for entry in read_shard(parts, known[key])]:
                raise PartDamagedError(key, "its photographs are not those of the plan")
        except PartDamagedError as error:
            found.append(_put_aside(dest, prefix + key, error.fault, aside))
    return [*found, *_reopen(dest, run, prefix, aside)] if found and prefix else found


def _reopen(dest: Store, run: Run, prefix: str, aside: str) -> Iterator[PutAside]:
    """Make a run, or a retry below `prefix`, unfinished: what it came to is to be counted again."""
    if run.finished is not None:
        dest.put(f"{prefix}run.json", to_json(dataclasses.replace(run, finished=None)))
    summaries = {"summary.json", RUN_SUMMARY}
    for key in [entry.key for entry in dest.list(prefix) if entry.key.rpartition("/")[2] in summaries]:
        if not key.startswith("damaged/"):
            yield _put_aside(dest, key, "it counted what has been put aside", aside)


def _put_aside(dest: Store, key: str, fault: str, aside: str) -> PutAside:
    now = f"{aside}/{key}"
    dest.move(key, now)
    folder, part = "outcomes/part-", key.rpartition("outcomes/part-")[2].removesuffix(".parquet")
    if folder in key and part.isdecimal():  # its audit says what is not so any more
        follows = f"{key[: key.index(folder)]}{audit_key(int(part))}"
        with suppress(ObjectMissingError):
            dest.move(dest.head(follows).key, f"{aside}/{follows}")
    return PutAside(key, fault, now)
