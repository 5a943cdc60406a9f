"""A shard from plan to commit, with a fleet that does as it is told."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
from dicom_files import dicom_file, key_of
from fault_proxy import Fault, Kind, fault_proxy
from local_fleet import LocalFleet
from PIL import Image

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.plan import shards
from ma_cluster.archive.run import begin_run, committed, read_outcomes
from ma_cluster.archive.shard_scorer import Breaker, PlainCount, Reading, Scorer, Segmentation, ShardScorer
from ma_cluster.errors import (
    Flag,
    FleetBrokenError,
    ImageError,
    ImageFailedError,
    ImageRefusedError,
    Reason,
    StoreError,
    Triage,
    WorkerLostError,
)
from ma_cluster.images.fundus import Fov
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import Facts
from ma_cluster.images.sample import retina
from ma_cluster.lesions.findings import Findings, Lesion
from ma_cluster.storage.dicomweb import DicomWeb
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import Entry

QUALITY = Quality(0.4, 0.1, 0.08, 0.02, 0.2, 0.9, True, (Flag.FIELD_ASSUMED,))
FACTS = Facts(
    480,
    640,
    Fov(240.0, 320.0, 470.0),
    QUALITY,
    {"fetch": 0.1, "decode": 0.2, "prepare": 0.3},
)
LESION = Lesion(1, 20.5, 30.0, (18, 28, 24, 33), 25, 5.64, 0.8, 0.7, 0.9, 362.0)
FINDINGS = Findings((LESION,), 0.75, Triage.REFER)


class FakeFleet:
    """Raises, for each key, the errors that are listed for it, then answers."""

    def __init__(self, reading: dict[str, list[ImageError]], segmenting: dict[str, list[ImageError]]) -> None:
        self.reading, self.segmenting = reading, segmenting
        self.last = ""

    def read(self, entry: Entry) -> Reading:
        self.last = entry.key
        if self.reading.get(entry.key):
            raise self.reading[entry.key].pop(0)
        return Reading(FACTS, ray.ObjectRef.nil())

    def segment(self, reading: Reading) -> Segmentation:
        if self.segmenting.get(self.last):
            raise self.segmenting[self.last].pop(0)
        return Segmentation(FINDINGS, b"png", b"jpeg", {"hgn": 1.0, "lesions": 0.5})


class Heard:
    """Counts what a recorder is told."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def begun(self) -> None:
        self.counts["begun"] += 1

    def decided(self, outcome: Outcome) -> None:
        self.counts[outcome.status.value] += 1


class FullDisk(LocalStore):
    """Holds a run, and takes no mask."""

    def create(self, key: str, data: bytes) -> bool:
        if key.startswith("masks/"):
            raise StoreError("the destination cannot be written: no space left")
        return super().create(key, data)


def scorer_of(tmp_path: Path, fleet: Scorer, dest: LocalStore | None = None, images: int = 1) -> ShardScorer:
    source = LocalStore(tmp_path / "source")
    for name in ["eye.jpg", *(f"eye {number}.jpg" for number in range(1, images))]:
        source.create(name, b"...")
    dest = dest or LocalStore(tmp_path / "dest")
    return ShardScorer(fleet, dest, dest, begin_run(source, dest, "model", "config"), ThreadPoolExecutor(1), Heard())


class Rendezvous(FakeFleet):
    """Answers only when two photographs are read at a time, and says how many ever were."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self.both = threading.Barrier(2, timeout=30.0)
        self.now: list[str] = []
        self.most = 0

    def read(self, entry: Entry) -> Reading:
        self.now.append(entry.key)
        self.both.wait()
        self.most = max(self.most, len(self.now))
        self.both.wait()
        self.now.remove(entry.key)
        return super().read(entry)


def died() -> ImageError:
    return WorkerLostError(Reason.CRASHED_WORKER, "the replica died")


def outcome_of(scorer: ShardScorer) -> dict[str, object]:
    scorer.score(next(shards(scorer.dest, scorer.run.plan)))
    row: dict[str, object] = read_outcomes(scorer.dest, scorer.run, 0).to_pylist()[0]
    return row


def test_a_scored_photograph_has_all_its_columns(tmp_path: Path) -> None:
    row = outcome_of(scorer_of(tmp_path, FakeFleet({}, {})))
    assert (row["status"], row["reason"], row["attempts"]) == ("scored", None, 1)
    assert (row["height"], row["width"], row["fov_diameter_px"]) == (480, 640, 470.0)
    assert (row["lesion_count"], row["lesion_area_px"]) == (1, 25)
    assert (row["triage"], row["image_score"]) == ("refer", 0.75)
    assert row["lesions"][0]["bbox"] == [18, 28, 24, 33]  # type: ignore[index]
    assert (row["seconds_fetch"], row["seconds_hgn"], row["seconds_prn"]) == (0.1, 1.0, None)
    assert (tmp_path / "dest" / str(row["mask_key"])).read_bytes() == b"png"
    assert (tmp_path / "dest" / str(row["overlay_key"])).read_bytes() == b"jpeg"


def test_a_refused_photograph_is_not_tried_again(tmp_path: Path) -> None:
    fleet = FakeFleet({"eye.jpg": [ImageRefusedError(Reason.TRUNCATED, "half of it")]}, {})
    scorer = scorer_of(tmp_path, fleet)
    row = outcome_of(scorer)
    assert (row["status"], row["reason"], row["attempts"]) == ("refused", "truncated", 1)
    assert row["detail"] == "half of it"
    assert row["lesions"] is None and row["mask_key"] is None and row["height"] is None
    assert isinstance(scorer.recorder, Heard)
    assert scorer.recorder.counts == {"begun": 1, "refused": 1}


def test_a_photograph_whose_replica_died_is_tried_again(tmp_path: Path) -> None:
    row = outcome_of(scorer_of(tmp_path, FakeFleet({}, {"eye.jpg": [died()]})))
    assert (row["status"], row["attempts"]) == ("scored", 2)


def test_a_photograph_whose_replicas_died_twice_has_failed(tmp_path: Path) -> None:
    row = outcome_of(scorer_of(tmp_path, FakeFleet({"eye.jpg": [died()]}, {"eye.jpg": [died(), died()]})))
    assert (row["status"], row["reason"], row["attempts"]) == ("failed", "crashed_worker", 2)
    row_of_segmenter = outcome_of(scorer_of(tmp_path / "2", FakeFleet({}, {"eye.jpg": [died(), died()]})))
    assert (row_of_segmenter["status"], row_of_segmenter["height"]) == ("failed", 480)


def test_a_destination_that_takes_no_masks_leaves_the_shard_uncommitted(tmp_path: Path) -> None:
    dest = FullDisk(tmp_path / "dest")
    with pytest.raises(StoreError, match="no space"):
        outcome_of(scorer_of(tmp_path, FakeFleet({}, {}), dest))
    assert committed(dest) == set()


def test_a_shard_that_another_driver_has_committed_is_not_scored_again(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, FakeFleet({}, {}))
    (shard,) = shards(scorer.dest, scorer.run.plan)
    assert (scorer.score(shard), scorer.score(shard)) == (1, 1)
    assert isinstance(scorer.recorder, Heard)
    assert scorer.recorder.counts == {"begun": 1, "scored": 1}


def test_shards_that_are_scored_at_a_time_share_the_photographs_in_flight(tmp_path: Path) -> None:
    fleet = Rendezvous()
    scorer = dataclasses.replace(scorer_of(tmp_path, fleet, images=4), threads=ThreadPoolExecutor(2))
    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(scorer.score, shards(scorer.dest, scorer.run.plan))) == [1, 1, 1, 1]
    assert fleet.most == 2
    assert committed(scorer.dest) == {0, 1, 2, 3}


def test_a_photograph_that_came_too_late_is_tried_again(tmp_path: Path) -> None:
    late = ImageFailedError(Reason.TIMEOUT, "not decoded within 60 s")
    row = outcome_of(scorer_of(tmp_path, FakeFleet({"eye.jpg": [late]}, {})))
    assert (row["status"], row["attempts"]) == ("scored", 2)


def test_workers_lost_in_a_row_end_the_run_and_leave_the_shard_uncommitted(tmp_path: Path) -> None:
    keys = ["eye.jpg", *(f"eye {number}.jpg" for number in range(1, 6))]
    fleet = Breaker(FakeFleet({}, {key: [died(), died()] for key in keys}), PlainCount(), 5)
    scorer = scorer_of(tmp_path, fleet, images=6)
    first, second, third, *_ = shards(scorer.dest, scorer.run.plan)
    scorer.score(first)
    scorer.score(second)
    with pytest.raises(FleetBrokenError, match="5 workers were lost in a row, the last as the replica died"):
        scorer.score(third)
    with pytest.raises(FleetBrokenError, match="5 workers"):  # and so does what other threads still ask for
        scorer.score(third)
    assert committed(scorer.dest) == {0, 1}


def test_a_success_in_between_starts_the_count_of_lost_workers_anew(tmp_path: Path) -> None:
    fleet = Breaker(FakeFleet({}, {"eye.jpg": [died()], "eye 1.jpg": [died()], "eye 2.jpg": [died()]}), PlainCount(), 2)
    scorer = scorer_of(tmp_path, fleet, images=4)
    assert sum(scorer.score(shard) for shard in shards(scorer.dest, scorer.run.plan)) == 4


def test_decoders_that_die_apart_never_end_the_run(tmp_path: Path) -> None:
    keys = ["eye.jpg", "eye 1.jpg", "eye 2.jpg"]
    apart = {key: [ImageFailedError(Reason.CRASHED_WORKER, "died of SIGABRT")] * 2 for key in keys}
    scorer = scorer_of(tmp_path, Breaker(FakeFleet(apart, {}), PlainCount(), 2), images=3)
    assert sum(scorer.score(shard) for shard in shards(scorer.dest, scorer.run.plan)) == 3
    reasons = [read_outcomes(scorer.dest, scorer.run, number)["reason"].to_pylist() for number in range(3)]
    assert reasons == [["crashed_worker"]] * 3


def test_a_token_that_expires_ends_the_run_and_a_photograph_that_is_denied_does_not(
    orthanc: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    rgb = np.asarray(Image.fromarray(retina()).resize((300, 300)))
    web, dest = DicomWeb(f"dicomweb+{orthanc}"), LocalStore(tmp_path)
    for data in [dicom_file(rgb, "jpeg", number, StudyDate="20310701") for number in range(901, 906)]:
        web.create(key_of(data), data)
    with fault_proxy(orthanc) as proxy:
        source = DicomWeb(f"dicomweb+{proxy.endpoint}/dicom-web?StudyDate=20310701")
        fleet = Breaker(LocalFleet(source, tiny_bundle), PlainCount(), 3)
        run = begin_run(source, dest, "model", "config")
        scorer = ShardScorer(fleet, dest, dest, run, ThreadPoolExecutor(1), Heard())
        *denied, third, fourth, fifth = shards(dest, run.plan)
        proxy.faults.append(Fault(Kind.ERROR, "GET", "/instances/", times=4, status=403))
        assert [scorer.score(shard) for shard in (*denied, third)] == [1, 1, 1]
        proxy.faults.append(Fault(Kind.ERROR, "GET", "/", times=1_000, status=401))
        assert scorer.score(fourth) == 1
        with pytest.raises(FleetBrokenError, match=r"source .* failed 3 times in a row, .* status 401; .* renew"):
            scorer.score(fifth)
    ended = [read_outcomes(dest, run, number, ["reason"])["reason"].to_pylist() for number in sorted(committed(dest))]
    assert ended == [["store_error"], ["store_error"], [None], ["store_error"]]
