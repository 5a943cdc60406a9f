"""The warm fleet that scores photographs: two Ray Serve deployments behind a plain facade, `ScoringApp`.

Only facts and encoded files pass through the caller, never pixel arrays. A Segmenter holds one photograph at a time,
and a Reader lets none of them touch its process, so whatever dies or hangs is the fault of one photograph at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from ma_cluster.archive.shard_scorer import Reading, Segmentation
from ma_cluster.cluster.fleet.replicas import Fleet, Model, Reader, Segmenter
from ma_cluster.config import KnownField, OperatingPoint
from ma_cluster.errors import FleetBrokenError, ImageError, Reason, UsageError, WorkerLostError
from ma_cluster.images.reading import Facts
from ma_cluster.machine import MALLOC
from ma_cluster.storage.store import Entry

log = logging.getLogger(__name__)
_LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError)
_CHECKS = 3  # that a replica must miss before Serve replaces it
_PARTS = ("reader", "segmenter")
_FETCH_S = 900.0  # more than a store's own deadlines and retries add up to
_JOIN_S = 3600.0  # a Segmenter answers when it is through with its photograph
_POLL_S = 0.5
SAY_S = 30.0
"""Between two words on what is waited for."""


class ScoringApp:
    """A fleet that is up, known by its name: it can be handed to any process of the cluster."""

    def __init__(self, name: str, fleet: Fleet, source: str | None = None) -> None:
        """`fleet` is as it was started; `source` is the URL of the photographs that `read` reads."""
        self.name, self.fleet, self._source = name, fleet, source
        reader: DeploymentHandle[Any] = serve.get_deployment_handle(Reader.__name__, f"{name}-reader")
        self._reader: DeploymentHandle[Any] = reader.options(stream=True)
        self._segmenter: DeploymentHandle[Any] = serve.get_deployment_handle(Segmenter.__name__, f"{name}-segmenter")

    @classmethod
    def deploy(cls, name: str, source: str | None, model: Model, fleet: Fleet) -> ScoringApp:
        """Start the replicas and wait until they have loaded the model, however long the cluster takes to find room:
        every half minute a line of the log says what is waited for.

        Raises:
            FleetBrokenError: they do not start.
        """
        log.info("loading the model")
        targets = {f"{name}-reader": reader_app(model, fleet), f"{name}-segmenter": segmenter_app(model, fleet)}
        serve.start(proxy_location="Disabled")  # where nobody has started it with HTTP
        try:
            wanted = [serve.RunTarget(app, name=key, route_prefix=None) for key, app in targets.items()]
            serve.run_many(wanted, wait_for_applications_running=False)
            app = cls(name, fleet, source)
            app._wait_until_up()
        except BaseException:
            _delete(name)
            raise
        return app

    @classmethod
    def join(cls, source: str, model: Model, wanted: Fleet) -> ScoringApp:
        """The fleet of the wanted one's name that somebody else keeps, as that one has started it.

        Raises:
            FleetBrokenError: it is not there.
            UsageError: it has another model or decoder.
        """
        name = wanted.name
        assert name is not None
        if not _up(name):
            raise FleetBrokenError(f"the cluster has no fleet {name} that is up; start it with `ma-cluster serve`")
        log.info("joining the fleet")
        segmenter: DeploymentHandle[Any] = serve.get_deployment_handle(Segmenter.__name__, f"{name}-segmenter")
        digest, fleet = _result(segmenter.joined.remote(), _JOIN_S)
        if (digest, fleet.sandbox.decoder) != (model.digest, wanted.sandbox.decoder):
            raise UsageError(
                f"the fleet {name} has another model or decoder; give the run the fleet's, or let it start its own"
            )
        return cls(name, replace(fleet, operating_point=wanted.operating_point), source)

    def up(self) -> bool:
        """Whether both kinds of replica run."""
        return _up(self.name)

    def waits_for(self) -> str:
        """What Serve says of replicas that are not up, in a line; empty where all are."""
        parts = [item for app in _applications(self.name) for item in app.deployments.items()]
        lacking = [f"{name} is {part.status.value}. {part.message}" for name, part in parts if part.status != "HEALTHY"]
        return " ".join(" ".join(lacking).split())

    def _wait_until_up(self) -> None:
        said = time.monotonic()
        while not self.up():
            if any(app.status == ApplicationStatus.DEPLOY_FAILED for app in _applications(self.name)):
                raise FleetBrokenError(f"the scoring fleet does not start: {_fault(self.name) or self.waits_for()}")
            if time.monotonic() - said >= SAY_S:
                said = time.monotonic()
                log.warning("waiting: %s", self.waits_for() or "Serve has not begun")
            time.sleep(_POLL_S)

    def read(self, entry: Entry) -> Reading:
        """Read one photograph of the source.

        Raises:
            ImageError: it has no result.
            WorkerLostError: the replica died or was stuck, or failed in a way that nobody foresaw.
        """
        assert self._source is not None
        return self._reading(self._reader.read.remote(self._source, entry))

    def read_upload(self, data: bytes, field: KnownField) -> Reading:
        """Read one photograph from its encoded bytes, with what is known of its field; raises as `read` does."""
        return self._reading(self._reader.read_upload.remote(data, field))

    def _reading(self, response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> Reading:
        fleet = self.fleet
        rounds = 1 + math.ceil(fleet.in_flight / (fleet.readers * fleet.sandbox.children))
        timeout_s = rounds * (fleet.sandbox.deadline_s + _FETCH_S)
        assert isinstance(response, DeploymentResponseGenerator)
        with _blamed(response, timeout_s):
            parts = response._to_object_ref_gen_sync(timeout_s)
            if not ray.wait([parts], timeout=timeout_s)[0]:
                raise TimeoutError
            facts: Facts = ray.get(next(parts))
            return Reading(facts, next(parts))

    def segment(self, reading: Reading, operating_point: OperatingPoint | None = None) -> Segmentation:
        """Find the lesions of a photograph that was read; at the fleet's operating point where none is given.

        Raises:
            WorkerLostError: the replica died or was stuck, or failed in a way that nobody foresaw.
        """
        fleet, began = self.fleet, time.monotonic()
        assert fleet.segmenters is not None
        deadline_s, rounds = fleet.segment_deadline_s, 1 + math.ceil(fleet.in_flight / fleet.segmenters)
        try:
            response = self._segmenter.segment.remote(reading.prepared, operating_point or fleet.operating_point)
            answer: Segmentation = _result(response, rounds * deadline_s)
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
    return deployment.bind(model, fleet)


def _with_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """The job's runtime environment and some variables: a deployment that is given one of its own loses the job's."""
    job = dict(ray.get_runtime_context().runtime_env)
    return job | {"env_vars": job.get("env_vars", {}) | variables}


def _delete(name: str) -> None:
    for part in _PARTS:
        serve.delete(f"{name}-{part}")


def _applications(name: str) -> list[ApplicationStatusOverview]:
    """Of a fleet, as far as Serve knows them."""
    known = serve.status().applications
    return [known[f"{name}-{part}"] for part in _PARTS if f"{name}-{part}" in known]


def _up(name: str) -> bool:
    return [app.status for app in _applications(name)] == [ApplicationStatus.RUNNING] * len(_PARTS)


def _fault(name: str) -> str:
    """What the replicas last failed with, as far as Serve knows: the ends of their tracebacks."""
    parts = [part for app in _applications(name) for part in app.deployments.values()]
    return "; ".join(part.message.strip().splitlines()[-1] for part in parts if "Traceback" in part.message)


def _options(fleet: Fleet) -> dict[str, Any]:
    return {
        "graceful_shutdown_timeout_s": 5.0,
        "max_constructor_retry_count": 3,
        "health_check_period_s": fleet.stuck_after_s / _CHECKS,
        "health_check_timeout_s": fleet.stuck_after_s / _CHECKS,
    }


def _result(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any], timeout_s: float) -> Any:
    """Wait for an answer; raises as `_blamed` does."""
    assert isinstance(response, DeploymentResponse)
    with _blamed(response, timeout_s):
        return response.result(timeout_s=timeout_s)


@contextmanager
def _blamed(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any], timeout_s: float) -> Iterator[None]:
    """An exception of the replica becomes that photograph's.

    Replicas end themselves, or are replaced, long before `timeout_s`; it is for a fleet that cannot be replaced.
    """
    try:
        yield
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
    except (RayError, RayServeException) as error:  # cancelled, no room for its objects, the deployment gone, ...
        log.warning("a photograph was not answered: %s", error)
        raise WorkerLostError(Reason.CRASHED_WORKER, f"not answered ({type(error).__name__})") from error
