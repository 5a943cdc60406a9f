"""Objects under a URL: local folders in local.py, S3 in s3.py, the only module that knows a storage library.

A `Store` is rooted at a prefix; keys are relative to it, always with "/", and are never interpreted: an S3 key may hold
anything a photographer's software has put into it. Listing streams, reading is capped, creating never overwrites.
`kept` has files that this node fetches once.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from ma_cluster.errors import ImageRefusedError, Reason, StoreError, UsageError


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing. With an empty `etag` it is none that could be read: a pipe, a folder that is locked, a
    key that a manifest alone knows. With an `etag` and a size of 0 its size may be unknown.
    """

    key: str
    size: int
    etag: str
    field_degrees: float = 0.0
    no_surround: bool = False
    """The photograph's `KnownField`, where its owner says it."""
    patient: str = ""
    """What results call the patient, where a manifest names one; storage/identity.py."""
    eye: str = ""
    """R or L, where a manifest says it."""
    visit: str = ""
    """When it was taken, YYYY-MM-DD, or another label of the visit, where a manifest says it."""
    fault: str = ""
    """What is wrong with the row of a manifest that names it, in words."""


@runtime_checkable
class Store(Protocol):
    """What both kinds of store do. Every method raises StoreError, or what it names, when the store does not answer."""

    url: str

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose key starts with `prefix`, sorted by key, page by page: memory stays flat."""

    def head(self, key: str) -> Entry:
        """The object as a listing would show it.

        Raises:
            ObjectMissingError: no such key.
        """

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        """The object's bytes.

        Raises:
            ObjectMissingError: no such key.
            ObjectChangedError: `etag` is given and the object has another.
            ImageRefusedError: too_large, where the object has more than `max_bytes`.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write the whole object or nothing; whatever was there is replaced."""

    def create(self, key: str, data: bytes) -> bool:
        """Write the whole object only where there is none; False where there is one already."""

    def move(self, key: str, to: str) -> None:
        """Give the object another key, under which there must be none.

        Raises:
            ObjectMissingError: no such key.
        """


def open_store(url: str | os.PathLike[str], *, private: bool = False) -> Store:
    """The store of a local path, `file://` or `s3://bucket/prefix` URL. Nothing is opened or created yet.

    S3-compatible servers by the standard AWS variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). What is created
    locally in a `private` store is for this user alone; in S3 the bucket's own rules decide.

    Raises:
        UsageError: another scheme, no bucket, or no path.
    """
    from ma_cluster.storage.local import LocalStore  # which stores an `Entry` of this module

    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(Path(text), private=private)
    if scheme == "file":
        if not rest.startswith(("/", "localhost/")):
            raise UsageError("a file:// URL needs an absolute path: file:///folder")
        return LocalStore(Path(unquote(urlsplit(text).path)), private=private)
    if scheme.startswith("dicomweb+"):
        raise UsageError("a DICOMweb server holds photographs, and takes DICOM results; nothing else can be put there")
    if scheme != "s3":
        raise UsageError(
            f"{scheme}:// is not a store this version knows; use a local path, file:// or s3://bucket/prefix"
        )
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError("an s3:// URL needs a bucket: s3://bucket/prefix")
    from ma_cluster.storage.s3 import S3Store  # boto3 takes half a second: not for local runs

    return S3Store(bucket, prefix.strip("/"))


class KeySet:
    """A set of keys in a temporary file, as those of a large archive would fill the memory. Threads may share it."""

    def __init__(self) -> None:
        self._file = temporary_database()
        self._file.execute("create table keys (key blob primary key) without rowid")

    def add(self, key: str) -> bool:
        """False where it was there already. Raises StoreError: the temporary folder is full."""
        with temporary_room():
            return self._file.execute("insert or ignore into keys values (?)", (_stored(key),)).rowcount == 1

    def __contains__(self, key: object) -> bool:
        return self._file.execute("select 1 from keys where key = ?", (_stored(key),)).fetchone() is not None

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


def temporary_database() -> sqlite3.Connection:
    """A database in a temporary file, which goes with it; `temporary_room` says where the file cannot grow."""
    file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    file.execute("pragma journal_mode = off")
    return file


@contextmanager
def temporary_room() -> Iterator[None]:
    """Around what SQLite keeps in a temporary file. Raises StoreError: the file cannot grow."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"the temporary folder is full ({error}): free some space there, or set TMPDIR") from error


def _stored(key: object) -> bytes:
    return str(key).encode("utf-8", "surrogatepass")


def check_bytes(size: int, max_bytes: int | None) -> None:
    """Raises ImageRefusedError: too_large, where an object of so many bytes is larger than allowed."""
    if max_bytes is not None and size > max_bytes:
        raise ImageRefusedError(Reason.TOO_LARGE, f"{size} bytes, the limit is {max_bytes}")


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
    store = open_store(path.parent)
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
