"""The review page's routes on a real server: who may ask, what is kept, what is escaped, what a running run shows."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import cv2
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from photographs import encode
from review_runs import commit_retry, commit_run, dotted, fetch, review_page, small_run
from servers import free_ports

from ma_cluster.errors import Reason, UsageError
from ma_cluster.http.listening import TOKEN_VARIABLE
from ma_cluster.review import api
from ma_cluster.review.api import reviewing
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import open_store

HOSTILE = '<script>alert(1)</script>"onerror=x.jpg'
TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    pixels, mask = dotted(1100, 6)
    eye = encode(pixels, "JPEG", quality=92)
    known = {"eye.jpg": (eye, mask), HOSTILE.replace("/", ":"): (eye, mask), "black.png": (b"black", None)}
    return commit_run(tmp_path_factory.mktemp("api"), known)


@pytest.fixture(scope="module")
def page(dest: LocalStore) -> Iterator[str]:
    with review_page(dest.url) as url:
        wait_for(url, 3)
        yield url


def wait_for(url: str, photographs: int) -> None:
    while get(url, "/v1/run")[1]["photographs"] < photographs:
        pass


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), named)
        answer = connection.getresponse()
        data, kept = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, json.loads(data) if kept.get("content-type") == "application/json" else data, kept


def get(url: str, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
    return ask(url, "GET", path, **headers)


def rows(url: str) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in get(url, "/v1/photographs")[1]["rows"]}


def decision(photograph: str, number: int, kind: str = "done", **said: Any) -> dict[str, Any]:
    stamp = f"20261127T1200{number:02d}.000Z"
    return {"photograph": photograph, "id": f"{number:016x}", "at": stamp, "reviewer": "ada", "kind": kind, **said}


def test_the_page_and_its_files_let_nothing_else_in(page: str) -> None:
    for path in ("/", "/page/review.js", "/page/base.css", "/page/openseadragon.min.js"):
        status, _, headers = get(page, path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    text = fetch(page).decode()
    assert "style=" not in text
    assert "onclick" not in text
    assert text.count("<script ") == text.count("<script src=") == 2
    assert get(page, "/page/../api.py")[0] == get(page, "/page/none.js")[0] == 404


def test_a_photograph_has_lesions_outlines_scale_and_tiles(page: str) -> None:
    photograph = rows(page)["eye.jpg"]["id"]
    _, known, _ = get(page, f"/v1/photographs/{photograph}")
    assert len(known["lesions"]) == 6
    assert all(len(lesion["outline"]) > 3 for lesion in known["lesions"])
    assert known["scale"]["um_per_px"] == pytest.approx(50 / 1092 * 288)
    assert known["previous"] is None
    status, tile, headers = get(page, f"/v1/photographs/{photograph}/tiles/colour/2/1_1.jpg")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert cv2.imdecode(np.frombuffer(tile, np.uint8), cv2.IMREAD_COLOR).shape == (512, 512, 3)
    assert get(page, f"/v1/photographs/{photograph}/thumbnail.jpg")[0] == 200
    for wrong in ("colour/9/0_0", "colour/0/1_0", "colour/-1/0_0"):
        assert get(page, f"/v1/photographs/{photograph}/tiles/{wrong}.jpg")[0] == 404
    assert get(page, f"/v1/photographs/{photograph}/tiles/infrared/0/0_0.jpg")[0] == 422


def test_a_photograph_that_was_refused_says_why_and_has_no_thumbnail(page: str) -> None:
    photograph = rows(page)["black.png"]["id"]
    _, known, _ = get(page, f"/v1/photographs/{photograph}")
    assert (known["reason"], known["lesions"], known["width"]) == ("no_fov", [], None)
    assert get(page, f"/v1/photographs/{photograph}/thumbnail.jpg")[0] == 404
    assert get(page, f"/v1/photographs/{photograph}/tiles/colour/0/0_0.jpg")[0] == 415
    assert get(page, f"/v1/photographs/{'0' * 16}")[0] == 404


def test_a_decision_is_kept_once_however_often_it_is_sent(page: str, dest: LocalStore) -> None:
    photograph = rows(page)["eye.jpg"]["id"]
    event = decision(photograph, 1, "reject", lesion=2)
    json_type = {"content_type": "application/json"}
    assert ask(page, "POST", "/v1/reviews", event, **json_type)[:2] == (201, {"id": f"{1:016x}", "new": True})
    assert ask(page, "POST", "/v1/reviews", event, **json_type)[1]["new"] is False
    kept = [entry.key for entry in dest.list("reviews/")]
    assert kept == ["reviews/ada/20261127T120001.000Z-0000000000000001.json"]
    assert json.loads(dest.get(kept[0]))["key"] == "eye.jpg"
    assert [said["lesion"] for said in get(page, f"/v1/photographs/{photograph}")[1]["events"]] == [2]
    assert get(page, "/v1/reviews")[1] == {"photographs": [photograph], "seen": 1}
    for wrong in (
        event | {"id": "x"},
        event | {"kind": "done"},
        event | {"reviewer": "../x"},
        {"photograph": photograph},
    ):
        assert ask(page, "POST", "/v1/reviews", wrong, **json_type)[0] == 422
    assert ask(page, "POST", "/v1/reviews", event | {"photograph": "0" * 16}, **json_type)[0] == 404
    assert ask(page, "POST", "/v1/reviews", event)[0] == 415
    assert ask(page, "POST", "/v1/reviews", event, origin="http://elsewhere.example", **json_type)[0] == 403
    assert len(list(dest.list("reviews/"))) == 1


def test_many_reviewers_at_once_lose_nothing(page: str, dest: LocalStore) -> None:
    photograph = rows(page)[HOSTILE.replace("/", ":")]["id"]
    before = len(list(dest.list("reviews/")))

    def send(reviewer: int) -> None:
        for number in range(5):
            event = decision(photograph, 10 + number, "accept", lesion=number + 1) | {"reviewer": f"grader-{reviewer}"}
            assert ask(page, "POST", "/v1/reviews", event, content_type="application/json")[0] == 201

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(dest.list("reviews/"))) == before + 20
    assert len(get(page, f"/v1/photographs/{photograph}")[1]["events"]) == 20


def test_numbers_that_no_event_has_are_refused(page: str) -> None:
    assert get(page, f"/v1/reviews?seen={2**63 - 1}")[1]["photographs"] == []
    for wrong in (f"/v1/reviews?seen={2**63}", f"/v1/photographs?as_of={2**64}.1", "/v1/photographs?start=-1"):
        assert get(page, wrong)[0] == 422


def test_what_a_retry_has_found_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_FOLLOW_S", 0.2)
    pixels, mask = dotted(300, 4)
    eye = encode(pixels, "JPEG")
    dest = commit_run(tmp_path, {"eye.jpg": (eye, None)}, reason=Reason.TIMEOUT)
    with review_page(dest.url) as url:
        wait_for(url, 1)
        photograph = rows(url)["eye.jpg"]["id"]
        assert get(url, f"/v1/photographs/{photograph}")[1]["status"] == "failed"
        commit_retry(dest, {"eye.jpg": (eye, mask)})
        while rows(url)["eye.jpg"]["status"] == "failed":
            time.sleep(0.1)
        known = get(url, f"/v1/photographs/{photograph}")[1]
        assert (known["status"], len(known["lesions"])) == ("scored", 4)


def test_a_damaged_mask_is_told_of_and_hides_no_other_photograph(tmp_path: Path) -> None:
    dest = small_run(tmp_path, 2, 300)
    next(Path(dest.url, "masks").iterdir()).write_bytes(b"<html>")
    with review_page(dest.url) as url:
        wait_for(url, 2)
        answers = [get(url, f"/v1/photographs/{row['id']}") for row in rows(url).values()]
    assert sorted(status for status, *_ in answers) == [200, 503]
    (told,) = (body for status, body, _ in answers if status == 503)
    assert told["reason"] == "store_error" and "masks/" in told["detail"]


def test_another_host_name_is_refused(page: str) -> None:
    assert get(page, "/v1/run", host="archive.example")[0] == 403


def test_beyond_loopback_a_token_is_asked_for(dest: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=TOKEN_VARIABLE), reviewing(dest.url, "", "0.0.0.0", 8010):
        pass
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with review_page(dest.url) as url:
        assert get(url, "/v1/run")[0] == get(url, "/v1/photographs")[0] == 401
        assert get(url, "/v1/run", authorization=f"Bearer {TOKEN}")[0] == 200
        assert get(url, "/")[0] == get(url, "/page/review.js")[0] == 200


def test_a_run_in_an_object_store_is_reviewed_there(
    dest: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    boto3.client("s3").create_bucket(Bucket="results")
    remote = open_store("s3://results/run")
    for entry in list(dest.list()):
        if not entry.key.startswith("reviews/"):
            remote.put(entry.key, dest.get(entry.key))
    with review_page(remote.url) as url:
        wait_for(url, 3)
        photograph = rows(url)["eye.jpg"]["id"]
        assert len(get(url, f"/v1/photographs/{photograph}")[1]["lesions"]) == 6
        assert get(url, f"/v1/photographs/{photograph}/tiles/colour/0/0_0.jpg")[0] == 200
        event = decision(photograph, 1, "reject", lesion=2)
        assert ask(url, "POST", "/v1/reviews", event, content_type="application/json")[0] == 201
        assert ask(url, "POST", "/v1/reviews", event, content_type="application/json")[1]["new"] is False
    assert [entry.key.rpartition("/")[2] for entry in remote.list("reviews/ada/")] == [
        "20261127T120001.000Z-0000000000000001.json"
    ]
    server.stop()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run"), reviewing(str(tmp_path), "", "127.0.0.1", free_ports(1)[0]):
        pass
