"""Data sets: IDRiD's layout, healthy folders and manifests become samples whose splits share nobody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photographs import encode, idrid_folder
from PIL import Image

from ma_cluster.config import SplitConfig
from ma_cluster.errors import StoreError, UsageError
from ma_cluster.images.datasets import (
    IMAGES_FOLDER,
    MASKS_FOLDER,
    TEST_PART,
    Sample,
    decode_mask,
    read_dataset,
    read_graded,
    read_object,
)
from ma_cluster.storage.store import open_store

SPLIT = SplitConfig(validation=("IDRiD_02",), validation_healthy=("N_2",))
TRAINING_PART = "a. Training Set"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """IDRiD's layout with three photographs to train on, one without microaneurysms, and one to test on."""
    store = open_store(tmp_path / "idrid")
    for name, part in [("IDRiD_01", TRAINING_PART), ("IDRiD_02", TRAINING_PART), ("IDRiD_03", TRAINING_PART)]:
        store.put(f"{IMAGES_FOLDER}{part}/{name}.jpg", name.encode())
    store.put(f"{IMAGES_FOLDER}{TEST_PART}/IDRiD_55.JPG", b"IDRiD_55")
    store.put(f"{IMAGES_FOLDER}{TRAINING_PART}/Thumbs.db", b"")
    masks = [("IDRiD_01", "MA"), ("IDRiD_01", "HE"), ("IDRiD_01", "OD"), ("IDRiD_02", "MA"), ("IDRiD_03", "EX")]
    for name, kind in masks:
        store.put(f"{MASKS_FOLDER}{TRAINING_PART}/kind/{name}_{kind}.tif", kind.encode())
    store.put(f"{MASKS_FOLDER}{TEST_PART}/1. Microaneurysms/IDRiD_55_MA.tif", b"MA")
    return tmp_path / "idrid"


def by_name(samples: list[Sample]) -> dict[str, Sample]:
    return {sample.name: sample for sample in samples}


def test_the_layout_gives_labels_splits_and_masks(folder: Path) -> None:
    samples = by_name(read_dataset(str(folder), SPLIT))
    assert list(samples) == ["IDRiD_01", "IDRiD_02", "IDRiD_03", "IDRiD_55"]
    assert [sample.split for sample in samples.values()] == ["training", "validation", "training", "test"]
    assert [sample.label for sample in samples.values()] == ["lesion", "lesion", "healthy", "lesion"]
    first = samples["IDRiD_01"]
    assert read_object(first.image) == b"IDRiD_01"
    assert first.mask is not None and read_object(first.mask) == b"MA"
    assert [read_object(mask) for mask in first.other_masks] == [b"HE", b"OD"]
    assert samples["IDRiD_03"].mask is None
    assert all(sample.others_known for sample in samples.values())
    assert [read_object(mask) for mask in samples["IDRiD_03"].other_masks] == [b"EX"]


def test_a_folder_of_the_test_part_alone_is_enough(tmp_path: Path) -> None:
    open_store(tmp_path).put(f"{IMAGES_FOLDER}{TEST_PART}/IDRiD_60.jpg", b"")
    (sample,) = read_dataset(str(tmp_path), SPLIT)
    assert (sample.name, sample.split) == ("IDRiD_60", "test")


def test_healthy_photographs_join_by_their_own_split(folder: Path, tmp_path: Path) -> None:
    for name in ("N_1.jpg", "nested/N_2.png", "licence.txt"):
        open_store(tmp_path / "healthy").put(name, name.encode())
    samples = by_name(read_dataset(str(folder), SPLIT, str(tmp_path / "healthy")))
    assert (samples["N_1"].split, samples["N_2"].split) == ("training", "validation")
    assert {samples[name].label for name in ("N_1", "N_2")} == {"healthy"}
    assert read_object(samples["N_2"].image) == b"nested/N_2.png"
    assert len(samples) == 6


@pytest.mark.parametrize("column", ["grade", "retinopathy_grade"])
def test_of_a_table_of_grades_those_without_retinopathy_join(folder: Path, tmp_path: Path, column: str) -> None:
    rows = [f"images/IDRiD_grading_{number:03d}.jpg,{grade}" for number, grade in ((20, 0), (21, 0), (22, 2), (331, 0))]
    (tmp_path / "grades.csv").write_text("\n".join([f"image,{column}", *rows, ",0"]) + "\n")
    samples = by_name(read_dataset(str(folder), SplitConfig(), str(tmp_path / "grades.csv")))
    graded = {name: sample for name, sample in samples.items() if "grading" in name}
    assert {name: sample.split for name, sample in graded.items()} == {
        "IDRiD_grading_020": "validation",
        "IDRiD_grading_021": "training",
        "IDRiD_grading_331": "validation",
    }
    assert graded["IDRiD_grading_021"].image == f"{tmp_path}/images/IDRiD_grading_021.jpg"


def test_a_table_gives_grades_splits_groups_and_whatever_else_it_says(tmp_path: Path) -> None:
    rows = ["a.jpg,2.0,,P1,45", "IDRiD_grading_331.jpg,0,,,", "b.jpg,1,validation,,30", "c.jpg,,,,", ",3,,,"]
    (tmp_path / "grades.csv").write_text("\n".join(["image,grade,split,patient,age", *rows]) + "\n")
    found = read_graded(f"{tmp_path}/grades.csv", SplitConfig())
    assert [(each.name, each.grade, each.split) for each in found] == [
        ("a", 2, "training"),
        ("IDRiD_grading_331", 0, "validation"),
        ("b", 1, "validation"),
    ]
    assert [each.group for each in found] == ["P1", "IDRiD_grading_331", "b"]
    assert [each.columns for each in found] == [{"age": "45"}, {"age": ""}, {"age": "30"}]
    assert found[0].image == f"{tmp_path}/a.jpg"


def test_grades_of_annotated_photographs_need_the_data_set(folder: Path, tmp_path: Path) -> None:
    annotated = read_dataset(str(folder), SPLIT)
    name = next(sample.name for sample in annotated if sample.split == "validation")
    (tmp_path / "grades.csv").write_text(f"image,retinopathy_grade,same_as_segmentation\n,3,{name}\nx.jpg,0,\n")
    both = read_graded(f"{tmp_path}/grades.csv", SPLIT, annotated)
    assert [(each.name, each.grade, each.split) for each in both] == [(name, 3, "validation"), ("x", 0, "training")]
    assert both[0].image == by_name(annotated)[name].image
    assert [each.name for each in read_graded(f"{tmp_path}/grades.csv", SPLIT)] == ["x"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [("image,grade\na.jpg,mild\n", "row 1 of the grades has no number"), ("image,mask\na.jpg,b.png\n", "no row")],
)
def test_a_table_without_grades_is_a_usage_error(tmp_path: Path, table: str, complaint: str) -> None:
    (tmp_path / "grades.csv").write_text(table)
    with pytest.raises(UsageError, match=complaint):
        read_graded(f"{tmp_path}/grades.csv", SplitConfig())


def test_a_folder_without_photographs_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no photographs under"):
        read_dataset(str(tmp_path), SPLIT)


ROWS = [
    {"image": "images/a.png", "mask": "masks/a.png", "label": "lesion", "split": "training", "group": "p1"},
    {"image": "/abs/b.png", "mask": "", "label": "healthy", "split": "validation", "group": "p2"},
    {"image": "s3://bucket/c.png", "mask": "", "label": "healthy", "split": "test", "group": ""},
]


def write_csv(folder: Path, rows: list[dict[str, str]], start: str = "") -> str:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / "manifest.csv").write_text(start + "\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "manifest.csv")


def write_parquet(folder: Path, rows: list[dict[str, str]]) -> str:
    table = pa.Table.from_pylist([{key: value or None for key, value in row.items()} for row in rows])
    pq.write_table(table, folder / "manifest.parquet")
    return str(folder / "manifest.parquet")


@pytest.mark.parametrize("kind", ["csv", "csv from Excel", "parquet"])
def test_a_manifest_gives_samples_with_paths_relative_to_itself(tmp_path: Path, kind: str) -> None:
    byte_order_mark = "\ufeff" if kind == "csv from Excel" else ""
    url = write_parquet(tmp_path, ROWS) if kind == "parquet" else write_csv(tmp_path, ROWS, byte_order_mark)
    mask = f"{tmp_path}/masks/a.png"
    assert read_dataset(url, SPLIT) == [
        Sample("a", f"{tmp_path}/images/a.png", mask, "lesion", "training", others_known=False, group=ROWS[0]["group"]),
        Sample("b", "/abs/b.png", None, "healthy", "validation", group=ROWS[1]["group"]),
        Sample("c", "s3://bucket/c.png", None, "healthy", "test", group=ROWS[2]["group"]),
    ]


def test_a_manifest_in_the_working_folder_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path, ROWS)
    monkeypatch.chdir(tmp_path)
    assert read_dataset("manifest.csv", SPLIT)[0].image == "images/a.png"


@pytest.mark.parametrize("change", [{"image": ""}, {"label": "ill"}, {"label": ""}, {"split": "train"}])
def test_a_wrong_row_is_numbered(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="row 2 of the manifest needs image"):
        read_dataset(write_csv(tmp_path, [ROWS[0], ROWS[1] | change]), SPLIT)


def test_a_patient_in_two_splits_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"row 2 .* second split"):
        read_dataset(write_csv(tmp_path, [ROWS[0], ROWS[1] | {"group": "p1"}]), SPLIT)


def test_the_first_of_patients_counted_from_0_is_one_as_well(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"group": 0}, ROWS[2] | {"group": 0, "split": "training"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "manifest.parquet")
    assert [each.group for each in read_dataset(f"{tmp_path}/manifest.parquet", SPLIT)] == ["0", "0"]


def test_a_manifest_that_names_a_photograph_twice_may_not_split_it(tmp_path: Path) -> None:
    twice = ROWS[0] | {"group": "", "split": "test"}
    with pytest.raises(UsageError, match="second split"):
        read_dataset(write_csv(tmp_path, [ROWS[0] | {"group": ""}, twice]), SPLIT)


MASK = np.array([[0, 1, 1], [0, 0, 1]], bool)


def _palette(top: int) -> Image.Image:
    image = Image.fromarray(MASK.astype(np.uint8), mode=None).convert("P")
    image.putpalette([0, 0, 0, top, 0, 0])
    image.putdata(MASK.astype(np.uint8).ravel().tolist())
    return image


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
@pytest.mark.parametrize(
    "image",
    [
        _palette(76),
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8) * 255),
        Image.fromarray(MASK.astype(np.uint16)),
        Image.fromarray((MASK[:, :, None] * np.uint8([255, 255, 255])).astype(np.uint8)),
        Image.fromarray((MASK[:, :, None] * np.uint8([1, 0, 0])).astype(np.uint8)),
        Image.fromarray((MASK[:, :, None] * np.uint8([0, 0, 4])).astype(np.uint8)),
        Image.fromarray(
            np.dstack([MASK * np.uint8(level) for level in (0, 0, 4)] + [np.full_like(MASK, 255, np.uint8)])
        ),
    ],
    ids=["palette", "1-bit", "0 and 1", "0 and 255", "16-bit", "colour", "dark red", "dark blue", "opaque"],
)
def test_masks_of_every_mode_are_read(image: Image.Image, kind: str) -> None:
    assert (decode_mask(encode(image, kind)) == MASK).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_a_damaged_mask_is_an_error_of_ours(kind: str) -> None:
    whole = encode(Image.fromarray(np.random.default_rng(0).random((200, 200)) < 0.5), kind)
    for damaged in (b"", b"<html>", whole[:40], whole[: len(whole) // 2]):
        with pytest.raises(StoreError, match="a mask is damaged"):
            decode_mask(damaged)


def test_a_mask_of_another_size_than_its_photograph_is_refused() -> None:
    data = encode(Image.fromarray(MASK), "PNG")
    assert decode_mask(data, (2, 3)).any()
    for shape in ((3, 2), (4, 6)):
        with pytest.raises(UsageError, match=rf"mask is of 3 x 2 pixels.* of {shape[1]} x {shape[0]}; give masks"):
            decode_mask(data, shape)


def test_idrid_itself_is_read() -> None:
    samples = read_dataset(str(idrid_folder()), SplitConfig())
    training = [sample for sample in samples if sample.split == "training"]
    assert (len(samples), len(training)) == (54, 44)
    assert {sample.split for sample in samples} == {"training", "validation"}
    assert all(sample.mask is not None for sample in samples)
    first = samples[0]
    assert first.name == "IDRiD_01" and first.mask is not None
    mask = decode_mask(read_object(first.mask))
    assert mask.shape == (2848, 4288)
    assert 0 < mask.mean() < 0.01
