"""A folder as a store: files are objects, paths below the folder their keys."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from ma_cluster.errors import ObjectChangedError, ObjectMissingError, StoreError, UsageError
from ma_cluster.storage.store import Entry, check_bytes

_PARTIAL = ".partial-"  # begins names that no listing shows
_NO_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ELOOP, errno.ENAMETOOLONG}  # ENXIO: a socket
)
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_CLAIM_S = 60.0
"""A claim on a name is held for two system calls; one older than this was left by a writer that was killed."""


class LocalStore:
    """A folder. Keys are paths below it; links that leave it are followed, as the operator put them there."""

    def __init__(self, root: Path, *, private: bool = False) -> None:
        """What is created in a `private` store is for this user alone. Raises UsageError: no path can be made of it."""
        self._modes = (0o700, 0o600) if private else (0o777, 0o644)
        try:
            self.root = root.expanduser().resolve()
        except (RuntimeError, ValueError, OSError) as error:
            causes = "an unknown user after `~`, a null byte, or links in a circle"
            raise UsageError(f"this is no path of a folder: {causes}; check it") from error
        self.url = str(self.root)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with _reading():  # which is_dir raises where a folder above must not be entered
            there = self.root.is_dir()
        if self.root.is_file():
            kinds = ".csv, .csv.gz, .tsv or .parquet"
            raise StoreError(f"the source is a file: give its folder, or a list of photographs that ends in {kinds}")
        if not there:
            raise StoreError("the source folder does not exist or is not a folder; check the path")
        folder = prefix.rpartition("/")[0]
        with _reading():
            there = self._path(folder).is_dir()
        for name in _walk(self.root, f"{folder}/" if folder else "") if there else ():
            key = os.fsencode(name).decode("utf-8", "backslashreplace")
            if key.startswith(prefix) and not PurePosixPath(name).name.startswith(_PARTIAL):
                path = self.root / name
                # A name that is not UTF-8 cannot be a key: it is listed escaped, and so leads to nothing.
                entry = _entry(path, key) if _name(key) == name else Entry(key, 0, "")
                if entry.etag or os.path.lexists(path):  # else deleted since
                    yield entry

    def head(self, key: str) -> Entry:
        entry = _entry(self._path(key), key)
        if not entry.etag:
            raise ObjectMissingError("no file that can be read is under this key; list the source again")
        return entry

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        with _reading(), open(self._path(key), "rb", opener=_open_at_once) as file:
            stat = os.fstat(file.fileno())
            if not S_ISREG(stat.st_mode):
                raise ObjectMissingError("this is no file; list the source again")
            if etag is not None and etag != _local_etag(stat):
                raise ObjectChangedError("the object was replaced after it was planned")
            check_bytes(stat.st_size, max_bytes)
            return file.read()

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        partial = _write_partial(path, data, self._modes)
        try:
            partial.replace(path)
        except OSError as error:
            partial.unlink()
            raise _unwritable(error) from error

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if os.path.lexists(path):
            return False
        partial = _write_partial(path, data, self._modes)
        try:
            _name_exclusively(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise _unwritable(error) from error
        finally:
            partial.unlink(missing_ok=True)
        return True

    def move(self, key: str, to: str) -> None:
        with _reading():
            self._path(key).lstat()
        try:
            self._path(to).parent.mkdir(parents=True, exist_ok=True)
            self._path(key).rename(self._path(to))
        except OSError as error:
            raise _unwritable(error) from error

    def _path(self, key: str) -> Path:
        if ".." in Path(key).parts or Path(key).is_absolute():
            raise UsageError("a key of a local store must stay inside its folder")
        if "\0" in key:
            raise ObjectMissingError("a file's name cannot hold a null byte; rename the object")
        return self.root / _name(key)


def _name(key: str) -> str:
    """The path of a key: its bytes are UTF-8 under any locale."""
    return os.fsdecode(key.encode("utf-8", "surrogatepass"))


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_FILE:
            raise ObjectMissingError("there is no file under this key; list the source again") from error
        raise StoreError(f"the file cannot be read: {error.strerror}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would be waited for


def _write_partial(path: Path, data: bytes, modes: tuple[int, int]) -> Path:
    """The bytes on disk beside `path`, under a name that no listing shows. Modes are of the folder and of the file."""
    partial: Path | None = None
    try:
        path.parent.mkdir(modes[0], parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(modes[1])
    except OSError as error:
        if partial is not None:
            partial.unlink()  # a full disk needs the space
        raise _unwritable(error) from error
    return partial


def _unwritable(error: OSError) -> StoreError:
    return StoreError(f"the destination cannot be written: {error.strerror}; check space and permissions")


def _name_exclusively(partial: Path, path: Path) -> None:
    """Give a file its name where that is free, atomically.

    Raises:
        FileExistsError: it is not.
    """
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _claimed(partial, path):  # exFAT, SMB
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            partial.rename(path)


@contextmanager
def _claimed(partial: Path, path: Path) -> Iterator[None]:
    """Hold the only claim on a name: a file beside it, which one alone can create.

    Its age is told by the file system's own clock, from `partial`, which has just been written.
    """
    claim = path.with_name(f"{_PARTIAL}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}")
    written, began = partial.stat().st_mtime, time.monotonic()
    while True:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            break
        except FileExistsError:
            time.sleep(0.02)
        try:
            if written - claim.stat().st_mtime + time.monotonic() - began > _CLAIM_S:
                claim.unlink(missing_ok=True)
        except FileNotFoundError:  # given back meanwhile
            continue
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _walk(root: Path, start: str) -> Iterator[str]:
    """Names below the folder `start`, relative to the root and in the order of their keys, one directory in memory on
    each level: of all that is no folder, and, ending in "/", of folders that cannot be read.

    Raises:
        StoreError: `start` cannot be read.
    """
    levels: list[tuple[str, Iterator[str], frozenset[tuple[int, int]]]] = [("", iter([start]), frozenset())]
    while levels:
        folder, names, around = levels[-1]
        name = next(names, None)
        if name is None:
            levels.pop()
        elif name and not name.endswith("/"):
            yield folder + name
        else:
            inner = folder + name
            try:
                below, identity = _names(root / inner)
            except OSError as error:
                if inner == start:
                    raise StoreError(f"the folder cannot be read: {error.strerror}; check its permissions") from error
                yield inner
                continue
            if identity not in around:  # a link to a folder that it lies in shows nothing new
                levels.append((inner, iter(below), around | {identity}))


def _names(folder: Path) -> tuple[list[str], tuple[int, int]]:
    """What lies in a folder, sorted, folders with a "/" at the end; and which folder this is, by whatever path."""
    stat = folder.stat()
    with os.scandir(folder) as entries:
        # "a/" sorts as S3 sorts it, so both stores list the same keys in the same order
        names = sorted(entry.name + "/" if _is_folder(entry) else entry.name for entry in entries)
    return names, (stat.st_dev, stat.st_ino)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _entry(path: Path, key: str) -> Entry:
    """The file as a listing shows it; size 0 and no version where it is none, or is not reached."""
    try:
        stat = path.stat()
    except OSError:
        return Entry(key, 0, "")
    return Entry(key, stat.st_size, _local_etag(stat)) if S_ISREG(stat.st_mode) else Entry(key, 0, "")


def _local_etag(stat: os.stat_result) -> str:
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
