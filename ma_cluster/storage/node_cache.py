"""What this node keeps of stores: files that are fetched once, under a lock, and judged whenever they are read."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from ma_cluster.errors import StoreError
from ma_cluster.storage.local import LocalStore


def cache_folder() -> Path:
    """MA_CLUSTER_CACHE, else where a user's caches are by custom."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MA_CLUSTER_CACHE") or f"{home}/ma_cluster").expanduser()


def kept(path: Path, right: Callable[[bytes], bool], fetch: Callable[[], bytes]) -> bytes:
    """The bytes of a file of the cache; where it is not there, or not right any more, it is fetched and kept.

    Of several processes that ask at once one fetches, the others wait for it. What is fetched and not right is returned
    but not kept: the caller knows what to say of it.

    Raises:
        StoreError: the cache cannot be written.
    """
    store = LocalStore(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file() and right(data := path.read_bytes()):
                return data
            data = fetch()
            if right(data):
                store.put(path.name, data)
            return data
    except OSError as error:
        raise StoreError(
            f"the cache of fetched models cannot be used: {error.strerror}; set MA_CLUSTER_CACHE to another folder"
        ) from error
