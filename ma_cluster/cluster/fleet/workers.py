"""The worker processes of an archive run: shards of keys in, committed parts out, by way of the scoring fleet.

A worker touches no image bytes: what they break is a child process of a Reader, or one request of a Segmenter.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from ma_cluster.archive.plan import Shard, largest_shard
from ma_cluster.archive.run import Run
from ma_cluster.archive.shard_scorer import Scorer, ShardScorer
from ma_cluster.cluster import recording
from ma_cluster.cluster.connection import answer
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.scoring_app import SAY_S
from ma_cluster.errors import FleetBrokenError
from ma_cluster.storage.identity import Pseudonyms
from ma_cluster.storage.store import open_store

log = logging.getLogger(__name__)
_WORKER_IN_FLIGHT = 8
"""Photographs that one worker process may have under way."""
_RESTARTS = 10
_WORKER: dict[str, Any] = {
    "num_cpus": 0.1,  # it waits for the fleet and the store, it computes nothing
    "max_restarts": _RESTARTS,  # those after a node's preemption are not counted
    "max_task_retries": _RESTARTS,
    "scheduling_strategy": "SPREAD",  # so that a lost node costs few shards
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. The rate is of this driver, without what an earlier one has done."""

    done: int
    total: int
    images_per_second: float | None
    eta_seconds: float | None


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker process needs to know; it opens its own stores and handles."""

    scorer: Callable[[], Scorer]
    dest: str
    artefacts: str
    run: Run
    in_flight: int
    """Photographs that it may have under way."""
    pseudonyms: Pseudonyms | None = None
    """What results call patients whom DICOM files name."""
    dicom: bool = False
    """Whether it writes DICOM, too."""


class _Worker:
    """The actor around a `ShardScorer`: a shard in, the number of its photographs out. Called from several threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        dest, artefacts = open_store(spec.dest), open_store(spec.artefacts)
        threads = ThreadPoolExecutor(spec.in_flight)
        scored = spec.scorer(), dest, artefacts, spec.run, threads, recording.Recorder()
        self._shards = ShardScorer(*scored, spec.pseudonyms, spec.dicom)

    def score(self, shard: Shard) -> int:
        return self._shards.score(shard)


def score_shards(
    todo: Iterator[Shard],
    spec: WorkerSpec,
    workers: int,
    on_progress: OnProgress | None = None,
    waits_for: Callable[[], str] = str,
) -> None:
    """Send shards through worker processes of the Ray that is up, a few at a time to each.

    A worker that dies, or whose node does, is started again by Ray, which gives it what it had under way; of that only
    what is not committed is done again.

    Args:
        todo: in the plan's order.
        spec: of each worker.
        workers: how many.
        on_progress: called after each shard.
        waits_for: what of the fleet is not up, in a line; asked where no shard ends for half a minute.

    Raises:
        StoreError, FleetBrokenError: as a worker met it; or workers die time and again.
    """
    at_a_time = 1 + -(-spec.in_flight // largest_shard(spec.run.plan))  # one more: a shard's end idles nobody
    actor: Any = ray.remote(_Worker).options(max_concurrency=at_a_time, **_WORKER)
    pool: list[Any] = [actor.remote(spec) for _ in range(workers)]
    up = [worker.__ray_ready__.remote() for worker in pool]
    idle, under_way = deque(pool * at_a_time), dict[Any, tuple[Any, Shard]]()
    began, total, reached, scored = time.monotonic(), spec.run.plan.images, 0, 0
    log.info("scoring")
    try:
        while True:
            while idle and reached < total:
                shard = next(todo, None)
                reached = total if shard is None else shard.row + shard.images
                if shard is not None:
                    worker = idle.popleft()
                    under_way[worker.score.remote(shard)] = worker, shard
            if not under_way:
                return
            ended, _ = ray.wait(list(under_way), timeout=SAY_S)
            if not ended:
                not_up = ray.wait(up, num_returns=workers, timeout=0)[1]
                _say(
                    len(under_way),
                    waits_for() or (f"{len(not_up)} workers, each for a tenth of a CPU" if not_up else ""),
                )
                continue
            worker, shard = under_way.pop(ended[0])
            idle.append(worker)
            scored += _answer(ended[0])
            done = reached - sum(shard.images for _, shard in under_way.values())
            if on_progress is not None:
                rate = scored / (time.monotonic() - began)
                on_progress(Progress(done, total, rate, (total - done) / rate))
    finally:
        for worker in pool:
            ray.kill(worker)


def _say(shards: int, lacking: str) -> None:
    """What goes on where nothing moves."""
    if lacking:
        log.warning("waiting: %s", lacking)
    else:
        log.info("%d shards under way", shards)


def _answer(of_worker: Any) -> int:
    """The number of photographs of a shard that is through; raises what ended it."""
    try:
        images: int = answer(of_worker)
    except RayActorError as error:
        raise FleetBrokenError(
            f"a worker process of the run died more than {_RESTARTS} times: see Ray's logs, look at memory and at the "
            "installation on each node, and give the command again"
        ) from error
    return images


def workers_for(shards: int, fleet: Fleet) -> tuple[int, int]:
    """Worker processes, and photographs in flight in each: no replica waits, and memory holds them all."""
    workers = min(shards, -(-fleet.in_flight // _WORKER_IN_FLIGHT))
    return workers, min(_WORKER_IN_FLIGHT, -(-fleet.in_flight // workers))
