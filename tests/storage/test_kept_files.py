"""What a node keeps of stores: fetched once however many ask, judged whenever it is read."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ma_cluster.errors import ObjectMissingError, StoreError
from ma_cluster.storage.store import cache_folder, kept


class Shelf:
    """A store of one file that counts how often it is asked."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, 0

    def fetch(self) -> bytes:
        self.asked += 1
        return self.data


def right(data: bytes) -> bool:
    return data == b"right"


def test_of_many_that_ask_at_once_one_fetches(tmp_path: Path) -> None:
    shelf, begin = Shelf(b"right"), threading.Barrier(8)

    def ask(_: int) -> bytes:
        begin.wait()
        return kept(tmp_path / "models" / "file", right, shelf.fetch)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(8))) == {b"right"}
    assert shelf.asked == 1


def test_a_file_that_was_damaged_is_fetched_anew(tmp_path: Path) -> None:
    shelf, path = Shelf(b"right"), tmp_path / "file"
    path.write_bytes(b"wrong")
    assert kept(path, right, shelf.fetch) == path.read_bytes() == b"right"
    assert kept(path, right, shelf.fetch) == b"right"
    assert shelf.asked == 1


def test_what_is_not_right_is_returned_and_not_kept(tmp_path: Path) -> None:
    assert kept(tmp_path / "file", right, Shelf(b"wrong").fetch) == b"wrong"
    assert not (tmp_path / "file").exists()


def test_what_cannot_be_fetched_is_the_stores_error(tmp_path: Path) -> None:
    def gone() -> bytes:
        raise ObjectMissingError("gone")

    with pytest.raises(ObjectMissingError):
        kept(tmp_path / "file", right, gone)
    assert kept(tmp_path / "file", right, Shelf(b"right").fetch) == b"right"


def test_a_cache_that_cannot_be_written_says_how_to_name_another(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"a file, no folder")
    with pytest.raises(StoreError, match="set MA_CLUSTER_CACHE to another folder"):
        kept(tmp_path / "taken" / "file", right, Shelf(b"right").fetch)


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MA_CLUSTER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder() == Path("~/.cache/ma_cluster").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/ma_cluster")
    monkeypatch.setenv("MA_CLUSTER_CACHE", "/scratch")
    assert cache_folder() == Path("/scratch")
