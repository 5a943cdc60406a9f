"""What runs in the replicas of the scoring fleet, and what they answer. Plain classes; Ray appears at `ray.put` alone.

Reader      CPU         fetch, decode apart, FOV, contrast  -> Prepared, left in the object store
Segmenter   CPU or GPU  networks, lesions, mask, overlay    <- Prepared, straight from the object store
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import ray

from ma_cluster.archive.shard_scorer import Reading, Segmentation
from ma_cluster.cluster import recording
from ma_cluster.config import ImageConfig
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.reading import Facts, read_bytes, read_photograph
from ma_cluster.images.sandbox import DecodePool, SandboxConfig
from ma_cluster.lesions.overlay import encode_mask, encode_overlay
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Entry

_SOURCES = 16
"""Open sources that a Reader keeps."""


@dataclass(frozen=True, slots=True)
class Model:
    """Which bundle the Segmenters load, and the digest it must have: each node reads or fetches its own copy."""

    location: str
    """A shipped model's name, a folder that each node sees, or a URL."""
    digest: str
    image: ImageConfig


class Reader:
    """CPU: from an object of the source to network input, as many photographs at a time as the pool has children."""

    def __init__(self, config: ImageConfig, sandbox: SandboxConfig) -> None:
        self._source = lru_cache(_SOURCES)(open_source)
        self._config = config
        self._pool = DecodePool(config, sandbox)

    def read(self, source: str, entry: Entry) -> Reading:
        return self._handed_on(*read_photograph(self._source(source), entry, self._config, self._pool.decode))

    def read_upload(self, data: bytes) -> Reading:
        return self._handed_on(*read_bytes(data, self._config, self._pool.decode))

    def _handed_on(self, prepared: Prepared, facts: Facts) -> Reading:
        recording.record_seconds(facts.seconds)
        return Reading(facts, ray.put(prepared))


class Segmenter:
    """CPU or GPU: from network input to lesions, one photograph at a time: what ends it is that photograph's."""

    def __init__(self, model: Model, device: str, threads: int, deadline_s: float) -> None:
        from ma_cluster.lesions.detector import Detector  # torch: only the Segmenters wait for it and hold it

        self._deadline_s = deadline_s
        self._detector = Detector.load(model.location, device=device, threads=threads, digest=model.digest)

    def digest(self) -> str:
        """Of its model."""
        return self._detector.digest

    def segment(self, prepared: Prepared) -> Segmentation:
        with _ended_after(self._deadline_s):
            detection = self._detector.segment(prepared)
            began = time.perf_counter()
            mask = encode_mask(detection.mask)
            overlay = encode_overlay(prepared.pixels, detection.mask)
        seconds = dict(detection.seconds)
        seconds["lesions"] += time.perf_counter() - began
        recording.record_seconds(seconds)
        return Segmentation(detection.lesions, mask, overlay, seconds)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process where the block takes longer: a hanging kernel heeds no exception. Needs no interpreter lock."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
