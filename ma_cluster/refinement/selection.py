"""Selective sampling: which healthy patches to train on (van Grinsven et al., IEEE TMI 35(5), 2016; Sarhan et al.).

P(i) is proportional to max(loss_i, FLOOR); draws are with replacement and a pure function of (losses, count, rng). What
is kept as a patch's loss is its `probability_of_error`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64
from numpy import ndarray

FLOOR = 1e-6
"""No patch is ever excluded."""
BLOCK = 1024
"""Patches whose sum is the unit of `share_out`: a table may be cut between blocks without changing a draw."""
UNIFORMS_PER_DRAW = 2
"""Numbers that `LossTable.place` takes from its generator for each draw."""
_FAN = 32  # patches in a group, groups in a block: 4.26 bytes a patch, and a draw looks at 64 numbers
_CHUNK = 8192  # draws or groups at a time, so that temporary arrays fit the processor's cache


def probability_of_error(cross_entropy: Float[ndarray, "n"]) -> Float[ndarray, "n"]:
    """What is kept of a patch as its loss: 1 - p of its own class, of a healthy patch the probability of a lesion.

    Van Grinsven et al. draw by the difference of label and probability. Unlike the cross entropy -ln p it ends at 1, so
    that a few patches with a wrong label, whose cross entropy has no bound, cannot take most of the draws.
    """
    return 1 - np.exp(-cross_entropy)


class LossTable:
    """The losses of patches 0 .. size - 1, one float32 each, under a small index of sums; uniform at first.

        losses       | 32 patches | 32 patches | ...                             float32
        group sums   |     1      |     1      | ... 32 groups |                 float64
        block sums   |                   1                     | ...             float64

    A draw goes down the index: block, group, patch. Sums are always taken afresh from what lies below, never adjusted,
    so the table is a function of its losses alone, whatever the order in which they came.
    """

    def __init__(self, size: int, initial: float = 1.0) -> None:
        """Every patch has the loss `initial`: all are equally likely.

        Raises:
            ValueError: the table would be empty, or `initial` is no loss.
        """
        if size < 1 or not FLOOR <= initial < np.inf:
            raise ValueError(f"a loss table needs at least one patch and a finite first loss of {FLOOR} or more")
        blocks = -(-size // BLOCK)
        self.size = size
        self._losses = np.zeros(blocks * BLOCK, np.float32)  # past the last patch 0: never drawn
        self._losses[:size] = initial
        self._group_sums = np.empty(blocks * BLOCK // _FAN, np.float64)
        self._block_sums = np.empty(blocks, np.float64)
        _sum_groups(self._losses, self._group_sums, np.arange(len(self._group_sums)))
        _sum_groups(self._group_sums, self._block_sums, np.arange(blocks))

    @property
    def nbytes(self) -> int:
        """Memory of the losses and their index, bytes."""
        return self._losses.nbytes + self._group_sums.nbytes + self._block_sums.nbytes

    @property
    def losses(self) -> Float32[ndarray, "size"]:
        """max(loss, FLOOR) of each patch: a view, to be read only."""
        view = self._losses[: self.size]
        view.flags.writeable = False
        return view

    @property
    def block_sums(self) -> Float64[ndarray, "blocks"]:
        """Sum of max(loss, FLOOR) over each BLOCK patches: a copy."""
        return self._block_sums.copy()

    @property
    def total(self) -> float:
        """Sum of max(loss, FLOOR) over all patches."""
        return float(self._block_sums.sum())

    @property
    def mean(self) -> float:
        """Mean of max(loss, FLOOR) over all patches."""
        return self.total / self.size

    def update(self, ids: Int[ndarray, "n"], losses: Float[ndarray, "n"]) -> None:
        """Set the losses of patches. Where an id comes twice, its last loss counts.

        Raises:
            ValueError: an id or a loss that cannot be; the table is then as it was.
        """
        self._losses[ids] = np.maximum(checked_losses(ids, losses, self.size), FLOOR)
        groups = _distinct(ids // _FAN, len(self._group_sums))
        _sum_groups(self._losses, self._group_sums, groups)
        _sum_groups(self._group_sums, self._block_sums, _distinct(groups // _FAN, len(self._block_sums)))

    def highest(self, count: int, besides: float) -> tuple[Int64[ndarray, "n"], Float32[ndarray, "n"]]:
        """Ids and losses of the costliest patches, the costliest first, equal ones by their ids; at most `count`.

        Patches whose loss is exactly `besides`, which is the one that all begin with, are left out: nothing is known
        of them.
        """
        unknown = np.float32(max(besides, FLOOR))
        kept, least = np.empty(0, np.int64), np.float32(-1)
        for start in range(0, self.size, _CHUNK):
            part = self.losses[start : start + _CHUNK]
            kept = np.concatenate([kept, start + np.flatnonzero((part != unknown) & (part > least))])
            kept = kept[np.argsort(-self._losses[kept], kind="stable")[:count]]
            if 0 < count == len(kept):
                least = self._losses[kept[-1]]  # of equal ones the earlier stays
        return kept, self._losses[kept]

    def draw(self, count: int, rng: np.random.Generator) -> Int64[ndarray, "count"]:
        """Ids drawn with replacement, P(i) ~ max(loss_i, FLOOR).

        Raises:
            ValueError: `count` is negative.
        """
        return rng.permutation(self.place(share_out(self._block_sums, count, rng), rng))

    def place(self, counts: Int64[ndarray, "blocks"], rng: np.random.Generator) -> Int64[ndarray, "n"]:
        """Ids of draws whose blocks are settled: `counts[b]` from block b, in the order of the blocks.

        Takes UNIFORMS_PER_DRAW numbers from `rng` for each draw, one draw after the other: whoever skips those of the
        blocks before may ask for a part of the blocks and gets what the whole would have given there.
        """
        ends = np.cumsum(counts)
        ids = np.empty(int(ends[-1]), np.int64)
        for start in range(0, len(ids), _CHUNK):
            stop = min(start + _CHUNK, len(ids))
            uniforms = rng.random((stop - start, UNIFORMS_PER_DRAW))
            block = np.searchsorted(ends, np.arange(start, stop), side="right")
            group = block * _FAN + _pick(self._group_sums.reshape(-1, _FAN)[block], uniforms[:, 0])
            ids[start:stop] = group * _FAN + _pick(self._losses.reshape(-1, _FAN)[group], uniforms[:, 1])
        return ids


def share_out(sums: Float64[ndarray, "b"], count: int, rng: np.random.Generator) -> Int64[ndarray, "b"]:
    """How many of `count` draws fall to each block: multinomial, P(b) ~ sums[b]. Takes `count` numbers from `rng`.

        sums     1   2   1         edges    .25   .75   1
        numbers  .1 .3 .6 .9       counts     1     2   1

    Raises:
        ValueError: `count` is negative.
    """
    edges = np.cumsum(sums)
    edges /= edges[-1]
    below = np.searchsorted(np.sort(rng.random(count)), edges, side="left")
    return np.diff(below, prepend=0)


def checked_losses(ids: Int[ndarray, "n"], losses: Float[ndarray, "n"], size: int) -> Float32[ndarray, "n"]:
    """The losses of a batch in the precision that is kept.

    Raises:
        ValueError: a loss is NaN, infinite or negative, an id is not in 0 .. size - 1, or their numbers differ.
    """
    if ids.shape != losses.shape or ids.ndim != 1:
        raise ValueError(f"ids {ids.shape} and losses {losses.shape} must be rows of one length")
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:
        raise ValueError(f"ids {ids.min()} to {ids.max()} do not lie in 0 to {size - 1}; they belong to another pool")
    with np.errstate(over="ignore"):
        kept = losses.astype(np.float32, copy=False)
    bad = ~((kept >= 0) & np.isfinite(kept))
    if bad.any():
        raise ValueError(
            f"{np.count_nonzero(bad)} of {len(kept)} losses are NaN, infinite or negative, the first for patch "
            f"{ids[bad.argmax()]}; the network that gave them has diverged"
        )
    return kept


def _pick(weights: Float[ndarray, "n fan"], uniforms: Float64[ndarray, "n"]) -> Int64[ndarray, "n"]:
    """In each row a column, P(column) ~ weight; never one of weight 0.

    weights  2 1 1 0    running  2 3 4 4    uniform .6 -> target 2.4 -> the first running sum above it: column 1
    """
    running = np.empty((weights.shape[1], len(weights)))
    running[0] = weights[:, 0]
    for column in range(1, len(running)):  # all rows at once: twice as fast as a cumsum along each
        np.add(running[column - 1], weights[:, column], out=running[column])
    # the product may round up to the whole sum, above which no running sum lies
    targets = np.minimum(uniforms * running[-1], np.nextafter(running[-1], 0))
    return np.count_nonzero(running <= targets, axis=0)


def _sum_groups(parts: Float[ndarray, "n"], sums: Float64[ndarray, "m"], which: Int64[ndarray, "w"]) -> None:
    """Take some of the sums afresh, each over _FAN parts."""
    groups = parts.reshape(-1, _FAN)
    for start in range(0, len(which), _CHUNK):
        some = which[start : start + _CHUNK]
        sums[some] = groups[some].astype(np.float64).sum(axis=1)


def _distinct(numbers: Int[ndarray, "n"], end: int) -> Int64[ndarray, "m"]:
    """Each of the numbers once, ascending; all lie in 0 .. end - 1. Far faster than np.unique on a million."""
    present = np.zeros(end, np.bool_)
    present[numbers] = True
    return np.flatnonzero(present)
