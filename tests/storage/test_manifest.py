"""Manifests as the source of an archive, on folders and on a real S3 server."""

from __future__ import annotations

import gzip
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Weed

from ma_cluster.config import KnownField
from ma_cluster.errors import ObjectMissingError, StoreError, UsageError
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import Manifest, Photographs, Source, open_source
from ma_cluster.storage.store import Entry, open_store


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "archive")
    for key in ("left.jpg", "deep/right eye.jpg", "else,where.jpg"):
        store.create(key, key.encode())
    return store


def manifest(folder: LocalStore, *lines: str, name: str = "list.csv") -> Source:
    folder.put(name, "\n".join(["key", *lines, ""]).encode())
    return open_source(f"{folder.url}/{name}")


def test_a_folder_is_its_own_source(folder: LocalStore) -> None:
    assert list(open_source(folder.url).list()) == list(folder.list())


def test_a_csv_names_photographs_in_its_own_order(folder: LocalStore) -> None:
    source = manifest(folder, "left.jpg", '"else,where.jpg"', "deep/right eye.jpg")
    assert [entry.key for entry in source.list()] == ["left.jpg", "else,where.jpg", "deep/right eye.jpg"]
    assert next(source.list()) == folder.head("left.jpg")
    assert source.get("deep/right eye.jpg", max_bytes=100) == b"deep/right eye.jpg"
    assert source.url == f"{folder.url}/list.csv"


def test_keys_may_be_absolute_paths_and_urls(folder: LocalStore, tmp_path: Path) -> None:
    keys = [f"{folder.url}/left.jpg", f"file://{folder.url}/deep/right%20eye.jpg"]
    elsewhere = LocalStore(tmp_path / "lists")
    source = manifest(elsewhere, *keys)
    assert [(entry.key, entry.size) for entry in source.list()] == [(keys[0], 8), (keys[1], 18)]
    assert [source.get(key) for key in keys] == [b"left.jpg", b"deep/right eye.jpg"]


def test_a_parquet_does_as_well(folder: LocalStore) -> None:
    path = Path(folder.url) / "list.parquet"
    pq.write_table(pa.table({"patient": [1, 2], "key": ["left.jpg", "deep/right eye.jpg"]}), path)
    assert [entry.key for entry in open_source(str(path)).list()] == ["left.jpg", "deep/right eye.jpg"]


def test_s3_keys_are_relative_or_urls_of_any_bucket(folder: LocalStore, weed: Weed) -> None:
    bucket = weed.bucket("manifests")
    store = open_store(f"{bucket}/2026")
    store.put("left eye.jpg", b"left")
    store.put("list.csv", f"key\nleft eye.jpg\n{bucket}/2026/list.csv\n{folder.url}/left.jpg\n".encode())
    source = Manifest(f"{bucket}/2026/list.csv")
    found = {entry.key: entry for entry in source.list()}
    assert found["left eye.jpg"] == next(entry for entry in store.list() if entry.key == "left eye.jpg")
    assert [source.get(key, etag=entry.etag) for key, entry in found.items()][::2] == [b"left", b"left.jpg"]
    with pytest.raises(ObjectMissingError):
        source.head("right eye.jpg")


def test_an_url_that_no_object_of_s3_can_have_is_one_missing_photograph(folder: LocalStore, weed: Weed) -> None:
    bucket = weed.bucket("odd-urls")
    folder.put("list.csv", f"key\nleft.jpg\n{bucket}/\ns3://Bad Bucket/x.jpg\n{bucket}/lost.jpg\n".encode())
    first, *faulty = open_source(f"{folder.url}/list.csv").list()
    assert first == folder.head("left.jpg")
    assert [entry.fault.partition(":")[0] for entry in faulty] == [f"line {line} of the manifest" for line in (3, 4, 5)]
    assert ["check the URL" in entry.fault for entry in faulty] == [True, True, False]


def test_a_key_that_leads_to_nothing_is_listed_so_that_it_ends_as_gone(folder: LocalStore) -> None:
    source = manifest(folder, "left.jpg", "nothing.jpg", "deep")
    _, *faulty = source.list()
    assert [replace(entry, fault="") for entry in faulty] == [Entry("nothing.jpg", 0, ""), Entry("deep", 0, "")]
    assert [entry.fault.partition(":")[0] for entry in faulty] == [f"line {line} of the manifest" for line in (3, 4)]
    with pytest.raises(ObjectMissingError):
        source.get("nothing.jpg", etag="")


def test_many_keys_come_in_order(folder: LocalStore) -> None:
    keys = [f"{number}.jpg" for number in range(3000)]
    assert [entry.key for entry in manifest(folder, *keys).list()] == keys


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("eye\nleft.jpg\n", "no column `key`.*its columns: `eye`"),
        ("", "no column `key`"),
        ("key\n\xe9.jpg\n", "save it as UTF-8"),
    ],
)
def test_a_wrong_csv_is_refused(folder: LocalStore, text: str, fault: str) -> None:
    folder.put("list.csv", text.encode("latin-1"))
    with pytest.raises(UsageError, match=fault):
        list(open_source(f"{folder.url}/list.csv").list())


def test_a_wrong_parquet_is_refused(folder: LocalStore) -> None:
    folder.put("list.parquet", b"key\nleft.jpg\n")
    with pytest.raises(UsageError, match="not what its name ends in"):
        list(open_source(f"{folder.url}/list.parquet").list())


TABLE = "{column}{s}eye\r\nleft.jpg{s}OD\r\n{s}\r\n\r\ndeep/right eye.jpg{s}OS\r\n"


@pytest.mark.parametrize("column", ["key", "Key", " PATH ", "image", "FileName", "url"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_table_is_read_as_spreadsheets_write_it(
    folder: LocalStore, column: str, separator: str, encoding: str
) -> None:
    data = TABLE.format(column=column, s=separator).encode(encoding)
    folder.put("list.csv", data)
    folder.put("list.csv.gz", gzip.compress(data))
    for name in ("list.csv", "list.csv.gz"):
        entries = list(open_source(f"{folder.url}/{name}").list())
        assert [entry.key for entry in entries] == ["left.jpg", "deep/right eye.jpg"]
        assert all(entry.size for entry in entries)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sep=;\npath;x\nleft.jpg;1\nlost.jpg;2\n", 4),
        ("\n\r\npath\nleft.jpg\nlost.jpg\n", 5),
        ("path|x\nleft.jpg|1\nlost.jpg|2\n", 3),
        ("path , x\n left.jpg , 1\nlost.jpg , 2\n", 3),
        ('"Path","x"\n"left.jpg","1"\n"lost.jpg","2"\n', 3),
        ("path\rleft.jpg\rlost.jpg\r", 3),
        (f"path,drawn\nleft.jpg,{200_000 * '1'}\nlost.jpg,\n", 3),
    ],
)
def test_a_table_is_read_as_other_programs_write_it(folder: LocalStore, text: str, line: int) -> None:
    folder.put("list.csv", text.encode())
    found, lost = open_source(f"{folder.url}/list.csv").list()
    assert found == folder.head("left.jpg")
    assert (lost.key, lost.fault.partition(":")[0]) == ("lost.jpg", f"line {line} of the manifest")


def test_the_cure_of_a_path_as_windows_writes_it_is_told(folder: LocalStore) -> None:
    folder.put("list.csv", b"key\nleft.jpg\ndeep\\right eye.jpg\n")
    found, lost = open_source(f"{folder.url}/list.csv").list()
    assert found == folder.head("left.jpg")
    assert "line 3 of the manifest" in lost.fault and "write / where" in lost.fault


@pytest.mark.parametrize("name", ["left.jpg", "list.txt", "list.tsv.gz"])
def test_a_source_that_is_a_file_and_no_list_is_told_so(folder: LocalStore, name: str) -> None:
    folder.put(name, b"key\nleft.jpg\n")
    with pytest.raises(StoreError, match="the source is a file: give its folder, or a list"):
        list(open_source(f"{folder.url}/{name}").list())


def test_a_wrong_row_costs_one_photograph_and_says_its_line_as_a_spreadsheet_shows_it(folder: LocalStore) -> None:
    folder.put("list.csv", b'key,note\n\nleft.jpg,"two\nlines"\nleft.jpg,\n,1\ngs://bucket/eye.jpg,\n')
    first, *faulty = open_source(f"{folder.url}/list.csv").list()
    assert first == folder.head("left.jpg")
    assert [(entry.key, entry.etag) for entry in faulty] == [
        ("left.jpg#line=4", ""),
        ("#line=5", ""),
        ("gs://bucket/eye.jpg", ""),
    ]
    said = [
        "line 4 of the manifest: it repeats",
        "line 5 of the manifest: it has no key",
        "line 6 .*gs:// is not a store",
    ]
    assert all(re.match(text, entry.fault) for text, entry in zip(said, faulty, strict=True))


def told(folder: LocalStore, field: KnownField, header: str, cells: str) -> Entry:
    """What is listed of a photograph whose row says something of its field."""
    folder.put("list.csv", f"key;{header}\nleft.jpg;{cells}\n".encode())
    (entry,) = Photographs(f"{folder.url}/list.csv", field).open().list()
    return entry


@pytest.mark.parametrize(
    ("field", "header", "cells", "expected"),
    [
        (KnownField(), "eye", "OD", (0.0, False)),
        (KnownField(45.0), "eye", "OD", (45.0, False)),
        (KnownField(45.0), "field_degrees", "", (45.0, False)),
        (KnownField(45.0), "Field_Degrees", " 30 ", (30.0, False)),
        (KnownField(), "field_degrees", "42,5", (42.5, False)),
        (KnownField(), "no_surround;field_degrees", "Yes;35", (35.0, True)),
        (KnownField(45.0, True), "no_surround;field_degrees", "no;35", (35.0, False)),
        (KnownField(45.0, True), "field_degrees", "", (45.0, True)),
    ],
)
def test_a_row_says_more_of_a_field_than_the_run(
    folder: LocalStore, field: KnownField, header: str, cells: str, expected: tuple[float, bool]
) -> None:
    entry = told(folder, field, header, cells)
    assert (entry.field_degrees, entry.no_surround, entry.fault) == (*expected, "")


@pytest.mark.parametrize("cells", ["wide;", "5;", "nan;", "400;", ";yes", "45;perhaps"])
def test_a_field_that_cannot_be_is_that_rows_fault(folder: LocalStore, cells: str) -> None:
    entry = told(folder, KnownField(), "field_degrees;no_surround", cells)
    assert entry.etag and entry.fault.startswith("line 2 of the manifest: ")


def test_a_row_whose_photograph_is_missing_keeps_its_words(folder: LocalStore) -> None:
    folder.put("list.csv", b"key,field_degrees,eye,visit\nlost.jpg,30,R,2\ngone.jpg,wide,R,2\n")
    lost, gone = Photographs(f"{folder.url}/list.csv", KnownField(45.0)).open().list()
    assert (lost.field_degrees, lost.eye, lost.visit, lost.etag) == (30.0, "R", "2", "")
    assert lost.fault.startswith("line 2 of the manifest: no file that can be read")
    assert gone.etag == "" and re.match("line 3 of the manifest: field_degrees is .*; nor is there", gone.fault)


def test_a_folder_has_the_field_that_is_known_of_it(folder: LocalStore) -> None:
    source = Photographs(folder.url, KnownField(45.0)).open()
    assert {entry.field_degrees for entry in source.list()} == {45.0}
    assert replace(source.head("left.jpg"), field_degrees=0.0) == folder.head("left.jpg")
    assert source.get("left.jpg") == b"left.jpg"


def test_a_parquet_says_the_field_of_its_photographs(folder: LocalStore) -> None:
    table = pa.table(
        {"key": ["left.jpg", "else,where.jpg"], "field_degrees": [45.0, None], "no_surround": [True, False]}
    )
    pq.write_table(table, Path(folder.url) / "list.parquet")
    entries = list(open_source(f"{folder.url}/list.parquet").list())
    assert [(entry.field_degrees, entry.no_surround) for entry in entries] == [(45.0, True), (0.0, False)]


def test_a_key_may_lead_above_the_folder_of_a_local_manifest(folder: LocalStore) -> None:
    folder.put("lists/2026/list.csv", b"key\n../../left.jpg\n")
    source = open_source(f"{folder.url}/lists/2026/list.csv")
    (entry,) = source.list()
    assert (entry.key, source.get(entry.key)) == ("../../left.jpg", b"left.jpg")
