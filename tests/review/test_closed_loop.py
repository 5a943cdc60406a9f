"""Review -> train -> evaluate: what a reviewer corrects makes the next model better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from review_runs import score_here
from test_reviews import Grader, the_run

from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.bundle import Bundle, load_bundle
from ma_cluster.config import lite
from ma_cluster.evaluation.scoring import average_precision
from ma_cluster.evaluation.tally import Tally, evaluate_photograph
from ma_cluster.images.datasets import IMAGES_FOLDER, Sample, decode_mask
from ma_cluster.images.sample import SampleArchive, write_sample
from ma_cluster.lesions.detector import Detector
from ma_cluster.review.export import export_reviews
from ma_cluster.storage.local import LocalStore
from ma_cluster.training.checkpoints import checkpoint_weights, read_checkpoint
from ma_cluster.training.run import TrainRequest
from ma_cluster.training.start import train_local


@pytest.mark.long
def test_a_model_that_is_trained_on_corrections_finds_more(tmp_path: Path) -> None:
    archive, unseen = write_sample(str(tmp_path / "archive"), 10), write_sample(str(tmp_path / "unseen"), 3, seed=1)
    before = load_bundle("lite", networks=("hgn_1x", "hgn_half"))
    dest = LocalStore(tmp_path / "results")
    score_here(f"{archive.url}/{IMAGES_FOLDER}".rstrip("/"), dest.url, Detector(load_bundle("lite")))
    correct(dest, archive)
    out = LocalStore(tmp_path / "reviewed")
    export_reviews(dest, the_run(dest), out)
    request = TrainRequest(
        network="hgn_half",
        data=f"{out.url}/manifest.csv",
        out=str(tmp_path / "run"),
        recipe=lite(),
        init="lite",
        steps=80,
        epoch_steps=40,
        learning_rate=5e-4,
        threads=2,
    )
    weights = checkpoint_weights(read_checkpoint(train_local(request).best), "the corrected network")
    after = replace(before, weights=before.weights | {"hgn_half": weights})
    figures = [precision(bundle, unseen) for bundle in (before, after)]
    assert figures[1] > figures[0] + 0.02, figures


def correct(dest: LocalStore, archive: SampleArchive) -> None:
    """A reviewer who knows the truth: rejects what is none, draws what was missed, and is done."""
    grader, store = Grader(dest, "ada"), LocalStore(Path(archive.url))
    run = the_run(dest)
    rows = [row for table in latest_outcomes(dest, run, ["lesions", "mask_key"]) for row in table.to_pylist()]
    masks = {Path(photograph.image).name: photograph.mask for photograph in archive.photographs}
    for row in rows:
        key, called, mask = row["key"], decode_mask(dest.get(row["mask_key"])), masks[Path(row["key"]).name]
        known = np.zeros_like(called) if mask is None else decode_mask(store.get(mask))
        for lesion in row["lesions"]:
            top, left, bottom, right = lesion["bbox"]
            if not known[top:bottom, left:right].any():
                grader.say(key, "reject", lesion=lesion["id"])
        contours, _ = cv2.findContours(known.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        for contour in contours:
            corners = contour[:, 0, ::-1]
            if len(corners) >= 3 and not called[tuple(corners.T)].any():
                grader.say(key, "draw", polygon=corners.tolist())
        grader.say(key, "done")


def precision(bundle: Bundle, archive: SampleArchive) -> float:
    """The average precision of the 0.5x network on photographs that no one has reviewed."""
    detector, tally = Detector(bundle), Tally()
    for number, each in enumerate(archive.photographs, 1):
        assert each.mask is not None
        image, mask = (f"{archive.url}/{key}" for key in (each.image, each.mask))
        tally += evaluate_photograph(detector, Sample(each.name, image, mask, "lesion", "test"), number, ["hgn_half"])
    return average_precision(tally.rows["hgn_half"].pixels)
