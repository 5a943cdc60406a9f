"""What the falsely called pixels of a photograph lie on: where a better model has something to gain.

IDRiD outlines the other lesions and the optic disc; rims and the edge follow from what is known; vessels are found
here, roughly.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from ma_cluster.hypotheses.maps import grown, upsample_half
from ma_cluster.images.reading import Prepared

_RIM_PX, _EDGE_PX = 8, 40  # on the 1x grid: about a microaneurysm's radius, a hundredth of the field of view
_OUTLINED = {"HE": "haemorrhage", "EX": "hard_exudate", "SE": "soft_exudate", "OD": "optic_disc"}
PLACES = ("rim", *_OUTLINED.values(), "edge", "vessel", "nothing")
"""What a pixel may lie on, of which the first counts: within a radius of an annotated microaneurysm, ..., within a
hundredth of the field of view from its edge, on a vessel, on nothing that is known."""
_NARROW_PX, _DARKER, _VESSEL_PX = 15, 9, 900  # on the 0.5x grid: width of most, grey levels of 255, least area


def false_pixels(
    called: Bool[ndarray, "h w"],
    truth: Bool[ndarray, "h w"],
    outlined: Mapping[str, Bool[ndarray, "h w"]],
    prepared: Prepared,
) -> dict[str, int]:
    """How many falsely called pixels lie on what, by name; all masks are on the photograph's own grid.

    Args:
        called: what is called a microaneurysm.
        truth: what is one.
        outlined: what else is outlined, by kind; see `kind_of`.
        prepared: the photograph.
    """
    grid, shape = prepared.grid, prepared.shape
    nowhere = np.zeros(shape, dtype=bool)
    inside = grid.uncrop(prepared.fov_1x.astype(np.uint8), shape) > 0
    vessel = upsample_half(vessels(prepared.enhanced_half).astype(np.float32), prepared.fov_1x.shape)
    masks = [
        grown(truth, round(_RIM_PX / grid.scale)),
        *(outlined.get(kind, nowhere) for kind in _OUTLINED),
        grown(~inside, round(_EDGE_PX / grid.scale)),
        grid.uncrop(vessel, shape) >= 0.5,
        ~nowhere,
    ]
    left, counts = called & ~truth, {}
    for place, mask in zip(PLACES, masks, strict=True):
        counts[place] = int((left & mask).sum())
        left &= ~mask
    return counts


def vessels(enhanced: UInt8[ndarray, "h w 3"]) -> Bool[ndarray, "h w"]:
    """Roughly where vessels are: narrow, darker than what is around, connected; on the enhanced 0.5x photograph."""
    green = np.ascontiguousarray(enhanced[..., 1])
    smooth, around = cv2.GaussianBlur(green, (0, 0), _NARROW_PX / 5), cv2.medianBlur(green, 4 * _NARROW_PX + 1)
    dark = (cv2.subtract(around, smooth) > _DARKER).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(dark, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= _VESSEL_PX
    large[0] = False
    return large[labels]
