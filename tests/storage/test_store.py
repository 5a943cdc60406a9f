"""Both kinds of store keep the same promises: order, caps, create-only writes, and keys nobody would wish for."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from ma_cluster.errors import (
    ImageRefusedError,
    ObjectChangedError,
    ObjectMissingError,
    Reason,
    StoreError,
    UsageError,
)
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.s3 import S3Store
from ma_cluster.storage.store import KeySet, Store, open_store

COMMON_KEYS = ["a", "deep/er/b.jpg", "with space.jpg", "+ % # ?&=", "%2e%2e/c", "Ä/ä.jpg", "a\u0308", "NA", "tab\t"]
LOCAL_KEYS = ["new\nline", "-rf", "~", "a\\b"]  # moto finds no object under a key with a line break
S3_KEYS = [*COMMON_KEYS, "../up", "../../etc/passwd", "/absolute", "a//b", "a/./b", "folder/", "\u202e.jpg", "k" * 1017]


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Store:
    settings_of_aws = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings_of_aws.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{abs(hash(request.node.name)):x}"[:40]
    boto3.client("s3").create_bucket(Bucket=bucket)
    store = open_store(f"s3://{bucket}/prefix")
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    (tmp_path / "root").mkdir()
    return LocalStore(tmp_path / "root")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    store: Store = request.getfixturevalue(request.param)
    return store


def keys(store: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix)]


@pytest.mark.parametrize("key", COMMON_KEYS)
def test_any_key_can_be_written_listed_and_read(store: Store, key: str) -> None:
    store.put(key, b"bytes")
    assert keys(store) == [key]
    assert store.get(key) == b"bytes"
    assert store.create(key, b"other") is False
    assert store.get(key) == b"bytes"


@pytest.mark.parametrize("key", LOCAL_KEYS)
def test_any_file_name_can_be_written_listed_and_read(local: LocalStore, key: str) -> None:
    assert local.create(key, b"bytes") is True
    assert keys(local) == [key]
    assert local.get(key) == b"bytes"


@pytest.mark.parametrize("key", S3_KEYS)
def test_a_key_of_s3_is_never_interpreted(s3: S3Store, key: str) -> None:
    s3.put("neighbour", b"untouched")
    assert s3.create(key, b"bytes") is True
    assert sorted(keys(s3)) == sorted([key, "neighbour"])
    assert (s3.get(key), s3.get("neighbour")) == (b"bytes", b"untouched")


@pytest.mark.parametrize("key", ["../up", "a/../../up", "/absolute"])
def test_a_key_cannot_leave_the_folder_of_a_local_store(local: LocalStore, key: str) -> None:
    for attempt in (lambda: local.put(key, b""), lambda: local.create(key, b""), lambda: local.get(key)):
        with pytest.raises(UsageError, match="must stay inside"):
            attempt()
    assert list(local.root.parent.iterdir()) == [local.root]


@pytest.mark.parametrize("key", ["nul\0byte", "k" * 300])
def test_a_key_the_file_system_cannot_hold_is_a_store_error(local: LocalStore, key: str) -> None:
    for attempt in (lambda: local.put(key, b""), lambda: local.create(key, b""), lambda: local.get(key)):
        with pytest.raises(StoreError):
            attempt()


def test_entries_tell_size_and_etag(store: Store) -> None:
    store.put("a", b"12345")
    (entry,) = store.list()
    assert entry.size == 5
    assert store.get("a", etag=entry.etag) == b"12345"


def test_listing_is_sorted_by_key_in_both_stores(store: Store) -> None:
    names = ["b", "a/2", "a/1", "a.jpg", "a0", "a-1/x", "ä", "Z"]
    for name in names:
        store.put(name, b"1")
    found = keys(store)
    assert found == sorted(found)
    assert keys(store, "a/") == ["a/1", "a/2"]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.text("ab.-/0Ä", min_size=1, max_size=6).filter(lambda key: "//" not in key)))
def test_any_tree_of_files_is_listed_in_the_order_of_its_keys(
    tmp_path_factory: pytest.TempPathFactory, tree: set[str]
) -> None:
    local = LocalStore(tmp_path_factory.mktemp("tree"))
    written = set()
    for key in sorted(tree):
        parts = key.strip("/").split("/")
        ancestors = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        name = "/".join(parts)
        taken = any(other.startswith(f"{name}/") for other in written)
        if name and not ({".", ".."} & set(parts)) and not (ancestors & written) and not taken:
            local.put(name, b"")
            written.add(name)
    assert keys(local) == sorted(written)


def test_a_prefix_lists_only_what_starts_with_it(store: Store) -> None:
    for key in ("plan/part-0", "plan/part-1", "plan-b/x", "masks/plan/x"):
        store.put(key, b"1")
    assert keys(store, "plan/") == ["plan/part-0", "plan/part-1"]
    assert keys(store, "plan/part-1") == ["plan/part-1"]
    assert keys(store, "nothing/") == []


def test_stores_of_neighbouring_prefixes_do_not_see_each_other(s3: S3Store) -> None:
    s3.put("a", b"1")
    open_store(f"s3://{s3.bucket}/prefix2").put("b", b"2")
    assert keys(s3) == ["a"]
    assert keys(open_store(f"s3://{s3.bucket}")) == ["prefix/a", "prefix2/b"]


def test_more_keys_than_a_page_holds_are_listed_once_each_in_order(s3: S3Store) -> None:
    names = [f"{number:04d}.jpg" for number in range(1_050)]
    behind_the_server = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for name in names:
        behind_the_server.put_object(s3.bucket, f"prefix/{name}", b"1")
    assert keys(s3) == names


def test_folder_markers_of_a_console_are_no_objects(s3: S3Store) -> None:
    s3.put("folder/", b"")
    s3.put("folder/a", b"1")
    assert keys(s3) == ["folder/a"]


def test_a_missing_object_is_missing(store: Store) -> None:
    store.put("a", b"1")
    for key in ("b", "a/b"):
        with pytest.raises(ObjectMissingError, match="list the source again"):
            store.get(key)


def test_a_key_that_no_object_can_have_is_missing(s3: S3Store) -> None:
    with pytest.raises(ObjectMissingError, match="so long a key"):
        s3.head("ä" * 600)


def test_a_larger_object_than_allowed_is_refused_and_one_of_the_size_is_read(store: Store) -> None:
    store.put("a", b"12345")
    assert store.get("a", max_bytes=5) == b"12345"
    with pytest.raises(ImageRefusedError) as caught:
        store.get("a", max_bytes=4)
    assert caught.value.reason is Reason.TOO_LARGE


def test_an_object_replaced_since_it_was_listed_is_noticed(store: Store) -> None:
    store.put("a", b"first")
    (entry,) = store.list()
    store.put("a", b"second")
    with pytest.raises(ObjectChangedError, match="replaced"):
        store.get("a", etag=entry.etag)


def test_put_replaces_and_create_does_not(store: Store) -> None:
    assert store.create("a", b"1") is True
    assert store.create("a", b"2") is False
    assert store.get("a") == b"1"
    store.put("a", b"3")
    assert store.get("a") == b"3"


@pytest.mark.parametrize("key", ["part-0", "deep/er/Ä ä+%#?.jpg"])
def test_an_object_that_is_moved_has_the_other_key_alone(store: Store, key: str) -> None:
    store.put(key, b"1")
    store.move(key, f"damaged/0001/{key}")
    assert keys(store) == [f"damaged/0001/{key}"]
    assert store.get(f"damaged/0001/{key}") == b"1"
    with pytest.raises(ObjectMissingError):
        store.move(key, f"damaged/0002/{key}")


def test_a_race_to_create_has_one_winner_whose_bytes_stay(local: LocalStore) -> None:
    for round_number in range(20):
        start, key = threading.Barrier(8), f"race/{round_number}"

        def contend(runner: int, start: threading.Barrier = start, key: str = key) -> bool:
            start.wait()
            return local.create(key, bytes([runner]) * 10_000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(contend, range(8)))
        assert won.count(True) == 1
        assert local.get(key) == bytes([won.index(True)]) * 10_000
    assert len(list((local.root / "race").iterdir())) == 20


def test_files_being_written_are_not_listed(local: LocalStore) -> None:
    local.put("a", b"1")
    (local.root / ".partial-abc").write_bytes(b"half")
    assert keys(local) == ["a"]


def test_links_are_followed(local: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b").write_bytes(b"2")
    (local.root / "linked").symlink_to(tmp_path / "elsewhere")
    assert keys(local) == ["linked/b"]
    assert local.get("linked/b") == b"2"


def test_a_folder_is_no_object(local: LocalStore) -> None:
    local.put("folder/a", b"1")
    for attempt in (lambda: local.get("folder"), lambda: local.put("folder", b"2")):
        with pytest.raises(StoreError):
            attempt()
    assert keys(local) == ["folder/a"]
    assert [path.name for path in local.root.iterdir()] == ["folder"]


def test_a_destination_that_cannot_be_written_is_a_store_error(local: LocalStore) -> None:
    local.put("file", b"1")
    for attempt in (lambda: local.put("file/a", b""), lambda: local.create("file/a", b"")):
        with pytest.raises(StoreError, match="cannot be written"):
            attempt()


def test_a_source_that_is_not_there_is_a_store_error(tmp_path: Path, s3: S3Store) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        keys(LocalStore(tmp_path / "nowhere"))
    with pytest.raises(StoreError, match="NoSuchBucket"):
        keys(open_store("s3://no-such-bucket/x"))


@pytest.mark.parametrize(
    ("url", "root"),
    [("/data/x", "/data/x"), ("file:///data/a%20b", "/data/a b"), ("file:///data/100%25", "/data/100%")],
)
def test_local_urls_lead_to_their_folder(url: str, root: str) -> None:
    store = open_store(url)
    assert isinstance(store, LocalStore)
    assert store.root == Path(root)
    assert open_store(store.url).url == store.url


@pytest.mark.parametrize("url", ["~nosuch/x", "/data/a\0b", "file:///data/a%00b"])
def test_a_path_that_is_none_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="no path of a folder"):
        open_store(url)


def test_a_path_of_links_in_a_circle_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(UsageError, match="links in a circle"):
        open_store(tmp_path / "one/x")


def test_a_folder_has_one_url_however_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = ["link", "./link/", "real/../link", "~/link", f"file://{tmp_path}/link", str(tmp_path / "real")]
    assert {open_store(way).url for way in ways} == {str(tmp_path.resolve() / "real")}


@pytest.mark.parametrize("url", ["http://host/x", "gs://bucket/x", "s3://", "s3:///prefix", "file://host/x", "://x"])
def test_urls_of_no_known_store_are_usage_errors(url: str) -> None:
    with pytest.raises(UsageError):
        open_store(url)


def test_an_endpoint_that_is_no_url_is_a_usage_error(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    for attempt in (lambda store: store.get("a"), lambda store: list(store.list())):
        with pytest.raises((UsageError, StoreError), match="AWS_ENDPOINT_URL"):
            attempt(open_store(s3.url))


def test_a_store_travels_between_processes(store: Store) -> None:
    store.put("a", b"1")
    assert store.get("a") == b"1"
    copy = pickle.loads(pickle.dumps(store))
    assert copy.url == store.url
    assert copy.get("a") == b"1"


def test_errors_of_s3_never_hold_the_key(s3: S3Store) -> None:
    with pytest.raises(StoreError) as caught:
        s3.get("patient-name.jpg")
    assert "patient" not in str(caught.value)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=3)), st.text(max_size=3))
def test_a_key_set_is_a_set_of_whatever_text(keys, other):
    known = set[str]()
    with closing(KeySet()) as found:
        for key in keys:
            assert found.add(key) == (key not in known)
            known.add(key)
        assert all(key in found for key in known)
        assert (other in found) == (other in known)


FILLED = """
import resource
from ma_cluster.storage.store import KeySet
resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
found = KeySet()
for number in range(10**6):
    found.add(f"{number:0100d}")
"""


def test_a_full_temporary_folder_is_told() -> None:
    done = subprocess.run([sys.executable, "-c", FILLED], capture_output=True, text=True)
    assert "StoreError: the temporary folder is full" in done.stderr
