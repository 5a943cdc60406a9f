"""The warm fleet that scores photographs: two Ray Serve deployments behind a plain facade, `ScoringApp`.

    Reader      CPU         fetch, decode, FOV, contrast     -> Prepared, left in the object store
    Segmenter   CPU or GPU  networks, lesions, mask, overlay <- Prepared, straight from the object store

Only facts and encoded files pass through the caller, never pixel arrays. A replica holds one photograph at a time, so
the death of one is the fault of one photograph at most.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import ObjectRef, serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from ma_cluster.cluster import metrics
from ma_cluster.cluster.reading import Facts, read_photograph
from ma_cluster.config import ImageConfig
from ma_cluster.errors import BundleError, ImageError, ImageFailedError, Reason
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.store import Entry, open_store
from ma_cluster.lesions.overlay import encode_mask, encode_overlay
from ma_cluster.lesions.table import Lesion

log = logging.getLogger(__name__)
_LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError)
_READER, _SEGMENTER = "_Reader", "_Segmenter"
_DRIVER_CPUS = 1  # left for the workers that ask the fleet


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """How many replicas, and what each may use. Decides the speed, never the result."""

    segmenters: int | None = None
    """Replicas of the Segmenter; None takes as many as the cluster's free cores feed, one at least."""
    readers: int = 1
    """Replicas of the Reader. On a CPU one feeds many Segmenters, a GPU wants some twenty."""
    gpus_per_segmenter: float = 0.0
    """GPUs of a Segmenter, a share of one allowed; 0 runs the networks on the CPU."""
    threads_per_segmenter: int = 1
    """CPU threads of a Segmenter's networks. With one, the order of sums, and so the last digit of a score, does not
    depend on the machine, and replicas do not wait for each other."""
    address: str | None = None
    """A running Ray cluster; None takes RAY_ADDRESS's, else starts a local one and stops it at the end."""

    def __post_init__(self) -> None:
        if min(1 if self.segmenters is None else self.segmenters, self.readers, self.threads_per_segmenter) < 1:
            raise ValueError("fleet.segmenters, readers and threads_per_segmenter must be at least 1")
        if self.gpus_per_segmenter < 0:
            raise ValueError("fleet.gpus_per_segmenter must not be negative")

    def sized(self, images: int) -> Fleet:
        """The fleet with its number of Segmenters, for so many photographs on the Ray this process is connected to."""
        if self.segmenters is not None:
            return self
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        cores = sum(node["Resources"].get("CPU", 0.0) for node in nodes if node["Alive"])
        free = int((cores - self.readers - _DRIVER_CPUS) / self.threads_per_segmenter)
        return replace(self, segmenters=max(1, min(free, images)))


@dataclass(frozen=True, slots=True)
class Model:
    """Which bundle the Segmenters load, and the digest it must have: each node reads its own copy."""

    location: str
    digest: str
    image: ImageConfig


@dataclass(frozen=True, slots=True)
class Reading:
    """A photograph that was read; its pixels stay where the Reader put them."""

    facts: Facts
    prepared: ObjectRef[Prepared]


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What a Segmenter answers: lesions, and the files that people look at, encoded."""

    lesions: tuple[Lesion, ...]
    mask_png: bytes
    overlay_jpeg: bytes
    seconds: dict[str, float]
    """Wall time of the stages hgn, prn and lesions; encoding counts as lesions."""


class ScoringApp:
    """A fleet that is up, known by its name: it can be handed to any process of the cluster."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._reader: DeploymentHandle[Any] = serve.get_deployment_handle(_READER, f"{name}-reader")
        self._segmenter: DeploymentHandle[Any] = serve.get_deployment_handle(_SEGMENTER, f"{name}-segmenter")

    @classmethod
    def deploy(cls, name: str, source: str, model: Model, fleet: Fleet) -> ScoringApp:
        """Start the replicas and wait until they have loaded the model."""
        threads = fleet.threads_per_segmenter
        device = "cuda" if fleet.gpus_per_segmenter else "cpu"
        options: dict[str, Any] = {
            "max_ongoing_requests": 1,
            "graceful_shutdown_timeout_s": 5.0,
            "max_constructor_retry_count": 3,
        }
        needs = {"num_cpus": threads, "num_gpus": fleet.gpus_per_segmenter}
        reader = serve.deployment(num_replicas=fleet.readers, ray_actor_options={"num_cpus": 1}, **options)(_Reader)
        segmenter = serve.deployment(num_replicas=fleet.segmenters, ray_actor_options=needs, **options)(_Segmenter)
        targets = {
            f"{name}-reader": reader.bind(source, model.image),
            f"{name}-segmenter": segmenter.bind(model.location, model.digest, device, threads),
        }
        serve.start(proxy_location="Disabled")
        serve.run_many([serve.RunTarget(app, name=key, route_prefix=None) for key, app in targets.items()])
        return cls(name)

    def read(self, entry: Entry) -> Reading:
        """Read one photograph of the source.

        Raises:
            ImageRefusedError, ImageFailedError: it has no result.
        """
        reading: Reading = _result(self._reader.read.remote(entry))
        return reading

    def segment(self, reading: Reading) -> Segmentation:
        """Find the lesions of a photograph that was read.

        Raises:
            ImageFailedError: the replica died, or failed in a way that nobody foresaw.
        """
        segmentation: Segmentation = _result(self._segmenter.segment.remote(reading.prepared))
        return segmentation

    def delete(self) -> None:
        """Stop the replicas."""
        for part in ("reader", "segmenter"):
            serve.delete(f"{self.name}-{part}")


class _Reader:
    """CPU: from an object of the source to network input."""

    def __init__(self, source: str, config: ImageConfig) -> None:
        self._store = open_store(source)
        self._config = config

    def read(self, entry: Entry) -> Reading:
        prepared, facts = read_photograph(self._store, entry, self._config)
        metrics.record_seconds(facts.seconds)
        return Reading(facts, ray.put(prepared))


class _Segmenter:
    """CPU or GPU: from network input to lesions."""

    def __init__(self, location: str, digest: str, device: str, threads: int) -> None:
        from ma_cluster.lesions.detector import Detector  # torch: only the Segmenters wait for it and hold it

        self._detector = Detector.load(location, device=device, threads=threads)
        if self._detector.digest != digest:
            raise BundleError("the model on this node is not the one the run was begun with; install the same on all")

    def segment(self, prepared: Prepared) -> Segmentation:
        detection = self._detector.segment(prepared)
        began = time.perf_counter()
        mask = encode_mask(detection.mask)
        overlay = encode_overlay(prepared.pixels, detection.mask)
        seconds = dict(detection.seconds)
        seconds["lesions"] += time.perf_counter() - began
        metrics.record_seconds(seconds)
        return Segmentation(detection.lesions, mask, overlay, seconds)


def _result(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> Any:
    """Wait for an answer; an exception of the replica becomes that photograph's."""
    assert isinstance(response, DeploymentResponse)
    try:
        return response.result()
    except RayTaskError as error:
        if isinstance(error.cause, ImageError):
            raise error.cause from None
        log.warning("a replica failed on a photograph: %s", error)
        detail = f"{type(error.cause).__name__} in a replica; its log says more"
        raise ImageFailedError(Reason.CRASHED_WORKER, detail) from error
    except _LOST as error:
        raise ImageFailedError(Reason.CRASHED_WORKER, f"the replica died ({type(error).__name__})") from error
