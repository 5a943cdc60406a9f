"""How fast the loss table draws and learns, beside numpy and torch: `bench_ledger.py --out FILE.json`.

Each size is measured in this one process, peers right after the table, so that the ratios hold whatever else the
machine does. numpy's `Generator.choice(p=...)` is measured as called in training: the losses change between draws, so
their normalisation counts. torch.multinomial refuses more than 2^24 categories.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ma_cluster import machine
from ma_cluster.refinement.selection import LossTable

TORCH_LIMIT = 2**24
_BATCH = 1_000_000
_ONCE_FROM = 100_000_000  # patches from which everything is measured once


def main() -> None:
    """Measure each size and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--repeats", type=int, default=3, help="the best counts; 1 from 10^8 patches on")
    parser.add_argument("--cluster-shards", type=int, default=0, help="measure a LossLedger on a local Ray, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in arguments.sizes:
        repeats = 1 if size >= _ONCE_FROM else arguments.repeats
        rows.append(measure(size, repeats))
        if arguments.cluster_shards:
            rows[-1]["ledger"] = measure_ledger(size, arguments.cluster_shards, repeats)
    report = {"benchmark": "ledger", "batch": _BATCH, "machine": machine.describe(), "sizes": rows}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(size: int, repeats: int) -> dict[str, Any]:
    """One size: memory, draws and updates of the table, and the peers' draws, all of _BATCH ids."""
    rng = np.random.default_rng(0)
    ids, losses = rng.integers(size, size=_BATCH), rng.random(_BATCH, dtype=np.float32)
    tracemalloc.start()
    table = LossTable(size)
    fill(table, size, rng)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    table.draw(_BATCH, rng)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    draws = _per_second(lambda: table.draw(_BATCH, rng), repeats)
    row: dict[str, Any] = {
        "patches": size,
        "bytes_per_patch": table.nbytes / size,
        "draw_temporary_bytes": peak,
        "draws_per_second": draws,
        "updates_per_second": _per_second(lambda: table.update(ids, losses), repeats),
    }
    weights = table.losses
    peers: dict[str, Callable[[], object]] = {
        "numpy.Generator.choice": lambda: _numpy_choice(weights, rng),
        "torch.multinomial": lambda: torch.multinomial(torch.tensor(weights), _BATCH, replacement=True),
    }
    row["peers"] = {
        name: {"draws_per_second": None, "note": "cannot: it takes at most 2^24 categories"}
        if name.startswith("torch") and size > TORCH_LIMIT
        else _against(draws, _per_second(peer, repeats))
        for name, peer in peers.items()
    }
    return row


def measure_ledger(size: int, shards: int, repeats: int) -> dict[str, Any]:
    """Draws and updates of the table through its facade, on actors of a local Ray."""
    import ray

    from ma_cluster.cluster.training.ledger import LossLedger

    if not ray.is_initialized():
        ray.init(
            address="local", _node_ip_address="127.0.0.1", num_cpus=2, include_dashboard=False, log_to_driver=False
        )
    rng = np.random.default_rng(0)
    ids, losses = rng.integers(size, size=_BATCH), rng.random(_BATCH, dtype=np.float32)
    ledger = LossLedger.create(size, shards=shards)
    fill(ledger, size, rng)
    row = {
        "shards": shards,
        "draws_per_second": _per_second(lambda: ledger.draw(_BATCH, 0, 0), repeats),
        "updates_per_second": _per_second(lambda: ledger.update(ids, losses), repeats),
    }
    ledger.close()
    return row


def fill(table: Any, size: int, rng: np.random.Generator) -> None:
    """A loss for every patch."""
    for start in range(0, size, _BATCH):
        part = np.arange(start, min(start + _BATCH, size))
        table.update(part, rng.gamma(0.5, size=len(part)).astype(np.float32))


def _numpy_choice(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    p = weights.astype(np.float64)
    p /= p.sum()
    return rng.choice(len(p), size=_BATCH, p=p)


def _against(draws: float, peer_draws: float) -> dict[str, float]:
    return {"draws_per_second": peer_draws, "table_over_peer": draws / peer_draws}


def _per_second(call: Callable[[], object], repeats: int) -> float:
    """Ids a second, the best of some calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return _BATCH / min(seconds)


if __name__ == "__main__":
    main()
