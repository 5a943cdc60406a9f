"""The loss ledger: what every patch of a pool last got wrong, the draws that follow, and its snapshots.

`LocalLedger` keeps it in this process; cluster/training/ledger.py in actors. Both answer alike, to the bit. A snapshot
is safetensors files of at most 16 MiB, and a manifest that is written last:

    ledger.json                          format, size; of each file its ids and sha256
    a/losses-000000000000.safetensors    float32 losses of the patches from 0 on
    b/...                                the snapshot before, or the one being written

Files are cut by id, not by shard, so a ledger of any number of shards can read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from numpy import ndarray

from ma_cluster.errors import LedgerLostError, ObjectMissingError
from ma_cluster.refinement.selection import LossTable
from ma_cluster.storage.store import Store, open_store

FORMAT = "ma_cluster.ledger/1"
PART = 4 * 2**20
"""Most patches in one file: 16 MiB."""
_MANIFEST = "ledger.json"


@runtime_checkable
class Ledger(Protocol):
    """One loss for each patch 0 .. size - 1 of a pool."""

    def update(self, ids: Int[ndarray, "n"], losses: Float[ndarray, "n"]) -> None:
        """Set the losses of patches; where an id comes twice, its last loss counts.

        Raises:
            ValueError: an id is not of this pool, or a loss is NaN, infinite or negative; nothing has then changed.
        """

    def draw(self, count: int, epoch: int, seed: int) -> Int64[ndarray, "count"]:
        """Ids drawn with replacement, P(i) ~ max(loss_i, FLOOR): a pure function of (losses, count, epoch, seed).

        Raises:
            ValueError: count, epoch or seed is negative.
        """

    def highest(self, count: int, besides: float) -> tuple[Int64[ndarray, "n"], Float32[ndarray, "n"]]:
        """Ids and losses as `LossTable.highest` has them."""

    def loss_mean(self) -> float:
        """Mean of max(loss, FLOOR) over the pool."""

    def snapshot(self, url: str) -> None:
        """Write all losses under a URL, the manifest last: what was there before stays valid until then.

        Raises:
            StoreError: the store refuses the writes.
        """

    def restore(self, url: str) -> None:
        """Take all losses from a snapshot of a pool of this size, whoever made it.

        Raises:
            LedgerLostError: there is none, or it is damaged or of another pool.
        """


class LocalLedger:
    """A `Ledger` in this process."""

    def __init__(self, size: int, initial: float) -> None:
        """`initial`: the loss of every patch at first."""
        self._table = LossTable(size, initial)

    def update(self, ids: Int[ndarray, "n"], losses: Float[ndarray, "n"]) -> None:
        self._table.update(ids, losses)

    def draw(self, count: int, epoch: int, seed: int) -> Int64[ndarray, "count"]:
        return self._table.draw(count, np.random.default_rng([seed, epoch]))

    def highest(self, count: int, besides: float) -> tuple[Int64[ndarray, "n"], Float32[ndarray, "n"]]:
        return self._table.highest(count, besides)

    def loss_mean(self) -> float:
        return self._table.mean

    def snapshot(self, url: str) -> None:
        store = open_store(url)
        write_manifest(store, write_table(store, free_folder(store), self._table, 0))

    def restore(self, url: str) -> None:
        store = open_store(url)
        self._table = read_table(store, read_manifest(store, self._table.size), 0, self._table.size)


@dataclass(frozen=True, slots=True)
class Part:
    """One file: the losses of `count` patches from `first` on."""

    key: str
    first: int
    count: int
    sha256: str


def free_folder(store: Store) -> str:
    """The folder to write into: the one that the manifest in force, if any, does not name."""
    try:
        used = json.loads(store.get(_MANIFEST))["parts"][0]["key"]
    except (ObjectMissingError, ValueError, TypeError, KeyError, IndexError):
        return "a"
    return "b" if str(used).startswith("a/") else "a"


def write_table(store: Store, folder: str, table: LossTable, first: int) -> list[Part]:
    """Write the losses of a table whose first patch has the id `first`."""
    losses = table.losses
    return [
        _write_part(store, folder, first + start, losses[start : start + PART]) for start in range(0, table.size, PART)
    ]


def read_table(store: Store, parts: Sequence[Part], first: int, size: int) -> LossTable:
    """The losses of the patches from `first` on, of a snapshot's files.

    Raises:
        LedgerLostError: a file is gone or damaged.
    """
    table = LossTable(size)
    for part in parts:
        start, stop = max(part.first, first), min(part.first + part.count, first + size)
        if start < stop:
            losses = _read_part(store, part)[start - part.first : stop - part.first]
            table.update(np.arange(start - first, stop - first), losses)
    return table


def _write_part(store: Store, folder: str, first: int, losses: Float32[ndarray, "n"]) -> Part:
    from safetensors.numpy import save

    data = save({"losses": losses})
    key = f"{folder}/losses-{first:012d}.safetensors"
    store.put(key, data)
    return Part(key, first, len(losses), hashlib.sha256(data).hexdigest())


def write_manifest(store: Store, parts: Sequence[Part]) -> None:
    """Put a snapshot in force whose files are all written."""
    size = sum(part.count for part in parts)
    manifest = {"format": FORMAT, "size": size, "parts": [asdict(part) for part in parts]}
    store.put(_MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(store: Store, size: int | None = None) -> list[Part]:
    """The files of the snapshot in force, in the order of their ids.

    Raises:
        LedgerLostError: there is no snapshot of `size` patches, or of any where it is None, or its manifest is damaged.
    """
    try:
        manifest = json.loads(store.get(_MANIFEST))
        parts = sorted((Part(**part) for part in manifest["parts"]), key=lambda part: part.first)
        ends = [0, *(part.first + part.count for part in parts)]
    except ObjectMissingError as error:
        raise LedgerLostError("there is no snapshot of the ledger at the URL; check it, or begin anew") from error
    except (ValueError, TypeError, KeyError) as error:
        raise LedgerLostError("the manifest of the ledger's snapshot is damaged; use another snapshot") from error
    size = ends[-1] if size is None else size
    if manifest.get("format") != FORMAT or ends != [*(part.first for part in parts), size]:
        raise LedgerLostError(
            f"the snapshot ({manifest.get('format')}) holds {ends[-1]} patches, not the {size} of this ledger "
            f"({FORMAT}); use one of the same pool"
        )
    return parts


def _read_part(store: Store, part: Part) -> Float32[ndarray, "n"]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = store.get(part.key)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise LedgerLostError("a file of the ledger's snapshot is not what its manifest says; use another snapshot")
        losses = load(data)["losses"]
    except ObjectMissingError as error:
        raise LedgerLostError("a file of the ledger's snapshot is gone; use another snapshot") from error
    except (SafetensorError, KeyError) as error:
        raise LedgerLostError("a file of the ledger's snapshot holds no losses; use another snapshot") from error
    if losses.dtype != np.float32 or losses.shape != (part.count,):
        raise LedgerLostError("a file of the ledger's snapshot holds other patches than its manifest says")
    return losses
