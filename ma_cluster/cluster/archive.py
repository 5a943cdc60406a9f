"""An archive run in the object store: plan -> shards -> committed parts -> summary. No Ray in here.

    run.json                       begun last of the plan, create-only: where it is, the plan is whole
    plan/part-00000.parquet        key, size, etag; 16,384 rows each
    outcomes/part-000000.parquet   one for each shard, create-only: where it is, the shard is done
    summary.json                   create-only, last

A shard is a slice of the plan. Nothing is ever overwritten but `finished` in run.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count, groupby, islice

import pyarrow as pa
import pyarrow.parquet as pq

from ma_cluster import __version__
from ma_cluster.cluster.outcomes import Outcome, to_table
from ma_cluster.config import digest
from ma_cluster.errors import ObjectMissingError, RunConflictError, StoreError, UsageError
from ma_cluster.images.store import Entry, Store

PLAN_PART_IMAGES = 16_384
"""Rows of a plan part: a worker that needs a shard reads about a megabyte."""
LARGEST_SHARD_IMAGES = 256
"""A multiple of it is PLAN_PART_IMAGES: more would be lost with a killed worker, fewer would make tiny parts."""
SHARDS_WANTED = 64
"""An archive is cut into at least so many shards where it has the images, so that a fleet is evenly loaded."""
_PLAN_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), metadata={"unit": "", "description": "object key, relative to the source"}),
        pa.field("size", pa.int64(), metadata={"unit": "byte", "description": "of the object"}),
        pa.field("etag", pa.string(), metadata={"unit": "", "description": "the object's version when listed"}),
    ]
)
_COMMITTED = "ma_cluster.committed"


@dataclass(frozen=True, slots=True)
class Plan:
    """How many photographs an archive has, and a digest of all their keys, sizes and versions."""

    images: int
    digest: str


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


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [start, stop) of one plan part, scored and committed together."""

    number: int
    part: int
    start: int
    stop: int

    @property
    def images(self) -> int:
        """How many photographs it holds."""
        return self.stop - self.start


def begin_run(source: Store, dest: Store, model_digest: str, config_digest: str) -> Run:
    """The run of these digests in `dest`: the one that is there, or a new one, planned first.

    Raises:
        RunConflictError: `dest` holds a run of another source, model or configuration.
    """
    run = read_run(dest)
    if run is None:
        plan = write_plan(source, dest)
        run = Run(
            id=digest([source.url, plan.digest, model_digest, config_digest])[:16],
            source=source.url,
            plan=plan,
            model_digest=model_digest,
            config_digest=config_digest,
            versions=_versions(),
            started=_now(),
        )
        if not dest.create("run.json", _to_json(run)):  # another driver was faster
            run = read_run(dest)
            assert run is not None
    wanted = {"source": source.url, "model_digest": model_digest, "config_digest": config_digest}
    differing = [name.replace("_digest", "") for name, value in wanted.items() if getattr(run, name) != value]
    if differing:
        raise RunConflictError(
            f"the destination holds run {run.id} of another {' and '.join(differing)}; nothing is overwritten: "
            "use an empty destination"
        )
    return run


def read_run(dest: Store) -> Run | None:
    """The run in `dest`, None where there is none.

    Raises:
        UsageError: run.json is not one of ours.
    """
    try:
        values = json.loads(dest.get("run.json"))
        return Run(**(values | {"plan": Plan(**values["plan"])}))
    except ObjectMissingError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError("run.json of the destination was not written by this version; use its own") from error


def write_plan(source: Store, dest: Store) -> Plan:
    """List the source into plan parts; memory holds one part. What lies below `dest` itself is left out.

    Raises:
        RunConflictError: `dest` holds a part of another listing, from a driver that died while it planned.
    """
    running, images = hashlib.sha256(), 0
    entries = _listing(source, dest)
    for number in count():
        rows = [dataclasses.asdict(entry) for entry in islice(entries, PLAN_PART_IMAGES)]
        if not rows:
            break
        table = pa.Table.from_pylist(rows, schema=_PLAN_SCHEMA)
        if not dest.create(_plan_key(number), _to_parquet(table)) and _read_plan_part(dest, number) != table:
            raise RunConflictError(
                "the destination holds a half-written plan of another listing; delete its plan/ or use an empty one"
            )
        running.update(json.dumps(rows).encode())
        images += len(rows)
    return Plan(images, running.hexdigest())


def shards(images: int) -> Iterator[Shard]:
    """All shards of a plan. Small archives get one photograph each, large ones up to 256.

    A shard does not straddle two parts. With parts of 4 rows and shards of 3, nine rows give

        part      0 0 0 0 1 1 1 1 2
        shard     0 0 0 1 2 2 2 3 4
    """
    size = min(LARGEST_SHARD_IMAGES, max(1, images // SHARDS_WANTED))
    number = 0
    for part, first in enumerate(range(0, images, PLAN_PART_IMAGES)):
        rows = min(PLAN_PART_IMAGES, images - first)
        for start in range(0, rows, size):
            yield Shard(number, part, start, min(start + size, rows))
            number += 1


def read_shard(dest: Store, shard: Shard) -> list[Entry]:
    """The objects of a shard."""
    return _entries(_read_plan_part(dest, shard.part), shard)


def undecided(dest: Store, run: Run) -> Iterator[Entry]:
    """The objects of all shards that are not committed, in the plan's order; each plan part is read at most once."""
    done = committed(dest)
    pending = (shard for shard in shards(run.plan.images) if shard.number not in done)
    for number, of_part in groupby(pending, key=lambda shard: shard.part):
        table = _read_plan_part(dest, number)
        for shard in of_part:
            yield from _entries(table, shard)


def commit(dest: Store, run: Run, shard: Shard, outcomes: Sequence[Outcome]) -> bool:
    """Write a shard's outcomes, after their masks. False where another driver has committed it already."""
    assert len(outcomes) == shard.images
    stamp = {"ma_cluster.run": run.id, _COMMITTED: repr(time.time())}
    return dest.create(_outcomes_key(shard.number), _to_parquet(to_table(outcomes).replace_schema_metadata(stamp)))


def committed(dest: Store) -> set[int]:
    """Numbers of the shards that are done."""
    prefix, suffix = "outcomes/part-", ".parquet"
    keys = (entry.key for entry in dest.list(prefix))
    numbers = (key.removeprefix(prefix).removesuffix(suffix) for key in keys if key.endswith(suffix))
    return {int(number) for number in numbers if number.isdecimal()}


def read_outcomes(dest: Store, number: int, columns: list[str] | None = None) -> pa.Table:
    """The committed outcomes of a shard.

    Raises:
        StoreError: the part is damaged.
    """
    return _from_parquet(dest.get(_outcomes_key(number)), columns)


def committed_at(outcomes: pa.Table) -> float:
    """When a part was committed, seconds since 1970."""
    return float((outcomes.schema.metadata or {}).get(_COMMITTED.encode(), b"nan"))


def mark_finished(dest: Store, run: Run) -> Run:
    """Put the time into run.json, once."""
    if run.finished is None:
        run = dataclasses.replace(run, finished=_now())
        dest.put("run.json", _to_json(run))
    return run


def _listing(source: Store, dest: Store) -> Iterator[Entry]:
    root = source.url.rstrip("/") + "/"
    own = dest.url.removeprefix(root) + "/" if dest.url.startswith(root) else None
    return (entry for entry in source.list() if own is None or not entry.key.startswith(own))


def _read_plan_part(dest: Store, number: int) -> pa.Table:
    return _from_parquet(dest.get(_plan_key(number)), None)


def _entries(part: pa.Table, shard: Shard) -> list[Entry]:
    return [Entry(**row) for row in part.slice(shard.start, shard.images).to_pylist()]


def _plan_key(number: int) -> str:
    return f"plan/part-{number:05d}.parquet"


def _outcomes_key(number: int) -> str:
    return f"outcomes/part-{number:06d}.parquet"


def _to_parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def _from_parquet(data: bytes, columns: list[str] | None) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(data), columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise StoreError("a Parquet part of the destination is damaged; restore it, or use an empty one") from error


def _to_json(run: Run) -> bytes:
    return (json.dumps(dataclasses.asdict(run), indent=2) + "\n").encode()


def _versions() -> dict[str, str]:
    packages = ("ray", "torch", "numpy", "opencv-python-headless", "pillow", "pyarrow")
    own = {"ma_cluster": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
