"""The warm fleet that scores photographs: two Ray Serve deployments behind a plain facade, `ScoringApp`.

Only facts and encoded files pass through the caller, never pixel arrays. A Segmenter holds one photograph at a time,
and a Reader lets none of them touch its process, so whatever dies or hangs is the fault of one photograph at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatus

from ma_cluster.archive.shard_scorer import Reading, Segmentation
from ma_cluster.cluster.fleet.replicas import Model, Reader, Segmenter
from ma_cluster.errors import FleetBrokenError, ImageError, Reason, UsageError, WorkerLostError
from ma_cluster.images.sandbox import SandboxConfig
from ma_cluster.networks.tile_executor import MALLOC
from ma_cluster.storage.store import Entry

log = logging.getLogger(__name__)
_LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError)
_DRIVER_CPUS = 1  # left for the workers that ask the fleet
_CHECKS = 3  # that a replica must miss before Serve replaces it
_PARTS = ("reader", "segmenter")
_FETCH_S = 600.0  # more than a store's own deadlines and retries add up to


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """How many replicas, and what each may use. Decides the speed, never the result, but for `sandbox.decoder`."""

    segmenters: int | None = None
    """Replicas of the Segmenter; None takes as many as the cluster's free cores feed, one at least."""
    readers: int = 1
    """Replicas of the Reader. On a CPU one feeds many Segmenters, a GPU wants some twenty."""
    gpus_per_segmenter: float = 0.0
    """GPUs of a Segmenter, a share of one allowed; 0 runs the networks on the CPU."""
    threads_per_segmenter: int = 1
    """Tiles that a Segmenter looks at at a time on a CPU. Each has one thread, so that the order of sums, and with it
    the last digit of a score, never depends on the machine."""
    name: str | None = None
    """A warm fleet of the cluster, as `ma-cluster serve` keeps one, by its name; None starts one for the run."""
    address: str | None = None
    """A running Ray cluster; None takes RAY_ADDRESS's, else starts a local one and stops it at the end."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Of each Reader, which has so many photographs at a time as its sandbox has children."""
    segment_deadline_s: float = 3600.0
    """Time for one photograph's networks, seconds; a Segmenter that takes longer ends itself. The paper's networks
    take some 20 minutes on one CPU thread."""
    stuck_after_s: float = 45.0
    """A replica whose process does not answer (stopped, swapped out, node lost) is replaced after so many seconds."""
    crashes_in_a_row: int = 20
    """Workers lost in a row, with no photograph segmented in between, after which a run ends: a broken fleet must not
    mark an archive as failed. Each photograph is tried twice: these are some ten, and what else is in flight."""

    def __post_init__(self) -> None:
        if min(1 if self.segmenters is None else self.segmenters, self.readers, self.threads_per_segmenter) < 1:
            raise ValueError("fleet.segmenters, readers and threads_per_segmenter must be at least 1")
        if self.gpus_per_segmenter < 0:
            raise ValueError("fleet.gpus_per_segmenter must not be negative")
        if min(self.segment_deadline_s, self.stuck_after_s, self.crashes_in_a_row) <= 0:
            raise ValueError("fleet.segment_deadline_s, stuck_after_s and crashes_in_a_row must be positive")

    @property
    def in_flight(self) -> int:
        """Photographs under way at a time, so that no replica waits for the next one."""
        assert self.segmenters is not None
        return 2 * self.segmenters + self.readers * self.sandbox.children

    def sized(self, images: int) -> Fleet:
        """The fleet with its number of Segmenters, for so many photographs on the Ray this process is connected to."""
        if self.segmenters is not None:
            return self
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        cores = sum(node["Resources"].get("CPU", 0.0) for node in nodes if node["Alive"])
        free = int((cores - self.readers - _DRIVER_CPUS) / self.threads_per_segmenter)
        return replace(self, segmenters=max(1, min(free, images)))


class ScoringApp:
    """A fleet that is up, known by its name: it can be handed to any process of the cluster."""

    def __init__(self, name: str, fleet: Fleet, source: str | None = None) -> None:
        """`source` is the URL of the photographs that `read` reads."""
        self.name, self._fleet, self._source = name, fleet, source
        self._reader: DeploymentHandle[Any] = serve.get_deployment_handle(Reader.__name__, f"{name}-reader")
        self._segmenter: DeploymentHandle[Any] = serve.get_deployment_handle(Segmenter.__name__, f"{name}-segmenter")

    @classmethod
    def deploy(cls, name: str, source: str | None, model: Model, fleet: Fleet) -> ScoringApp:
        """Start the replicas and wait until they have loaded the model.

        Raises:
            FleetBrokenError: they do not start.
        """
        targets = {f"{name}-reader": reader_app(model, fleet), f"{name}-segmenter": segmenter_app(model, fleet)}
        serve.start(proxy_location="Disabled")  # where nobody has started it with HTTP
        try:
            serve.run_many([serve.RunTarget(app, name=key, route_prefix=None) for key, app in targets.items()])
        except RuntimeError as error:
            fault = _fault(targets) or str(error)
            _delete(name)
            raise FleetBrokenError(f"the scoring fleet does not start: {fault}") from error
        return cls(name, fleet, source)

    @classmethod
    def join(cls, name: str, source: str, model: Model, fleet: Fleet) -> ScoringApp:
        """A fleet that somebody else keeps.

        Raises:
            FleetBrokenError: it is not there.
            UsageError: it has another model.
        """
        app = cls(name, fleet, source)
        if not app.up():
            raise FleetBrokenError(f"the cluster has no fleet {name} that is up; start it with `ma-cluster serve`")
        if app.model_digest() != model.digest:
            raise UsageError(f"the fleet {name} has another model; give the run the fleet's, or let it start its own")
        return app

    def up(self) -> bool:
        """Whether both kinds of replica run."""
        known = serve.status().applications
        apps = [known.get(f"{self.name}-{part}") for part in _PARTS]
        return all(app is not None and app.status == ApplicationStatus.RUNNING for app in apps)

    def model_digest(self) -> str:
        """Of the model that the Segmenters have loaded."""
        digest: str = _result(self._segmenter.digest.remote(), self._fleet.segment_deadline_s)
        return digest

    def read(self, entry: Entry) -> Reading:
        """Read one photograph of the source.

        Raises:
            ImageError: it has no result.
            WorkerLostError: the replica died or was stuck, or failed in a way that nobody foresaw.
        """
        assert self._source is not None
        return self._reading(self._reader.read.remote(self._source, entry))

    def read_upload(self, data: bytes) -> Reading:
        """Read one photograph from its encoded bytes; raises as `read` does."""
        return self._reading(self._reader.read_upload.remote(data))

    def _reading(self, response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> Reading:
        fleet = self._fleet
        rounds = 1 + math.ceil(fleet.in_flight / (fleet.readers * fleet.sandbox.children))
        reading: Reading = _result(response, rounds * (fleet.sandbox.deadline_s + _FETCH_S))
        return reading

    def segment(self, reading: Reading) -> Segmentation:
        """Find the lesions of a photograph that was read.

        Raises:
            WorkerLostError: the replica died or was stuck, or failed in a way that nobody foresaw.
        """
        fleet, began = self._fleet, time.monotonic()
        assert fleet.segmenters is not None
        deadline_s, rounds = fleet.segment_deadline_s, 1 + math.ceil(fleet.in_flight / fleet.segmenters)
        try:
            answer: Segmentation = _result(self._segmenter.segment.remote(reading.prepared), rounds * deadline_s)
        except WorkerLostError as lost:
            if time.monotonic() - began < deadline_s:
                raise
            raise WorkerLostError(Reason.TIMEOUT, f"not segmented within {deadline_s:g} s") from lost
        return answer

    def delete(self) -> None:
        """Stop the replicas."""
        _delete(self.name)


def reader_app(model: Model, fleet: Fleet) -> serve.Application:
    """The Serve application of the Readers."""
    deployment = serve.deployment(
        num_replicas=fleet.readers,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=fleet.sandbox.children,
        **_options(fleet),
    )(Reader)
    return deployment.bind(model.image, fleet.sandbox)


def segmenter_app(model: Model, fleet: Fleet) -> serve.Application:
    """The Serve application of the Segmenters."""
    threads, gpus = fleet.threads_per_segmenter, fleet.gpus_per_segmenter
    deployment = serve.deployment(
        num_replicas=fleet.segmenters,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus, "runtime_env": _with_variables(MALLOC)},
        max_ongoing_requests=1,
        **_options(fleet),
    )(Segmenter)
    return deployment.bind(model, "cuda" if gpus else "cpu", threads, fleet.segment_deadline_s)


def _with_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """The job's runtime environment and some variables: a deployment that is given one of its own loses the job's."""
    job = dict(ray.get_runtime_context().runtime_env)
    return job | {"env_vars": job.get("env_vars", {}) | variables}


def _delete(name: str) -> None:
    for part in _PARTS:
        serve.delete(f"{name}-{part}")


def _fault(apps: Iterable[str]) -> str:
    """What the replicas of some applications last failed with, as far as Serve knows: the ends of their tracebacks."""
    known = serve.status().applications
    parts = [part for app in apps if app in known for part in known[app].deployments.values()]
    return "; ".join(part.message.strip().splitlines()[-1] for part in parts if "Traceback" in part.message)


def _options(fleet: Fleet) -> dict[str, Any]:
    return {
        "graceful_shutdown_timeout_s": 5.0,
        "max_constructor_retry_count": 3,
        "health_check_period_s": fleet.stuck_after_s / _CHECKS,
        "health_check_timeout_s": fleet.stuck_after_s / _CHECKS,
    }


def _result(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any], timeout_s: float) -> Any:
    """Wait for an answer; an exception of the replica becomes that photograph's.

    Replicas end themselves, or are replaced, long before `timeout_s`; it is for a fleet that cannot be replaced.
    """
    assert isinstance(response, DeploymentResponse)
    try:
        return response.result(timeout_s=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, ImageError):
            raise error.cause from None
        log.warning("a replica failed on a photograph: %s", error)
        detail = f"{type(error.cause).__name__} in a replica; its log says more"
        raise WorkerLostError(Reason.CRASHED_WORKER, detail) from error
    except _LOST as error:
        raise WorkerLostError(Reason.CRASHED_WORKER, f"the replica died ({type(error).__name__})") from error
    except TimeoutError as error:
        response.cancel()  # type: ignore[no-untyped-call]
        raise WorkerLostError(Reason.TIMEOUT, f"no answer within {timeout_s:g} s") from error
