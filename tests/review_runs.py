"""Runs as the review page and the exports meet them: of known lesions, or scored in this process without Ray."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from photographs import encode
from servers import free_ports

from ma_cluster.archive.outcomes import Identity, Outcome, config_digest
from ma_cluster.archive.plan import read_shard
from ma_cluster.archive.retry import begin_retry
from ma_cluster.archive.run import Run, begin_run, commit, pending, read_run
from ma_cluster.archive.shard_scorer import Reading, Segmentation, ShardScorer
from ma_cluster.archive.summary import finish_run
from ma_cluster.config import DetectorConfig
from ma_cluster.errors import Reason
from ma_cluster.images.decode import decode
from ma_cluster.images.fundus import Fov
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import Facts, read_photograph
from ma_cluster.images.sandbox import DEFAULT_DECODER
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Findings, encode_mask, encode_overlay, find_lesions, triage
from ma_cluster.review.api import reviewing
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Entry, open_store

QUALITY = Quality(0.4, 0.1, 0.08, 0.02, 0.2, 0.9, True, ())


def dotted(side: int, dots: int, seed: int = 0) -> tuple[UInt8[ndarray, "h w 3"], Bool[ndarray, "h w"]]:
    """A red disc with dark dots at random places, well apart, and where they are."""
    rng = np.random.default_rng(seed)
    pixels, mask = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
    cv2.circle(pixels, (side // 2, side // 2), side // 2 - 4, (190, 90, 50), -1)
    cells = rng.permutation(25)[:dots]
    for cell in cells:
        row, col = (int(side * (0.25 + 0.1 * part) + rng.integers(0, side // 50)) for part in divmod(cell, 5))
        cv2.circle(mask, (col, row), max(3, side // 150), 1, -1)
    pixels[mask > 0] = (110, 30, 20)
    return pixels, mask > 0


def commit_run(
    root: Path,
    photographs: Mapping[str, tuple[bytes, Bool[ndarray, "h w"] | None]],
    identities: Mapping[str, Identity] | None = None,
    reason: Reason = Reason.NO_FOV,
) -> LocalStore:
    """A finished run of photographs in which these masks were found; None has the reason. The surer it is, the more."""
    known = identities or {}
    source, dest = LocalStore(root / "source"), LocalStore(root / "dest")
    for key, (data, _) in photographs.items():
        source.put(key, data)
    run = begin_run(source, dest, "m" * 64, "c" * 64)
    for shard in pending(dest, run):
        outcomes = [
            replace(_outcome(dest, entry, *photographs[entry.key], reason), identity=known.get(entry.key))
            for entry in read_shard(dest, shard)
        ]
        commit(dest, run, shard, outcomes)
    finish_run(dest, run)
    return dest


def commit_retry(dest: LocalStore, photographs: Mapping[str, tuple[bytes, Bool[ndarray, "h w"]]]) -> None:
    """A retry of a run, in which these masks were found."""
    run = read_run(dest)
    assert run is not None
    begun = begin_retry(open_source(run.source), dest, run)
    assert begun is not None
    parts, retry = begun
    for shard in pending(parts, retry):
        outcomes = [_outcome(dest, entry, *photographs[entry.key]) for entry in read_shard(parts, shard)]
        commit(parts, retry, shard, outcomes)
    finish_run(parts, retry)


def _outcome(
    dest: LocalStore, entry: Entry, data: bytes, mask: Bool[ndarray, "h w"] | None, reason: Reason = Reason.NO_FOV
) -> Outcome:
    if mask is None:
        return Outcome(key=entry.key, etag=entry.etag, reason=reason, detail="no bright disc", attempts=1)
    height, width = mask.shape
    fov = Fov(height / 2, width / 2, float(min(height, width) - 8))
    probability = mask.astype(np.float32) * 0.9
    lesions, _ = find_lesions(probability, None, 1.0, fov, replace(DetectorConfig(), threshold=0.5, least_score=0.0))
    score = min(0.95, 0.1 + 0.1 * len(lesions))
    name = entry.key.replace("/", "_").encode().hex()
    keys = {"mask_key": f"masks/{name}.png", "overlay_key": f"overlays/{name}.jpg"}
    dest.put(keys["mask_key"], encode_mask(mask))
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    dest.put(keys["overlay_key"], encode_overlay(pixels, mask))
    findings = Findings(lesions, score, triage(len(lesions), score, 0.6, gradable=True))
    facts = Facts(height, width, fov, QUALITY, {})
    return Outcome(
        key=entry.key, etag=entry.etag, reason=None, attempts=1, facts=facts, findings=findings, seconds={"hgn": 1.0},
        **keys,
    )  # fmt: skip


def small_run(root: Path, count: int = 3, side: int = 700) -> LocalStore:
    """Photographs eye-0.jpg, eye-1.jpg, ... with 2, 4, 6, ... dots."""
    found = {}
    for number in range(count):
        pixels, mask = dotted(side, 2 * number + 2, number)
        found[f"eye-{number}.jpg"] = (encode(pixels, "JPEG", quality=92), mask)
    return commit_run(root, found)


@contextmanager
def review_page(dest_url: str, reviewer: str = "", port: int = 0) -> Iterator[str]:
    """The page over a run, by its URL, once the worklist is read."""
    port = port or free_ports(1)[0]
    with reviewing(dest_url, reviewer, "127.0.0.1", port) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


def fetch(url: str) -> bytes:
    """What is answered."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bytes(answer.read())


class Here:
    """A `Scorer` whose networks run in this process."""

    def __init__(self, source: Any, detector: Detector) -> None:
        self._source, self._detector = source, detector

    def read(self, entry: Entry) -> Reading:
        config = self._detector.recipe.image
        prepared, facts = read_photograph(self._source, entry, config, lambda data: decode(data, config))
        return Reading(facts, prepared)

    def segment(self, reading: Reading) -> Segmentation:
        found = self._detector.segment(reading.prepared)
        overlay = encode_overlay(reading.prepared.pixels, found.mask)
        return Segmentation(found.findings, encode_mask(found.mask), overlay, found.seconds)


class Silent:
    """A `Recorder` that keeps nothing."""

    def begun(self) -> None: ...

    def decided(self, outcome: Outcome) -> None: ...


def score_here(source_url: str, dest_url: str, detector: Detector) -> Run:
    """Score an archive in this process."""
    source, dest = open_source(source_url), open_store(dest_url)
    run = begin_run(source, dest, detector.digest, config_digest(detector.recipe, DEFAULT_DECODER))
    with ThreadPoolExecutor(1) as threads:
        scorer = ShardScorer(Here(source, detector), dest, dest, run, threads, Silent())
        for shard in list(pending(dest, run)):
            scorer.score(shard)
    return finish_run(dest, run).run
