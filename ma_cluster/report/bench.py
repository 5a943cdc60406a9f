"""`ma-cluster bench`: how fast a model is on this machine, stage by stage, beside MONAI and on a cluster.

Every benchmark runs in a fresh process, so that memory and caches are its own, and every ratio is of times of one run.
Ray is loaded by the one that needs it alone. What they look at: a photograph, with the truth where lesions were drawn
in, and the networks of a model.
"""

from __future__ import annotations

import importlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from numpy import ndarray
from torch import nn

from ma_cluster import machine
from ma_cluster.bundle import Bundle, load_bundle
from ma_cluster.config import ImageConfig
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.scoring import PixelCounts, average_precision
from ma_cluster.hypotheses.maps import Maps
from ma_cluster.images.reading import Prepared, read_bytes
from ma_cluster.images.sample import enlarged_sample
from ma_cluster.lesions.detector import Detector, build_network
from ma_cluster.lesions.findings import Detection
from ma_cluster.networks import FlipAugmented, fold, normalise, probability

FLIPS = (1, 2, 4)
"""Flips at 0.5x that are tried: each costs a quarter of the 1x network."""
MONAI_TILE, MONAI_OVERLAP = 512, 0.25
PHOTOGRAPHS = 40
"""Photographs of the archive that `score` is timed on."""
SAMPLE_SIDE_PX = 3464
"""Side of the sample photograph as it is enlarged: 12 megapixels."""
NETWORKS = ("hgn_1x", "hgn_half")
Map = Float32[ndarray, "h w"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured, and how. Picklable: each benchmark runs in a process of its own."""

    model: str = "lite"
    """Name of a model that ships, or a bundle's folder."""
    image: Path | None = None
    """A photograph; None takes one of `ma-cluster sample`, enlarged to 12 megapixels, whose lesions are known."""
    threads: int = 1
    """CPU threads of the networks, ours and the peers'."""
    device: str = "cpu"
    """Where the networks run."""
    repeats: int = 1
    """Passes of which the fastest counts."""

    def bundle(self, flips_half: int | None = None) -> Bundle:
        """The model, if asked with other flips at 0.5x."""
        bundle = load_bundle(self.model)
        if flips_half is None:
            return bundle
        detector = replace(bundle.recipe.detector, flips_half=flips_half)
        return replace(bundle, recipe=replace(bundle.recipe, detector=detector))

    def photograph(self) -> Photograph:
        """The photograph to look at."""
        if self.image is not None:
            return Photograph(self.image.name, self.image.read_bytes(), None)
        return Photograph("ma-cluster sample, enlarged to 12 megapixels", *enlarged_sample(SAMPLE_SIDE_PX))

    def fastest_detection(self, bundle: Bundle, data: bytes) -> Detection:
        """What a model says of an encoded photograph, with the seconds of the fastest pass."""
        detector = Detector(bundle, device=self.device, threads=self.threads)
        detections = [detector.detect(data) for _ in range(self.repeats)]
        return min(detections, key=lambda detection: sum(detection.seconds.values()))

    def fastest(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest pass; waits for a GPU to finish."""
        seconds = []
        for _ in range(self.repeats):
            started = time.perf_counter()
            work()
            if torch.device(self.device).type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)


@dataclass(frozen=True, slots=True)
class Photograph:
    """An encoded photograph; `truth` on its own grid, None where it is not known."""

    name: str
    data: bytes
    truth: Bool[ndarray, "h w"] | None

    def prepared(self, config: ImageConfig) -> Prepared:
        """The photograph as the networks take it."""
        return read_bytes(self.data, config)[0]


Benchmark = Callable[[Subject], Iterator[dict[str, Any]]]


def run_benchmarks(
    benchmarks: Mapping[str, Benchmark], subject: Subject, on_rows: Callable[[str, Rows | str], None]
) -> dict[str, Any]:
    """Run them in turn and return the report, ready for JSON.

    Args:
        benchmarks: by name; functions of a module, as they run in another process.
        subject: what they look at.
        on_rows: is given each benchmark's rows, or why it cannot run, as soon as that is known.

    Raises:
        BundleError: the model cannot be loaded; nothing is measured then.
    """
    subject.bundle()
    results: dict[str, Rows | str] = {}
    for name, benchmark in benchmarks.items():
        results[name] = _alone(benchmark, subject)
        on_rows(name, results[name])
    settings = asdict(subject) | {"image": None if subject.image is None else subject.image.name}
    return {"machine": machine.describe(subject.device), "settings": settings, "results": results}


def _alone(benchmark: Benchmark, subject: Subject) -> Rows | str:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_rows, benchmark, subject).result()
        except UsageError as error:
            return f"skipped: {error}"


def _rows(benchmark: Benchmark, subject: Subject) -> Rows:
    return list(benchmark(subject))


def detect(subject: Subject) -> Iterator[dict[str, Any]]:
    """Photographs/s and megapixels/s of `detect`, with the seconds of each stage, for several flips at 0.5x.

    The flips of the model itself come first, so that the process's largest memory is theirs.
    """
    data, own = subject.photograph().data, subject.bundle().recipe.detector.flips_half
    for flips in (own, *(count for count in FLIPS if count != own)):
        best = subject.fastest_detection(subject.bundle(flips_half=flips), data)
        total = sum(best.seconds.values())
        yield {
            "flips_half": flips,
            "of_the_model": flips == own,
            "seconds": {stage: round(value, 2) for stage, value in best.seconds.items()},
            "total_seconds": round(total, 2),
            "photographs_per_s": round(1 / total, 4),
            "megapixels_per_s": round(best.mask.size / total / 1e6, 3),
            "peak_mb": peak_mb(),
        }


def monai(subject: Subject) -> Iterator[dict[str, Any]]:
    """The hypothesis stage against MONAI's `sliding_window_inference` with the same networks in plain torch.

    Once as `evaluate` needs it, each map whole, as MONAI makes them, and once as `detect` runs it.

    Raises:
        UsageError: MONAI is not installed.
    """
    try:
        sliding = importlib.import_module("monai.inferers").sliding_window_inference
    except ImportError as error:
        raise UsageError("MONAI is not installed: pip install 'ma_cluster[bench]'") from error
    torch.set_num_threads(subject.threads)
    bundle, photograph = subject.bundle(), subject.photograph()
    prepared = photograph.prepared(bundle.recipe.image)
    theirs: dict[str, Map] = {}

    def slide() -> None:
        for name in NETWORKS:
            network = hypothesis_network(bundle, name, subject.device, folded=False)
            enhanced = prepared.enhanced_1x if name == "hgn_1x" else prepared.enhanced_half
            whole = normalise(torch.from_numpy(enhanced).permute(2, 0, 1)[None].contiguous())
            with torch.inference_mode():
                logits = sliding(
                    whole.to(subject.device), (MONAI_TILE,) * 2, 1, network, overlap=MONAI_OVERLAP, mode="gaussian"
                )
            theirs[name] = probability(logits[:, 1] - logits[:, 0])[0].cpu().numpy()

    peer_seconds = subject.fastest(slide)
    detector = Detector(bundle, device=subject.device, threads=subject.threads)
    seconds = subject.fastest(lambda: detector.hypotheses(prepared))
    in_detect = min(detector.segment(prepared).seconds["hgn"] for _ in range(subject.repeats))
    maps = detector.hypotheses(prepared)
    yield {
        "monai_seconds": round(peer_seconds, 2),
        "seconds": round(seconds, 2),
        "speed_up": round(peer_seconds / seconds, 2),
        "seconds_in_detect": round(in_detect, 2),
        "speed_up_in_detect": round(peer_seconds / in_detect, 2),
        "difference_at_1x": _differences(maps.hgn_1x, theirs["hgn_1x"], prepared.fov_1x),
        **_precisions(prepared, photograph.truth, maps, theirs),
    }


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
    rate, with_start = _archive_run(subject, photograph.data)
    seconds += _loop(detector, photograph.data)
    bare = PHOTOGRAPHS / seconds
    yield {"subject": "bare loop", "photographs": PHOTOGRAPHS, "photographs_per_second": bare}
    yield {"subject": "score", "photographs": PHOTOGRAPHS, "photographs_per_second": rate, "with_start": with_start}
    yield {"subject": "score over bare loop", "ratio": rate / bare}


BENCHMARKS: dict[str, Benchmark] = {"detect": detect, "monai": monai, "score": score}


def _loop(detector: Detector, data: bytes) -> float:
    """Seconds of half the photographs, one after the other."""
    began = time.perf_counter()
    for _ in range(PHOTOGRAPHS // 2):
        detector.detect(data)
    return time.perf_counter() - began


def _archive_run(subject: Subject, data: bytes) -> tuple[float, float]:
    """Photographs a second of a run: of its shards alone, and of all that it does."""
    from ma_cluster.cluster.fleet.driver import score_archive
    from ma_cluster.cluster.fleet.replicas import Fleet
    from ma_cluster.cluster.fleet.workers import Progress

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


def _differences(ours: Map, theirs: Map, fov: Bool[ndarray, "h w"]) -> dict[str, float]:
    """How far two probability maps differ within the field of view; most at the seams of their tiles."""
    off = np.abs(ours - theirs)[fov]
    return {
        "median": round(float(np.median(off)), 6),
        "quantile_0.999": round(float(np.quantile(off, 0.999)), 5),
        "largest": round(float(off.max()), 4),
    }


def _precisions(
    prepared: Prepared, truth: Bool[ndarray, "h w"] | None, maps: Maps, theirs: dict[str, Map]
) -> dict[str, float]:
    """Average precision of the 1x map, ours and the peer's; nothing without a truth."""
    if truth is None:
        return {}
    known = prepared.grid.crop_mask(truth)
    pairs = {"average_precision_1x": maps.hgn_1x, "monai_average_precision_1x": theirs["hgn_1x"] * prepared.fov_1x}
    return {name: round(average_precision(PixelCounts.of(each, known)), 4) for name, each in pairs.items()}


def hypothesis_network(bundle: Bundle, name: str, device: str, *, folded: bool) -> nn.Module:
    """A hypothesis network as a plain script has it, or, `folded`, as the detector has it."""
    recipe = bundle.recipe
    network = build_network(name, recipe, bundle.weights[name])
    network.to(device).eval()
    if folded:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fold(network)
    flips = recipe.detector.flips_1x if name == "hgn_1x" else recipe.detector.flips_half
    return FlipAugmented(network, flips)


def peak_mb() -> int:
    """This process's largest resident memory so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
