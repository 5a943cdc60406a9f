"""Archive jobs and the runs they stand for, without anything that scores."""

from __future__ import annotations

from pathlib import Path

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.plan import Shard, read_shard
from ma_cluster.archive.run import begin_run, commit, pending, read_run
from ma_cluster.archive.summary import finish_run
from ma_cluster.config import ScoreOptions, digest
from ma_cluster.errors import Reason
from ma_cluster.http.jobs import ArchiveJobs
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import Store

MODEL, CONFIG = "m" * 64, "c" * 64


def config_of(options: ScoreOptions) -> str:
    """The digest of a configuration: `CONFIG`, where nothing is said."""
    return CONFIG if options == ScoreOptions() else digest(repr(options))


def jobs_of(folder: Path) -> ArchiveJobs:
    """The jobs of a service with a state of its own."""
    return ArchiveJobs(str(folder / "state"), MODEL, config_of)


def photographs(folder: Path) -> LocalStore:
    """A source of five objects."""
    store = LocalStore(folder / "source")
    for number in range(5):
        store.put(f"eye {number}.jpg", b"x" * (number + 1))
    return store


def begun(source: Store, root: Path) -> LocalStore:
    """A destination with a planned run."""
    dest = LocalStore(root)
    root.mkdir()
    begin_run(source, dest, MODEL, CONFIG)
    return dest


def decide(dest: Store, shard: Shard, reason: Reason | None) -> None:
    run = read_run(dest)
    assert run is not None
    entries = read_shard(dest, shard)
    commit(dest, run, shard, [Outcome(key=e.key, etag=e.etag, reason=reason, attempts=1) for e in entries])


def finish(dest: LocalStore) -> None:
    """Decide all photographs of the run in a destination."""
    run = read_run(dest)
    assert run is not None
    for shard in pending(dest, run):
        decide(dest, shard, None)
    finish_run(dest, run)
