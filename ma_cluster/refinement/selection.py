"""Selective sampling: which healthy patches to train on (van Grinsven et al., IEEE TMI 35(5), 2016; Sarhan et al.).

P(i) is proportional to max(loss_i, floor); draws are with replacement and a pure function of (losses, count, rng).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

FLOOR = 1e-6
"""No patch is ever excluded."""


def draw_by_loss(losses: Float32[ndarray, "n"], count: int, rng: np.random.Generator) -> Int64[ndarray, "count"]:
    """Indices drawn with replacement, P(i) ~ max(loss_i, FLOOR)."""
    cumulative = np.cumsum(np.maximum(losses, FLOOR), dtype=np.float64)
    return np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right").astype(np.int64)
