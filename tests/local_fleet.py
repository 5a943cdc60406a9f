"""A fleet without Ray, in this process: it reads and segments as replicas do, with the model that it is given."""

from __future__ import annotations

from pathlib import Path

from ma_cluster.archive.plan import shards
from ma_cluster.archive.run import Run
from ma_cluster.archive.shard_scorer import Reading, Segmentation, ShardScorer
from ma_cluster.images.decode import Decoded
from ma_cluster.images.decode import decode as decode_here
from ma_cluster.images.reading import read_photograph
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import encode_mask, encode_overlay
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Entry, Store


class LocalFleet:
    """A `Scorer`; threads may share it."""

    def __init__(self, source: Source, model: Path) -> None:
        self._source, self._detector = source, Detector.load(model)

    def read(self, entry: Entry) -> Reading:
        prepared, facts = read_photograph(self._source, entry, self._detector.recipe.image, self._decode)
        return Reading(facts, prepared)

    def segment(self, reading: Reading) -> Segmentation:
        found = self._detector.segment(reading.prepared)
        overlay = encode_overlay(reading.prepared.pixels, found.mask)
        return Segmentation(found.findings, encode_mask(found.mask), overlay, found.seconds)

    def _decode(self, data: bytes) -> Decoded:
        return decode_here(data, self._detector.recipe.image)


def score_all(scorer: ShardScorer, dest: Store, run: Run) -> None:
    """All shards of a run, one after the other."""
    for shard in shards(dest, run.plan):
        scorer.score(shard)
