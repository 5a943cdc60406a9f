"""What an archive run has to do: the plan, every photograph once, and its shards. No Ray in here.

    plan/part-00000.parquet        key, size, etag; 16,384 rows each, written while the source is listed

A shard is a slice of a plan part. Both listing and cutting hold one part in memory, however large the archive.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import pyarrow as pa

from ma_cluster.archive.parquet import from_parquet, to_parquet
from ma_cluster.errors import RunConflictError
from ma_cluster.storage.store import Entry, Store

PLAN_PART_IMAGES = 16_384
"""Rows of a plan part: a worker that needs a shard reads about a megabyte."""
LARGEST_SHARD_IMAGES = 256
"""More would be lost with a killed worker, fewer would make tiny parts."""
LARGEST_SHARD_BYTES = 2**30
"""A shard of larger photographs has fewer of them, one at least: what is lost with a worker is bounded, too."""
SHARDS_WANTED = 64
"""An archive is cut into at least so many shards where it has the images, so that a fleet is evenly loaded."""
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), metadata={"unit": "", "description": "object key, relative to the source"}),
        pa.field("size", pa.int64(), metadata={"unit": "byte", "description": "of the object"}),
        pa.field("etag", pa.string(), metadata={"unit": "", "description": "the object's version when listed"}),
    ]
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many photographs an archive has, and a digest of all their keys, sizes and versions."""

    images: int
    digest: str


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


def write_plan(entries: Iterable[Entry], dest: Store) -> Plan:
    """Write the photographs into plan parts as they are listed.

    Raises:
        RunConflictError: `dest` holds a part of another listing, from a driver that died while it planned.
    """
    running, images = hashlib.sha256(), 0
    listed = iter(entries)
    while rows := [dataclasses.asdict(entry) for entry in islice(listed, PLAN_PART_IMAGES)]:
        number = images // PLAN_PART_IMAGES
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        if not dest.create(_key(number), to_parquet(table)) and _read_part(dest, number) != table:
            raise RunConflictError(
                "the destination holds a half-written plan of another listing; delete its plan/ or use an empty one"
            )
        running.update(json.dumps(rows).encode())
        images += len(rows)
    return Plan(images, running.hexdigest())


def shards(dest: Store, plan: Plan) -> Iterator[Shard]:
    """All shards of a plan, numbered in its order; they follow from the plan alone."""
    largest = min(LARGEST_SHARD_IMAGES, max(1, plan.images // SHARDS_WANTED))
    number = 0
    for part in range(-(-plan.images // PLAN_PART_IMAGES)):
        sizes = from_parquet(dest.get(_key(part)), ["size"])["size"].to_pylist()
        for start, stop in cut(sizes, largest):
            yield Shard(number, part, start, stop)
            number += 1


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
    return _entries(_read_part(dest, shard.part), shard)


def read_shards(dest: Store, wanted: Iterable[Shard]) -> Iterator[Entry]:
    """The objects of shards in the plan's order; each plan part is read once."""
    for number, of_part in groupby(wanted, key=lambda shard: shard.part):
        table = _read_part(dest, number)
        for shard in of_part:
            yield from _entries(table, shard)


def _read_part(dest: Store, number: int) -> pa.Table:
    return from_parquet(dest.get(_key(number)))


def _entries(part: pa.Table, shard: Shard) -> list[Entry]:
    return [Entry(**row) for row in part.slice(shard.start, shard.images).to_pylist()]


def _key(number: int) -> str:
    return f"plan/part-{number:05d}.parquet"
