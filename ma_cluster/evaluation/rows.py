"""The rows of the paper's Table 2: a photograph's maps by network -> the probability map of each row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from ma_cluster.hypotheses.fusion import fuse
from ma_cluster.images.contrast import Prepared
from ma_cluster.lesions.detector import Map, Maps

ROWS: dict[str, Callable[[Maps], Map]] = {
    "hgn_1x": lambda maps: maps.hgn_1x,
    "hgn_half": lambda maps: maps.hgn_half,
    "hgn_geometric": lambda maps: fuse([maps.hgn_1x, maps.hgn_half], "geometric"),
    "hgn_arithmetic": lambda maps: fuse([maps.hgn_1x, maps.hgn_half], "arithmetic"),
    "cls_geometric": lambda maps: fuse(maps.stack(), "geometric"),
    "cls_arithmetic": lambda maps: fuse(maps.stack(), "arithmetic"),
    "prn_arithmetic": lambda maps: fuse(maps.stack(), "arithmetic"),
    "prn_geometric": lambda maps: fuse(maps.stack(), "geometric"),
}
"""In the paper's order, each as a fusion of the maps that its network completes."""


def network_of(row: str) -> str:
    """The network whose maps a row is made of: hgn, which every bundle has, prn or cls."""
    return row.partition("_")[0]


def rows_given(networks: Collection[str]) -> list[str]:
    """The rows that a bundle of these networks gives, in the paper's order."""
    return [row for row in ROWS if network_of(row) in {"hgn", *networks}]


def row_map(row: str, maps: Mapping[str, Maps], prepared: Prepared) -> Map:
    """A row's map on the photograph's own grid, 0..1.

    Args:
        row: its name.
        maps: of the photograph, by network.
        prepared: the photograph.
    """
    own = prepared.grid.uncrop(ROWS[row](maps[network_of(row)]), prepared.shape)
    return np.clip(own, 0, 1)
