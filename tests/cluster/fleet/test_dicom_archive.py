"""Archive runs on real Ray between a real DICOM server and itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from archive_runs import rows
from dicom_files import dicom_file, key_of
from PIL import Image

from ma_cluster.archive.audit import check_audit
from ma_cluster.archive.summary import open_run
from ma_cluster.cluster.fleet.driver import score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.images.sample import retina
from ma_cluster.storage.dicomweb import DicomWeb
from ma_cluster.storage.local import LocalStore

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("local_ray")
def test_photographs_of_a_dicom_server_are_scored_and_told_as_dicom(
    orthanc: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    web, dest = DicomWeb(f"dicomweb+{orthanc}"), LocalStore(tmp_path / "run")
    rgb = np.asarray(Image.fromarray(retina()).resize((300, 300)))
    files = [dicom_file(rgb, kind, number, StudyDate="20310601") for number, kind in ((801, "jpeg"), (802, "rle"))]
    for data in files:
        web.create(key_of(data), data)
    summary = score_archive(
        f"dicomweb+{orthanc}?StudyDate=20310601", dest.url, Fleet(segmenters=1, dicom=True), model=str(tiny_bundle)
    )
    assert summary.complete
    found = rows(dest)
    assert {key: row["status"] for key, row in found.items()} == {key_of(data): "scored" for data in files}
    assert {row["fov_degrees"] for row in found.values()} == {45.0}, "as the header says"
    assert len(list(dest.list("dicom/"))) == 6
    assert check_audit(*open_run(dest.url)).results == 2
    private = ("patient-80", "Jane", "secret-of-the-tests")
    texts = [dest.get(entry.key) for entry in dest.list() if entry.key.endswith((".json", ".jsonl"))]
    assert not any(word.encode() in text for word in private for text in texts)
