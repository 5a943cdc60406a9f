"""Schemathesis against the OpenAPI document on a real server: real archive jobs and decoders, S3 played by moto."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from archive_jobs import jobs_of
from known_service import TOKEN, served
from moto.server import ThreadedMotoServer

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.shard_scorer import Reading, Segmentation
from ma_cluster.bundle import load_bundle
from ma_cluster.config import ImageConfig, KnownField, OperatingPoint
from ma_cluster.http.fleet_service import Backing, FleetService
from ma_cluster.http.guard import HttpLimits
from ma_cluster.images.reading import read_bytes

MINUTES = 3
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"


@dataclass(frozen=True)
class Reader:
    """A fleet that reads, and is never asked for more: nothing that is made up is a photograph."""

    config: ImageConfig

    def read_upload(self, data: bytes, field: KnownField) -> Reading:
        _, facts = read_bytes(data, field.told(self.config))
        return Reading(facts, None)

    def segment(self, reading: Reading, operating_point: OperatingPoint) -> Segmentation:
        raise AssertionError

    def up(self) -> bool:
        return True

    def begun(self) -> None: ...

    def decided(self, outcome: Outcome) -> None: ...


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of the document's examples."""
    import boto3

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    for name in ("archive", "results"):
        boto3.client("s3").create_bucket(Bucket=name)
    yield
    server.stop()


@pytest.mark.long
def test_minutes_of_made_up_requests_are_answered_as_the_document_says_and_never_by_a_fault_of_ours(
    tiny_bundle: Path, tmp_path: Path, buckets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = load_bundle(tiny_bundle)
    reader = Reader(bundle.recipe.image)
    service = FleetService(Backing(reader, jobs_of(tmp_path), lambda: set(), reader), bundle)
    limits = HttpLimits(token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest(), body_deadline_s=5.0)
    with served(limits, service) as server:
        schemathesis = str(Path(sys.executable).with_name("schemathesis"))
        options = ["--max-time", str(60 * MINUTES), "--workers", "2", "--checks", CHECKS, "--seed", "1"]
        options += ["--header", f"Authorization:Bearer {TOKEN}", "--request-timeout", "20", "--continue-on-failure"]
        command = [schemathesis, "run", f"http://127.0.0.1:{server.port}/openapi.json", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
