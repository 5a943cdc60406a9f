"""Where an archive's photographs come from: all that lies below a URL, or what a manifest names, object by object."""

from __future__ import annotations

import csv
import gzip
import io
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol, runtime_checkable
from urllib.parse import unquote

import pyarrow as pa

from ma_cluster.errors import ObjectMissingError, UsageError
from ma_cluster.storage.parquet import DAMAGED, open_parquet
from ma_cluster.storage.store import Entry, Store, open_store

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".parquet")
_COLUMNS = ("key", "path", "image", "filename", "url")  # any case; the first that is there names the photographs
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_LARGEST_UNPACKED = 2**30  # bytes
_HEADS = 16  # requests at a time: they wait for the store, not for a core
_CHUNK = 1024  # keys asked about before the first is handed on


@runtime_checkable
class Source(Protocol):
    """What scoring asks of an archive; every `Store` is one, and so is a `Manifest`."""

    url: str

    def list(self) -> Iterator[Entry]:
        """The photographs, each key once; memory stays flat."""

    def head(self, key: str) -> Entry:
        """The photograph as it is now; raises ObjectMissingError where it is gone."""

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        """Its bytes; raises as `Store.get` does."""


def open_source(url: str) -> Source:
    """A manifest where the URL ends in .csv, .csv.gz, .tsv or .parquet, else the folder or prefix.

    Raises:
        UsageError: no such kind of store.
    """
    return Manifest(url) if url.lower().endswith(_SUFFIXES) else open_store(url)


class Manifest:
    """A table whose column `key` (or path, image, filename, url) names photographs, in any order, each once.

    A key is a URL (s3://..., file://...), an absolute path, or relative to the manifest's folder, above which it may
    lead on a file system. One that leads to nothing, or to a store that nobody knows, is listed with size 0 and an
    empty version, and so ends as one that is missing. Text is UTF-8 or UTF-16 and separated by commas, semicolons or
    tabs, as its header says.
    """

    def __init__(self, url: str) -> None:
        folder, _, self._name = url.rpartition("/")
        self._folder = open_store(folder or ("/" if url.startswith("/") else "."))
        self.url = f"{self._folder.url.rstrip('/')}/{self._name}"
        self._stores: dict[str, Store] = {}

    def list(self) -> Iterator[Entry]:
        """Raises UsageError: it is not there, is no such file, or a row is wrong."""
        keys = _distinct(self._keys())
        with ThreadPoolExecutor(_HEADS) as threads:
            while chunk := tuple(islice(keys, _CHUNK)):
                yield from threads.map(self._look, chunk)

    def head(self, key: str) -> Entry:
        store, own = self._locate(key)
        found = store.head(own)
        return Entry(key, found.size, found.etag)

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        store, own = self._locate(key)
        return store.get(own, max_bytes=max_bytes, etag=etag)

    def _look(self, key: str) -> Entry:
        try:
            return self.head(key)
        except (ObjectMissingError, UsageError):
            return Entry(key, 0, "")

    def _locate(self, key: str) -> tuple[Store, str]:
        """The store that holds a photograph, and its key there."""
        scheme, separator, rest = key.partition("://")
        if separator and scheme != "file":
            bucket, _, own = rest.partition("/")
            return self._store(f"{scheme}://{bucket}"), own
        if separator:
            return self._store("/"), unquote(rest.removeprefix("localhost")).lstrip("/")
        if not key.startswith("/") and (".." not in key.split("/") or not self._folder.url.startswith("/")):
            return self._folder, key
        return self._store("/"), posixpath.normpath(posixpath.join(self._folder.url, key)).lstrip("/")

    def _store(self, url: str) -> Store:
        if url not in self._stores:
            self._stores[url] = open_store(url)
        return self._stores[url]

    def _keys(self) -> Iterator[tuple[int, str]]:
        try:
            data = self._folder.get(self._name)
            yield from _parquet_keys(data) if self._name.lower().endswith(".parquet") else _text_keys(data)
        except ObjectMissingError as error:
            raise UsageError("there is no manifest of this name; check the URL") from error
        except UnicodeDecodeError as error:
            raise UsageError("the manifest is not what its name ends in, or no UTF-8; save it as UTF-8") from error
        except (*DAMAGED, csv.Error, EOFError, zlib.error) as error:
            raise UsageError("the manifest is not what its name ends in, or its keys are no text") from error


def _text_keys(data: bytes) -> Iterator[tuple[int, str]]:
    """Line numbers as a spreadsheet shows them, and keys; blank lines are passed by."""
    if data.startswith(b"\x1f\x8b"):
        with gzip.open(io.BytesIO(data)) as packed:
            data = packed.read(_LARGEST_UNPACKED)
            if packed.read(1):
                raise UsageError(f"the manifest holds more than {_LARGEST_UNPACKED} bytes; cut it into several")
    text = data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8-sig")
    header, _, _ = text.partition("\n")
    separator = max(",;\t", key=header.count)  # commas where there is but one column
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    column = _column([name.strip() for name in next(lines, [])])
    for line, cells in enumerate(lines, 2):
        if any(cell.strip() for cell in cells):
            yield line, cells[column] if column < len(cells) else ""


def _parquet_keys(data: bytes) -> Iterator[tuple[int, str]]:
    file = open_parquet(data)
    name = file.schema_arrow.names[_column(file.schema_arrow.names)]
    line = 2  # as if it had a header
    for batch in file.iter_batches(columns=[name], use_threads=False):
        yield from enumerate(batch.column(0).cast(pa.string()).to_pylist(), line)
        line += len(batch)


def _column(names: Sequence[str]) -> int:
    """Which column names the photographs."""
    folded = [name.casefold() for name in names]
    for name in _COLUMNS:
        if name in folded:
            return folded.index(name)
    found = ", ".join(f"`{name[:40]}`" for name in names[:8]) or "none"
    wanted = f"`key` (or {', '.join(_COLUMNS[1:])})"
    raise UsageError(f"the manifest has no column {wanted}, which names the photographs; its columns: {found}")


def _distinct(keys: Iterator[tuple[int, str]]) -> Iterator[str]:
    seen: set[str] = set()
    for line, key in keys:
        if not key or key in seen:
            fault = "repeats an earlier key" if key else "has no key"
            raise UsageError(f"line {line} of the manifest {fault}; each line names one photograph, once")
        seen.add(key)
        yield key


_SIDECARS = (".xml", ".json", ".txt", ".pdf", ".csv", ".tsv", ".xls", ".xlsx", ".doc", ".docx", ".md", ".log", ".ini")
_SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".localized", ".picasa.ini"})
_SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "$recycle.bin", "__macosx", ".appledouble", ".thumbnails", ".trashes", ".spotlight-v100"}
)


def is_litter(key: str) -> bool:
    """Whether a file of a folder is no photograph by its name: of Windows, macOS, a NAS or Hadoop, or a sidecar."""
    *folders, name = key.casefold().split("/")
    return (
        name in _SYSTEM_FILES
        or name.startswith("._")
        or name.endswith(("_$folder$", *_SIDECARS))
        or not _SYSTEM_FOLDERS.isdisjoint(folders)
    )
