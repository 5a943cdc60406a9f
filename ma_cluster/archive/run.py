"""An archive run in the object store: plan -> shards -> committed parts -> summary. No Ray in here.

    run.json                       after the plan, create-only: where it is, the plan is whole
    plan/part-00000.parquet        see plan.py
    outcomes/part-000000.parquet   one for each shard, create-only: where it is, the shard is done
    retries/0001/...               see retry.py
    summary.json                   create-only, last

Nothing is ever overwritten but `finished` in run.json.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import pyarrow as pa

from ma_cluster import __version__
from ma_cluster.archive.outcomes import Outcome, to_table
from ma_cluster.archive.parquet import from_parquet, to_parquet
from ma_cluster.archive.plan import Plan, Shard, read_shards, shards, write_plan
from ma_cluster.config import digest
from ma_cluster.errors import ObjectMissingError, RunConflictError, UsageError
from ma_cluster.identity import RESULT_VERSION
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Entry, Store

_COMMITTED = "ma_cluster.committed"
_RESULTS = "results"  # among the versions


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
    """
    run = read_run(dest)
    if run is None:
        plan = write_plan(_listing(source, dest) if only is None else only, dest)
        new = Run(
            id=digest([source.url, dest.url, plan.digest, model_digest, config_digest])[:16],
            source=source.url,
            plan=plan,
            model_digest=model_digest,
            config_digest=config_digest,
            versions=_versions(),
            started=_now(),
        )
        run = new if dest.create("run.json", _to_json(new)) else read_run(dest)  # another driver was faster
        assert run is not None
    _check_same(run, {"source": source.url, "model_digest": model_digest, "config_digest": config_digest})
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


def undecided(dest: Store, run: Run) -> Iterator[Entry]:
    """The objects of all shards that are not committed, in the plan's order."""
    return read_shards(dest, pending(dest, run))


def pending(dest: Store, run: Run) -> Iterator[Shard]:
    """The shards that are not committed."""
    done = committed(dest)
    return (shard for shard in shards(dest, run.plan) if shard.number not in done)


def commit(dest: Store, run: Run, shard: Shard, outcomes: Sequence[Outcome]) -> bool:
    """Write a shard's outcomes, after their masks. False where another driver has committed it already."""
    assert len(outcomes) == shard.images
    stamp = {"ma_cluster.run": run.id, _COMMITTED: repr(time.time())}
    return dest.create(_outcomes_key(shard.number), to_parquet(to_table(outcomes).replace_schema_metadata(stamp)))


def committed(dest: Store) -> set[int]:
    """Numbers of the shards that are done."""
    prefix, suffix = "outcomes/part-", ".parquet"
    keys = (entry.key for entry in dest.list(prefix))
    numbers = (key.removeprefix(prefix).removesuffix(suffix) for key in keys if key.endswith(suffix))
    return {int(number) for number in numbers if number.isdecimal()}


def is_committed(dest: Store, shard: Shard) -> bool:
    """Whether a shard is done by now, be it by another driver."""
    try:
        dest.head(_outcomes_key(shard.number))
    except ObjectMissingError:
        return False
    return True


def read_outcomes(dest: Store, number: int, columns: list[str] | None = None) -> pa.Table:
    """The committed outcomes of a shard.

    Raises:
        StoreError: the part is damaged.
    """
    return from_parquet(dest.get(_outcomes_key(number)), columns)


def committed_at(outcomes: pa.Table) -> float:
    """When a part was committed, seconds since 1970."""
    return float((outcomes.schema.metadata or {}).get(_COMMITTED.encode(), b"nan"))


def mark_finished(dest: Store, run: Run) -> Run:
    """Put the time into run.json, once."""
    if run.finished is None:
        run = dataclasses.replace(run, finished=_now())
        dest.put("run.json", _to_json(run))
    return run


def _listing(source: Source, dest: Store) -> Iterator[Entry]:
    root = source.url.rstrip("/") + "/"
    own = dest.url.removeprefix(root) + "/" if dest.url.startswith(root) else None
    return (entry for entry in source.list() if own is None or not entry.key.startswith(own))


def _check_same(run: Run, wanted: dict[str, str]) -> None:
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


def _outcomes_key(number: int) -> str:
    return f"outcomes/part-{number:06d}.parquet"


def _to_json(run: Run) -> bytes:
    return (json.dumps(dataclasses.asdict(run), indent=2) + "\n").encode()


def _versions() -> dict[str, str]:
    packages = ("ray", "torch", "numpy", "opencv-python-headless", "pillow", "pyarrow")
    own = {"ma_cluster": __version__, _RESULTS: str(RESULT_VERSION), "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
