"""Going over failed photographs again: a retry is a run of its own inside the run, of the photographs that had failed.

    retries/0001/run.json, plan/, outcomes/, summary.json     as of any run; masks and overlays lie beside the run's own

So a retry is resumed as a run is, and nothing that is written is touched: the run's own outcomes keep one row for each
key, and a retry's row supersedes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import pyarrow as pa

from ma_cluster.archive.plan import read_shard, shards
from ma_cluster.archive.run import Run, begin_run, committed, read_outcomes, read_run
from ma_cluster.errors import ObjectMissingError, Reason, Status
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Entry, Store, open_store

_READS = 8  # parts read at a time: they wait for the store, not for a core


def begin_retry(source: Source, dest: Store, run: Run) -> tuple[Store, Run] | None:
    """The last retry where it is unfinished, else a new one; None where no photograph has failed.

    Args:
        source: of the run.
        dest: of the run.
        run: finished.

    Returns:
        the store of the retry's own parts, and the retry.
    """
    earlier = retries(dest)
    last = earlier[-1] if earlier else dest
    last_run = read_run(last)
    assert last_run is not None
    if last_run.finished is None:
        return last, last_run
    failed = _failed(source, last, last_run)  # a retry goes over all that had failed before it: the last knows them
    first = next(failed, None)
    if first is None:
        return None
    retry = open_store(f"{dest.url}/retries/{len(earlier) + 1:04d}")
    return retry, begin_run(source, retry, run.model_digest, run.config_digest, chain([first], failed))


def retries(dest: Store) -> list[Store]:
    """The stores of a run's retries, in their order."""
    keys = (entry.key for entry in dest.list("retries/"))
    folders = sorted(key.removesuffix("/run.json") for key in keys if key.endswith("/run.json"))
    return [open_store(f"{dest.url}/{folder}") for folder in folders]


def latest_outcomes(dest: Store, columns: list[str]) -> Iterator[pa.Table]:
    """Columns of all committed outcomes, each key once: the last retry's row where there is one.

    Memory holds some parts and the keys that were retried.

    Raises:
        StoreError: a part is damaged.
    """
    wanted = ["key", *(column for column in columns if column != "key")]
    superseded: set[str] = set()
    for retry in reversed(retries(dest)):
        tables = [_without(read_outcomes(retry, number, wanted), superseded) for number in sorted(committed(retry))]
        yield from tables
        superseded.update(key for table in tables for key in table["key"].to_pylist())
    numbers = iter(sorted(committed(dest)))
    with ThreadPoolExecutor(_READS) as readers:
        while chunk := list(islice(numbers, _READS)):
            yield from readers.map(lambda number: _without(read_outcomes(dest, number, wanted), superseded), chunk)


def _failed(source: Source, dest: Store, run: Run) -> Iterator[Entry]:
    """The photographs that failed, as they were planned; those that had changed or were missing,
    as they are now.
    """
    for shard in shards(dest, run.plan):
        outcomes = read_outcomes(dest, shard.number, ["status", "reason"]).to_pylist()
        if any(outcome["status"] == Status.FAILED for outcome in outcomes):
            for entry, outcome in zip(read_shard(dest, shard), outcomes, strict=True):
                if outcome["reason"] in (Reason.CHANGED, Reason.MISSING):
                    yield _as_it_is_now(source, entry)
                elif outcome["status"] == Status.FAILED:
                    yield entry


def _as_it_is_now(source: Source, entry: Entry) -> Entry:
    try:
        return source.head(entry.key)
    except ObjectMissingError:
        return entry


def _without(outcomes: pa.Table, superseded: set[str]) -> pa.Table:
    if not superseded:
        return outcomes
    return outcomes.filter(pa.array([key not in superseded for key in outcomes["key"].to_pylist()], pa.bool_()))
