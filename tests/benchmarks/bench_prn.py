"""How fast the PRN covers regions in shared computation, beside patch by patch: `bench_prn.py --out FILE.json`.

Both ways run the `lite` network over the same regions of the same real photograph, in this one run, each in a process
of its own, whose memory is measured. The regions are the darkest of its pixels, as lesions and vessels are. Differences
are the price of what patches see: zeros around them patch by patch, the photograph in shared computation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage.data
import torch
from machine import machine

from ma_cluster.bundle import load_bundle, load_weights
from ma_cluster.images.contrast import prepare
from ma_cluster.images.fundus import locate, read_fundus
from ma_cluster.refinement.dense import DensePrn, refine_dense
from ma_cluster.refinement.fitting import build_prn
from ma_cluster.refinement.patchwise import lattice_nodes, refine


def main() -> None:
    """Measure each stride and size of region, print a line for each, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photograph", type=Path, help="else one of IDRiD's, where it is, or scikit-image's retina")
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05], help="of the pixels, in the regions")
    parser.add_argument("--side", type=int, default=512, help="of the part of the 0.5x grid that is looked at, pixels")
    arguments = parser.parse_args()
    name, enhanced = photograph(arguments.photograph, arguments.side)
    rows = []
    for stride in arguments.strides:
        for share in arguments.shares:
            rows.append(measure(enhanced, darkest(enhanced, share), stride))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
    report = {
        "benchmark": "prn",
        "photograph": name,
        "side_px": arguments.side,
        "machine": machine("numpy", "torch"),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def photograph(path: Path | None, side: int) -> tuple[str, np.ndarray]:
    """Name, and the middle of the enhanced 0.5x grid."""
    config = load_bundle("lite").recipe.image
    idrid = Path(os.environ.get("MA_CLUSTER_IDRID", Path(__file__).parents[3] / "shared" / "idrid"))
    path = path or next(iter(sorted(idrid.glob("A. Segmentation/1. Original Images/*/*.jpg"))), None)
    fundus = read_fundus(path.read_bytes(), config) if path else locate(skimage.data.retina(), config)
    enhanced = prepare(fundus, config).enhanced_half
    top, left = (max(0, length - side) // 2 for length in enhanced.shape[:2])
    return path.name if path else "skimage.data.retina", enhanced[top : top + side, left : left + side]


def darkest(enhanced: np.ndarray, share: float) -> np.ndarray:
    """The share of the pixels that is darkest in green, smoothed: blobs, as regions of interest are."""
    green = cv2.GaussianBlur(enhanced[:, :, 1].astype(np.float32), (0, 0), 3)
    return green < np.quantile(green, share)


def measure(enhanced: np.ndarray, roi: np.ndarray, stride: int) -> dict[str, Any]:
    """Both ways over the same region."""
    dense, shared = alone("dense", enhanced, roi, stride)
    patchwise, reference = alone("patchwise", enhanced, roi, stride)
    difference = np.abs(shared - reference)[roi]
    return {
        "stride_px": stride,
        "roi_px": int(roi.sum()),
        "nodes": int(lattice_nodes(roi, stride).sum()),
        "dense": dense,
        "patchwise": patchwise,
        "speed_up": round(patchwise["seconds"] / dense["seconds"], 2),
        "largest_difference": round(float(difference.max()), 4),
        "mean_difference": round(float(difference.mean()), 4),
    }


def alone(way: str, enhanced: np.ndarray, roi: np.ndarray, stride: int) -> tuple[dict[str, float], np.ndarray]:
    """Seconds, memory and answer of one way in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, way, enhanced, roi, stride).result()


def run(way: str, enhanced: np.ndarray, roi: np.ndarray, stride: int) -> tuple[dict[str, float], np.ndarray]:
    """The same in this process, on one thread. The network is loaded, and copied, before the clock starts."""
    torch.set_num_threads(1)
    bundle = load_bundle("lite")
    model, patch_px = build_prn(bundle.recipe.prn), bundle.recipe.prn.patch_px
    load_weights(model, bundle.weights["prn"], "prn")
    model.eval().to(memory_format=torch.channels_last)
    shared = DensePrn(model, patch_px, stride)
    before, began = _forget_peak(), time.perf_counter()
    answer = refine_dense(shared, enhanced, roi) if way == "dense" else refine(model, enhanced, roi, patch_px, stride)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "peak_mb": round(_peak_mb() - before)}, answer


def _forget_peak() -> float:
    """Set this process's record of its largest memory to what it has now, and return that, MB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def _peak_mb() -> float:
    """Largest resident memory of this process, MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024  # in KB


if __name__ == "__main__":
    main()
