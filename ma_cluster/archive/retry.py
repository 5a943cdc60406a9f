"""Going over failed photographs again: a retry is a run of its own inside the run, of the photographs that had failed.

    retries/0001/run.json, plan/, outcomes/, summary.json     as of any run; masks and overlays lie beside the run's own
    retries/0001/run_summary.json                             of the whole run, as it stands after this retry

So a retry is resumed as a run is, and nothing that is written is touched: the run's own outcomes keep one row for each
key, and a retry's row supersedes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from ma_cluster.archive.plan import read_shard, shards
from ma_cluster.archive.run import Run, begin_run, committed, read_outcomes, read_run
from ma_cluster.errors import ObjectMissingError, Reason, Status
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Entry, Store, open_store

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
    number = 1 + max((int(parts.url.rpartition("/")[2]) for parts, _ in earlier), default=0)
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
        numbers = sorted(committed(parts))
        tables = [_without(read_outcomes(parts, retry, number, wanted), superseded) for number in numbers]
        yield from tables
        superseded.update(key for table in tables for key in table["key"].to_pylist())
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
    try:
        found = source.head(entry.key)
        return replace(entry, size=found.size, etag=found.etag, fault="")
    except ObjectMissingError:
        return entry


def _without(outcomes: pa.Table, superseded: set[str]) -> pa.Table:
    if not superseded:
        return outcomes
    return outcomes.filter(pa.array([key not in superseded for key in outcomes["key"].to_pylist()], pa.bool_()))
