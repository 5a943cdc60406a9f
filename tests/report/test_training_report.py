"""The page of a training: from its log, and from the ledger's last snapshot where it has one."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from photographs import encode

from ma_cluster.errors import UsageError
from ma_cluster.report.run_report import is_training
from ma_cluster.report.training_report import write_training_report
from ma_cluster.storage.local import LocalStore
from ma_cluster.training.ledger import LocalLedger
from ma_cluster.training.run import Epoch, Example, TrainFolder


def record(step: int, precision: float, pool_loss: float | None = None) -> Epoch:
    losses = {"dice": 1.0 / step, "<b>cross</b>": 0.5}
    return Epoch(
        step=step, losses=losses, average_precision=precision, workers=1, patches_per_second=8.0, seconds=60.0,
        pool_loss=pool_loss,
    )  # fmt: skip


def a_run(root: Path, pool_loss: float | None) -> TrainFolder:
    folder = TrainFolder.begin(str(root), {"network": "prn", "seed": 3}, resume=False)
    epochs = [record(100, 0.25, pool_loss), record(200, 0.5, pool_loss), record(300, 0.375, pool_loss)]
    LocalStore(root).put("log.json", json.dumps([asdict(epoch) for epoch in epochs]).encode())
    return folder


def test_the_page_tells_the_best_epoch_and_draws_each_term(tmp_path: Path) -> None:
    a_run(tmp_path, None)
    assert is_training(str(tmp_path))
    write_training_report(str(tmp_path))
    page = (tmp_path / "report/index.html").read_text()
    assert "<b>0.5000</b>best average precision, at step 200" in page
    assert page.count("<polyline") == 4
    assert "&lt;b&gt;cross" in page
    assert "healthy pool" not in page


def test_the_losses_of_the_pool_are_told_from_the_ledger(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 0.1)
    ledger = LocalLedger(1000, 0.01)
    ledger.update(np.arange(10), np.full(10, 0.99))
    ledger.snapshot(folder.ledger(3))
    write_training_report(str(tmp_path))
    assert "The costliest 1 % of them hold 50 % of all loss" in (tmp_path / "report/index.html").read_text()


def test_the_patches_that_cost_most_are_shown_with_their_photographs(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 0.1)
    write_training_report(str(tmp_path))
    assert "cost most" not in (tmp_path / "report/index.html").read_text(), "there are none yet"
    jpeg = base64.b64encode(encode(np.zeros((8, 8, 3), np.uint8), "JPEG")).decode()
    folder.keep_costliest([Example(photograph="<eye>_7", row=12, col=34, loss=0.98765, jpeg=jpeg)])
    write_training_report(str(tmp_path))
    page = (tmp_path / "report/index.html").read_text()
    assert "loss 0.988" in page and f'src="data:image/jpeg;base64,{jpeg}"' in page
    assert 'alt="Patch of &lt;eye&gt;_7 around row 12, column 34"' in page and "<eye>" not in page


def test_a_training_without_a_record_and_a_folder_without_a_training_are_told_apart(tmp_path: Path) -> None:
    assert not is_training(str(tmp_path))
    TrainFolder.begin(str(tmp_path), {"network": "prn"}, resume=False)
    with pytest.raises(UsageError, match="no finished epoch"):
        write_training_report(str(tmp_path))
