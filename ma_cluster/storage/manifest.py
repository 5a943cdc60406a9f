"""Where an archive's photographs come from: all that lies below a URL, or what a manifest names, object by object."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol, runtime_checkable
from urllib.parse import unquote

import pyarrow as pa

from ma_cluster.errors import ObjectMissingError, UsageError
from ma_cluster.storage.parquet import DAMAGED, open_parquet
from ma_cluster.storage.store import Entry, Store, open_store

_SUFFIXES = (".csv", ".parquet")
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
    """A manifest where the URL ends in .csv or .parquet, else the folder or prefix.

    Raises:
        UsageError: no such kind of store.
    """
    return Manifest(url) if url.lower().endswith(_SUFFIXES) else open_store(url)


class Manifest:
    """A CSV or Parquet file whose column `key` names photographs, in any order, each once.

    A key is a URL (s3://..., file://...), an absolute path, or relative to the manifest's folder. One that leads to
    nothing is listed with size 0 and an empty version, and so ends as one that is missing.
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
            while chunk := tuple(islice(enumerate(keys, 1), _CHUNK)):
                yield from threads.map(self._look, chunk)

    def head(self, key: str) -> Entry:
        store, own = self._locate(key)
        found = store.head(own)
        return Entry(key, found.size, found.etag)

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        store, own = self._locate(key)
        return store.get(own, max_bytes=max_bytes, etag=etag)

    def _look(self, numbered: tuple[int, str]) -> Entry:
        row, key = numbered
        try:
            return self.head(key)
        except ObjectMissingError:
            return Entry(key, 0, "")
        except UsageError as error:
            raise UsageError(f"row {row} of the manifest: {error}") from error

    def _locate(self, key: str) -> tuple[Store, str]:
        """The store that holds a photograph, and its key there."""
        scheme, separator, rest = key.partition("://")
        if separator and scheme != "file":
            bucket, _, own = rest.partition("/")
            return self._store(f"{scheme}://{bucket}"), own
        if separator:
            return self._store("/"), unquote(rest.removeprefix("localhost")).lstrip("/")
        return (self._store("/"), key.lstrip("/")) if key.startswith("/") else (self._folder, key)

    def _store(self, url: str) -> Store:
        if url not in self._stores:
            self._stores[url] = open_store(url)
        return self._stores[url]

    def _keys(self) -> Iterator[str]:
        try:
            data = self._folder.get(self._name)
            yield from _csv_keys(data) if self._name.lower().endswith(".csv") else _parquet_keys(data)
        except ObjectMissingError as error:
            raise UsageError("there is no manifest of this name; check the URL") from error
        except (*DAMAGED, UnicodeDecodeError, csv.Error) as error:
            raise UsageError("the manifest is not what its name ends in, or its keys are no text") from error


def _csv_keys(data: bytes) -> Iterator[str]:
    table = csv.DictReader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""))
    _check_column("key" in (table.fieldnames or ()))
    return (row["key"] for row in table)


def _parquet_keys(data: bytes) -> Iterator[str]:
    file = open_parquet(data)
    _check_column("key" in file.schema_arrow.names)
    for batch in file.iter_batches(columns=["key"], use_threads=False):
        yield from batch.column(0).cast(pa.string()).to_pylist()


def _check_column(there: bool) -> None:
    if not there:
        raise UsageError("the manifest has no column `key`; it names the photographs, one in each row")


def _distinct(keys: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for row, key in enumerate(keys, 1):
        if not key or key in seen:
            fault = "repeats an earlier key" if key else "has no key"
            raise UsageError(f"row {row} of the manifest {fault}; each row names one photograph, once")
        seen.add(key)
        yield key
