"""Results as DICOM: valid, equal to the mask, the same whenever they are made, and filed beside the photograph."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from archive_runs import rows
from dicom_files import OPHTHALMIC_8_BIT, dicom_file, key_of
from fault_proxy import Fault, Kind, fault_proxy
from hypothesis import given, settings
from hypothesis import strategies as st
from local_fleet import LocalFleet, score_all
from photographs import encode
from PIL import Image
from pydicom import Dataset, dcmread
from typer.testing import CliRunner

from ma_cluster.archive.audit import check_audit
from ma_cluster.archive.dicom_export import DicomExport, Exported
from ma_cluster.archive.dicom_results import SUFFIXES, Told, dicom_results
from ma_cluster.archive.plan import Plan
from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run, begin_run
from ma_cluster.archive.shard_scorer import ShardScorer
from ma_cluster.archive.summary import finish_run
from ma_cluster.cli.app import app
from ma_cluster.config import ImageConfig
from ma_cluster.errors import StoreError
from ma_cluster.images.acquisition import HEADER, Acquisition
from ma_cluster.images.datasets import decode_mask
from ma_cluster.images.decode import Decoded, decode
from ma_cluster.images.sample import retina
from ma_cluster.lesions.findings import encode_mask, encode_overlay
from ma_cluster.storage.dicomweb import DicomWeb
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import Source, open_source
from ma_cluster.storage.network import NetworkLimits

RGB = np.asarray(Image.fromarray(retina()).resize((301, 300)))
MASK = np.zeros(RGB.shape[:2], bool)
MASK[100:110, 200:211] = MASK[299, 300] = True
RUN = Run(
    id="1",
    source="s",
    plan=Plan(1, "d"),
    model_digest="ab" * 32,
    config_digest="cd" * 32,
    versions={},
    started="2026-01-01T00:00:00+00:00",
)
TOLD = Told(
    mask_png=encode_mask(MASK),
    overlay_jpeg=encode_overlay(RGB, MASK),
    lesions=2,
    area_px=111,
    image_score=0.7,
    triage="refer",
    gradable=True,
    shows_text=False,
)
NOTHING = dataclasses.replace(TOLD, mask_png=encode_mask(MASK & False), lesions=0, area_px=0, image_score=None)
POOR = dataclasses.replace(NOTHING, triage="ungradable", gradable=False)
SPACED: dict[str, Any] = {"PixelSpacing": [0.005, 0.004], "FrameOfReferenceUID": "1.2.3"}
BARE: dict[str, Any] = dict.fromkeys(
    ("PatientName", "PatientBirthDate", "StudyTime", "Manufacturer", "ManufacturerModelName", "ImageLaterality")
)
SECONDARY: dict[str, Any] = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "ConversionType": "WSD"}


def acquisition(kind: str = "explicit", **values: Any) -> Acquisition:
    found = decode(dicom_file(RGB, kind, **values), ImageConfig()).acquisition
    assert found is not None
    return found


def read(files: dict[str, bytes], suffix: str) -> Dataset:
    return dcmread(io.BytesIO(files[suffix]))


@pytest.mark.parametrize(
    ("of", "told"),
    [
        ({}, TOLD),
        (SPACED, TOLD),
        (SECONDARY, TOLD),
        (BARE, NOTHING),
        ({"kind": "frames"}, POOR),
        ({"BurnedInAnnotation": None}, TOLD),
        ({}, dataclasses.replace(TOLD, shows_text=True)),
        ({"kind": "jpeg", "LossyImageCompression": "01"}, TOLD),
    ],
)
def test_dciodvfy_finds_no_errors(of: dict[str, Any], told: Told, tmp_path: Path) -> None:
    tool = shutil.which("dciodvfy")
    if tool is None:
        pytest.skip("no dciodvfy: Debian's dicom3tools")
    for suffix, data in dicom_results(acquisition(**of), told, RUN).items():
        path = tmp_path / f"it{suffix}"
        path.write_bytes(data)
        done = subprocess.run([tool, "-new", path], capture_output=True, text=True)
        assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == []


@pytest.mark.parametrize("mask", [MASK, MASK & False, ~MASK])
def test_the_segmentation_is_the_mask_to_the_pixel(mask: np.ndarray) -> None:
    files = dicom_results(acquisition(), dataclasses.replace(TOLD, mask_png=encode_mask(mask)), RUN)
    stored = highdicom.seg.segread(io.BytesIO(files[".seg.dcm"]))
    pixels = stored.get_pixels_by_source_instance([acquisition().sop_instance_uid], combine_segments=False)
    np.testing.assert_array_equal(pixels[0, :, :, 0], mask)
    assert stored.get_segment_description(1).segmented_property_type.meaning == "Microaneurysm"
    assert (
        RUN.model_digest in stored.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    )


def test_the_report_tells_the_findings() -> None:
    report = highdicom.sr.srread(io.BytesIO(dicom_results(acquisition(**SPACED), TOLD, RUN)[".sr.dcm"]))
    (group,) = report.content.get_image_measurement_groups()
    measured = {each.name.meaning: (each.value, each.unit.value) for each in group.get_measurements()}
    assert measured["Number of microaneurysms"] == (2.0, "1")
    assert measured["Area"] == (pytest.approx(111 * 0.005 * 0.004), "mm2")
    assert measured["Probability of retinopathy"] == (0.7, "1")
    said = {each.name.meaning: each.value.meaning for each in group.get_qualitative_evaluations()}
    assert said == {"Triage": "refer", "Gradable": "Yes"}


def test_the_overlay_is_the_jpeg_and_shows() -> None:
    capture = read(dicom_results(acquisition(), TOLD, RUN), ".sc.dcm")
    jpeg = np.asarray(Image.open(io.BytesIO(TOLD.overlay_jpeg)).convert("RGB")).astype(int)
    assert np.abs(capture.pixel_array.astype(int) - jpeg).max() <= 2  # by another library's arithmetic


@pytest.mark.parametrize(
    ("header", "seen", "said"),
    [
        ("YES", False, "YES"),
        ("YES", True, "YES"),
        ("NO", True, "YES"),
        (None, True, "YES"),
        ("NO", False, "NO"),
        (None, False, None),
        ("MAYBE", False, None),
    ],
)
def test_the_overlay_says_no_text_is_on_it_only_where_that_is_known(
    header: str | None, said: str | None, *, seen: bool
) -> None:
    files = dicom_results(acquisition(BurnedInAnnotation=header), dataclasses.replace(TOLD, shows_text=seen), RUN)
    assert read(files, ".sc.dcm").get("BurnedInAnnotation") == said


def test_results_are_of_the_patient_and_study_and_refer_to_the_photograph() -> None:
    known = acquisition("frames")
    for data in dicom_results(known, TOLD, RUN).values():
        made = dcmread(io.BytesIO(data))
        assert (made.PatientID, made.PatientName) == ("patient-1", "Doé^Jane")
        assert made.StudyInstanceUID == known.study_instance_uid
        assert made.SeriesInstanceUID != known.series_instance_uid
        references = [each for each in made.iterall() if each.keyword == "ReferencedSOPInstanceUID"]
        assert {each.value for each in references} == {known.sop_instance_uid}
        kinds = {each.value for each in made.iterall() if each.keyword == "ReferencedSOPClassUID"}
        assert kinds == {OPHTHALMIC_8_BIT}
    segmentation = read(dicom_results(known, TOLD, RUN), ".seg.dcm")
    assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == known.series_instance_uid


def test_the_same_photograph_and_model_give_the_same_objects_and_others_give_others() -> None:
    files = dicom_results(acquisition(), TOLD, RUN)
    assert dicom_results(acquisition(), TOLD, RUN) == files
    others = [
        dicom_results(acquisition(number=2), TOLD, RUN),
        dicom_results(acquisition(), TOLD, dataclasses.replace(RUN, model_digest="00")),
        dicom_results(acquisition(), TOLD, dataclasses.replace(RUN, config_digest="00")),
    ]
    uids = [read(some, suffix).SOPInstanceUID for some in (files, *others) for suffix in SUFFIXES]
    assert len(set(uids)) == len(uids)
    again = dicom_results(acquisition(), TOLD, dataclasses.replace(RUN, started="2027-01-01T00:00:00+00:00"))
    assert [read(again, suffix).SOPInstanceUID for suffix in SUFFIXES] == uids[:3]


@settings(max_examples=10, deadline=None)
@given(st.dictionaries(st.sampled_from(HEADER), st.text(min_size=1, max_size=70), max_size=4))
def test_a_header_that_breaks_the_rules_costs_no_result(header: dict[str, str]) -> None:
    known = dataclasses.replace(acquisition(), header=header)
    assert set(dicom_results(known, NOTHING, RUN)) == set(SUFFIXES)


@pytest.mark.parametrize(
    ("header", "number"),
    [
        ({"InstanceNumber": "0"}, 1),
        ({"InstanceNumber": "7"}, 7),
        ({"PatientName": "A^B\\C^D"}, 1),
        ({"PatientBirthDate": "19500101-", "StudyTime": "1000-1100"}, 1),
    ],
)
def test_odd_numbers_ranges_and_two_names_in_one_cost_no_result(header: dict[str, str], number: int) -> None:
    files = dicom_results(dataclasses.replace(acquisition(), header=header), NOTHING, RUN)
    assert {read(files, suffix).InstanceNumber for suffix in SUFFIXES} == {number}


def test_a_name_that_highdicom_doubts_is_warned_of_by_no_thread() -> None:
    known = dataclasses.replace(acquisition(), header={"PatientName": "MuellerAnna"})
    with warnings.catch_warnings(record=True) as heard, ThreadPoolExecutor(8) as threads:
        warnings.simplefilter("always")
        for made in threads.map(lambda _: dicom_results(known, NOTHING, RUN), range(24)):
            assert set(made) == set(SUFFIXES)
    assert heard == []


def run_over(source: Source, dest: LocalStore, model: Path, *, dicom: bool) -> Run:
    run = begin_run(source, dest, "ab" * 32, "cd" * 32)
    with ThreadPoolExecutor(4) as threads:
        score_all(ShardScorer(LocalFleet(source, model), dest, dest, run, threads, Silent(), dicom=dicom), dest, run)
    finish_run(dest, run)
    return run


class Silent:
    """A `Recorder`."""

    def begun(self) -> None: ...

    def decided(self, outcome: object) -> None: ...


def decode_plainly(data: bytes) -> Decoded:
    return decode(data, ImageConfig())


def export(source: Source, dest: LocalStore, run: Run, server: DicomWeb | None = None) -> Exported:
    return DicomExport(source, dest, run, decode_plainly, ImageConfig().max_bytes, server).all()


@pytest.mark.parametrize("dicom", [True, False])
def test_a_run_has_dicom_results_of_its_dicom_photographs_meanwhile_or_afterwards(
    tiny_bundle: Path, tmp_path: Path, *, dicom: bool
) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    source.put("one.dcm", dicom_file(RGB, "jpeg", 1))
    source.put("two", dicom_file(RGB, "rle", 2))
    source.put("three.png", encode(RGB, "PNG"))
    source.put("bad.dcm", dicom_file(RGB, "explicit", 3)[:5000])
    run = run_over(source, dest, tiny_bundle, dicom=dicom)
    written = sorted(entry.key for entry in dest.list("dicom/"))
    assert len(written) == (2 * len(SUFFIXES) if dicom else 0)
    assert export(source, dest, run) == Exported(written=2, no_dicom=1)
    before = {entry.key: dest.get(entry.key) for entry in dest.list("dicom/")}
    assert len(before) == 2 * len(SUFFIXES)
    assert export(source, dest, run) == Exported(written=2, no_dicom=1)
    assert {entry.key: dest.get(entry.key) for entry in dest.list("dicom/")} == before
    assert (check_audit(dest, run).results, check_audit(dest, run, masks=True).faults) == (4, ())


def test_the_commands_write_a_run_as_dicom_once_and_check_its_audit(tiny_bundle: Path, tmp_path: Path) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    source.put("one.dcm", dicom_file(RGB, "jpeg 2000", 1))
    source.put("two.png", encode(RGB, "PNG"))
    run_over(source, dest, tiny_bundle, dicom=False)
    for _ in range(2):
        done = CliRunner().invoke(app, ["dicom", dest.url])
        assert done.exit_code == 0, done.output
        assert done.output.splitlines() == [
            f"1 results as DICOM, {dest.url}/dicom",
            "1 photographs are of other files than DICOM",
        ]
        files = {entry.key: dest.get(entry.key) for entry in dest.list("dicom/")}
        assert len(files) == len(SUFFIXES)
    checked = CliRunner().invoke(app, ["audit", dest.url, "--masks"])
    assert checked.exit_code == 0 and checked.output.startswith("2 results, ")
    (mask,) = (row["mask_key"] for row in rows(dest).values() if row["key"] == "one.dcm")
    (stored,) = (highdicom.seg.segread(io.BytesIO(data)) for key, data in files.items() if key.endswith(".seg.dcm"))
    np.testing.assert_array_equal(stored.pixel_array.squeeze() > 0, decode_mask(dest.get(mask)))


def test_a_mask_or_overlay_that_is_gone_costs_its_own_photograph_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    for number in range(1, 4):
        source.put(f"{number}.dcm", dicom_file(RGB, "jpeg", number))
    run = run_over(source, dest, tiny_bundle, dicom=False)
    gone = next(dest.list("masks/")).key, list(dest.list("overlays/"))[-1].key
    for key in gone:
        (tmp_path / "run" / key).unlink()
    assert export(source, dest, run) == Exported(written=1, failed=2)


@pytest.mark.parametrize("damage", [b"", b"<html>", None], ids=["nothing", "another", "its half"])
def test_a_damaged_mask_or_overlay_costs_its_own_photograph_alone(
    tiny_bundle: Path, tmp_path: Path, damage: bytes | None
) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    for number in range(1, 4):
        source.put(f"{number}.dcm", dicom_file(RGB, "jpeg", number))
    run = run_over(source, dest, tiny_bundle, dicom=False)
    for key in (next(dest.list("masks/")).key, list(dest.list("overlays/"))[-1].key):
        data = dest.get(key)
        dest.put(key, data[: len(data) // 2] if damage is None else damage)
    assert export(source, dest, run) == Exported(written=1, failed=2)


def test_a_damaged_result_is_not_sent_and_keeps_no_other_back(orthanc: str, tiny_bundle: Path, tmp_path: Path) -> None:
    web = DicomWeb(f"dicomweb+{orthanc}")
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    for number in (611, 612):
        source.put(f"{number}.dcm", dicom_file(RGB, "jpeg", number))
    run = run_over(source, dest, tiny_bundle, dicom=True)
    dest.put(next(dest.list("dicom/")).key, b"damaged")
    assert export(source, dest, run, web) == Exported(written=1, sent=1, failed=1)


def test_sending_results_twice_changes_nothing_and_they_are_found_by_the_study(
    orthanc: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    web = DicomWeb(f"dicomweb+{orthanc}")
    data = dicom_file(RGB, "jpeg", 601, StudyDate="20310401")
    web.create(key_of(data), data)
    source = open_source(f"dicomweb+{orthanc}?StudyDate=20310401")
    dest = LocalStore(tmp_path / "run")
    run = run_over(source, dest, tiny_bundle, dicom=True)
    assert export(source, dest, run, web) == Exported(written=1, sent=1)
    assert export(source, dest, run, web) == Exported(written=1, sent=0)
    study = key_of(data).split("/")[1]
    of_the_study = DicomWeb(f"dicomweb+{orthanc}?StudyInstanceUID={study}")
    assert [entry.key for entry in of_the_study.list()] == [key_of(data)], "results are no photographs"
    assert of_the_study.skipped == len(SUFFIXES)


def test_a_result_that_the_server_refuses_is_counted_and_one_that_lets_nobody_in_ends_the_export(
    orthanc: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    for number in (621, 622):
        source.put(f"{number}.dcm", dicom_file(RGB, "jpeg", number))
    run = run_over(source, dest, tiny_bundle, dicom=True)
    with fault_proxy(orthanc) as proxy:
        web = DicomWeb(f"dicomweb+{proxy.endpoint}/dicom-web")
        proxy.faults += [Fault(Kind.ERROR, "POST", "/studies", status=409)]
        assert export(source, dest, run, web) == Exported(written=1, sent=1, failed=1)
        proxy.faults += [Fault(Kind.ERROR, "POST", "/studies", times=9, status=401)]
        with pytest.raises(StoreError, match="401"):
            export(source, dest, run, web)
    assert export(source, dest, run, DicomWeb(f"dicomweb+{orthanc}")) == Exported(written=2, sent=1)


@pytest.mark.long
def test_an_archive_through_a_breaking_dicomweb_server_has_each_instance_once(
    orthanc: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    web = DicomWeb(f"dicomweb+{orthanc}")
    small = np.asarray(Image.fromarray(RGB).resize((260, 260)))
    files = [dicom_file(small, "jpeg", 700 + number, StudyDate="20310501") for number in range(200)]
    for data in files:
        web.create(key_of(data), data)
    limits = NetworkLimits(stall_s=8.0, deadline_s=120.0, attempts=8, first_pause_s=0.02)
    with fault_proxy(orthanc) as proxy:
        proxy.faults += [
            Fault(Kind.ERROR, "GET", "/instances?", times=2, status=500),
            Fault(Kind.SHORTER, "GET", "/instances?", times=1),
            Fault(Kind.ERROR, "GET", "/instances/", times=5, after=10),
            Fault(Kind.SHORTER, "GET", "/instances/", times=5, after=40),
            Fault(Kind.LONGER, "GET", "/instances/", times=5, after=80),
            Fault(Kind.RESET, "GET", "/instances/", times=3, after=120),
            Fault(Kind.STALL, "GET", "/instances/", times=2, after=150),
            Fault(Kind.SILENCE, "GET", "/instances/", times=2, after=170),
        ]
        told = list(proxy.faults)
        source = DicomWeb(f"dicomweb+{proxy.endpoint}/dicom-web?StudyDate=20310501", limits)
        dest = LocalStore(tmp_path / "run")
        run = run_over(source, dest, tiny_bundle, dicom=True)
    assert [fault for fault in told if fault.times] == [], "all of them have happened"
    rows = [row for table in latest_outcomes(dest, run, ["status"]) for row in table.to_pylist()]
    assert sorted(row["key"] for row in rows) == sorted(key_of(data) for data in files)
    assert {row["status"] for row in rows} == {"scored"}
    assert len(list(dest.list("dicom/"))) == 200 * len(SUFFIXES)
    assert os.environ["DICOMWEB_PASSWORD"] not in (tmp_path / "run" / "run.json").read_text()
