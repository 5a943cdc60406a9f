"""Where an archive's photographs come from: all that lies below a URL, or what a manifest names, object by object."""

from __future__ import annotations

import csv
import gzip
import io
import posixpath
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Protocol, runtime_checkable
from urllib.parse import unquote

import pyarrow as pa

from ma_cluster.config import KnownField
from ma_cluster.errors import ObjectMissingError, StoreError, UsageError
from ma_cluster.storage.identity import Pseudonyms, eye_named, site_pseudonyms, visit_named
from ma_cluster.storage.parquet import DAMAGED, open_parquet
from ma_cluster.storage.store import Entry, KeySet, open_store

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".parquet")
_COLUMNS = ("key", "path", "image", "filename", "url")  # any case; the first that is there names the photographs
_FIELD, _NO_SURROUND = "field_degrees", "no_surround"
_SAID = (_FIELD, _NO_SURROUND, "patient", "eye", "visit")  # what else a row may say, any case
_YES, _NO = frozenset({"1", "true", "yes", "y"}), frozenset({"", "0", "false", "no", "n"})
_SEPARATOR = re.compile(r"sep=(.)\r?\n")  # what Excel notes above the header
_ENCODINGS = {"utf-32": rb"\xff\xfe\0\0|\0\0\xfe\xff", "utf-16": rb"\xff\xfe|\xfe\xff"}  # by their mark
_ENCODINGS |= {"utf-16-le": rb"[^\0]\0", "utf-16-be": rb"\0[^\0]"}  # by the zeros beside the first letter
AND_MISSING = "; nor is there its photograph: "
"""In the fault of a row between what is wrong with its words, which stays, and that its photograph is missing."""
_UNKNOWN = KnownField()
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


@dataclass(frozen=True, slots=True)
class Photographs:
    """Where an archive's photographs lie, and what is known of the field of those of which a manifest says nothing."""

    url: str
    field: KnownField = _UNKNOWN
    keep_ids: bool = False
    """Whether results have patients' ids as they are, and not their pseudonyms."""

    def open(self) -> Source:
        """Their source. Raises UsageError: no such kind of store, or a salt that is none."""
        source = open_source(self.url, self.pseudonyms)
        return _Told(source, self.field) if self.field.degrees else source

    @property
    def pseudonyms(self) -> Pseudonyms:
        """What results call their patients."""
        return site_pseudonyms(self.keep_ids)


def open_source(url: str, pseudonyms: Pseudonyms | None = None) -> Source:
    """A manifest where the URL ends in .csv, .csv.gz, .tsv or .parquet, else the folder, prefix or DICOMweb server.

    Args:
        url: of either.
        pseudonyms: what its patients are called; without them it does not say who they are.

    Raises:
        UsageError: no such kind of store.
    """
    return Manifest(url, pseudonyms) if url.lower().endswith(_SUFFIXES) else _open_objects(url)


def _open_objects(url: str) -> Source:
    if url.startswith("dicomweb+"):
        from ma_cluster.storage.dicomweb import DicomWeb  # urllib3: not for local runs

        return DicomWeb(url)
    return open_store(url)


def url_of(source: Source, key: str) -> str:
    """Where a photograph of a source lies, for whoever has no source."""
    if isinstance(source, Manifest):
        source, key = source._locate(key)
    root = source.url.partition("?")[0] if source.url.startswith("dicomweb+") else source.url
    return f"{root.rstrip('/')}/{key}"


class _Told:
    """A source about whose photographs something is known."""

    def __init__(self, source: Source, field: KnownField) -> None:
        self.url, self.source, self._field = source.url, source, field

    def list(self) -> Iterator[Entry]:
        return map(self._told, self.source.list())

    def head(self, key: str) -> Entry:
        return self._told(self.source.head(key))

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        return self.source.get(key, max_bytes=max_bytes, etag=etag)

    def _told(self, entry: Entry) -> Entry:
        if entry.field_degrees:
            return entry
        return replace(entry, field_degrees=self._field.degrees, no_surround=self._field.no_surround)


def is_manifest(source: Source) -> bool:
    """Whether what a source lists was named by somebody."""
    return isinstance(source.source if isinstance(source, _Told) else source, Manifest)


def no_photographs(source: Source) -> int:
    """How many objects a source, once it was listed, has left out by what its server says of them."""
    inner = source.source if isinstance(source, _Told) else source
    return int(getattr(inner, "skipped", 0))  # of DicomWeb


class Manifest:
    """A table whose column `key` (or path, image, filename, url) names photographs, in any order, each once.

    A key is a URL (s3://..., file://...), an absolute path, or relative to the manifest's folder, above which it may
    lead on a file system. The columns `field_degrees` and `no_surround`, where they are there, say what is known of a
    photograph's field, and `patient`, `eye` and `visit` whom and what it shows, and when. A row that leads to nothing,
    or to a store that nobody knows, that repeats a key or has none, is listed with size 0, an empty version and its
    fault; so the run goes on, and the row is one outcome. Text is UTF-8 or UTF-16 and separated by commas, semicolons
    or tabs, as its header says.
    """

    def __init__(self, url: str, pseudonyms: Pseudonyms | None = None) -> None:
        self._pseudonyms = pseudonyms
        folder, _, self._name = url.rpartition("/")
        self._folder = open_store(folder or ("/" if url.startswith("/") else "."))
        self.url = f"{self._folder.url.rstrip('/')}/{self._name}"
        self._stores: dict[str, Source] = {}

    def list(self) -> Iterator[Entry]:
        """Raises UsageError: it is not there, or is no such file."""
        rows = _distinct(self._rows())
        with ThreadPoolExecutor(_HEADS) as threads:
            while chunk := list(islice(rows, _CHUNK)):
                each = -(-len(chunk) // _HEADS)  # to hand over one key costs more than to look for it on a disk
                parts = [chunk[first : first + each] for first in range(0, len(chunk), each)]
                yield from chain.from_iterable(threads.map(lambda part: [self._look(row) for row in part], parts))

    def head(self, key: str) -> Entry:
        store, own = self._locate(key)
        return replace(store.head(own), key=key)

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        store, own = self._locate(key)
        return store.get(own, max_bytes=max_bytes, etag=etag)

    def _look(self, row: _Row) -> Entry:
        if row.fault:
            return self._identified(row, Entry(row.key, 0, "", fault=row.at(row.fault)))
        said = self._identified(row, row.told(Entry(row.key, 0, "")))
        try:
            found = self.head(row.key)
        except (ObjectMissingError, UsageError) as error:
            why = f"{error}; write / where its path has \\" if "\\" in row.key else str(error)
            return replace(said, fault=f"{said.fault}{AND_MISSING}{why}" if said.fault else row.at(why))
        except StoreError as error:  # most likely of all the rows that follow, too
            raise StoreError(row.at(str(error))) from error
        return replace(said, size=found.size, etag=found.etag)

    def _identified(self, row: _Row, entry: Entry) -> Entry:
        """The photograph with whom and what it shows: one that cannot be read is missing in somebody's visit."""
        patient = "" if self._pseudonyms is None else self._pseudonyms.of(row.patient)
        try:
            return replace(entry, patient=patient, eye=eye_named(row.eye), visit=visit_named(row.visit))
        except UsageError as error:
            return replace(entry, patient=patient, fault=entry.fault or row.at(str(error)))

    def _locate(self, key: str) -> tuple[Source, str]:
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

    def _store(self, url: str) -> Source:
        if url not in self._stores:
            self._stores[url] = _open_objects(url)
        return self._stores[url]

    def _rows(self) -> Iterator[_Row]:
        try:
            data = self._folder.get(self._name)
            yield from _parquet_rows(data) if self._name.lower().endswith(".parquet") else _text_rows(data)
        except ObjectMissingError as error:
            raise UsageError("there is no manifest of this name; check the URL") from error
        except UnicodeDecodeError as error:
            raise UsageError("the manifest is not what its name ends in, or no UTF-8; save it as UTF-8") from error
        except (*DAMAGED, csv.Error, EOFError, zlib.error) as error:
            raise UsageError("the manifest is not what its name ends in, or its keys are no text") from error


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of a manifest, numbered as a spreadsheet shows it."""

    line: int
    key: str
    field_degrees: str = ""
    no_surround: str = ""
    patient: str = field(default="", repr=False)
    eye: str = ""
    visit: str = ""
    fault: str = ""

    def at(self, fault: str) -> str:
        """A fault with its place."""
        return f"line {self.line} of the manifest: {fault}"

    def told(self, entry: Entry) -> Entry:
        """The photograph that the row names, with what it says of its field, or with what is wrong about that."""
        answer = self.no_surround.strip().casefold()
        if answer not in _YES | _NO:
            return replace(entry, fault=self.at(f"{_NO_SURROUND} is yes, no, or left empty"))
        try:
            known = KnownField(float(self.field_degrees.strip().replace(",", ".") or 0), answer in _YES)
        except ValueError:
            return replace(entry, fault=self.at(f"{_FIELD} is an angle in degrees, or left empty"))
        except UsageError as error:
            return replace(entry, fault=self.at(str(error)))
        return replace(entry, field_degrees=known.degrees, no_surround=known.no_surround)


def _text_rows(data: bytes) -> Iterator[_Row]:
    """Blank lines are passed by."""
    if data.startswith(b"\x1f\x8b"):
        with gzip.open(io.BytesIO(data)) as packed:
            data = packed.read(_LARGEST_UNPACKED)
            if packed.read(1):
                raise UsageError(f"the manifest holds more than {_LARGEST_UNPACKED} bytes; cut it into several")
    encoding = next((name for name, begin in _ENCODINGS.items() if re.match(begin, data)), "utf-8-sig")
    text = io.TextIOWrapper(io.BytesIO(data), encoding, newline="")
    deque(text, maxlen=0)  # it is text to its end, or nothing is planned
    text.seek(0)
    header, above = next(text, ""), 0
    while header.endswith("\n") and not header.strip(" \t,;\r\n"):
        header, above = next(text, ""), above + 1
    noted = _SEPARATOR.fullmatch(header)
    if noted is not None:
        header, above = next(text, ""), above + 1
    separator = max(",;\t|", key=header.count) if noted is None else noted[1]  # commas where there is but one column
    csv.field_size_limit(_LARGEST_UNPACKED)  # a tool may keep what it has drawn in a cell
    lines = csv.reader(chain([header], text), delimiter=separator)
    names = next(lines, [])
    spaced = any(name != name.strip() for name in names)  # for people's eyes, in all lines
    columns = list(_columns([name.strip() for name in names]).values())
    for line, cells in enumerate(lines, 2 + above):
        cells = [cell.strip() for cell in cells] if spaced else cells
        if any(cell.strip() for cell in cells):
            said = (cells[column] if column is not None and column < len(cells) else "" for column in columns)
            yield _Row(line, *said)


def _parquet_rows(data: bytes) -> Iterator[_Row]:
    file = open_parquet(data)
    names = file.schema_arrow.names
    columns = {name: names[column] for name, column in _columns(names).items() if column is not None}
    line = 2  # as if it had a header
    for batch in file.iter_batches(columns=list(columns.values()), use_threads=False):
        cells = (batch[column].cast(pa.string()).to_pylist() for column in columns.values())
        for values in zip(*cells, strict=True):
            yield _Row(line, **{name: value or "" for name, value in zip(columns, values, strict=True)})
            line += 1


def _columns(names: Sequence[str]) -> dict[str, int | None]:
    """Which columns hold what a `_Row` has: its key, and what else is said; None where there is none."""
    folded = [name.casefold() for name in names]
    key = next((folded.index(name) for name in _COLUMNS if name in folded), None)
    if key is None:
        found = ", ".join(f"`{name[:40]}`" for name in names[:8]) or "none"
        wanted = f"`key` (or {', '.join(_COLUMNS[1:])})"
        raise UsageError(f"the manifest has no column {wanted}, which names the photographs; its columns: {found}")
    return {"key": key} | {name: folded.index(name) if name in folded else None for name in _SAID}


def _distinct(rows: Iterator[_Row]) -> Iterator[_Row]:
    """The rows, each with a key of its own: one without, or with that of an earlier one, is named by its line."""
    with closing(KeySet()) as seen:
        for row in rows:
            if row.key and seen.add(row.key):
                yield row
            else:
                fault = "it repeats the key of an earlier line" if row.key else "it has no key"
                yield replace(row, key=f"{row.key}#line={row.line}", fault=fault)
