"""A training run as people look at it: RUN/report/index.html, one page from its log, the ledger's last snapshot, and
the patches that cost most.
"""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Any

import numpy as np

from ma_cluster.errors import LedgerLostError, UsageError
from ma_cluster.report.charts import bars, embedded, lines, render
from ma_cluster.storage.store import open_store
from ma_cluster.training.ledger import read_manifest, read_table
from ma_cluster.training.run import Epoch, TrainFolder

INDEX = "report/index.html"
_SHOWN = ("data", "healthy", "seed", "steps", "learning_rate", "init")
_BINS = 24


def write_training_report(url: str) -> str:
    """Write the page of a training run, finished or not, and return its URL; an earlier one is replaced.

    Raises:
        UsageError: it has no epoch yet.
        StoreError: something cannot be read, or the page not be written.
    """
    store = open_store(url)
    folder = TrainFolder(store.url)
    about, epochs = folder.about, folder.epochs
    if not epochs:
        raise UsageError("this training has no finished epoch yet: it writes its first record after one")
    steps = [float(epoch.step) for epoch in epochs]
    terms = list(dict.fromkeys(term for epoch in epochs for term in epoch.losses))
    losses = {term: [epoch.losses.get(term, 0.0) for epoch in epochs] for term in terms}
    precisions, speeds = [
        [getattr(epoch, name) for epoch in epochs] for name in ("average_precision", "patches_per_second")
    ]
    tops = [max(values, default=0.0) or 1.0 for values in (precisions, [max(each) for each in losses.values()], speeds)]
    page = render(
        "training.html",
        network=about["network"],
        about={name: about[name] for name in _SHOWN if about.get(name) is not None},
        epochs=epochs,
        best=max(epochs, key=lambda epoch: epoch.average_precision),
        hours=sum(epoch.seconds for epoch in epochs) / 3600,
        terms=terms,
        first=f"{epochs[0].step:,}",
        last=f"step {epochs[-1].step:,}",
        validation=lines(steps, {"average precision": precisions}),
        losses=lines(steps, losses),
        speed=lines(steps, {"patches a second": speeds}),
        top_precision=tops[0],
        top_loss=tops[1],
        top_speed=tops[2],
        ledger=_ledger(folder, epochs),
        costliest=[asdict(each) | {"picture": embedded(base64.b64decode(each.jpeg))} for each in folder.costliest],
    )
    store.put(INDEX, page.encode())
    return f"{store.url}/{INDEX}"


def _ledger(folder: TrainFolder, epochs: tuple[Epoch, ...]) -> dict[str, Any] | None:
    """How the losses of the healthy pool are spread; None of a network without one."""
    if epochs[-1].pool_loss is None:
        return None
    ledger = open_store(folder.ledger(len(epochs)))
    try:
        held = read_manifest(ledger)
        losses = read_table(ledger, held, 0, sum(part.count for part in held)).losses
    except LedgerLostError:
        return None
    numbers, edges = np.histogram(losses, _BINS)
    ordered = np.sort(losses.astype(np.float64))[::-1]
    shares = [float(ordered[: max(1, len(ordered) // part)].sum() / max(ordered.sum(), 1e-12)) for part in (100, 10)]
    labels = [f"{edge:.2g}" for edge in edges[:-1].tolist()]
    return {"bars": bars(labels, numbers.tolist()), "size": len(losses), "top_1": shares[0], "top_10": shares[1]}
