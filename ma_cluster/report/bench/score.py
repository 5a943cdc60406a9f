"""What the cluster costs: an archive run against a bare loop over the same photographs and the same Detector."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ma_cluster.cluster.fleet.driver import Progress, score_archive
from ma_cluster.cluster.fleet.scoring_app import Fleet
from ma_cluster.lesions.detector import Detector
from ma_cluster.report.bench.subject import Subject

PHOTOGRAPHS = 40


def score(subject: Subject) -> Iterator[dict[str, Any]]:
    """Photographs a second of a loop in one process of `threads` threads, and of a run with as many Segmenters.

    Half of the loop comes before the run and half after it, since a machine that others share changes its pace. The
    run's own rate is that of its shards, as its progress shows it; `with_start` adds what comes once: Ray, the
    replicas, the model in each, the plan and the summary.
    """
    photograph = subject.photograph()
    detector = Detector.load(subject.model, device=subject.device, threads=subject.threads)
    detector.detect(photograph.data)  # the first one pays for the caches of the libraries
    seconds = _loop(detector, photograph.data)
    rate, with_start = _run(subject, photograph.data)
    seconds += _loop(detector, photograph.data)
    bare = PHOTOGRAPHS / seconds
    yield {"subject": "bare loop", "photographs": PHOTOGRAPHS, "photographs_per_second": bare}
    yield {"subject": "score", "photographs": PHOTOGRAPHS, "photographs_per_second": rate, "with_start": with_start}
    yield {"subject": "score over bare loop", "ratio": rate / bare}


def _loop(detector: Detector, data: bytes) -> float:
    """Seconds of half the photographs, one after the other."""
    began = time.perf_counter()
    for _ in range(PHOTOGRAPHS // 2):
        detector.detect(data)
    return time.perf_counter() - began


def _run(subject: Subject, data: bytes) -> tuple[float, float]:
    """Photographs a second of a run: of its shards, and of all."""
    progress: list[Progress] = []
    with tempfile.TemporaryDirectory(prefix="ma-bench-") as folder:
        archive = Path(folder, "archive")
        archive.mkdir()
        for number in range(PHOTOGRAPHS):
            (archive / f"{number:03d}.jpg").write_bytes(data)
        fleet = Fleet(segmenters=subject.threads, gpus_per_segmenter=0.0 if subject.device == "cpu" else 1.0)
        began = time.perf_counter()
        score_archive(str(archive), f"{folder}/run", fleet, model=subject.model, on_progress=progress.append)
        whole = PHOTOGRAPHS / (time.perf_counter() - began)
    rate = progress[-1].images_per_second
    assert rate is not None
    return rate, whole
