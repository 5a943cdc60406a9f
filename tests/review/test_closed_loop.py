"""Review -> train -> evaluate: what a reviewer corrects makes the next model better."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from review_runs import score_here
from test_reviews import Grader, the_run

from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.bundle import Bundle, load_bundle
from ma_cluster.config import JUDGE
from ma_cluster.evaluation.scoring import PixelCounts, average_precision
from ma_cluster.images.datasets import IMAGES_FOLDER, decode_mask
from ma_cluster.images.fundus import half_scale_mask
from ma_cluster.images.sample import SampleArchive, write_sample
from ma_cluster.lesions.detector import Detector
from ma_cluster.review.export import export_reviews
from ma_cluster.storage.local import LocalStore
from ma_cluster.training.checkpoints import checkpoint_weights, read_checkpoint
from ma_cluster.training.run import TrainRequest
from ma_cluster.training.start import train_local


@pytest.mark.long
def test_a_model_that_is_trained_on_corrections_finds_more(tmp_path: Path) -> None:
    archive, unseen = write_sample(str(tmp_path / "archive"), 14, 3), write_sample(str(tmp_path / "unseen"), 2, seed=1)
    dest = LocalStore(tmp_path / "results")
    score_here(f"{archive.url}/{IMAGES_FOLDER}".rstrip("/"), dest.url, Detector(load_bundle("lite")))
    correct(dest, archive)
    before, after = corrected(dest, tmp_path)
    figures = [precision(bundle, unseen) for bundle in (before, after)]
    assert figures[1] > figures[0] + 0.005, figures  # measured: 0.822, then 0.838


def quick(bundle: Bundle) -> Bundle:
    """The model without the flips of its 0.5x network."""
    return replace(bundle, recipe=replace(bundle.recipe, detector=replace(bundle.recipe.detector, flips_half=1)))


def corrected(dest: LocalStore, root: Path) -> tuple[Bundle, Bundle]:
    """The shipped hypothesis networks, and the same after some training of the 0.5x one on what was reviewed."""
    out = LocalStore(root / "reviewed")
    export_reviews(dest, the_run(dest), out)
    before = quick(load_bundle("lite", networks=("hgn_1x", "hgn_half", JUDGE)))
    small = replace(before.recipe.hgn_half, batch_patches=4, weight_average=0.9)  # else an average forgets too slowly
    request = TrainRequest(
        network="hgn_half",
        data=f"{out.url}/manifest.csv",
        out=str(root / "run"),
        recipe=replace(before.recipe, hgn_half=small),
        init="lite",
        steps=40,
        epoch_steps=40,
        learning_rate=1e-3,
        threads=2,
    )
    weights = checkpoint_weights(read_checkpoint(train_local(request).last), "the corrected network")
    return before, replace(before, weights=before.weights | {"hgn_half": weights})


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
    """The average precision of the 0.5x network, on its grid, on photographs that no one has reviewed."""
    detector, store, counts = Detector(bundle), LocalStore(Path(archive.url)), []
    for photograph in archive.photographs:
        assert photograph.mask is not None
        prepared = detector.prepare(store.get(photograph.image))
        truth = half_scale_mask(prepared.grid.crop_mask(decode_mask(store.get(photograph.mask))))
        found = np.where(prepared.fov_half, detector.kinds(prepared)[0], np.float32(0))
        counts.append(PixelCounts.of(found, truth))
    return average_precision(functools.reduce(operator.add, counts))
