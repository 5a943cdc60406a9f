"""S3Store against a real S3 server whose replies break on their way: late, slow, cut off, wrong, or lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import boto3
import pytest
from fault_proxy import Fault, FaultProxy, Kind, fault_proxy
from servers import Weed, free_ports

from ma_cluster.errors import ObjectChangedError, ObjectMissingError, StoreError
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.network import NetworkLimits
from ma_cluster.storage.s3 import S3Store

HASTY = NetworkLimits(stall_s=1.0, slowest_bytes_per_s=8192.0, deadline_s=20.0, attempts=3, first_pause_s=0.02)
EYE = os.urandom(200_000)
ALWAYS = 1_000
_folders = count()


@pytest.fixture(scope="module")
def bucket(weed: Weed) -> str:
    return weed.bucket("faults").removeprefix("s3://")


@pytest.fixture
def proxy(weed: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with fault_proxy(weed.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture
def behind(bucket: str, proxy: FaultProxy) -> S3Store:
    """The store that faults happen to, with eye.jpg in it."""
    store = S3Store(bucket, f"folder-{next(_folders)}", HASTY)
    store.put("eye.jpg", EYE)
    return store


ACTIONS: dict[str, tuple[str, Callable[[S3Store], object], object]] = {
    "get": ("GET", lambda store: store.get("eye.jpg"), EYE),
    "head": ("HEAD", lambda store: store.head("eye.jpg").size, len(EYE)),
    "list": ("GET", lambda store: [entry.key for entry in store.list()], ["eye.jpg"]),
    "put": ("PUT", lambda store: store.put("eye.jpg", b"new"), None),
    "create": ("PUT", lambda store: store.create("new.jpg", b"new"), True),
}


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_burst_of_server_errors_is_outlasted(
    behind: S3Store, proxy: FaultProxy, action: str, status: int, code: str
) -> None:
    method, act, answer = ACTIONS[action]
    proxy.faults.append(Fault(Kind.ERROR, method, behind.bucket, times=2, status=status, code=code))
    assert act(behind) == answer
    assert proxy.broken == {Kind.ERROR: 2}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_server_that_stays_broken_is_a_store_error(behind: S3Store, proxy: FaultProxy, action: str) -> None:
    method, act, _ = ACTIONS[action]
    proxy.faults.append(Fault(Kind.ERROR, method, behind.bucket, times=ALWAYS))
    with pytest.raises(StoreError, match=r"S3 could not (read|list|write): (SlowDown|503)"):
        act(behind)
    assert proxy.broken == {Kind.ERROR: HASTY.attempts}


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.TRICKLE, Kind.STALL, Kind.SILENCE, Kind.LONGER, Kind.SHORTER])
def test_a_body_that_breaks_off_is_read_again(behind: S3Store, proxy: FaultProxy, kind: Kind) -> None:
    """Cut off, slow, or with a wrong length. At 1 KB/s the body would take 200 s, with no single byte late."""
    proxy.faults.append(Fault(kind, "GET", "eye.jpg", times=1))
    began = time.monotonic()
    assert behind.get("eye.jpg") == EYE
    assert time.monotonic() - began < 15
    assert proxy.broken == {kind: 1}


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.STALL, Kind.LONGER, Kind.SHORTER])
def test_a_body_that_always_breaks_off_is_a_store_error(behind: S3Store, proxy: FaultProxy, kind: Kind) -> None:
    proxy.faults.append(Fault(kind, "GET", "eye.jpg", times=ALWAYS))
    with pytest.raises(StoreError, match=r"S3 could not read: \w+Error; check network"):
        behind.get("eye.jpg")
    assert proxy.broken == {kind: HASTY.attempts}


def test_a_create_whose_reply_was_lost_says_that_it_has_written(behind: S3Store, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(Kind.LOST, "PUT", "part-0", times=1))
    assert behind.create("part-0", b"ours") is True
    assert proxy.broken == {Kind.LOST: 1}
    assert behind.get("part-0") == b"ours"


def test_a_create_that_came_second_says_so_though_its_reply_was_lost(behind: S3Store, proxy: FaultProxy) -> None:
    behind.put("part-0", b"theirs")
    proxy.faults.append(Fault(Kind.LOST, "PUT", "part-0", times=1))
    assert behind.create("part-0", b"ours") is False
    assert behind.get("part-0") == b"theirs"


def test_a_put_whose_reply_was_lost_is_done_again(behind: S3Store, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(Kind.LOST, "PUT", "eye.jpg", times=2))
    behind.put("eye.jpg", b"new")
    assert behind.get("eye.jpg") == b"new"


def test_a_server_that_is_away_for_a_while_is_waited_for(
    behind: S3Store, weed: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are refused, as during a restart."""
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    away = S3Store(behind.bucket, behind.prefix.strip("/"), NetworkLimits(attempts=6, first_pause_s=0.2))
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(away.get, "eye.jpg")
        time.sleep(0.7)
        with fault_proxy(weed.endpoint, port):
            assert read.result() == EYE


def test_a_server_that_goes_away_between_two_answers_is_waited_for_beyond_the_attempts(
    behind: S3Store, weed: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for two minutes of a run; one that has never answered is given up sooner."""
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    limits = NetworkLimits(attempts=2, first_pause_s=0.05, longest_pause_s=0.1, deadline_s=20.0)
    away = S3Store(behind.bucket, behind.prefix.strip("/"), limits)
    with pytest.raises(StoreError, match="EndpointConnectionError"):
        away.get("eye.jpg")
    with fault_proxy(weed.endpoint, port):
        assert away.get("eye.jpg") == EYE
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(away.get, "eye.jpg")
        time.sleep(2.0)
        with fault_proxy(weed.endpoint, port):
            assert read.result() == EYE


def test_a_server_that_stays_away_is_given_up_at_the_deadline(
    behind: S3Store, weed: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    limits = NetworkLimits(attempts=2, first_pause_s=0.05, longest_pause_s=0.1, deadline_s=1.0)
    away = S3Store(behind.bucket, behind.prefix.strip("/"), limits)
    with fault_proxy(weed.endpoint, port):
        assert away.get("eye.jpg") == EYE
    began = time.monotonic()
    with pytest.raises(StoreError, match="check network"):
        away.get("eye.jpg")
    assert 0.8 < time.monotonic() - began < 15


def test_a_server_that_knows_no_conditional_writes_is_named_as_such(behind: S3Store, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(Kind.ERROR, "PUT", "part-0", times=ALWAYS, status=501, code="NotImplemented"))
    with pytest.raises(StoreError, match="use a server that honours If-None-Match"):
        behind.create("part-0", b"ours")


@pytest.fixture
def wrong_secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What boto3 has read from the variables it keeps, until it is set up anew."""
    with monkeypatch.context() as changed:
        changed.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
        boto3.setup_default_session()
        yield
    boto3.setup_default_session()


@pytest.mark.parametrize("action", ACTIONS)
def test_credentials_that_are_refused_are_named_at_once(bucket: str, wrong_secret: None, action: str) -> None:
    """Asked of the real server."""
    stranger = S3Store(bucket, "folder", HASTY)
    with pytest.raises(StoreError, match=r"S3 refused to (read|list|write): (SignatureDoesNotMatch|403); renew"):
        ACTIONS[action][1](stranger)


def test_credentials_that_are_refused_end_a_plan_and_the_line_is_told(
    bucket: str, wrong_secret: None, tmp_path: Path
) -> None:
    """A missing object is answered so, too, where nobody may list: so the line may be what is wrong."""
    (tmp_path / "left.jpg").write_bytes(EYE)
    (tmp_path / "list.csv").write_text(f"key\nleft.jpg\ns3://{bucket}/left.jpg\n")
    with pytest.raises(StoreError, match=r"line 3 of the manifest: .*; renew the credentials.*; without s3:ListBucket"):
        list(open_source(str(tmp_path / "list.csv")).list())


def test_credentials_that_have_expired_are_named_at_once(behind: S3Store, proxy: FaultProxy) -> None:
    """S3 says so with status 400."""
    proxy.faults.append(Fault(Kind.ERROR, "GET", "eye.jpg", times=ALWAYS, status=400, code="ExpiredToken"))
    with pytest.raises(StoreError, match="ExpiredToken; renew the credentials"):
        behind.get("eye.jpg")
    assert proxy.broken == {Kind.ERROR: 1}


def test_an_object_in_glacier_is_named_with_the_cure(behind: S3Store, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(Kind.ERROR, "GET", "eye.jpg", times=ALWAYS, status=403, code="InvalidObjectState"))
    with pytest.raises(StoreError, match="restore the object"):
        behind.get("eye.jpg")


def test_an_object_replaced_or_deleted_after_it_was_listed_is_noticed(behind: S3Store) -> None:
    (entry,) = behind.list()
    behind.put("eye.jpg", b"another")
    for etag in (entry.etag, ""):  # "": a manifest named it before it was there
        with pytest.raises(ObjectChangedError, match="replaced"):
            behind.get("eye.jpg", etag=etag)
    boto3.client("s3").delete_object(Bucket=behind.bucket, Key=f"{behind.prefix}eye.jpg")
    with pytest.raises(ObjectMissingError, match="gone"):
        behind.get("eye.jpg", etag=entry.etag)


def test_pages_of_a_listing_are_asked_for_again_and_no_key_is_lost_or_doubled(
    behind: S3Store, proxy: FaultProxy
) -> None:
    """1,050 keys, pages of 1,000; the second page breaks, and so does the first."""
    names = [f"{number:04d}.jpg" for number in range(1_049)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: behind.put(name, b"1"), names))
    proxy.faults.append(Fault(Kind.RESET, "GET", "continuation-token", times=1))
    proxy.faults.append(Fault(Kind.RESET, "GET", "list-type", times=1))
    assert [entry.key for entry in behind.list()] == [*names, "eye.jpg"]
    assert proxy.broken == {Kind.RESET: 2}


def test_a_clock_that_is_off_is_not_taken_for_wrong_credentials(behind: S3Store, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(Kind.ERROR, "GET", "eye.jpg", times=ALWAYS, status=403, code="RequestTimeTooSkewed"))
    with pytest.raises(StoreError, match="RequestTimeTooSkewed; set this machine's clock"):
        behind.get("eye.jpg")
