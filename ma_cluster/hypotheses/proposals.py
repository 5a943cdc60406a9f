"""Where a hypothesis network suspects lesions, rightly or not: on such places training learns most.

There the refinement will be asked. Of healthy places at large few look like a lesion, and those it would hardly meet.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from ma_cluster.bundle import load_weights
from ma_cluster.checkpoint import checkpoint_weights, read_checkpoint
from ma_cluster.config import Recipe
from ma_cluster.hypotheses.fusion import upsample_half
from ma_cluster.hypotheses.probability import probability_map
from ma_cluster.hypotheses.step import build_hgn, of_first_kind
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.patches import Tiling
from ma_cluster.networks.folding import fold


class Proposals:
    """The 0.5x hypothesis network as one who points at places: a quarter of the cost of 1x, and as good."""

    def __init__(self, checkpoint: str, recipe: Recipe) -> None:
        """`checkpoint` is the URL of one that the training of `hgn_half` has written.

        Raises:
            UsageError: there is none.
            BundleError: it is of another network.
        """
        self._network = build_hgn(recipe.hgn_half)
        weights = of_first_kind(checkpoint_weights(read_checkpoint(checkpoint), "hgn_half"))
        load_weights(self._network, weights, "hgn_half")
        fold(self._network.eval())
        self._recipe = recipe

    def __call__(self, prepared: Prepared) -> Bool[ndarray, "ch cw"]:
        """Pixels at 1x with a lesion's probability of `prn.proposal_probability` or more."""
        detector, fov = self._recipe.detector, prepared.fov_half
        tiling = Tiling(fov.shape[0], fov.shape[1], detector.tile_px, detector.halo_px)
        probability = probability_map(self._network, prepared.enhanced_half, fov, tiling)
        likely = upsample_half(probability, prepared.fov_1x.shape) >= np.float32(self._recipe.prn.proposal_probability)
        return likely & prepared.fov_1x
