"""Archives whose keys nobody would wish for, from plan to status. S3 is played by moto, which takes any key.

Each photograph is really fetched and decoded; only the networks are left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import boto3
import pytest
import ray
from archive_runs import rows, upload_eyes
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from ma_cluster.archive.plan import shards
from ma_cluster.archive.run import begin_run
from ma_cluster.archive.shard_scorer import Reading, Segmentation, ShardScorer
from ma_cluster.archive.summary import missing_keys
from ma_cluster.cli.app import app
from ma_cluster.config import ImageConfig
from ma_cluster.errors import Triage
from ma_cluster.images.decode import decode
from ma_cluster.images.reading import read_photograph
from ma_cluster.lesions.findings import Findings
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Entry, Store, open_store

FOLDER = "eyes/"
LONGEST = 1024 - len(FOLDER)
UNREADABLE = "new\nline.jpg"  # moto's HTTP part lists it, and finds nothing under it
KEYS = [
    "plain.jpg",
    "PLAIN.jpg",
    "../x.jpg",
    "../../etc/passwd",
    "/absolute.jpg",
    "a//b.jpg",
    "a/./b.jpg",
    "trailing/",
    "%2e%2e/x.jpg",
    "with space .jpg",
    "+ % # ?&=;.jpg",
    "NA",
    "null",
    ".hidden",
    "-rf",
    "=cmd|' /C calc'!A0",
    "<script>alert(1)</script>.jpg",
    "tab\there.jpg",
    "\u202egpj.exe",
    unicodedata.normalize("NFC", "fündus.jpg"),
    unicodedata.normalize("NFD", "fündus.jpg"),
    "目/写真.jpg",
    "k" * LONGEST,
    "ä" * (LONGEST // 2),
    UNREADABLE,
]
_buckets = count()


class Fleet:
    """Reads as a Reader does and finds no lesions."""

    def __init__(self, source: str) -> None:
        self._source = open_source(source)
        self._config = ImageConfig(fov_diameter_px=256.0)

    def read(self, entry: Entry) -> Reading:
        _, facts = read_photograph(self._source, entry, self._config, lambda data: decode(data, self._config))
        return Reading(facts, ray.ObjectRef.nil())

    def segment(self, reading: Reading) -> Segmentation:
        return Segmentation(Findings((), None, Triage.NONE), b"mask", b"overlay", {})


class Silent:
    """A recorder of nothing."""

    def begun(self) -> None: ...

    def decided(self, outcome: object) -> None: ...


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the keys that it was made with
    name = f"hostile-{next(_buckets)}"  # moto keeps them as long as this process lives
    boto3.client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    server.stop()


@pytest.fixture
def source(bucket: str, tmp_path: Path) -> Store:
    """One photograph under every key."""
    local, store = LocalStore(tmp_path / "eye"), open_store(f"{bucket}/{FOLDER}")
    upload_eyes(local, 1)
    (eye,) = (local.get(entry.key) for entry in local.list())
    for key in KEYS:
        if key != UNREADABLE:
            store.put(key, eye)
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket.removeprefix("s3://"), FOLDER + UNREADABLE, eye)
    return store


def test_every_key_has_one_outcome_and_files_of_a_safe_name(source: Store, bucket: str) -> None:
    dest = open_store(f"{bucket}/run")
    run = begin_run(source, dest, "model", "config")
    scorer = ShardScorer(Fleet(source.url), dest, dest, run, ThreadPoolExecutor(4), Silent())
    assert sum(scorer.score(shard) for shard in shards(dest, run.plan)) == len(KEYS)
    assert list(missing_keys(dest.url)) == []

    outcomes = rows(dest)
    assert sorted(outcomes) == sorted(KEYS)
    assert {key for key, row in outcomes.items() if row["status"] != "scored"} <= {UNREADABLE}
    files = [row[column] for row in outcomes.values() if row["mask_key"] for column in ("mask_key", "overlay_key")]
    assert len({name.casefold() for name in files}) == len(files) >= 2 * (len(KEYS) - 1), "on any file system"
    assert [name for name in files if not re.fullmatch(r"(masks|overlays)/[A-Za-z0-9._-]{1,60}\.(png|jpg)", name)] == []
    written = {entry.key for entry in dest.list()}
    assert written >= set(files)
    assert {entry.key for entry in open_store(bucket).list()} == {f"run/{key}" for key in written} | {
        FOLDER + key for key in KEYS
    }


def test_missing_keys_are_listed_one_on_a_line_and_harmless_to_a_terminal(source: Store, bucket: str) -> None:
    begin_run(source, open_store(f"{bucket}/run"), "model", "config")
    assert sorted(missing_keys(f"{bucket}/run")) == sorted(KEYS)
    shown = CliRunner().invoke(app, ["status", f"{bucket}/run", "--missing"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.split("\n")[:-1]
    assert len(lines) == len(KEYS)
    assert [line for line in lines if not line.isprintable()] == []
    assert {key for key in KEYS if key.isprintable() and key.isascii()} <= set(lines)
