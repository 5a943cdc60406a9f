"""The loss ledger: the last loss of every healthy patch, kept across a cluster, and the draws that follow from it.

    ids       0 .......... 4095 | 4096 ......... 8191 | 8192 .. size - 1
    actors         _Shard               _Shard              _Shard          each with a LossTable of its ids
    facade    LossLedger: update, draw, snapshot, restore; may be handed to any task, actor or Train worker

The shards meet at borders of BLOCK patches and share one stream of random numbers, so the draws of a ledger are those
of one `LossTable`, to the bit, whatever the number of shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray
from jaxtyping import Float, Float32, Float64, Int, Int64
from numpy import ndarray
from ray.actor import ActorHandle
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError

from ma_cluster import metrics
from ma_cluster.cluster import recording
from ma_cluster.cluster.connection import answer
from ma_cluster.errors import LedgerLostError
from ma_cluster.refinement.selection import BLOCK, UNIFORMS_PER_DRAW, LossTable, checked_losses, share_out
from ma_cluster.storage.store import open_store
from ma_cluster.training.ledger import Part, free_folder, read_manifest, read_table, write_manifest, write_table


class LossLedger:
    """A `Ledger` in actors that live as long as the creating process.

    Every method raises LedgerLostError when the losses of a shard are gone because its actor died. An update returns
    when all shards have it; one that runs beside a draw or a snapshot may count there wholly, in part or not at all.
    """

    def __init__(self, size: int, shards: Sequence[ActorHandle[Any]], bounds: Sequence[int]) -> None:
        self.size = size
        self._shards, self._bounds = tuple(shards), tuple(bounds)

    @classmethod
    def create(cls, size: int, *, shards: int = 1, initial: float = 1.0) -> LossLedger:
        """A ledger in which all patches are equally likely.

        Args:
            size: number of patches.
            shards: number of actors; fewer where the pool has fewer blocks of BLOCK patches.
            initial: the loss of every patch at first.

        Raises:
            ValueError: size or shards is below 1.
        """
        if size < 1 or shards < 1:
            raise ValueError(f"a ledger needs at least one patch and one shard, not {size} and {shards}")
        bounds = shard_bounds(size, shards)
        actor: Any = ray.remote(_Shard).options(
            num_cpus=0,  # waits most of the time; must find a place even where the Train workers hold every CPU
            scheduling_strategy="SPREAD",
        )
        return cls(size, [actor.remote(first, end, initial) for first, end in pairwise(bounds)], bounds)

    def update(self, ids: Int[ndarray, "n"], losses: Float[ndarray, "n"]) -> None:
        kept = checked_losses(ids, losses, self.size)
        owner = np.searchsorted(self._bounds, ids, side="right") - 1
        mine = [owner == number for number in range(len(self._shards))]
        _answers(
            [
                shard.update.remote(ids[part], kept[part])
                for shard, part in zip(self._shards, mine, strict=True)
                if part.any()
            ]
        )

    def draw(self, count: int, epoch: int, seed: int) -> Int64[ndarray, "count"]:
        """Meant for an epoch's draws at once: each call fetches the sums of all blocks, 0.8 MB for 10^8 patches."""
        bits = np.random.PCG64([seed, epoch])
        counts = share_out(self._block_sums(), count, np.random.Generator(bits))
        places: list[ray.ObjectRef[Any]] = []
        for shard, part in zip(self._shards, self._by_shard(counts), strict=True):
            places.append(shard.place.remote(part, bits))  # sent as it stands here, then moved past that shard's draws
            bits.advance(UNIFORMS_PER_DRAW * int(part.sum()))
        return np.random.Generator(bits).permutation(np.concatenate(_answers(places)))

    def highest(self, count: int, besides: float) -> tuple[Int64[ndarray, "n"], Float32[ndarray, "n"]]:
        found = _answers([shard.highest.remote(count, besides) for shard in self._shards])
        ids, losses = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(-losses, kind="stable")[:count]
        return ids[order], losses[order]

    def loss_mean(self) -> float:
        return float(self._block_sums().sum()) / self.size

    def snapshot(self, url: str) -> None:
        store = open_store(url)
        folder = free_folder(store)
        saved = _answers([shard.save.remote(url, folder) for shard in self._shards])
        write_manifest(store, [part for parts in saved for part in parts])

    def restore(self, url: str) -> None:
        parts = read_manifest(open_store(url), self.size)
        _answers([shard.restore.remote(url, parts) for shard in self._shards])

    def close(self) -> None:
        """Stop the actors; the losses are gone."""
        for shard in self._shards:
            ray.kill(shard)

    def _block_sums(self) -> Float64[ndarray, "blocks"]:
        return np.concatenate(_answers([shard.block_sums.remote() for shard in self._shards]))

    def _by_shard(self, counts: Int64[ndarray, "blocks"]) -> list[Int64[ndarray, "b"]]:
        return np.split(counts, [bound // BLOCK for bound in self._bounds[1:-1]])


def shard_bounds(size: int, shards: int) -> list[int]:
    """Where the id ranges of the shards begin and end, at multiples of BLOCK: 0, ..., size."""
    blocks = -(-size // BLOCK)
    shards = min(shards, blocks)
    return [blocks * number // shards * BLOCK for number in range(shards)] + [size]


class _Shard:
    """The actor: the ids first .. end - 1 of a pool."""

    def __init__(self, first: int, end: int, initial: float) -> None:
        self._first, self._table = first, LossTable(end - first, initial)
        for counter in metrics.LEDGER_COUNTERS:
            recording.begin(counter)
        self._report()

    def update(self, ids: Int[ndarray, "n"], losses: Float[ndarray, "n"]) -> None:
        self._table.update(ids - self._first, losses)
        recording.record(metrics.LEDGER_UPDATES, len(ids))
        self._report()

    def block_sums(self) -> Float64[ndarray, "blocks"]:
        return self._table.block_sums

    def place(self, counts: Int64[ndarray, "blocks"], bits: np.random.PCG64) -> Int64[ndarray, "n"]:
        ids = self._table.place(counts, np.random.Generator(bits))
        recording.record(metrics.LEDGER_DRAWS, len(ids))
        return ids + self._first

    def highest(self, count: int, besides: float) -> tuple[Int64[ndarray, "n"], Float32[ndarray, "n"]]:
        ids, losses = self._table.highest(count, besides)
        return ids + self._first, losses

    def save(self, url: str, folder: str) -> list[Part]:
        for bound in metrics.LEDGER_LOSSES.labels["le"]:
            recording.record(metrics.LEDGER_LOSSES, int(np.count_nonzero(self._table.losses <= float(bound))), le=bound)
        return write_table(open_store(url), folder, self._table, self._first)

    def restore(self, url: str, parts: Sequence[Part]) -> None:
        self._table = read_table(open_store(url), parts, self._first, self._table.size)
        self._report()

    def _report(self) -> None:
        recording.record(metrics.LEDGER_PATCHES, self._table.size)
        recording.record(metrics.LEDGER_LOSS_MEAN, self._table.mean)


def _answers(calls: Sequence[ray.ObjectRef[Any]]) -> list[Any]:
    """Wait for the shards; what they raise on purpose comes through, their death is a LedgerLostError."""
    try:
        answers: list[Any] = answer(list(calls))
        return answers
    except (RayActorError, ObjectLostError, NodeDiedError) as error:
        raise LedgerLostError(
            "an actor of the ledger died and cannot come back; make the ledger anew and restore it from a snapshot"
        ) from error
