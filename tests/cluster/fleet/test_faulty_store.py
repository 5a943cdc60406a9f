"""Archive runs on real Ray whose S3 server breaks its replies, and archives whose keys nobody would wish for."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from archive_runs import driver, masks, results, rows, upload_eyes
from fault_proxy import Fault, Kind, fault_proxy
from servers import Weed, free_ports

from ma_cluster.cluster.fleet.driver import retry_archive, score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.storage.store import open_store

pytestmark = pytest.mark.slow

FLEET = Fleet(segmenters=1)
ALWAYS = 1_000
AWAY_S = float(os.environ.get("MA_CLUSTER_AWAY_S", "20"))
EYES = 12


def faults() -> list[Fault]:
    """What happens to a run of `EYES` photographs: in listing, planning, reading, writing and committing."""
    return [
        Fault(Kind.ERROR, "GET", "list-type", times=2, status=500, code="InternalError"),
        Fault(Kind.LOST, "PUT", "/run/plan/part-00000"),
        Fault(Kind.LOST, "PUT", "/run/run.json"),
        Fault(Kind.ERROR, "GET", "/eyes/eye-11", times=ALWAYS, status=403, code="AccessDenied"),
        Fault(Kind.RESET, "GET", "/eyes/eye-03", times=2),
        Fault(Kind.LONGER, "GET", "/eyes/eye-05"),
        Fault(Kind.SHORTER, "GET", "/eyes/eye-06"),
        Fault(Kind.ERROR, "GET", "/eyes/", times=4, after=2),
        Fault(Kind.ERROR, "PUT", "/run/masks/", times=3, status=500, code="InternalError"),
        Fault(Kind.LOST, "PUT", "/run/overlays/", times=2),
        Fault(Kind.LOST, "PUT", "/run/outcomes/part-", times=2, after=1),
        Fault(Kind.LOST, "PUT", "/run/summary.json"),
    ]


@pytest.mark.usefixtures("local_ray")
def test_a_run_through_a_breaking_store_ends_as_a_clean_one_and_what_failed_is_scored_later(
    tiny_bundle: Path, weed: Weed, tmp_path: Path
) -> None:
    """Bursts of server errors, bodies that break off, wrong lengths and lost replies in one run; one photograph is
    denied as long as the faults last."""
    bucket = weed.bucket("breaking")
    source, clean, dest = open_store(f"{bucket}/eyes"), open_store(f"{bucket}/clean"), open_store(f"{bucket}/run")
    upload_eyes(source, EYES)
    score_archive(source.url, clean.url, FLEET, model=str(tiny_bundle))
    expected = results(clean)

    with fault_proxy(weed.endpoint) as proxy:
        proxy.faults += (told := faults())
        arguments = [source.url, dest.url, "--model", str(tiny_bundle), "--replicas", "1"]
        with driver(arguments, tmp_path / "driver.log", {"AWS_ENDPOINT_URL": proxy.endpoint}) as process:
            assert process.wait(timeout=240) == 3, (tmp_path / "driver.log").read_text()
    assert [fault for fault in told if fault.times and fault.times < ALWAYS // 2] == [], "all of them have happened"

    denied = rows(dest)["eye-11.jpg"]
    assert (denied["status"], denied["reason"], denied["attempts"]) == ("failed", "store_error", 2)
    assert {key: row for key, row in results(dest).items() if key != denied["key"]} == {
        key: row for key, row in expected.items() if key != denied["key"]
    }

    summary = retry_archive(source.url, dest.url, FLEET, model=str(tiny_bundle))
    assert summary.counts.statuses == {"scored": EYES}
    assert results(dest) == expected
    assert masks(dest) == masks(clean)


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_a_store_that_goes_away_in_mid_run_is_waited_for(tiny_bundle: Path, weed: Weed, tmp_path: Path) -> None:
    """Nothing listens there for a while, less than `S3Limits.deadline_s`; then the run ends as if nothing had been."""
    bucket = weed.bucket("away")
    source, clean, dest = open_store(f"{bucket}/eyes"), open_store(f"{bucket}/clean"), open_store(f"{bucket}/run")
    upload_eyes(source, EYES)
    score_archive(source.url, clean.url, FLEET, model=str(tiny_bundle))
    arguments, log = [source.url, dest.url, "--model", str(tiny_bundle), "--replicas", "1"], tmp_path / "driver.log"
    (port,) = free_ports(1)
    with ExitStack() as stack:
        with fault_proxy(weed.endpoint, port) as proxy:
            process = stack.enter_context(driver(arguments, log, {"AWS_ENDPOINT_URL": proxy.endpoint}))
            while not list(dest.list("outcomes/")):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        time.sleep(AWAY_S)
        assert process.poll() is None, log.read_text()
        assert len(list(dest.list("outcomes/"))) < EYES
        stack.enter_context(fault_proxy(weed.endpoint, port))
        assert process.wait(timeout=240) == 0, log.read_text()
    assert results(dest) == results(clean)
    assert masks(dest) == masks(clean)
