"""A folder as a store: files are objects, paths below the folder their keys."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG

from ma_cluster.errors import ObjectChangedError, ObjectMissingError, StoreError, UsageError
from ma_cluster.storage.store import Entry, check_size


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
