"""What several tests share: shapes checked as the code runs, one Ray, one S3 server, one untrained model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from servers import DICOMWEB_PASSWORD, DICOMWEB_USER, Weed, free_ports, running_orthanc, running_weed

jaxtyping.install_import_hook("ma_cluster", "beartype.beartype")
# Networks as small as the tests' lose by a second thread, and lose much where cores are busy. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MA_CLUSTER_SALT"] = "the salt of the tests"  # none is drawn into this user's state folder


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors; those that Ray's own modules cause are not ours to mend."""
    for category in ("DeprecationWarning", "FutureWarning", "ResourceWarning"):
        config.addinivalue_line("filterwarnings", rf"ignore::{category}:ray\..*")


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the package logs, a line each; a command run in an earlier test may have left a handler of its own."""
    handler, logger = _Lines(), logging.getLogger("ma_cluster")
    before = logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.handlers = before[0]
    logger.setLevel(before[1])


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[int]:
    """Set the AWS variables for an S3 server that may be started later: a Ray started before it must inherit them."""
    port = free_ports(1)[0]
    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield port
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def weed(s3_environment: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """A real S3 server on the loopback interface; this process and the shared Ray have its address and keys."""
    with running_weed(tmp_path_factory.mktemp("weed"), s3_environment) as server:
        yield server


@pytest.fixture(scope="session")
def dicomweb_environment() -> Iterator[None]:
    """Set the user and password of the tests' DICOM server: a Ray started before it must inherit them."""
    values = {"DICOMWEB_USER": DICOMWEB_USER, "DICOMWEB_PASSWORD": DICOMWEB_PASSWORD, "DICOMWEB_HOST": "127.0.0.1"}
    os.environ |= values
    yield
    for name in values:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def orthanc(dicomweb_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The DICOMweb URL, without dicomweb+, of a real DICOM server; all tests share it: each has studies of its own."""
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as url:
        yield url


@pytest.fixture(scope="session")
def local_ray(
    s3_environment: int, dicomweb_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The Ray that all tests of a run share. Six logical CPUs: most of what runs on it waits. The GPU is logical, too.

    Its workers find the tests' own modules: the decoders that die.
    """
    import ray

    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["MA_CLUSTER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    local: dict[str, Any] = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(**local, num_cpus=6, num_gpus=1, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `networks.untrained_bundle`."""
    from untrained import untrained_bundle

    from ma_cluster.bundle import save_bundle

    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(untrained_bundle(), folder)
    return folder


@pytest.fixture(scope="session")
def idrid() -> Path:
    """IDRiD's folder; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("MA_CLUSTER_IDRID", Path(__file__).parents[2] / "shared" / "idrid"))
    if not folder.is_dir():
        pytest.skip("no IDRiD data: set MA_CLUSTER_IDRID to its folder")
    return folder
