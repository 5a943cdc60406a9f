"""Tables as Parquet files in memory.

All in the calling thread: a thread of Arrow's pool that lets go of a file's bytes while Python ends aborts the process,
once its work is done (`PyBuffer`'s destructor asks for the interpreter's lock, and is not given it).
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

DAMAGED = (pa.ArrowException, OSError)
"""What reading raises where the file is damaged, or none."""


def to_parquet(table: pa.Table) -> bytes:
    """The table as one file, with a checksum of each page."""
    out = io.BytesIO()
    with parquet_writer(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def parquet_writer(out: io.BytesIO, schema: pa.Schema) -> pq.ParquetWriter:
    """What writes tables one after the other as one file, with a checksum of each page."""
    return pq.ParquetWriter(out, schema, compression="zstd", write_page_checksum=True)


def open_parquet(data: bytes) -> pq.ParquetFile:
    """The file; what reads on from it is to be told `use_threads=False`."""
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True)


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table of a file, or those of some columns that it has."""
    return open_parquet(data).read(columns, use_threads=False)
