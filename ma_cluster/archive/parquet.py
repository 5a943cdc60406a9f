"""Tables of a run as Parquet parts in the object store."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from ma_cluster.errors import StoreError


def to_parquet(table: pa.Table) -> bytes:
    """The table as one file."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table of a file, or some of its columns.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return pq.read_table(io.BytesIO(data), columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise StoreError("a Parquet part of the destination is damaged; restore it, or use an empty one") from error
