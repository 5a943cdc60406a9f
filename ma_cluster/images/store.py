"""Objects under a URL: local folders here, S3 in s3_store.py, the only module that knows a storage library.

A `Store` is rooted at a prefix; keys are relative to it, always with "/", and are never interpreted: an S3 key may hold
anything a photographer's software has put into it. Listing streams, reading is capped, creating never overwrites.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from ma_cluster.errors import ImageRefusedError, ObjectChangedError, ObjectMissingError, Reason, StoreError, UsageError


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    key: str
    size: int
    etag: str


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


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store of a local path, `file://` or `s3://bucket/prefix` URL. Nothing is opened or created yet.

    S3-compatible servers by the standard AWS variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

    Raises:
        UsageError: another scheme, or no bucket.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(Path(text))
    if scheme == "file":
        if not rest.startswith(("/", "localhost/")):
            raise UsageError("a file:// URL needs an absolute path: file:///folder")
        return LocalStore(Path(unquote(urlsplit(text).path)))
    if scheme != "s3":
        raise UsageError(
            f"{scheme}:// is not a store this version knows; use a local path, file:// or s3://bucket/prefix"
        )
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError("an s3:// URL needs a bucket: s3://bucket/prefix")
    from ma_cluster.images.s3_store import S3Store  # boto3 takes half a second: not for local runs

    return S3Store(bucket, prefix.strip("/"))


def check_size(size: int, max_bytes: int | None) -> None:
    """Raises ImageRefusedError: too_large, where an object of so many bytes is larger than allowed."""
    if max_bytes is not None and size > max_bytes:
        raise ImageRefusedError(Reason.TOO_LARGE, f"{size} bytes, the limit is {max_bytes}")


class LocalStore:
    """A folder. Keys are paths below it; links that leave it are followed, as the operator put them there."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        if not self.root.is_dir():
            raise StoreError("the source folder does not exist or is not a folder; check the path")
        folder = self._path(prefix.rpartition("/")[0])
        for path in _walk(folder) if folder.is_dir() else ():
            # A name that is not UTF-8 cannot be a key: it is listed escaped, and so ends as a photograph that is gone.
            name = path.relative_to(self.root).as_posix()
            key = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if not key.startswith(prefix) or path.name.startswith(_PARTIAL):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # deleted since, or a link that leads nowhere
                continue
            if S_ISREG(stat.st_mode):  # reading a pipe would wait for ever
                yield Entry(key, stat.st_size, _local_etag(stat))

    def head(self, key: str) -> Entry:
        with _reading():
            stat = self._path(key).stat()
        if not S_ISREG(stat.st_mode):
            raise ObjectMissingError("this is no file; list the source again")
        return Entry(key, stat.st_size, _local_etag(stat))

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        with _reading(), self._path(key).open("rb") as file:
            stat = os.fstat(file.fileno())
            if etag is not None and etag != _local_etag(stat):
                raise ObjectChangedError("the object was replaced after it was planned")
            check_size(stat.st_size, max_bytes)
            return file.read()

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        partial = _write_partial(path, data)
        try:
            partial.replace(path)
        except OSError as error:
            partial.unlink()
            raise _unwritable(error) from error

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if os.path.lexists(path):
            return False
        partial = _write_partial(path, data)
        try:
            os.link(partial, path)  # fails where the name is taken: create-only, atomic
        except FileExistsError:
            return False
        except OSError as error:
            raise _unwritable(error) from error
        finally:
            partial.unlink()
        return True

    def _path(self, key: str) -> Path:
        path = self.root / key
        if ".." in Path(key).parts or Path(key).is_absolute():
            raise UsageError("a key of a local store must stay inside its folder")
        if "\0" in key:
            raise StoreError("a file's name cannot hold a null byte; rename the object")
        return path


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectMissingError("the file is gone; list the source again") from error
    except OSError as error:
        raise StoreError(f"the file cannot be read: {error.strerror}") from error


def _write_partial(path: Path, data: bytes) -> Path:
    """The bytes on disk beside `path`, under a name that no listing shows."""
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
    except OSError as error:
        if partial is not None:
            partial.unlink()  # a full disk needs the space
        raise _unwritable(error) from error
    return partial


def _unwritable(error: OSError) -> StoreError:
    return StoreError(f"the destination cannot be written: {error.strerror}; check space and permissions")


_PARTIAL = ".partial-"


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in the order of their keys, one directory in memory at a time."""
    with os.scandir(folder) as entries:
        # "a/" sorts as S3 sorts it, so both stores list the same keys in the same order
        names = sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name[:-1])
        else:
            yield folder / name


def _local_etag(stat: os.stat_result) -> str:
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
