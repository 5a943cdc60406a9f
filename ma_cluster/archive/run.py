"""An archive run in the object store: plan -> shards -> committed parts -> summary. No Ray in here.

    run.json                       after the plan, create-only: where it is, the plan is whole
    plan/part-00000.parquet        see plan.py
    outcomes/part-000000.parquet   one for each shard, create-only: where it is, the shard is done
    audit/part-000000.jsonl        what follows from it, see audit.py
    summary.json                   create-only, last
    retries/..., damaged/...       see retry.py

Nothing is ever overwritten but `finished` and `pseudonyms` in run.json.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import pyarrow as pa

from ma_cluster import __version__
from ma_cluster.archive.outcomes import SCHEMA, Outcome, to_table
from ma_cluster.archive.plan import Plan, Shard, is_litter, plan_key, read_shards, shards, write_plan
from ma_cluster.config import RESULT_VERSION, digest
from ma_cluster.errors import ObjectMissingError, PartDamagedError, RunConflictError, StoreError, UsageError
from ma_cluster.storage.manifest import Source, is_manifest, no_photographs
from ma_cluster.storage.parquet import DAMAGED, from_parquet, to_parquet
from ma_cluster.storage.store import Entry, Store

FOLDERS = frozenset(
    {"audit", "damaged", "dicom", "masks", "outcomes", "overlays", "patients", "plan", "report", "retries"}
    | {"reviews", "turnover"}
)
FILES = ("run.json", "summary.json", "turnover.parquet")
"""All that lies in a run's destination: another run does not take it for photographs."""
_RUN, _PART, _COMMITTED = "ma_cluster.run", "ma_cluster.part", "ma_cluster.committed"  # in each part of the outcomes
_RESULTS = "results"  # among the versions
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What run.json says. Times are ISO 8601, UTC."""

    id: str
    source: str
    plan: Plan
    model_digest: str
    config_digest: str
    versions: dict[str, str]
    started: str
    finished: str | None = None
    pseudonyms: str = ""
    """`Pseudonyms.tag` of what it calls its patients; empty in runs of earlier versions."""


def begin_run(
    source: Source, dest: Store, model_digest: str, config_digest: str, only: Iterable[Entry] | None = None
) -> Run:
    """The run of these digests in `dest`: the one that is there, or a new one, planned first.

    Args:
        source: of the photographs.
        dest: of the run. What lies below it is not planned, where the source holds it.
        model_digest: of the bundle.
        config_digest: of what else decides an outcome.
        only: the photographs to plan; all that the source lists where it is None.

    Raises:
        RunConflictError: `dest` holds a run of another source, model or configuration, or of a version of the code
            whose results may differ.
        UsageError: there is nothing to score, or source and destination lie within each other; nothing is written.
        StoreError: the destination does not honour conditional writes.
    """
    run = read_run(dest)
    if run is None:
        _check_apart(source, dest)
        listing = Listing(source, dest)
        plan = write_plan(listing if only is None else only, dest)
        if plan.images == 0:
            earlier = f" but {listing.skipped} files that are none or of earlier runs" if listing.skipped else ""
            raise UsageError(f"there is nothing to score: the source holds no photographs{earlier}; check the URL")
        plan = dataclasses.replace(plan, skipped=listing.skipped)
        new = Run(
            id=digest([source.url, dest.url, plan.digest, model_digest, config_digest])[:16],
            source=source.url,
            plan=plan,
            model_digest=model_digest,
            config_digest=config_digest,
            versions=_versions(),
            started=_now(),
        )
        if dest.create("run.json", to_json(new)):
            run = new
            if dest.create("run.json", to_json(new) + b"\n"):
                raise StoreError("the destination's store overwrites where it should only create; use one that does")
        else:  # another driver was faster
            run = read_run(dest)
        assert run is not None
    check_same(run, {"source": source.url, "model_digest": model_digest, "config_digest": config_digest})
    return run


def read_run(dest: Store) -> Run | None:
    """The run in `dest`, None where there is none.

    Raises:
        UsageError: run.json is not one of ours.
    """
    try:
        values = json.loads(dest.get("run.json"))
        run = Run(**(values | {"plan": Plan(**values["plan"])}))
        if not isinstance(run.plan.images, int) or not isinstance(run.versions, dict):
            raise TypeError("fields of other types")
        return run
    except ObjectMissingError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            "run.json of the destination is damaged, or of another version: put it back from a copy, or use that "
            "version"
        ) from error


def check_same(run: Run, wanted: Mapping[str, str]) -> None:
    """Whether a run is the one that is wanted: `wanted` holds its source, model_digest and config_digest.

    Raises:
        RunConflictError: it is another, or of a version of the code whose results may differ.
    """
    if run.versions.get(_RESULTS) != str(RESULT_VERSION):
        raise RunConflictError(
            f"run {run.id} of the destination was begun by ma_cluster {run.versions.get('ma_cluster')}, whose results "
            f"may differ from those of this version, {__version__}: go on with that one, or use an empty destination"
        )
    differing = [name.replace("_digest", "") for name, value in wanted.items() if getattr(run, name) != value]
    if differing:
        raise RunConflictError(
            f"the destination holds run {run.id} of another {' and '.join(differing)}; nothing is overwritten: "
            "use an empty destination"
        )


def undecided(dest: Store, run: Run) -> Iterator[Entry]:
    """The objects of all shards that are not committed, in the plan's order."""
    return read_shards(dest, pending(dest, run))


def pending(dest: Store, run: Run) -> Iterator[Shard]:
    """The shards that are not committed.

    Raises:
        PartDamagedError: a part of the plan is damaged or missing, or there are outcomes that it does not know.
    """
    done = committed(dest)
    for shard in shards(dest, run.plan):
        if shard.number in done:
            done.discard(shard.number)
        else:
            yield shard
    if done:
        raise PartDamagedError(outcomes_key(min(done)), "the plan has no such part")


def commit(dest: Store, run: Run, shard: Shard, outcomes: Sequence[Outcome]) -> bool:
    """Write a shard's outcomes, after their masks. False where another driver has committed it already."""
    assert len(outcomes) == shard.images
    stamp = {_RUN: run.id, _PART: str(shard.number), _COMMITTED: repr(time.time())}
    return dest.create(outcomes_key(shard.number), to_parquet(to_table(outcomes).replace_schema_metadata(stamp)))


def committed(dest: Store) -> set[int]:
    """Numbers of the shards that are done."""
    prefix, suffix = "outcomes/part-", ".parquet"
    keys = (entry.key for entry in dest.list(prefix))
    numbers = (key.removeprefix(prefix).removesuffix(suffix) for key in keys if key.endswith(suffix))
    return {int(number) for number in numbers if number.isdecimal() and len(number) >= _DIGITS}


def is_committed(dest: Store, shard: Shard) -> bool:
    """Whether a shard is done by now, be it by another driver."""
    try:
        dest.head(outcomes_key(shard.number))
    except ObjectMissingError:
        return False
    return True


def read_outcomes(dest: Store, run: Run, number: int, columns: list[str] | None = None) -> pa.Table:
    """The committed outcomes of a shard, or some columns; one that an earlier version did not write is null.

    Raises:
        PartDamagedError: the part is damaged, or of another run or shard.
    """
    names = columns or SCHEMA.names
    table = read_as_committed(dest, run, number, names)
    for name in names:
        if name not in table.column_names:
            table = table.append_column(SCHEMA.field(name), pa.nulls(table.num_rows, SCHEMA.field(name).type))
    return table.select(names)


def read_as_committed(dest: Store, run: Run, number: int, columns: list[str] | None = None) -> pa.Table:
    """The same with the columns alone that it was written with; raises as `read_outcomes` does."""
    key = outcomes_key(number)
    try:
        table = from_parquet(dest.get(key), columns)
    except DAMAGED as error:
        raise PartDamagedError(key, "it is damaged, or no table") from error
    stamp = table.schema.metadata or {}
    if stamp.get(_RUN.encode()) != run.id.encode():
        raise PartDamagedError(key, "it is of another run")
    if stamp.get(_PART.encode(), str(number).encode()) != str(number).encode():
        raise PartDamagedError(key, "it is the copy of another part")
    return table


def committed_at(outcomes: pa.Table) -> float:
    """When a part was committed, seconds since 1970."""
    return float((outcomes.schema.metadata or {}).get(_COMMITTED.encode(), b"nan"))


def mark_finished(dest: Store, run: Run) -> Run:
    """Put the time into run.json, once."""
    if run.finished is None:
        run = dataclasses.replace(run, finished=_now())
        dest.put("run.json", to_json(run))
    return run


class Listing:
    """The photographs that a source lists, without sidecars, system files and the files of runs below it;
    `skipped` counts them, but for the run in `dest`. What a manifest names is scored, whatever it is.
    """

    def __init__(self, source: Source, dest: Store) -> None:
        root = source.url.rstrip("/") + "/"
        self._own = dest.url.removeprefix(root) + "/" if dest.url.startswith(root) else None
        self._source = source
        self._is_run: dict[str, bool] = {}
        self.skipped = 0

    def __iter__(self) -> Iterator[Entry]:
        named = is_manifest(self._source)
        for entry in self._source.list():
            if not named and self._own is not None and entry.key.startswith(self._own):
                continue
            if not named and (is_litter(entry.key) or any(self._holds_run(root) for root in _roots(entry.key))):
                self.skipped += 1
                continue
            yield entry
        self.skipped += no_photographs(self._source)

    def _holds_run(self, root: str) -> bool:
        if root not in self._is_run:
            self._is_run[root] = all(self._has(root + key) for key in ("run.json", plan_key(0)))
        return self._is_run[root]

    def _has(self, key: str) -> bool:
        try:
            self._source.head(key)
        except ObjectMissingError:
            return False
        return True


def _roots(key: str) -> Iterator[str]:
    """The folders, each "" or ending in "/", that would be a run's if this key were of one.

    a/masks/eye.png          a/
    retries/0001/run.json    "" and retries/0001/
    """
    parts = key.split("/")
    for place, part in enumerate(parts):
        if part in (FILES if place == len(parts) - 1 else FOLDERS):
            yield "".join(f"{parent}/" for parent in parts[:place])


def _check_apart(source: Source, dest: Store) -> None:
    within = source.url.removeprefix(dest.url.rstrip("/") + "/")
    if source.url == dest.url or (within != source.url and within.partition("/")[0] in FOLDERS):
        raise UsageError("the destination would write into the source: use a destination beside it, or a folder in it")


def outcomes_key(number: int) -> str:
    """Of a shard's outcomes."""
    return f"outcomes/part-{number:0{_DIGITS}d}.parquet"


def audit_key(number: int) -> str:
    """Of the audit of a shard's outcomes."""
    return f"audit/part-{number:0{_DIGITS}d}.jsonl"


def to_json(run: Run) -> bytes:
    """The contents of run.json."""
    return (json.dumps(dataclasses.asdict(run), indent=2) + "\n").encode()


def _versions() -> dict[str, str]:
    packages = ("ray", "torch", "numpy", "opencv-python-headless", "pillow", "pyarrow")
    own = {"ma_cluster": __version__, _RESULTS: str(RESULT_VERSION), "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
