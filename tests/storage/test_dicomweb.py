"""A DICOMweb server as a source and a sink: a real Orthanc, whose replies may break, and one that answers as told."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from dicom_files import dicom_file, key_of
from fault_proxy import Fault, FaultProxy, Kind, fault_proxy
from photographs import noise_photograph

from ma_cluster.config import ImageConfig, SplitConfig
from ma_cluster.errors import ImageRefusedError, ObjectChangedError, ObjectMissingError, Reason, StoreError, UsageError
from ma_cluster.images.datasets import read_graded, read_object
from ma_cluster.images.decode import decode
from ma_cluster.storage.dicomweb import OWN_SERIES, DicomWeb
from ma_cluster.storage.manifest import open_source, url_of
from ma_cluster.storage.network import NetworkLimits
from ma_cluster.storage.store import open_store

RGB = noise_photograph((260, 260))
HASTY = NetworkLimits(stall_s=1.0, deadline_s=20.0, attempts=4, first_pause_s=0.02)
DAY, OTHER_DAY = "20310305", "20310306"
PHOTOGRAPHS = [dicom_file(RGB, "jpeg", number, StudyDate=DAY) for number in range(501, 504)]
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


@pytest.fixture(scope="module")
def server(orthanc: str) -> DicomWeb:
    """Three photographs of one day, one of another, and what is no photograph."""
    web = DicomWeb(f"dicomweb+{orthanc}")
    files = [*PHOTOGRAPHS, dicom_file(RGB, "jpeg", 510, StudyDate=OTHER_DAY)]
    files += [dicom_file(RGB, "jpeg", 511, StudyDate=DAY, SeriesDescription=OWN_SERIES)]
    files += [dicom_file(RGB, "explicit", 512, StudyDate=DAY, SOPClassUID=SEGMENTATION)]
    for data in files:
        assert web.create(key_of(data), data)
    return web


@pytest.fixture
def proxy(orthanc: str, server: DicomWeb) -> Iterator[FaultProxy]:
    with fault_proxy(orthanc) as between:
        yield between


def through(proxy: FaultProxy) -> DicomWeb:
    return DicomWeb(f"dicomweb+{proxy.endpoint}/dicom-web?StudyDate={DAY}", HASTY)


def test_a_listing_holds_the_photographs_that_match_and_counts_what_is_none(orthanc: str, server: DicomWeb) -> None:
    of_a_day = open_source(f"dicomweb+{orthanc}?StudyDate={DAY}")
    assert isinstance(of_a_day, DicomWeb)
    listed = list(of_a_day.list())
    assert sorted(entry.key for entry in listed) == sorted(key_of(data) for data in PHOTOGRAPHS)
    assert all(entry.etag == entry.key.rpartition("/")[2] and not entry.size for entry in listed)
    assert of_a_day.skipped == 2
    assert key_of(dicom_file(RGB, "jpeg", 510)) in {entry.key for entry in server.list()}


def test_where_a_photograph_lies_is_enough_to_train_with_it(orthanc: str, server: DicomWeb, tmp_path: Path) -> None:
    """Of a listing that was asked for with a query, and of a manifest; as an export of reviews writes it."""
    key = key_of(PHOTOGRAPHS[0])
    (tmp_path / "list.csv").write_text(f"key\ndicomweb+{orthanc}/{key}\n")
    named = open_source(str(tmp_path / "list.csv"))
    for source, own in ((open_source(f"dicomweb+{orthanc}?StudyDate={DAY}"), key), (named, next(named.list()).key)):
        (tmp_path / "grades.csv").write_text(f"image,grade\n{url_of(source, own)},0\n")
        (graded,) = read_graded(f"{tmp_path}/grades.csv", SplitConfig())
        np.testing.assert_array_equal(
            decode(read_object(graded.image), ImageConfig()).pixels, decode(PHOTOGRAPHS[0], ImageConfig()).pixels
        )


def test_pages_hold_each_instance_once(orthanc: str, server: DicomWeb) -> None:
    whole = sorted(entry.key for entry in server.list())
    assert len(whole) > 3
    assert sorted(entry.key for entry in DicomWeb(server.url, page=2).list()) == whole


def test_a_photograph_comes_as_it_was_stored(server: DicomWeb) -> None:
    for data in PHOTOGRAPHS:
        found = server.get(key_of(data), etag=key_of(data).rpartition("/")[2])
        np.testing.assert_array_equal(decode(found, ImageConfig()).pixels, decode(data, ImageConfig()).pixels)


def test_what_is_not_there_is_missing(server: DicomWeb) -> None:
    gone = key_of(dicom_file(RGB, "jpeg", 599))
    for ask in (server.head, server.get):
        for key in (gone, "../../patients", "eye.jpg"):
            with pytest.raises(ObjectMissingError):
                ask(key)
    with pytest.raises(ObjectChangedError):
        server.get(key_of(PHOTOGRAPHS[0]), etag="1.2.3")


def test_a_photograph_that_is_too_large_is_refused_unread(server: DicomWeb) -> None:
    large = dicom_file(noise_photograph((400, 400)), "explicit", 520)
    assert server.create(key_of(large), large)
    with pytest.raises(ImageRefusedError) as refused:
        server.get(key_of(large), max_bytes=1000)
    assert refused.value.reason is Reason.TOO_LARGE


def test_sending_twice_stores_once(server: DicomWeb) -> None:
    data = dicom_file(RGB, "jpeg", 530)
    assert [server.create(key_of(data), data) for _ in range(3)] == [True, False, False]
    assert server.head(key_of(data)).etag == key_of(data).rpartition("/")[2]


@pytest.mark.parametrize("kind", [Kind.ERROR, Kind.RESET, Kind.STALL, Kind.SILENCE, Kind.SHORTER, Kind.LONGER])
def test_replies_that_break_are_asked_for_again(proxy: FaultProxy, kind: Kind) -> None:
    web, (first, *_) = through(proxy), PHOTOGRAPHS
    proxy.faults += [Fault(kind, "GET", "/instances/", times=2), Fault(kind, "GET", "/instances?")]
    assert len(list(web.list())) == 3
    np.testing.assert_array_equal(
        decode(web.get(key_of(first)), ImageConfig()).pixels, decode(first, ImageConfig()).pixels
    )
    assert proxy.broken[kind] == 3


def test_a_result_whose_reply_is_lost_is_stored_once(proxy: FaultProxy) -> None:
    data = dicom_file(RGB, "jpeg", 540)
    proxy.faults += [Fault(Kind.LOST, "POST", "/studies")]
    assert through(proxy).create(key_of(data), data)
    assert through(proxy).head(key_of(data))


def test_a_server_that_stays_broken_is_a_store_error(proxy: FaultProxy) -> None:
    proxy.faults += [Fault(Kind.ERROR, "GET", "/instances", times=100, status=500)]
    with pytest.raises(StoreError, match="status 500"):
        through(proxy).get(key_of(PHOTOGRAPHS[0]))


def test_wrong_credentials_are_told_without_them(
    orthanc: str, server: DicomWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMWEB_PASSWORD", "wrong-secret")
    with pytest.raises(StoreError, match="DICOMWEB_TOKEN") as refused:
        server.head(key_of(PHOTOGRAPHS[0]))
    assert "wrong-secret" not in str(refused.value) and "127.0.0.1" not in str(refused.value)


def test_credentials_go_to_their_host_alone(server: DicomWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMWEB_HOST", "pacs.example.org")
    with pytest.raises(StoreError, match="401"):
        server.head(key_of(PHOTOGRAPHS[0]))
    assert os.environ["DICOMWEB_USER"]


@dataclass
class Archive:
    """What a server lists, and what it was asked with."""

    instances: int = 0
    knows_limit: bool = True
    knows_offset: bool = True
    nameless: tuple[int, ...] = ()
    stored: bytes | None = None
    """What is answered to whoever sends an instance, which is listed from then on; None where nobody may."""
    authorizations: list[str | None] = field(default_factory=list)
    port: int = 0

    def page(self, asked: dict[str, list[str]]) -> list[dict[str, Any]]:
        begin = int(asked["offset"][0]) if self.knows_offset else 0
        end = begin + int(asked["limit"][0]) if self.knows_limit else None
        tags = ("0020000D", "0020000E", "00080018")
        return [
            {} if number in self.nameless else {tag: {"Value": [f"1.2.{number}"]} for tag in tags}
            for number in range(self.instances)[begin:end]
        ]


@pytest.fixture
def archive() -> Iterator[Archive]:
    """A server of loopback whose listings the test decides."""
    told = Archive()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.authorizations.append(self.headers.get("Authorization"))
            asked = {"limit": ["100"], "offset": ["0"]} | parse_qs(urlsplit(self.path).query)
            self._answer(json.dumps(told.page(asked)).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            assert told.stored is not None
            told.instances += b"refused" not in told.stored
            self._answer(told.stored)

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield told
        server.shutdown()
        thread.join()


def test_an_instance_without_uids_costs_no_other(archive: Archive) -> None:
    archive.instances, archive.nameless = 5, (0, 3)
    web = DicomWeb(f"dicomweb+http://127.0.0.1:{archive.port}/web", page=2)
    assert [entry.etag for entry in web.list()] == ["1.2.1", "1.2.2", "1.2.4"]
    assert web.skipped == 1, "what cannot be told apart is counted once"
    archive.nameless = tuple(range(5))
    with pytest.raises(StoreError, match="without their UIDs; check the URL"):
        list(web.list())


@pytest.mark.parametrize("answered", [b"<NativeDicomModel/>", b"stored", b"[]", b'{"00081198": []}', b"null"])
def test_an_answer_that_is_not_as_it_should_be_loses_no_result(archive: Archive, answered: bytes) -> None:
    archive.stored = answered
    web = DicomWeb(f"dicomweb+http://127.0.0.1:{archive.port}/web", HASTY)
    key = "studies/1.2.0/series/1.2.0/instances/1.2.0"
    assert web.create(key, b"a result")
    assert not web.create(key, b"a result")


def test_an_answer_of_words_behind_which_nothing_is_stored_is_an_error(archive: Archive) -> None:
    archive.stored = b"<html>refused: log in</html>"
    web = DicomWeb(f"dicomweb+http://127.0.0.1:{archive.port}/web", HASTY)
    with pytest.raises(StoreError, match="refused to store"):
        web.create("studies/1.2.0/series/1.2.0/instances/1.2.0", b"a result")


@pytest.mark.parametrize(
    ("host", "named", "sent"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.1:{port}", True),
        ("LocalHost", "localhost", True),
        ("127.0.0.1", "127.0.0.1:1", False),
        ("127.0.0.1", "pacs.example.org", False),
        ("0.0.0.0", "0.0.0.0", False),  # this machine's, too, but no address of loopback: http would be in the clear
    ],
)
def test_credentials_go_to_the_host_that_is_named_and_by_http_to_loopback_alone(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, host: str, named: str, *, sent: bool
) -> None:
    monkeypatch.setenv("DICOMWEB_TOKEN", "t")
    monkeypatch.setenv("DICOMWEB_HOST", named.format(port=archive.port))
    assert list(DicomWeb(f"dicomweb+http://{host}:{archive.port}/web").list()) == []
    assert archive.authorizations == ["Bearer t" if sent else None]


@pytest.mark.parametrize("variable", ["DICOMWEB_TOKEN", "DICOMWEB_USER"])
def test_credentials_of_no_host_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("DICOMWEB_HOST", raising=False)
    monkeypatch.setenv(variable, "secret")
    with pytest.raises(UsageError, match="set DICOMWEB_HOST") as refused:
        open_source("dicomweb+https://host/path")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("limit", "offset"), [(True, True), (False, False)])
def test_a_listing_is_whole_whether_the_server_pages_or_not(archive: Archive, *, limit: bool, offset: bool) -> None:
    archive.instances, archive.knows_limit, archive.knows_offset = 7, limit, offset
    web = DicomWeb(f"dicomweb+http://127.0.0.1:{archive.port}/web", page=3)
    assert [entry.etag for entry in web.list()] == [f"1.2.{number}" for number in range(7)]


def test_a_listing_that_cannot_go_on_is_an_error(archive: Archive) -> None:
    archive.instances, archive.knows_offset = 7, False
    web = DicomWeb(f"dicomweb+http://127.0.0.1:{archive.port}/web", page=3)
    with pytest.raises(StoreError, match="narrow the query"):
        list(web.list())


@pytest.mark.parametrize(
    "url",
    [
        "dicomweb+ftp://host/path",
        "dicomweb+https://",
        "dicomweb+https://user:secret@host/path",
    ],
)
def test_urls_that_would_tell_too_much_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_source(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("PatientName=Doe", "PatientName"),
        ("patientname=Doe", "patientname"),
        ("%50atientID=Doe", "PatientID"),
        ("limit=5&00100020=Doe", "00100020"),
        ("%30%30100020=Doe", "00100020"),
        ("StudyDate=20260101;PatientID=Doe", "PatientID"),
        ("StudyDate=20260101%26PatientID=Doe", "PatientID"),
        ("OtherPatientIDs=Doe", "OtherPatientIDs"),
        ("IssuerOfPatientID=Doe", "IssuerOfPatientID"),
        ("ReferringPhysicianName=Doe", "ReferringPhysicianName"),
        ("AccessionNumber=Doe", "AccessionNumber"),
        ("00400275.00080050=Doe", "00400275.00080050"),
        ("=Doe", ""),
    ],
)
def test_a_query_asks_by_nothing_that_tells_a_patient(query: str, named: str) -> None:
    with pytest.raises(UsageError, match=f"may not ask by '{named}'") as refused:
        open_source(f"dicomweb+https://host/path?{query}")
    assert "Doe" not in str(refused.value)


def test_what_a_query_may_ask_by_is_asked_as_it_is_written() -> None:
    url = "dicomweb+https://host/path?StudyDate=20260101-&ModalitiesInStudy=OP&0020000d=1.2&InstitutionName=St+Mary"
    assert open_source(f"{url}&limit=5&offset=2").url == f"{url}&limit=5&offset=2"


def test_a_run_cannot_be_put_on_a_dicomweb_server() -> None:
    with pytest.raises(UsageError, match="nothing else can be put there"):
        open_store("dicomweb+https://host/path")


def test_a_manifest_may_name_instances(orthanc: str, server: DicomWeb, tmp_path: Path) -> None:
    lines = [f"dicomweb+{orthanc}/{key_of(data)}" for data in PHOTOGRAPHS]
    (tmp_path / "some.csv").write_text("\n".join(["key", *lines, f"dicomweb+{orthanc}/studies/1/series/2/instances/3"]))
    source = open_source(str(tmp_path / "some.csv"))
    listed = list(source.list())
    assert [bool(entry.etag) for entry in listed] == [True, True, True, False]
    assert source.get(listed[0].key, etag=listed[0].etag)[128:132] == b"DICM"
