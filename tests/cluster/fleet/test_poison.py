"""Archive runs with photographs that kill what decodes them, with a fleet that fails, and what is done about it later.

Real Ray, real processes that really die; the decoder is one of `decoders`, which dies of marked bytes.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from archive_runs import rows
from decoders import ABORT, EXIT, HANG, MEMORY, SLEEP, WHILE
from PIL import Image
from servers import Weed

from ma_cluster.archive.outcomes import config_digest
from ma_cluster.archive.run import begin_run, committed
from ma_cluster.bundle import load_bundle
from ma_cluster.cluster.fleet.driver import retry_archive, score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.errors import FleetBrokenError
from ma_cluster.images.sandbox import SandboxConfig
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import open_store

pytestmark = pytest.mark.slow

SANDBOX = SandboxConfig(children=2, deadline_s=3.0, memory_bytes=2**30, decoder="decoders:decode")
FLEET = Fleet(segmenters=1, sandbox=SANDBOX)
REASONS = {
    ABORT: "crashed_worker",
    EXIT: "crashed_worker",
    MEMORY: "crashed_worker",
    HANG: "timeout",
    SLEEP: "timeout",
}


@pytest.fixture(scope="module")
def eye() -> bytes:
    """A small real photograph."""
    from ma_cluster.images.sample import retina

    out = io.BytesIO()
    Image.fromarray(retina()).resize((300, 300)).save(out, "JPEG", quality=92)
    return out.getvalue()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("good", "poison"), [(99, [EXIT]), (18, [ABORT, HANG]), (5, [ABORT, EXIT, MEMORY, HANG, SLEEP])]
)
def test_photographs_that_kill_their_decoder_fail_and_no_other_is_touched(
    eye: bytes, tiny_bundle: Path, tmp_path: Path, good: int, poison: list[bytes]
) -> None:
    """Decoders that exit, abort, hang or take all memory, with a poison share of 1 %, 10 % and 50 %."""
    source = LocalStore(tmp_path / "source")
    for number in range(good):
        source.create(f"{number:02d} good.jpg", eye)
    marks = {f"{number * (good // len(poison)):02d} poison.jpg": mark for number, mark in enumerate(poison)}
    for key, mark in marks.items():
        source.create(key, mark + eye)
    summary = score_archive(source.url, f"{tmp_path}/dest", FLEET, model=str(tiny_bundle))
    assert summary.counts.statuses == {"failed": len(poison), "scored": good}
    assert not summary.complete, "so the command exits with 3"
    for key, row in rows(LocalStore(tmp_path / "dest")).items():
        mark = marks.get(key)
        expected = ("scored", None, 1) if mark is None else ("failed", REASONS[mark], 2)
        assert (row["status"], row["reason"], row["attempts"]) == expected


@pytest.mark.usefixtures("local_ray")
def test_failed_photographs_are_retried_and_the_rest_is_left_alone(
    eye: bytes, tiny_bundle: Path, weed: Weed, tmp_path: Path
) -> None:
    """Photographs of a manifest that were replaced or gone; and a decoder that has been mended since."""
    bucket = weed.bucket("poison")
    source, broken = open_store(f"{bucket}/eyes"), tmp_path / "broken"
    broken.touch()
    for key in ("good", "replaced", "deleted", "not named"):
        source.put(f"{key}.jpg", eye)
    source.put("brittle.jpg", WHILE + str(broken).encode() + b"\n" + eye)
    keys = ["good.jpg", f"{bucket}/eyes/replaced.jpg", "deleted.jpg", "brittle.jpg", "never there.jpg"]
    source.put("list.csv", "\n".join(["key", *keys]).encode())
    url, dest = f"{bucket}/eyes/list.csv", open_store(f"{bucket}/run")
    bundle = load_bundle(tiny_bundle)
    begin_run(open_source(url), dest, bundle.digest, config_digest(bundle.recipe, SANDBOX.decoder))
    source.put("replaced.jpg", eye + b"\0")  # after they were planned
    delete(source.url, "deleted.jpg")

    summary = score_archive(url, dest.url, FLEET, model=str(tiny_bundle))
    assert summary.counts.statuses == {"failed": 4, "scored": 1}
    assert summary.counts.reasons == {"changed": 2, "crashed_worker": 1, "missing": 1}
    before = {entry.key: entry.etag for entry in dest.list()}

    broken.unlink()
    summary = retry_archive(url, dest.url, FLEET, model=str(tiny_bundle))
    assert summary.counts.statuses == {"failed": 2, "scored": 3}
    outcomes = rows(dest)
    assert {key: outcomes[key]["reason"] for key in keys[2:] if outcomes[key]["reason"]} == {
        "deleted.jpg": "changed",
        "never there.jpg": "missing",
    }
    for key in keys[:2]:
        assert dest.get(outcomes[key]["mask_key"]).startswith(b"\x89PNG")
    after = {entry.key: entry.etag for entry in dest.list()}
    assert {key: after[key] for key in before} == before


@pytest.mark.usefixtures("local_ray")
def test_a_fleet_that_fails_whatever_it_is_given_ends_the_run_which_is_resumed(
    eye: bytes, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Segmenters that have no time for any photograph end themselves on each."""
    source = LocalStore(tmp_path / "source")
    for number in range(6):
        source.create(f"{number}.jpg", eye)
    dest = LocalStore(tmp_path / "dest")
    broken = replace(FLEET, segment_deadline_s=0.02, crashes_in_a_row=3)
    with pytest.raises(FleetBrokenError, match=r"\d workers were lost in a row"):
        score_archive(source.url, dest.url, broken, model=str(tiny_bundle))
    assert len(committed(dest)) <= 2, "those that had their second loss before"
    summary = retry_archive(source.url, dest.url, FLEET, model=str(tiny_bundle))
    assert summary.counts.statuses == {"scored": 6}
    assert summary.complete


def delete(url: str, key: str) -> None:
    """Our stores cannot."""
    import boto3

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"{prefix}/{key}")


@pytest.mark.usefixtures("local_ray")
def test_a_fleet_that_does_not_start_says_why(eye: bytes, tiny_bundle: Path, tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    source.create("eye.jpg", eye)
    fleet = replace(FLEET, sandbox=replace(SANDBOX, decoder="no.such.module:decode"))
    with pytest.raises(FleetBrokenError, match=r"no\.such\.module:decode cannot be loaded"):
        score_archive(source.url, f"{tmp_path}/dest", fleet, model=str(tiny_bundle))
