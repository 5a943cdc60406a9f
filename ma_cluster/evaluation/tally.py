"""One photograph of a data set -> all that an evaluation needs of it, in a `Tally` that adds up over photographs.

Each network runs once; every row of the paper's Table 2 is counted from its maps, on the photograph's own grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from jaxtyping import Float32, Int32, Int64
from numpy import ndarray

from ma_cluster.evaluation.examples import Example, Judged, find_examples, worst_first
from ma_cluster.evaluation.false_pixels import false_pixels
from ma_cluster.evaluation.scoring import LesionCounts, PixelCounts, coarse, found_and_false, label
from ma_cluster.hypotheses.maps import Map, Maps, fuse
from ma_cluster.images.datasets import Sample, decode_mask, kind_of, read_object
from ma_cluster.images.reading import Prepared
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Detection

ROWS: dict[str, Callable[[Maps], Map]] = {
    "hgn_1x": lambda maps: maps.hgn_1x,
    "hgn_half": lambda maps: maps.hgn_half,
    "hgn_geometric": lambda maps: fuse([maps.hgn_1x, maps.hgn_half], "geometric"),
    "hgn_arithmetic": lambda maps: fuse([maps.hgn_1x, maps.hgn_half], "arithmetic"),
    "cls_geometric": lambda maps: fuse(maps.stack(), "geometric"),
    "cls_arithmetic": lambda maps: fuse(maps.stack(), "arithmetic"),
    "prn_arithmetic": lambda maps: fuse(maps.stack(), "arithmetic"),
    "prn_geometric": lambda maps: fuse(maps.stack(), "geometric"),
}
"""The rows of the paper's Table 2, in its order, each as a fusion of the maps that its network completes."""
DETECT = "detect"
"""Counted beside them: what `detect` does, pixels by the bundle's own fusion, lesions by the score of each outline."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Pixels and lesions of one row. Adds up."""

    pixels: PixelCounts
    lesions: LesionCounts

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(self.pixels + other.pixels, self.lesions + other.lesions)


@dataclass(frozen=True, slots=True)
class Photograph:
    """What is kept of each photograph apart. `number` is its place in the evaluation, from 1."""

    number: int
    digest: str
    """sha256 of its bytes and its mask's."""
    healthy: bool
    called: int
    """Lesions that `Detector.detect` reports on it."""
    pixels: dict[str, Int64[ndarray, "2 b"]] = field(default_factory=dict)
    """Coarse pixel counts by row; none where it is counted among the healthy ones only."""
    lesions: dict[str, LesionCounts] = field(default_factory=dict)
    """Lesions by row."""
    found: int = 0
    """Reference lesions that what is called overlaps."""
    false: int = 0
    """Called lesions that overlap none."""
    false_on: dict[str, int] = field(default_factory=dict)
    """What the false pixels of all outlines lie on; see `false_pixels`."""
    group: str = ""
    """What it belongs to, as its patient; empty where nothing is said."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Photographs looked at so far: the sum of two is that of all their photographs, in any order."""

    rows: dict[str, RowCounts] = field(default_factory=dict)
    photographs: tuple[Photograph, ...] = ()
    examples: tuple[Example, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        if not (self.rows and other.rows):
            rows = self.rows or other.rows
        else:
            rows = {name: counts + other.rows[name] for name, counts in self.rows.items()}
        photographs = sorted((*self.photographs, *other.photographs), key=lambda photograph: photograph.number)
        return Tally(rows, tuple(photographs), tuple(worst_first((*self.examples, *other.examples))))


def evaluate_photograph(detector: Detector, sample: Sample, number: int, rows: Sequence[str]) -> Tally:
    """Look at one photograph.

    Args:
        detector: the model.
        sample: with its mask, or healthy: then everything called is false.
        number: of the photograph in the evaluation.
        rows: names of the rows that are counted; with none only the lesions that `detect` reports are.

    Raises:
        ImageRefusedError: the photograph cannot be scored.
        UsageError: photograph and masks are of different sizes.
        StoreError: photograph or mask cannot be read.
    """
    data = read_object(sample.image)
    mask = None if sample.mask is None else read_object(sample.mask)
    prepared = detector.prepare(data)
    digest = hashlib.sha256(data + (mask or b"")).hexdigest()
    healthy = sample.label == "healthy"
    if not rows:
        called = len(detector.segment(prepared).lesions)
        return Tally(photographs=(Photograph(number, digest, healthy, called),))
    labels = label(np.zeros(prepared.shape, bool) if mask is None else decode_mask(mask, prepared.shape))
    maps = _maps(detector, prepared, rows)
    own = maps[detector.stage]
    detection, outlined = (detector.decide(prepared, own, point) for point in ("default", "sensitive"))
    fused = own_grid(own.fused(detector.recipe.detector), prepared)
    counts = {row: _count(row_map(row, maps, prepared), labels) for row in rows if row != DETECT}
    if DETECT in rows:
        by_score = LesionCounts.of(scores_drawn(outlined), labels)
        counts[DETECT] = RowCounts(PixelCounts.of(fused, labels > 0), by_score)
    others = {kind_of(url): decode_mask(read_object(url), prepared.shape) for url in sample.other_masks}
    found, false = found_and_false(detection.mask, labels)
    photograph = Photograph(
        number,
        digest,
        healthy,
        len(detection.lesions),
        {row: coarse(of_row.pixels) for row, of_row in counts.items()},
        {row: of_row.lesions for row, of_row in counts.items()},
        found,
        false,
        false_pixels(outlined.mask, labels > 0, others, prepared),
        sample.group,
    )
    examples = find_examples(Judged(prepared, detection.mask, labels, fused), number)
    return Tally(counts, (photograph,), tuple(examples))


def scores_drawn(detection: Detection) -> Float32[ndarray, "h w"]:
    """The outline of each lesion filled with its score; 0 elsewhere."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(detection.mask.astype(np.uint8), connectivity=8)
    numbers = {tuple(of_one): number for number, of_one in enumerate(stats.tolist())}
    scores = np.zeros(count, np.float32)
    for lesion in detection.lesions:
        top, left, bottom, right = lesion.bbox
        scores[numbers[left, top, right - left, bottom - top, lesion.area_px]] = lesion.score
    return scores[labels]


def network_of(row: str) -> str:
    """The network whose maps a row is made of: hgn, which every bundle has, prn or cls."""
    return row.partition("_")[0]


def rows_given(networks: Collection[str]) -> list[str]:
    """The rows of the paper that a bundle of these networks gives, in its order."""
    return [row for row in ROWS if network_of(row) in {"hgn", *networks}]


def row_map(row: str, maps: Mapping[str, Maps], prepared: Prepared) -> Map:
    """A row's map on the photograph's own grid, 0..1.

    Args:
        row: its name.
        maps: of the photograph, by network.
        prepared: the photograph.
    """
    return own_grid(ROWS[row](maps[network_of(row)]), prepared)


def own_grid(fused: Map, prepared: Prepared) -> Float32[ndarray, "h w"]:
    """A map of the canonical grid on the photograph's own, 0..1."""
    return np.clip(prepared.grid.uncrop(fused, prepared.shape), 0, 1)


def _maps(detector: Detector, prepared: Prepared, rows: Sequence[str]) -> dict[str, Maps]:
    """By network the maps of the hypothesis networks, and as it completes them; what no row asks for is not run."""
    networks = {detector.stage, *(network_of(row) for row in rows if row != DETECT)}
    half_alone = detector.looks_at_half_alone and not {*rows} - {DETECT, "hgn_half"}
    hypotheses = detector.hypotheses(prepared, half_alone=half_alone)
    if half_alone:
        return dict.fromkeys(networks, hypotheses)
    refiners = [network for network in detector.refiners if network in networks]
    return {"hgn": hypotheses} | {name: detector.refinements(prepared, hypotheses, name) for name in refiners}


def _count(probability: Map, labels: Int32[ndarray, "h w"]) -> RowCounts:
    return RowCounts(PixelCounts.of(probability, labels > 0), LesionCounts.of(probability, labels))
