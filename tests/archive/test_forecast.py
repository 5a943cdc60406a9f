"""What an archive would take: by arithmetic, by a source's headers, and beside the photographs themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decoders import ABORT
from dicom_files import dicom_file
from photographs import encode
from typer.testing import CliRunner

from ma_cluster import Detector
from ma_cluster.archive.forecast import START_S as START
from ma_cluster.archive.forecast import Capacity, StageSeconds, Survey, forecast, seconds_here, seconds_of_run, survey
from ma_cluster.cli.app import app
from ma_cluster.config import ImageConfig
from ma_cluster.errors import UsageError
from ma_cluster.images.sample import retina
from ma_cluster.images.sandbox import SandboxConfig
from ma_cluster.metrics import STAGES
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Entry, Store

FOUND = Survey(images=10_000, skipped=0, bytes=10**10, sampled=32, unreadable=0, megapixels=12.0)
STAGE = StageSeconds(
    seconds={"fetch": 0.1, "decode": 0.2, "prepare": 0.5, "hgn": 2.0, "lesions": 0.4}, megapixels=12.0, by="a run"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encode(retina()[::3, ::3].copy(), "JPEG"))
    (folder / "broken.jpg").write_bytes(b"<html>not found</html>")
    (folder / "Thumbs.db").write_bytes(b"x")
    return folder


def test_a_header_of_dicom_tells_the_size_without_its_pixels(tmp_path: Path) -> None:
    eye = retina()[::3, ::3].copy()
    whole = dicom_file(eye, "jpeg")
    (tmp_path / "whole.dcm").write_bytes(whole)
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.dcm").write_bytes(whole[:140])
    found, _ = survey(open_source(str(tmp_path)))
    assert (found.images, found.sampled, found.unreadable) == (3, 3, 1)
    assert found.megapixels == pytest.approx(eye.shape[0] * eye.shape[1] / 1e6)


def test_the_slowest_part_decides() -> None:
    said = forecast(FOUND, STAGE, Capacity(segmenters=8, reading=4))
    assert said.rates == pytest.approx({"readers": 4 / 0.8, "segmenters": 8 / 2.4})
    assert (said.bottleneck, said.images_per_second) == ("segmenters", pytest.approx(8 / 2.4))
    assert said.seconds == pytest.approx(START + 10_000 * 2.4 / 8)
    assert forecast(FOUND, STAGE, Capacity(segmenters=80, reading=4)).bottleneck == "readers"
    assert forecast(FOUND, STAGE, Capacity(segmenters=8, reading=4, store_bytes_per_s=1e6)).bottleneck == "store"
    alone = forecast(FOUND, STAGE, Capacity(segmenters=2, reading=2, shared_cores=2))
    assert alone.images_per_second == pytest.approx(2 / 3.1)  # all but the fetching keeps a core busy


def test_what_it_takes_to_be_done_in_time_is_done_in_time() -> None:
    said = forecast(FOUND, STAGE, Capacity(segmenters=1, reading=1), within_s=3600.0)
    assert said.segmenters_within is not None and said.reading_within is not None
    enough = forecast(FOUND, STAGE, Capacity(segmenters=said.segmenters_within, reading=said.reading_within))
    fewer = forecast(FOUND, STAGE, Capacity(segmenters=said.segmenters_within - 1, reading=said.reading_within))
    assert enough.seconds <= 3600 < fewer.seconds
    with pytest.raises(UsageError, match="nothing ends"):
        forecast(FOUND, STAGE, Capacity(segmenters=1, reading=1), within_s=10.0)


def test_larger_photographs_take_longer_but_for_the_networks() -> None:
    assert STAGE.of(("decode", "hgn"), 24.0) == pytest.approx(0.4 + 2.0)


def test_a_source_is_counted_and_a_sample_measured(archive: Path) -> None:
    found, sample = survey(open_source(str(archive)), sample=10)
    assert (found.images, found.skipped, found.sampled, found.unreadable) == (4, 1, 4, 1)
    assert found.megapixels == pytest.approx(471 * 471 / 1e6)
    assert len({entry.key for entry in sample}) == 4
    fewer, _ = survey(open_source(str(archive)), sample=2)
    assert (fewer.images, fewer.bytes, fewer.sampled) == (4, found.bytes, 2)


def test_a_file_that_is_too_large_is_not_read(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes((archive / "0.jpg").read_bytes())
    with (tmp_path / "large.jpg").open("r+b") as file:
        file.truncate(ImageConfig().max_bytes + 1)  # a hole
    found, _ = survey(open_source(str(tmp_path)))
    assert (found.images, found.unreadable, found.bytes) == (1, 1, ImageConfig().max_bytes + 1)


class Unsized:
    """A source whose listing has no sizes, as a DICOMweb server's."""

    def __init__(self, store: Store) -> None:
        self.url, self._store = store.url, store
        self.head, self.get = store.head, store.get

    def list(self) -> Iterator[Entry]:
        return (replace(entry, size=0) for entry in self._store.list())


def test_bytes_that_no_listing_tells_are_those_of_the_sample(archive: Path) -> None:
    told, _ = survey(open_source(str(archive)))
    assert survey(Unsized(LocalStore(archive)))[0] == told
    assert survey(Unsized(LocalStore(archive)), sample=2)[0].bytes > 0


def test_photographs_that_kill_their_decoder_do_not_end_the_measuring(
    archive: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    whole = (archive / "0.jpg").read_bytes()
    (tmp_path / "poison.jpg").write_bytes(ABORT + whole)
    (tmp_path / "whole.jpg").write_bytes(whole)
    source, sandbox = LocalStore(tmp_path), SandboxConfig(children=1, decoder="decoders:decode")
    found = seconds_here(Detector.load(tiny_bundle, threads=1), source, list(source.list()), sandbox)
    assert found.megapixels == pytest.approx(471 * 471 / 1e6) and found.seconds["decode"] > 0


def test_an_empty_source_and_one_that_cannot_be_scored_are_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="nothing to score"):
        survey(open_source(str(tmp_path)))
    (tmp_path / "broken.jpg").write_bytes(b"<html>not found</html>")
    source = open_source(str(tmp_path))
    with pytest.raises(UsageError, match="--like"):
        seconds_here(Detector.load(tiny_bundle, threads=1), source, survey(source)[1], SandboxConfig(children=1))
    with pytest.raises(UsageError):
        seconds_of_run(str(tmp_path))


def test_the_command_says_it_all_of_this_machine(archive: Path, tiny_bundle: Path) -> None:
    options = ["plan", str(archive), "--model", str(tiny_bundle), "--json", "--within", "1"]
    done = CliRunner().invoke(app, options, catch_exceptions=False)
    said = json.loads(done.output)
    assert said["survey"]["images"] == 4
    assert set(said["stages"]["seconds"]) == set(STAGES)
    assert said["forecast"]["bottleneck"] in ("cores", "segmenters", "readers")
    assert math.isfinite(said["forecast"]["seconds"]) and said["forecast"]["segmenters_within"] >= 1
    lines = CliRunner().invoke(app, [*options[:4], "--price", "3"], catch_exceptions=False).output
    assert "4 photographs" in lines and "holds it back" in lines and "at 3 an hour" in lines


def test_a_fleet_of_gpus_is_reckoned_by_a_gpu_here_or_told_to_be_an_upper_limit(
    archive: Path, tiny_bundle: Path
) -> None:
    options = ["plan", str(archive), "--model", str(tiny_bundle), "--replicas", "4", "--gpus", "0.5", "--json"]
    said = json.loads(CliRunner().invoke(app, [*options, "--within", "1"], catch_exceptions=False).output)
    assert said["forecast"]["gpus"] == 2
    assert said["forecast"]["gpus_within"] == said["forecast"]["segmenters_within"] / 2
    assert ("upper limit" in said["stages"]["by"]) != torch.cuda.is_available()
    lines = CliRunner().invoke(app, options[:-1], catch_exceptions=False).output
    assert "with 2 GPUs" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without GPUs")
def test_of_a_machine_without_gpus_one_must_say_how_many_replicas_have_some(archive: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(archive), "--gpus", "1"])
    assert isinstance(done.exception, UsageError) and "--replicas" in str(done.exception)
