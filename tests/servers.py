"""Servers that tests talk to, on the loopback interface and on free ports."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Weed:
    """A running SeaweedFS with an S3 gateway; `bucket` reaches it by the AWS variables."""

    endpoint: str

    def bucket(self, name: str) -> str:
        """Create a bucket and return its URL."""
        import boto3

        boto3.client("s3").create_bucket(Bucket=name)
        return f"s3://{name}"


@contextmanager
def running_weed(folder: Path, port: int) -> Iterator[Weed]:
    """SeaweedFS with its data in `folder`; its S3 gateway takes the keys of the AWS variables."""
    credentials = [{"accessKey": os.environ["AWS_ACCESS_KEY_ID"], "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"]}]
    identity = {"name": "t", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer = free_ports(3, taken=(port,))
    weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    # each bucket takes seven volumes, and eight is all that a server has by default
    command += ["-volume.max=200", "-master.volumeSizeLimitMB=64"]
    command += ["-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for_http(f"http://127.0.0.1:{port}", server)
        yield Weed(f"http://127.0.0.1:{port}")
    finally:
        server.kill()  # asked kindly, it takes longer than the tests
        server.wait()


def free_ports(count: int, taken: tuple[int, ...] = ()) -> list[int]:
    """Ports that nobody listens on, nor on the port 10,000 above, which SeaweedFS takes for gRPC; below Ray's range."""
    found: list[int] = []
    for port in range(8500 + os.getpid() % 900, 10_000):
        if len(found) == count:
            break
        if _is_free(port) and _is_free(port + 10_000) and port not in taken:
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _wait_for_http(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    """Ready is when it answers, be it with 401 or 403: a gateway to S3 then reaches its filer."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"{server.args!r} ended with {server.returncode}")
        try:
            urllib.request.urlopen(endpoint, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"{server.args!r} did not answer within 60 s")


ORTHANC, DICOMWEB_PLUGIN = "/usr/sbin/Orthanc", Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
DICOMWEB_USER, DICOMWEB_PASSWORD = "reader", "secret-of-the-tests"


@contextmanager
def running_orthanc(folder: Path) -> Iterator[str]:
    """A DICOM server of Debian with its data in `folder`, on loopback; gives the URL of its DICOMweb. Users need the
    name and password above. The calling test is skipped where it is not installed."""
    if not (Path(ORTHANC).is_file() and DICOMWEB_PLUGIN.is_file()):
        pytest.skip("no Orthanc with DICOMweb: Debian's orthanc and orthanc-dicomweb")
    (port,) = free_ports(1)
    config = {
        "Name": "tests",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "DicomServerEnabled": False,
        "HttpPort": port,
        "HttpBindAddresses": ["127.0.0.1"],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {DICOMWEB_USER: DICOMWEB_PASSWORD},
        "Plugins": [str(DICOMWEB_PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "orthanc.log").open("wb") as log:
        server = subprocess.Popen([ORTHANC, folder / "orthanc.json"], stdout=log, stderr=log)
    try:
        _wait_for_http(f"http://127.0.0.1:{port}/dicom-web/studies", server)
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        server.terminate()
        server.wait()
