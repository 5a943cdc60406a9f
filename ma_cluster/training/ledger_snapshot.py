"""The loss ledger on disk: safetensors files of at most 16 MiB, and a manifest that is written last.

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

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ma_cluster.errors import LedgerLostError, ObjectMissingError
from ma_cluster.storage.store import Store

FORMAT = "ma_cluster.ledger/1"
PART = 4 * 2**20
"""Most patches in one file: 16 MiB."""
_MANIFEST = "ledger.json"


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


def write_part(store: Store, folder: str, first: int, losses: Float32[ndarray, "n"]) -> Part:
    """Write the losses of the patches from `first` on."""
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


def read_manifest(store: Store, size: int) -> list[Part]:
    """The files of the snapshot in force, in the order of their ids.

    Raises:
        LedgerLostError: there is no snapshot of `size` patches, or its manifest is damaged.
    """
    try:
        manifest = json.loads(store.get(_MANIFEST))
        parts = sorted((Part(**part) for part in manifest["parts"]), key=lambda part: part.first)
        ends = [0, *(part.first + part.count for part in parts)]
    except ObjectMissingError as error:
        raise LedgerLostError("there is no snapshot of the ledger at the URL; check it, or begin anew") from error
    except (ValueError, TypeError, KeyError) as error:
        raise LedgerLostError("the manifest of the ledger's snapshot is damaged; use another snapshot") from error
    if manifest.get("format") != FORMAT or ends != [*(part.first for part in parts), size]:
        raise LedgerLostError(
            f"the snapshot ({manifest.get('format')}) holds {ends[-1]} patches, not the {size} of this ledger "
            f"({FORMAT}); use one of the same pool"
        )
    return parts


def read_part(store: Store, part: Part) -> Float32[ndarray, "n"]:
    """The losses of one file.

    Raises:
        LedgerLostError: it is gone or damaged.
    """
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
