"""Annotated photographs of a data set: IDRiD's folder layout, a folder of healthy photographs, or a manifest.

What comes out is a list of `Sample`s: keys into a store, never pixels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from PIL import Image

from ma_cluster.config import SplitConfig
from ma_cluster.errors import ImageError, MaClusterError, StoreError, UsageError
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.parquet import from_parquet
from ma_cluster.storage.store import Store, open_store

_T = TypeVar("_T")
_Found = TypeVar("_Found")
Split = Literal["training", "validation", "test"]
Label = Literal["healthy", "lesion"]

IMAGES_FOLDER = "A. Segmentation/1. Original Images/"
MASKS_FOLDER = "A. Segmentation/2. All Segmentation Groundtruths/"
TEST_PART = "b. Testing Set"
_LABELS: dict[str, Label] = {"healthy": "healthy", "lesion": "lesion"}
_SPLITS: dict[str, Split] = {"training": "training", "validation": "validation", "test": "test"}
_OWN_COLUMNS = {"image", "grade", "retinopathy_grade", "split", "group", "patient", "same_as_segmentation"}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Sample:
    """One photograph, its microaneurysm mask where it has one, and what else is outlined on it; see `kind_of`."""

    name: str
    image: str
    mask: str | None
    label: Label
    split: Split
    other_masks: tuple[str, ...] = ()
    others_known: bool = True
    """Whether other kinds of lesions than `mask`'s were looked for, too: what no mask outlines is then not there."""
    group: str = ""
    """What belongs together, as the photographs of one patient; empty where nothing is said."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One photograph with its grade of retinopathy."""

    name: str
    image: str
    grade: int
    """0 none, 1 mild, 2 moderate and so on, as the International Clinical Diabetic Retinopathy scale has them."""
    split: Split
    group: str
    """What belongs together, as the photographs of one patient."""
    columns: dict[str, str]
    """What else is said of it."""


def read_dataset(url: str, split: SplitConfig, healthy_url: str | None = None) -> list[Sample]:
    """Samples of a data set, keys as URLs joined to `url`, sorted by name.

    Args:
        url: a folder or prefix that holds IDRiD's layout, or a manifest (.csv or .parquet with the columns image,
            mask, label, split and group).
        split: which of the training part's photographs validate.
        healthy_url: of photographs without retinopathy; see `read_healthy`.

    Raises:
        UsageError: nothing was found, or the manifest is wrong.
    """
    samples = _read_manifest(url) if url.endswith((".csv", ".parquet")) else list(_read_idrid(url, split))
    if healthy_url is not None:
        samples += read_healthy(healthy_url, split)
    if not samples:
        raise UsageError(f"no photographs under {url}: expected IDRiD's layout, '{IMAGES_FOLDER}...', or a manifest")
    return sorted(samples, key=lambda sample: sample.name)


def read_split(url: str, split: SplitConfig, part: Split, healthy_url: str | None = None) -> list[Sample]:
    """Photographs of a part whose microaneurysms are all known: they have a mask, or none is to be seen.

    Raises:
        UsageError: none of them has a mask; or as `read_dataset`, whose arguments these are, raises it.
    """
    samples = [sample for sample in read_dataset(url, split, healthy_url) if sample.split == part]
    known = [sample for sample in samples if sample.mask or sample.label == "healthy"]
    if not any(sample.mask for sample in known):
        raise UsageError(f"no photograph of the {part} split has a mask of microaneurysms; check data and split")
    return known


def read_healthy(url: str, split: SplitConfig) -> list[Sample]:
    """Photographs without retinopathy: all of a folder, or those of grade 0 of a table.

    Args:
        url: a folder or prefix, or a CSV or Parquet file with the columns image (a key beside it) and grade or
            retinopathy_grade; rows without an image are passed over.
        split: those that its `validation_healthy` does not name train.
    """
    if url.endswith((".csv", ".parquet")):
        folder = url.rpartition("/")[0]
        urls = [
            _resolve(folder, row["image"]) for row in _manifest_rows(url) if row.get("image") and _grade(row) == "0"
        ]
    else:
        store = open_store(url)
        urls = [_join(store, entry.key) for entry in store.list() if entry.key.lower().endswith(_IMAGE_SUFFIXES)]
    samples = []
    for image in urls:
        name = PurePosixPath(image).stem
        unseen = any(fnmatchcase(name, pattern) for pattern in split.validation_healthy)
        samples.append(Sample(name, image, None, "healthy", "validation" if unseen else "training"))
    return samples


def of_no_use(number: int, total: int, error: MaClusterError) -> UsageError:
    """What is raised for a photograph that cannot be used; a file's name may be a patient's."""
    return UsageError(f"photograph {number} of {total} in the order of their names is of no use: {error}")


def look_at_each(photographs: Sequence[_T], look: Callable[[_T], _Found]) -> list[_Found]:
    """What is found on each photograph. Raises UsageError: one is of no use; see `of_no_use`."""
    found: list[_Found] = []
    for photograph in photographs:
        try:
            found.append(look(photograph))
        except (ImageError, UsageError) as error:
            raise of_no_use(len(found) + 1, len(photographs), error) from None
    return found


def read_graded(url: str, split: SplitConfig, annotated: Sequence[Sample] = ()) -> list[Graded]:
    """Photographs with their grades of retinopathy, in the table's order; rows without a grade are passed over.

    Args:
        url: a CSV or Parquet file with the columns image (a key beside it) and grade or retinopathy_grade: 0 none,
            1 mild, and so on. A column group, or patient, names photographs that belong together.
        split: those that it names validate, the others train, where a column split does not say it.
        annotated: photographs of a data set, which rows without an image name in a column same_as_segmentation; such
            rows are passed over without them.

    Raises:
        UsageError: there are none, or a grade is no number.
    """
    folder, known = url.rpartition("/")[0], {sample.name: sample.image for sample in annotated}
    graded = []
    for number, row in enumerate(_manifest_rows(url), 1):
        image = row.get("image") or known.get(row.get("same_as_segmentation") or "")
        if not image or _grade(row) in ("", "None"):
            continue
        if not _grade(row).isdecimal():
            raise UsageError(f"row {number} of the grades has no number for its grade: 0 none, 1 mild, and so on")
        name = PurePosixPath(image).stem
        unseen = name in split.validation or any(fnmatchcase(name, pattern) for pattern in split.validation_healthy)
        part = _SPLITS.get(row.get("split") or "", "validation" if unseen else "training")
        columns = {key: str(value) for key, value in row.items() if key not in _OWN_COLUMNS and value is not None}
        group = _said(row, "group") or _said(row, "patient") or name
        graded.append(Graded(name, _resolve(folder, image), int(_grade(row)), part, group, columns))
    if not graded:
        raise UsageError(
            "no row of the grades has both a photograph, in a column image, and a grade, in a column grade"
        )
    return graded


def kind_of(mask_url: str) -> str:
    """What a mask of IDRiD's layout outlines: the lesions MA, HE, EX or SE, or OD, the optic disc."""
    return PurePosixPath(mask_url).stem.rpartition("_")[2]


def read_object(url: str) -> bytes:
    """The bytes of an image or mask of a Sample."""
    if url.startswith("dicomweb+"):
        server, _, instance = url.partition("/studies/")
        return open_source(server).get(f"studies/{instance}")
    folder, _, name = url.rpartition("/")
    return open_store(folder).get(name)


def decode_mask(data: bytes, shape: tuple[int, int] | None = None) -> Bool[ndarray, "h w"]:
    """A mask of any mode: whatever is not 0 is lesion. IDRiD's palette TIFFs hold 0 and 1, other exports 0 and 255.

    Args:
        data: the file.
        shape: height and width of its photograph, upright, where that is known.

    Raises:
        StoreError: it is damaged, or no picture.
        UsageError: it is of another size than its photograph.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            values = np.asarray(image if len(image.getbands()) == 1 else image.convert("RGB")) != 0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow's decoders raise
        raise StoreError("a mask is damaged, or no picture: restore it") from error
    mask = values if values.ndim == 2 else values.any(axis=2)
    if shape is not None and mask.shape != shape:
        own, wanted = (f"{width} x {height}" for height, width in (mask.shape, shape))
        raise UsageError(f"its mask is of {own} pixels, the photograph upright of {wanted}; give masks its grid")
    return mask


def _read_idrid(url: str, split: SplitConfig) -> Iterator[Sample]:
    store = open_store(url)
    keys = [entry.key for entry in store.list("A. Segmentation/")]
    masks: dict[str, dict[str, str]] = {}
    for key in keys:
        if key.startswith(MASKS_FOLDER):
            name, _, kind = PurePosixPath(key).stem.rpartition("_")
            masks.setdefault(name, {})[kind] = _join(store, key)
    looked = any({"HE", "EX", "SE"} & own.keys() for own in masks.values())
    for key in keys:
        if not (key.startswith(IMAGES_FOLDER) and key.lower().endswith(_IMAGE_SUFFIXES)):
            continue
        name = PurePosixPath(key).stem
        own = masks.get(name, {})
        part: Split = "test" if f"/{TEST_PART}/" in key else "validation" if name in split.validation else "training"
        others = tuple(own[kind] for kind in ("HE", "EX", "SE", "OD") if kind in own)
        label: Label = "lesion" if "MA" in own else "healthy"
        yield Sample(name, _join(store, key), own.get("MA"), label, part, others, looked)


def _read_manifest(url: str) -> list[Sample]:
    folder = url.rpartition("/")[0]
    samples: list[Sample] = []
    split_of: dict[str, Split] = {}
    for number, row in enumerate(_manifest_rows(url), 1):
        image, mask = row.get("image"), row.get("mask") or None
        label, part = _LABELS.get(row.get("label", "")), _SPLITS.get(row.get("split", ""))
        if not image or label is None or part is None:
            known = f"label ({' or '.join(_LABELS)}) and split ({', '.join(_SPLITS)})"
            raise UsageError(f"row {number} of the manifest needs image, {known}")
        name = PurePosixPath(image).stem
        group = _said(row, "group")
        if split_of.setdefault(group or name, part) != part:
            raise UsageError(f"row {number} of the manifest puts its group (patient) into a second split")
        own, others = mask and _resolve(folder, mask), label == "healthy"  # which shows no retinopathy at all
        samples.append(Sample(name, _resolve(folder, image), own, label, part, others_known=others, group=group))
    return samples


def _said(row: Mapping[str, object], column: str) -> str:
    """A cell as text, empty where nothing is said; 0 is a name like any other."""
    value = row.get(column)
    return "" if value is None else str(value)


def _grade(row: Mapping[str, object]) -> str:
    return str(row.get("grade", row.get("retinopathy_grade"))).strip().removesuffix(".0")


def _manifest_rows(url: str) -> list[dict[str, str]]:
    data = read_object(url)
    if url.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    rows: list[dict[str, str]] = from_parquet(data).to_pylist()
    return rows


def _join(store: Store, key: str) -> str:
    return f"{store.url}/{key}"


def _resolve(folder: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") or not folder else f"{folder}/{path}"
