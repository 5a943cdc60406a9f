"""What runs in the replicas of the scoring fleet, how many there are, what each may use, and what they answer.

Reader      CPU         fetch, decode apart, FOV, contrast  -> Prepared, left in the object store
Segmenter   CPU or GPU  networks, lesions, mask, overlay    <- Prepared, straight from the object store
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import ray

from ma_cluster import machine
from ma_cluster.archive.shard_scorer import Segmentation
from ma_cluster.cluster import recording
from ma_cluster.config import ImageConfig, KnownField, OperatingPoint
from ma_cluster.errors import UsageError
from ma_cluster.images.reading import Facts, Prepared, read_bytes, read_photograph
from ma_cluster.images.sandbox import DecodePool, SandboxConfig
from ma_cluster.lesions.findings import encode_mask, encode_overlay
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Entry

_SOURCES = 16
"""Open sources that a Reader keeps."""
_DRIVER_CPUS = 1  # left for the workers that ask the fleet
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Model:
    """Which bundle the Segmenters load, and the digest it must have: each node reads or fetches its own copy."""

    location: str
    """A shipped model's name, a folder that each node sees, or a URL."""
    digest: str
    image: ImageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """How many replicas, and what each may use. Decides the speed, never the result, but for `operating_point` and
    `sandbox.decoder`, nor its form, but for `dicom`.
    """

    segmenters: int | None = None
    """Replicas of the Segmenter; None takes as many as free CPUs and GPUs hold, one at least."""
    readers: int = 1
    """Replicas of the Reader. On a CPU one feeds many Segmenters, a GPU wants some twenty."""
    gpus_per_segmenter: float = 0.0
    """GPUs of a Segmenter, a whole number or a share of one; 0 runs the networks on the CPU."""
    threads_per_segmenter: int = 1
    """Tiles that a Segmenter looks at at a time on a CPU. Each has one thread, so that the order of sums, and with it
    the last digit of a score, never depends on the machine."""
    name: str | None = None
    """A warm fleet of the cluster, as `ma-cluster serve` keeps one, by its name; its own sizes and deadlines hold, not
    these. None starts one for the run."""
    address: str | None = None
    """A running Ray cluster; None takes RAY_ADDRESS's, else starts a local one and stops it at the end."""

    operating_point: OperatingPoint = "default"
    """Which of the places that are outlined are called: the sure ones, or all. A run's own on a warm fleet, too."""
    dicom: bool = False
    """Whether results of DICOM photographs are written as DICOM, too; a run's own."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Of each Reader, which has so many photographs at a time as its sandbox has children."""
    segment_deadline_s: float = 3600.0
    """Time for one photograph's networks, seconds; a Segmenter that takes longer ends itself. The paper's networks
    take some 20 minutes on one CPU thread."""
    stuck_after_s: float = 45.0
    """A replica whose process does not answer (stopped, swapped out, node lost) is replaced after so many seconds."""
    crashes_in_a_row: int = 20
    """Workers lost in a row, or times that the source did not answer, with no photograph segmented in between, after
    which a run ends: a broken fleet or a token that has expired must not mark an archive as failed. Each photograph is
    tried twice: these are some ten, and what else is in flight."""

    def __post_init__(self) -> None:
        if min(1 if self.segmenters is None else self.segmenters, self.readers, self.threads_per_segmenter) < 1:
            raise ValueError("fleet.segmenters, readers and threads_per_segmenter must be at least 1")
        share = self.gpus_per_segmenter
        if not (0 <= share <= 1 or (share > 1 and share % 1 == 0)):
            raise ValueError("fleet.gpus_per_segmenter must be a whole number or a share of one")
        if min(self.segment_deadline_s, self.stuck_after_s, self.crashes_in_a_row) <= 0:
            raise ValueError("fleet.segment_deadline_s, stuck_after_s and crashes_in_a_row must be positive")

    @property
    def in_flight(self) -> int:
        """Photographs under way at a time, so that no replica waits for the next one."""
        assert self.segmenters is not None
        return 2 * self.segmenters + self.readers * self.sandbox.children

    def room(self, cpus: int | float, gpus: int | float) -> int:
        """Segmenters for which so many CPUs and GPUs suffice; a share of a GPU is of one, so two of 0.6 take two."""
        share, by_cpus = self.gpus_per_segmenter, int(cpus / self.threads_per_segmenter)
        if share == 0:
            return by_cpus
        by_gpus = int(gpus / share) if share >= 1 else int(gpus) * int(1 / share + _ROUNDING)
        return min(by_cpus, by_gpus)

    def check_fits(self) -> None:
        """For a Ray of one's own, which no other machine joins.

        Raises:
            UsageError: a Segmenter, all of them, or the Readers need more than this machine has.
        """
        threads, share = self.threads_per_segmenter, self.gpus_per_segmenter
        cpus, gpus = machine.cores(), machine.gpus() if share else 0
        most = self.room(cpus, gpus)
        if threads > cpus:
            raise UsageError(f"needs {threads} CPUs for each Segmenter, {cpus} here: lower --threads")
        if share > gpus:
            raise UsageError(
                f"needs {share:g} GPU for each Segmenter, {gpus or 'none'} here: lower --gpus; 0 is for CPUs alone"
            )
        if self.segmenters is not None and self.segmenters > most:
            raise UsageError(f"there is room for {most} Segmenters here, not for {self.segmenters}: lower --replicas")
        if self.readers > cpus:
            raise UsageError(f"needs a CPU for each of {self.readers} Readers, {cpus} here: lower --readers")

    def sized(self, images: int) -> Fleet:
        """The fleet with its number of Segmenters, for so many photographs on the Ray this process is connected to.

        As many as its free CPUs and GPUs hold, one at least, which may have to wait for them.
        """
        if self.segmenters is not None:
            return self
        listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"] for node in listed if node["Alive"]]
        on_nodes = sum(self.room(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        in_all = self.room(free.get("CPU", 0.0) - self.readers - _DRIVER_CPUS, free.get("GPU", 0.0))
        return replace(self, segmenters=max(1, min(on_nodes, in_all, images)))


class Reader:
    """CPU: from an object of the source to network input, as many photographs at a time as the pool has children."""

    def __init__(self, config: ImageConfig, sandbox: SandboxConfig) -> None:
        self._source = lru_cache(_SOURCES)(open_source)
        self._config = config
        self._pool = DecodePool(config, sandbox)

    def read(self, source: str, entry: Entry) -> Iterator[Facts | Prepared]:
        yield from _in_parts(*read_photograph(self._source(source), entry, self._config, self._pool.decode))

    def read_upload(self, data: bytes, field: KnownField) -> Iterator[Facts | Prepared]:
        yield from _in_parts(*read_bytes(data, field.told(self._config), self._pool.decode))


def _in_parts(prepared: Prepared, facts: Facts) -> Iterator[Facts | Prepared]:
    """Each part is an object that the caller owns, who fetches the facts alone. A reference to one of ours within an
    answer would not do: Ray sometimes deletes that before the caller counts (ray-project/ray#58080).
    """
    recording.record_seconds(facts.seconds)
    yield facts
    yield prepared


class Segmenter:
    """CPU or GPU: from network input to lesions, one photograph at a time: what ends it is that photograph's."""

    def __init__(self, model: Model, fleet: Fleet) -> None:
        from ma_cluster.lesions.detector import Detector  # torch: only the Segmenters wait for it and hold it

        device, threads = "cuda" if fleet.gpus_per_segmenter else "cpu", fleet.threads_per_segmenter
        self._fleet, self._busy = fleet, threading.Lock()
        self._detector = Detector.load(model.location, device=device, threads=threads, digest=model.digest)

    def joined(self) -> tuple[str, Fleet]:
        """What somebody who joins the fleet must know: the digest of its model, and how it was started."""
        return self._detector.digest, self._fleet

    def segment(self, prepared: Prepared, operating_point: OperatingPoint) -> Segmentation:
        # Serve lets the next one in while that of a request which was cancelled is still looked at; one timer is all
        with self._busy, _ended_after(self._fleet.segment_deadline_s):
            detection = self._detector.segment(prepared, operating_point)
            began = time.perf_counter()
            mask = encode_mask(detection.mask)
            overlay = encode_overlay(prepared.pixels, detection.mask)
        seconds = dict(detection.seconds)
        seconds["lesions"] += time.perf_counter() - began
        recording.record_seconds(seconds)
        return Segmentation(detection.findings, mask, overlay, seconds)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process where the block takes longer: a hanging kernel heeds no exception. Needs no interpreter lock."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
