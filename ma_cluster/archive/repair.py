"""Putting aside what of a run is damaged, so that the run goes on with what is whole. Nothing is deleted.

    damaged/0001/outcomes/part-000003.parquet    as it was found, under the name that it had below the destination

A part of the outcomes is scored again; a part of the plan is listed again, which needs the source as it was; a retry
without its plan is put aside as a whole, and so can be done again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ma_cluster.archive.plan import damaged_parts, plan_again, plan_key, read_shard, shards
from ma_cluster.archive.retry import retry_folders
from ma_cluster.archive.run import Listing, Run, outcomes_key, read_outcomes, read_run, to_json
from ma_cluster.archive.summary import RUN_SUMMARY
from ma_cluster.errors import ObjectMissingError, PartDamagedError, RunConflictError, UsageError
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Store


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
    return PutAside(key, fault, now)
