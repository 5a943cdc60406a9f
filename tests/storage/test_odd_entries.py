"""What lies in a folder or stands in a manifest and is no file that can be read: one entry each, nothing stuck."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageFailedError, ObjectMissingError, Reason, StoreError, UsageError
from ma_cluster.images.reading import read_photograph
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import Source, open_source
from ma_cluster.storage.store import Entry

NOBODY = 65534


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:  # its address must be short, so it goes by the folder's number
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # reading it would never end


def dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


ODD = [pipe, listening_socket, device, dangling_link, link_to_itself]


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "archive")
    store.put("a.jpg", b"1")
    store.put("z.jpg", b"2")
    return store


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def reason(source: Source, entry: Entry) -> Reason:
    with pytest.raises(ImageFailedError) as caught:
        read_photograph(source, entry, ImageConfig(), lambda data: np.zeros((1, 1, 3), np.uint8))
    return caught.value.reason


@pytest.mark.parametrize("make", ODD)
def test_one_odd_entry_of_a_folder_is_one_missing_photograph(folder: LocalStore, make: Callable[[Path], None]) -> None:
    make(folder.root / "odd.jpg")
    first, odd, last = folder.list()
    assert (first.key, odd, last.key) == ("a.jpg", Entry("odd.jpg", 0, ""), "z.jpg")
    assert reason(folder, odd) is Reason.MISSING


@pytest.mark.parametrize("make", [*ODD, lambda path: path.mkdir(), lambda path: None])
def test_one_odd_row_of_a_manifest_is_one_missing_photograph(folder: LocalStore, make: Callable[[Path], None]) -> None:
    make(folder.root / "odd.jpg")
    folder.put("list.csv", b"key\na.jpg\nodd.jpg\nz.jpg\n")
    source = open_source(f"{folder.url}/list.csv")
    first, odd, last = source.list()
    assert (first.key, odd.key, odd.size, odd.etag, last.key) == ("a.jpg", "odd.jpg", 0, "", "z.jpg")
    assert odd.fault.startswith("line 3 of the manifest: ")
    assert reason(source, odd) is Reason.MISSING


@pytest.mark.parametrize("key", ["k" * 300, "nul\0byte", "a.jpg/below.jpg"])
def test_a_key_that_no_file_can_have_is_one_missing_photograph(folder: LocalStore, key: str) -> None:
    pq.write_table(pa.table({"key": ["a.jpg", key]}), folder.root / "list.parquet")
    source = open_source(f"{folder.url}/list.parquet")
    entry = list(source.list())[1]
    assert (entry.key, entry.size, entry.etag) == (key, 0, "")
    assert reason(source, entry) is reason(source, Entry(key, 0, "")) is Reason.MISSING


def test_a_photograph_that_arrives_after_it_was_planned_is_left_to_a_retry(folder: LocalStore) -> None:
    folder.put("late.jpg", b"3")
    assert reason(folder, Entry("late.jpg", 0, "")) is Reason.CHANGED


def test_a_link_to_a_folder_around_it_is_passed_by(folder: LocalStore) -> None:
    folder.put("deep/b.jpg", b"3")
    (folder.root / "deep/around").symlink_to(folder.root)
    (folder.root / "deep/here").symlink_to(folder.root / "deep")
    assert [entry.key for entry in folder.list()] == ["a.jpg", "deep/b.jpg", "z.jpg"]


def test_a_folder_twice_below_the_source_is_no_circle(folder: LocalStore) -> None:
    folder.put("one/b.jpg", b"3")
    (folder.root / "two").symlink_to(folder.root / "one")
    assert [entry.key for entry in folder.list()] == ["a.jpg", "one/b.jpg", "two/b.jpg", "z.jpg"]


def test_a_folder_that_cannot_be_read_is_one_failure_that_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        store = LocalStore(Path(name))
        store.root.chmod(0o755)
        for key in ("a.jpg", "locked/b.jpg", "z.jpg"):
            store.put(key, b"1")
        (store.root / "locked").chmod(0o000)
        store.put("list.csv", b"key\na.jpg\nlocked/b.jpg\n")
        with as_nobody():
            assert [entry.key for entry in store.list()] == ["a.jpg", "list.csv", "locked/", "z.jpg"]
            assert reason(store, Entry("locked/", 0, "")) is Reason.STORE_ERROR
            source = open_source(f"{store.url}/list.csv")
            assert [entry.etag != "" for entry in source.list()] == [True, False]
            assert reason(source, Entry("locked/b.jpg", 0, "")) is Reason.STORE_ERROR
            with pytest.raises(StoreError, match="Permission denied"):
                list(LocalStore(store.root / "locked").list())
        (store.root / "locked").chmod(0o755)


def test_a_tree_deeper_than_python_recurses_is_walked(folder: LocalStore) -> None:
    deep = folder.root
    for _ in range(sys.getrecursionlimit() + 200):  # two characters each: less than a path may have
        deep /= "d"
        deep.mkdir()
    (deep / "b.jpg").write_bytes(b"3")
    assert [entry.size for entry in folder.list()] == [1, 1, 1]
    (deep / "b.jpg").unlink()
    while deep != folder.root:  # pytest would recurse to clean up
        deep.rmdir()
        deep = deep.parent


def test_a_name_that_is_no_text_is_one_missing_photograph(folder: LocalStore) -> None:
    (folder.root / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"3")
    (odd,) = [entry for entry in folder.list() if not entry.etag]
    assert (odd.key, reason(folder, odd)) == ("caf\\xe9.jpg", Reason.MISSING)


def test_a_pipe_in_place_of_a_manifest_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(UsageError, match="no manifest of this name"):
        list(open_source(str(tmp_path / "list.csv")).list())


@pytest.mark.parametrize("key", ["../up.jpg", "gs://bucket/eye.jpg", "http://localhost/eye.jpg"])
def test_a_row_that_no_store_can_serve_is_one_missing_photograph(folder: LocalStore, key: str) -> None:
    folder.put("a.jpg", b"1")
    folder.put("list.csv", f"key\na.jpg\n{key}\n".encode())
    source = open_source(f"{folder.url}/list.csv")
    there, odd = source.list()
    assert there.etag and (odd.key, odd.etag) == (key, "")
    assert reason(source, odd) is Reason.MISSING


WITHOUT_LINKS = """
import errno, os, sys, time
from pathlib import Path
from ma_cluster.storage.local import LocalStore

def link(*arguments, **options):
    raise OSError(getattr(errno, sys.argv[2]), "no hard links here")

os.link = link
store = LocalStore(Path(sys.argv[1]))
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
print(*[int(store.create(f"parts/{number}", sys.argv[4].encode() * 50_000)) for number in range(40)])
"""


def writers(folder: Path, fault: str, count: int) -> list[list[int]]:
    """Processes that create the same names at the same time, on a file system without hard links."""
    import time

    start = str(time.time() + 1.5)
    command = [sys.executable, "-c", WITHOUT_LINKS, str(folder), fault, start]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(count)]
    return [[int(won) for won in process.communicate(timeout=60)[0].split()] for process in running]


@pytest.mark.parametrize("fault", ["EPERM", "ENOTSUP"])
def test_without_hard_links_a_name_still_has_one_writer(tmp_path: Path, fault: str) -> None:
    won = writers(tmp_path, fault, 3)
    assert [sum(of_name) for of_name in zip(*won, strict=True)] == [1] * 40
    for number, of_name in enumerate(zip(*won, strict=True)):
        assert (tmp_path / f"parts/{number}").read_bytes() == str(of_name.index(1)).encode() * 50_000
    assert len(list((tmp_path / "parts").iterdir())) == 40, "no claims are left"


def test_without_hard_links_the_claim_of_a_writer_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    assert writers(tmp_path, "EPERM", 1) == [[1] * 40]
    (tmp_path / "parts/0").unlink()
    claim = LocalStore(tmp_path).root / "parts" / (".partial-" + sha256(b"0"))
    claim.touch()
    os.utime(claim, (0, 0))
    assert writers(tmp_path, "EPERM", 1) == [[1] + [0] * 39]
    assert not claim.exists()


def sha256(name: bytes) -> str:
    import hashlib

    return hashlib.sha256(name).hexdigest()[:32]


def test_a_key_without_a_file_is_missing_for_head_as_for_get(folder: LocalStore) -> None:
    os.mkfifo(folder.root / "pipe.jpg")
    for attempt in (lambda: folder.head("pipe.jpg"), lambda: folder.get("pipe.jpg")):
        with pytest.raises(ObjectMissingError, match="list the source again"):
            attempt()


NAMES = ("Eye.jpg", "eye.jpg", "\u0153il.jpg", "\xe9.jpg", "e\u0301.jpg")
"""Of which a careless file system, or a careless program, takes some for one."""
IN_ANOTHER_LOCALE = """
import json, sys
from ma_cluster.storage.local import LocalStore
from pathlib import Path
store = LocalStore(Path(sys.argv[1]))
print(json.dumps([sys.getfilesystemencoding(), {e.key: store.get(e.key).decode() for e in store.list()}]))
"""


def test_keys_are_the_same_under_every_locale(tmp_path: Path) -> None:
    """So that a run begun by a terminal goes on from a cron job, whose locale is C."""
    store = LocalStore(tmp_path)
    for number, name in enumerate(NAMES):
        store.put(name, str(number).encode())
    found = {}
    for utf8 in "01":
        environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8}
        command = [sys.executable, "-c", IN_ANOTHER_LOCALE, str(tmp_path)]
        out = subprocess.run(command, env=os.environ | environment, capture_output=True, check=True).stdout
        encoding, read = json.loads(out)
        found[encoding] = read
    written = {name: str(number) for number, name in enumerate(NAMES)}
    assert found == {"utf-8": written, "ascii": written}


def test_a_folder_that_must_not_be_reached_is_told_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "locked" / "eyes").mkdir(parents=True)
    (tmp_path / "locked").chmod(0o000)
    with as_nobody(), pytest.raises(StoreError, match="Permission denied"):
        list(LocalStore(tmp_path / "locked" / "eyes").list())
