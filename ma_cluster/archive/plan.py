"""What an archive run has to do: the plan, every photograph once, and its shards. No Ray in here.

    plan/part-00000.parquet        key, size, etag, field, patient; 16,384 rows each, written while the source is listed

A shard is a slice of a plan part. Both listing and cutting hold one part in memory, however large the archive.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from ma_cluster.errors import ObjectMissingError, PartDamagedError, RunConflictError
from ma_cluster.storage.parquet import DAMAGED, from_parquet, to_parquet
from ma_cluster.storage.store import Entry, Store

log = logging.getLogger(__name__)
PLAN_PART_IMAGES = 16_384
"""Rows of a plan part: a worker that needs a shard reads about a megabyte."""
_SAID_PARTS = 8  # some half a minute of listing an object store
LARGEST_SHARD_IMAGES = 256
"""More would be lost with a killed worker, fewer would make tiny parts."""
LARGEST_SHARD_BYTES = 2**30
"""A shard of larger photographs has fewer of them, one at least: what is lost with a worker is bounded, too."""
SHARDS_WANTED = 1024
"""An archive is cut into at least so many shards where it has the images, so that a fleet is evenly loaded, and a lost
node costs little where the end is near (tests/benchmarks/simulate_fleet.py)."""
_LATER = frozenset(
    {"field_degrees", "no_surround", "fault", "patient", "eye", "visit"}
)  # which plans of earlier versions do not have
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), metadata={"unit": "", "description": "object key, relative to the source"}),
        pa.field("size", pa.int64(), metadata={"unit": "byte", "description": "of the object"}),
        pa.field("etag", pa.string(), metadata={"unit": "", "description": "the object's version when listed"}),
        pa.field("field_degrees", pa.float64(), metadata={"unit": "deg", "description": "of its disc; 0: not known"}),
        pa.field("no_surround", pa.bool_(), metadata={"unit": "", "description": "it has no disc"}),
        pa.field("patient", pa.string(), metadata={"unit": "", "description": "pseudonym; empty: not known"}),
        pa.field("eye", pa.string(), metadata={"unit": "", "description": "R or L as the manifest says; or empty"}),
        pa.field("visit", pa.string(), metadata={"unit": "", "description": "date or label as the manifest says"}),
        pa.field("fault", pa.string(), metadata={"unit": "", "description": "of the row of a manifest that names it"}),
    ]
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many photographs an archive has, and a digest of all their keys, sizes and versions."""

    images: int
    digest: str
    skipped: int = 0
    """Files of the source that are no photographs and have no row: sidecars, system files, those of earlier runs."""
    shards_wanted: int = 64
    """By which it is cut; runs of earlier versions do not say it."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [start, stop) of one plan part, scored and committed together."""

    number: int
    part: int
    start: int
    stop: int

    @property
    def images(self) -> int:
        """How many photographs it holds."""
        return self.stop - self.start

    @property
    def row(self) -> int:
        """Of its first photograph in the whole plan: how many come before it."""
        return self.part * PLAN_PART_IMAGES + self.start


def write_plan(entries: Iterable[Entry], dest: Store) -> Plan:
    """Write the photographs into plan parts as they are listed; nothing where there is none.

    Raises:
        RunConflictError: `dest` holds a part of another listing, from a driver that died while it planned.
    """
    running, images = hashlib.sha256(), 0
    for number, rows in enumerate(_parts(entries)):
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        if not dest.create(plan_key(number), to_parquet(table)) and read_part(dest, number) != table:
            raise RunConflictError(
                f"{dest.url}/plan is half of a plan of another listing: delete it, or use an empty destination"
            )
        running.update(json.dumps(rows).encode())
        images += len(rows)
        if number % _SAID_PARTS == _SAID_PARTS - 1:
            log.info("%d photographs listed", images)
    return Plan(images, running.hexdigest(), shards_wanted=SHARDS_WANTED)


def plan_again(entries: Iterable[Entry], plan: Plan, wanted: Container[int]) -> dict[int, bytes]:
    """Parts of a plan as files, from another listing of the same source.

    Raises:
        RunConflictError: it lists something else now.
    """
    running, parts = hashlib.sha256(), {}
    for number, rows in enumerate(_parts(entries)):
        running.update(json.dumps(rows).encode())
        if number in wanted:
            parts[number] = to_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA))
    if running.hexdigest() != plan.digest:
        raise RunConflictError(
            "parts of the plan are damaged, and the source does not list any more what was planned: put back the "
            "destination's plan/ from a copy, or use an empty destination"
        )
    return parts


def damaged_parts(dest: Store, plan: Plan) -> dict[int, str]:
    """Numbers of the parts of a plan that are missing, damaged or foreign, and how."""
    running, damaged = hashlib.sha256(), {}
    for number in range(_count(plan)):
        try:
            rows = _whole_part(dest, plan, number).to_pylist()
        except PartDamagedError as error:
            damaged[number] = error.fault
        else:
            running.update(json.dumps(rows).encode())
    if not damaged and running.hexdigest() != plan.digest:
        return dict.fromkeys(range(_count(plan)), "one of the plan's parts is of another plan")
    return damaged


def shards(dest: Store, plan: Plan) -> Iterator[Shard]:
    """All shards of a plan, numbered in its order; they follow from the plan alone."""
    largest, number = largest_shard(plan), 0
    for part in range(_count(plan)):
        sizes = _whole_part(dest, plan, part, ["size"])["size"].to_pylist()
        for start, stop in cut(sizes, largest):
            yield Shard(number, part, start, stop)
            number += 1


def largest_shard(plan: Plan) -> int:
    """The most photographs that a shard of a plan has; where they are large it has fewer."""
    return min(LARGEST_SHARD_IMAGES, max(1, plan.images // plan.shards_wanted))


def cut(sizes: Sequence[int], largest: int) -> Iterator[tuple[int, int]]:
    """Slices [start, stop) of at most `largest` rows and LARGEST_SHARD_BYTES, of one row at least.

    With slices of 3 rows and of 9 bytes, rows of these sizes give

        size      1 1 1 1 5 5 20 1
        slice     0 0 0 1 1 2  3 4
    """
    start, held = 0, 0
    for row, size in enumerate(sizes):
        if row > start and (row - start == largest or held + size > LARGEST_SHARD_BYTES):
            yield start, row
            start, held = row, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)


def read_shard(dest: Store, shard: Shard) -> list[Entry]:
    """The objects of a shard."""
    return _entries(read_part(dest, shard.part), shard)


def read_shards(dest: Store, wanted: Iterable[Shard]) -> Iterator[Entry]:
    """The objects of shards in the plan's order; each plan part is read once."""
    for number, of_part in groupby(wanted, key=lambda shard: shard.part):
        table = read_part(dest, number)
        for shard in of_part:
            yield from _entries(table, shard)


def read_part(dest: Store, number: int, columns: list[str] | None = None) -> pa.Table:
    """A part of the plan, or some of its columns.

    Raises:
        PartDamagedError: it is missing, or cannot be read.
    """
    try:
        names = columns or _SCHEMA.names
        part = from_parquet(dest.get(plan_key(number)), names)
        return part.select([name for name in names if name in part.column_names or name not in _LATER])
    except ObjectMissingError as error:
        raise PartDamagedError(plan_key(number), "it is missing") from error
    except (*DAMAGED, KeyError) as error:
        raise PartDamagedError(plan_key(number), "it is damaged, or no part of a plan") from error


def _whole_part(dest: Store, plan: Plan, number: int, columns: list[str] | None = None) -> pa.Table:
    part = read_part(dest, number, columns)
    if part.num_rows != min(PLAN_PART_IMAGES, plan.images - number * PLAN_PART_IMAGES):
        raise PartDamagedError(plan_key(number), "it is of another plan")
    return part


def _parts(entries: Iterable[Entry]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each part, one part at a time."""
    listed = iter(entries)
    while part := list(islice(listed, PLAN_PART_IMAGES)):
        yield [{name: getattr(entry, name) for name in _SCHEMA.names} for entry in part]


def _count(plan: Plan) -> int:
    return -(-plan.images // PLAN_PART_IMAGES)


def _entries(part: pa.Table, shard: Shard) -> list[Entry]:
    return [Entry(**row) for row in part.slice(shard.start, shard.images).to_pylist()]


def plan_key(number: int) -> str:
    """Of a part of the plan."""
    return f"plan/part-{number:05d}.parquet"


_SIDECARS = (
    *(".xml", ".json", ".txt", ".pdf", ".csv", ".tsv", ".xls", ".xlsx", ".doc", ".docx", ".md", ".log", ".ini", ".xmp"),
    *(".thm", ".aae", ".rtf", ".ods", ".pptx", ".yaml", ".yml", ".hl7", ".lnk", ".db", ".md5", ".sha256", ".crc"),
)
_SYSTEM_FILES = frozenset(
    {".ds_store", "desktop.ini", ".localized", ".nomedia", "zbthumbnail.info", "icon\r", "_success", "dicomdir"}
    | {".directory", ".dropbox", ".bridgesort", ".gitkeep", ".gitignore", ".keep", "autorun.inf"}
)
_SYSTEM_NAMES = ("._", ".nfs", ".fuse_hidden")  # begin so: of macOS, and what is deleted while somebody reads it
_SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "$recycle.bin", "__macosx", ".appledouble", ".thumbnails", ".trashes", ".git"}
    | {".spotlight-v100", ".fseventsd", ".@__thumb", "#snapshot", ".snapshot", "lost+found", ".picasaoriginals"}
    | {"system volume information", ".trash-1000", ".temporaryitems", ".documentrevisions-v100", "@tmp", "_temporary"}
    | {".stfolder", ".stversions", ".dropbox.cache", ".sync"}
)


def is_litter(key: str) -> bool:
    """Whether a file of a folder is no photograph by its name: of a system, or of what copies; or a sidecar."""
    *folders, name = key.casefold().split("/")
    return (
        name in _SYSTEM_FILES
        or name.startswith(_SYSTEM_NAMES)
        or name.endswith(("_$folder$", *_SIDECARS))
        or not _SYSTEM_FOLDERS.isdisjoint(folders)
    )
