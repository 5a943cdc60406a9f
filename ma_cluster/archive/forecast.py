"""What an archive would take before any of it is scored: `ma-cluster plan`. No Ray in here.

source -> listing, and headers of a sample -> Survey      photographs, megapixels, bytes
a run that is finished, or a few photographs here -> StageSeconds
both and a Capacity -> Forecast                           the part of the fleet that is slowest decides
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from ma_cluster.archive.run import Listing
from ma_cluster.archive.summary import read_status
from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageError, MaClusterError, UsageError
from ma_cluster.images.decode import read_size
from ma_cluster.images.reading import read_photograph
from ma_cluster.images.sandbox import DecodePool, SandboxConfig
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import encode_mask, encode_overlay
from ma_cluster.metrics import STAGES
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Entry, open_store

READING, SEGMENTING = ("fetch", "decode", "prepare"), ("hgn", "prn", "lesions")
_FIXED = ("hgn", "prn")  # on the canonical scale, whatever the photograph's size
START_S = 23.0
"""Before the first photograph and after the last: Ray, replicas, model, summary (benchmarks/results/score.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a source holds. Megapixels are of a sample; nothing is decoded."""

    images: int
    skipped: int
    bytes: int
    """Of those that the listing gives no size, by the sample."""
    sampled: int
    unreadable: int
    """Of the sample: their headers tell no size, or they are too large to be scored."""
    megapixels: float
    """Of a photograph, the sample's mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """What each stage of a photograph took."""

    seconds: dict[str, float]
    megapixels: float
    """Of the photographs that they were measured on."""
    by: str

    def of(self, stages: Sequence[str], megapixels: float) -> float:
        """Seconds of some stages for a photograph of another size."""
        factor = megapixels / self.megapixels if self.megapixels and megapixels else 1.0
        return sum(self.seconds.get(stage, 0.0) * (1.0 if stage in _FIXED else factor) for stage in stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How many photographs a fleet has in each of its parts at a time."""

    segmenters: int
    reading: int
    """Photographs that all Readers decode and prepare at a time."""
    shared_cores: int | None = None
    """Of one machine that does it all; None where each replica has cores of its own."""
    store_bytes_per_s: float | None = None
    """What the store delivers at most; None: more than is asked for."""
    gpus_per_segmenter: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """How fast a fleet would be, and what holds it back."""

    rates: dict[str, float]
    """Photographs a second that each part bears."""
    bottleneck: str
    images_per_second: float
    seconds: float
    """From the command to its end."""
    gpus: float
    """Of the whole fleet."""
    segmenters_within: int | None = None
    reading_within: int | None = None
    gpus_within: float | None = None
    """What it takes to be done within the time asked for."""

    def cost(self, hourly_price: float) -> float:
        """Of the whole, at a price for an hour of the whole fleet."""
        return self.seconds / 3600 * hourly_price


def survey(source: Source, sample: int = 32, seed: int = 0) -> tuple[Survey, list[Entry]]:
    """Count a source's photographs and read the headers of a few.

    Returns:
        what it holds, and the sample.

    Raises:
        UsageError: it holds none.
        StoreError: the store does not answer.
    """
    listing, rng = Listing(source, open_store("/nowhere")), random.Random(seed)
    images, total, unsized, kept = 0, 0, 0, list[Entry]()
    for entry in listing:
        images, total = images + 1, total + entry.size
        unsized += bool(entry.etag) and not entry.size
        if len(kept) < sample:
            kept.append(entry)
        elif (place := rng.randrange(images)) < sample:
            kept[place] = entry
    if not images:
        raise UsageError("there is nothing to score: the source holds no photographs; check the URL")
    with ThreadPoolExecutor(8) as pool:
        looks = list(pool.map(lambda entry: _look(source, entry), kept))
    known = [megapixels for _, megapixels in looks if megapixels is not None]
    fetched = [size for entry, (size, _) in zip(kept, looks, strict=True) if size is not None and not entry.size]
    total += round(unsized * sum(fetched) / len(fetched)) if fetched else 0
    mean = sum(known) / len(known) if known else 0.0
    counted = {"images": images, "skipped": listing.skipped, "bytes": total, "sampled": len(kept)}
    return Survey(**counted, unreadable=len(kept) - len(known), megapixels=mean), kept


def _look(source: Source, entry: Entry) -> tuple[int | None, float | None]:
    """Bytes and megapixels of a photograph; None where it cannot be fetched, and where its header does not tell."""
    size = None
    try:
        data = source.get(entry.key, max_bytes=ImageConfig().max_bytes)
        size = len(data)
        width, height = read_size(data)
    except MaClusterError:
        return size, None
    return size, width * height / 1e6


def seconds_of_run(dest_url: str) -> StageSeconds:
    """What the stages took in a run, by its outcomes.

    Raises:
        UsageError: there is no run, or it has scored nothing yet.
    """
    counts = read_status(dest_url).counts
    scored = counts.statuses["scored"]
    if not scored:
        raise UsageError("the run to go by has scored no photograph yet; leave it out, or name another")
    means = {stage: spent / scored for stage, spent in counts.seconds.items()}
    return StageSeconds(seconds=means, megapixels=counts.megapixels / scored, by="a run")


def seconds_here(detector: Detector, source: Source, entries: Sequence[Entry], sandbox: SandboxConfig) -> StageSeconds:
    """What the stages take on this machine, on photographs that are scored for it, one for each child at a time, twice.

    Only the second time counts: the first pays for caches. The detector has one thread.

    Raises:
        UsageError: none of them can be scored.
        SandboxError: the children do not start.
    """
    decoding = DecodePool(detector.recipe.image, sandbox)
    try:
        with ThreadPoolExecutor(sandbox.children) as pool:
            for _ in range(2):
                found = pool.map(lambda entry: _measured(detector, source, entry, decoding), entries)
                measured = [each for each in found if each]
    finally:
        decoding.close()
    if not measured:
        raise UsageError(f"none of {len(entries)} photographs of the source can be scored; name a run to go by, --like")
    count = len(measured)
    means = {stage: sum(seconds.get(stage, 0.0) for seconds, _ in measured) / count for stage in STAGES}
    return StageSeconds(seconds=means, megapixels=sum(size for _, size in measured) / count, by="this machine")


def _measured(
    detector: Detector, source: Source, entry: Entry, decoding: DecodePool
) -> tuple[dict[str, float], float] | None:
    try:
        prepared, facts = read_photograph(source, entry, detector.recipe.image, decoding.decode)
        detection = detector.segment(prepared)
    except ImageError:
        return None
    began = time.perf_counter()
    encode_mask(detection.mask)
    encode_overlay(prepared.pixels, detection.mask)
    seconds = facts.seconds | detection.seconds
    seconds["lesions"] += time.perf_counter() - began
    return seconds, facts.height * facts.width / 1e6


def forecast(found: Survey, stages: StageSeconds, fleet: Capacity, within_s: float | None = None) -> Forecast:
    """How long a fleet takes, and which part of it decides.

    Raises:
        UsageError: `within_s` leaves no time after the start.
    """
    reading, segmenting = (stages.of(part, found.megapixels) for part in (READING, SEGMENTING))
    rates = {"readers": _rate(fleet.reading, reading), "segmenters": _rate(fleet.segmenters, segmenting)}
    if fleet.shared_cores is not None:
        busy = [stage for stage in STAGES if stage != "fetch"]
        rates["cores"] = _rate(fleet.shared_cores, stages.of(busy, found.megapixels))
    if fleet.store_bytes_per_s is not None:
        rates["store"] = _rate(fleet.store_bytes_per_s, found.bytes / found.images)
    bottleneck = min(rates, key=lambda part: rates[part])
    rate = rates[bottleneck]
    in_rounds = math.ceil(found.images / fleet.segmenters) * segmenting  # the last one may leave replicas idle
    seconds = START_S + max(found.images / rate, in_rounds)
    gpus = fleet.segmenters * fleet.gpus_per_segmenter
    said = Forecast(rates=rates, bottleneck=bottleneck, images_per_second=rate, seconds=seconds, gpus=gpus)
    if within_s is None:
        return said
    if within_s <= START_S + segmenting:
        raise UsageError(f"within {within_s:.0f} s nothing ends: starting alone takes {START_S:.0f} s")
    rounds = max(1, math.floor((within_s - START_S) / segmenting)) if segmenting else found.images
    needed = math.ceil(found.images / rounds)
    return replace(
        said,
        segmenters_within=needed,
        reading_within=math.ceil(found.images * reading / (within_s - START_S)),
        gpus_within=needed * fleet.gpus_per_segmenter,
    )


def _rate(parallel: int | float, each: float) -> float:
    return parallel / each if each > 0 else math.inf


def to_json(found: Survey, stages: StageSeconds, said: Forecast, hourly_price: float | None) -> str:
    """All of it; a part that takes no time has no rate."""
    rates: dict[str, Any] = {part: rate if math.isfinite(rate) else None for part, rate in said.rates.items()}
    cost = None if hourly_price is None else said.cost(hourly_price)
    forecast = asdict(said) | {"rates": rates, "cost": cost}
    values = {"survey": asdict(found), "stages": asdict(stages), "forecast": forecast}
    return json.dumps(values, indent=2)
