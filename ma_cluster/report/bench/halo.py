"""How far a tiled answer lies from the whole photograph's, and what is computed for it, against the halo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ma_cluster.hypotheses.probability import probability_map
from ma_cluster.images.patches import Tiling
from ma_cluster.report.bench.subject import Subject, hypothesis_network

HALOS_PX = (0, 16, 32, 48, 64, 80, 96)
WHOLE_PX, KEPT_PX = 1024, 256
"""Side of the part of the 0.5x grid that is looked at whole, and of the kept parts it is cut into: many seams."""


def halo(subject: Subject) -> Iterator[dict[str, Any]]:
    """Differences in probability at 0.5x; and megapixels that the model's tiles would have over those of the FOV."""
    torch.set_num_threads(subject.threads)
    bundle = subject.bundle(flips_half=1)
    prepared = subject.photograph().prepared(bundle.recipe.image)
    network = hypothesis_network(bundle, "hgn_half", subject.device, folded=True)
    middle = tuple(slice(max(0, side - WHOLE_PX) // 2, (side + WHOLE_PX) // 2) for side in prepared.fov_half.shape)
    enhanced, fov = prepared.enhanced_half[middle], prepared.fov_half[middle]
    (height, width), full = fov.shape, prepared.fov_1x.shape
    whole = probability_map(network, enhanced, np.ones_like(fov), Tiling(height, width, WHOLE_PX, 0))
    for halo_px in HALOS_PX:
        tiled = probability_map(network, enhanced, fov, Tiling(height, width, KEPT_PX + 2 * halo_px, halo_px))
        off = np.abs(tiled - whole)[fov]
        tiling = Tiling(full[0], full[1], max(bundle.recipe.detector.tile_px, 2 * halo_px + 16), halo_px)
        computed = sum(window.shape[0] * window.shape[1] for window in tiling.covering(prepared.fov_1x))
        yield {
            "halo_px": halo_px,
            "mean_difference": float(f"{off.mean():.2g}"),
            "quantile_0.999": float(f"{np.quantile(off, 0.999):.2g}"),
            "largest": float(f"{off.max():.2g}"),
            "computed_over_fov_at_1x": round(computed / int(prepared.fov_1x.sum()), 2),
        }
