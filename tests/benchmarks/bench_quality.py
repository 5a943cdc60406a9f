"""What light, haze, focus, motion, JPEG and resolution cost in lesions, and what is said of photographs of other sets.

    bench_quality.py curves --idrid FOLDER [--photographs NAME ...] --out FILE.json
    bench_quality.py sets NAME=FOLDER ... [--field-degrees NAME=60 ...] [--detect] --out FILE.json
    bench_quality.py discs --idrid FOLDER --out FILE.json

`curves` degrades validation photographs in known steps. For each step it counts the annotated lesions that the model
still finds and its calls, over those on the undegraded photograph, and gives the measures of quality; exposure and haze
also `without` the gain that makes up for them. `sets` counts ungradable photographs and, with `--detect`, calls in the
outer twentieth of the field's radius. `discs` measures the optic discs that were drawn by hand: how well one tells the
field's angle.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster import machine
from ma_cluster.bundle import DETECTING, load_bundle
from ma_cluster.config import ImageConfig, SplitConfig
from ma_cluster.errors import ImageRefusedError
from ma_cluster.images.datasets import decode_mask, read_dataset, read_object
from ma_cluster.images.decode import decode
from ma_cluster.images.fundus import find_fov
from ma_cluster.images.reading import Facts, read_bytes, read_pixels
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Detection
from ma_cluster.report.run_report import agree

Photograph = UInt8[ndarray, "h w 3"]
STEPS: dict[str, tuple[float, ...]] = {
    "exposure": (0.5, 0.25, 0.12),
    "haze": (0.7, 0.5, 0.35, 0.2),
    "defocus": (1 / 2000, 1 / 1000, 1 / 700, 1 / 500),
    "motion": (1 / 500, 1 / 250),
    "jpeg": (50, 30, 20, 8),
    "diameter_px": (1700, 1200, 900, 700),
}
"""Factor on the light; contrast that is left; sigma and length over the disc's diameter; quality; pixels."""
COMPENSATED = ("exposure", "haze")
RIM = 0.95


def as_saved(pixels: Photograph, quality: int = 90) -> Photograph:
    """As a camera's JPEG gives it back."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out))


def degrade(pixels: Photograph, kind: str, step: float, diameter_px: float) -> Photograph:
    """A photograph with one thing made worse; what changes its size keeps its shape."""
    light = pixels.astype(np.float32)
    if kind == "exposure":
        light *= step
    elif kind == "haze":
        lit = pixels.max(axis=2, keepdims=True) > 25
        light = np.where(lit, light * step + 110 * (1 - step), light)
    elif kind == "defocus":
        light = cv2.GaussianBlur(light, (0, 0), step * diameter_px)
    elif kind == "motion":
        kernel = np.zeros((3, 2 * round(step * diameter_px / 2) + 1), np.float32)
        kernel[1] = 1 / kernel.shape[1]
        light = cv2.filter2D(light, -1, kernel)
    elif kind == "jpeg":
        return as_saved(pixels, int(step))
    else:
        ratio = step / diameter_px
        light = cv2.resize(light, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)


def curves(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each photograph, kind and step; the first of a photograph is undegraded."""
    bundle = load_bundle(arguments.model, networks=DETECTING)
    sure, image = bundle.recipe.detector.least_score, bundle.recipe.image
    numbers = replace(bundle.recipe.detector, flips_half=arguments.flips, least_score=0.0)
    recipe = replace(bundle.recipe, detector=numbers)
    detector = Detector(replace(bundle, recipe=recipe), threads=arguments.threads)
    without = copy.copy(detector)
    without.recipe = replace(recipe, image=replace(image, largest_gain=1.0))
    for sample in read_dataset(str(arguments.idrid), SplitConfig()):
        if sample.split != "validation" or (arguments.photographs and sample.name not in arguments.photographs):
            continue
        assert sample.mask is not None
        pixels, mask = decode(read_object(sample.image), image).pixels, decode_mask(read_object(sample.mask))
        fov, _ = find_fov(pixels, image)
        named = {"photograph": sample.name}
        yield named | {"kind": "none", "step": 1.0} | row(detector, sure, pixels, mask)
        for kind, steps in STEPS.items():
            for step in steps:
                worse = as_saved(degrade(pixels, kind, step, fov.diameter_px))
                found = named | {"kind": kind, "step": step} | row(detector, sure, worse, mask)
                if kind in COMPENSATED:
                    found["without"] = row(without, sure, worse, mask)
                yield found


def row(detector: Detector, sure: float, pixels: Photograph, mask: Bool[ndarray, "h w"]) -> dict[str, Any]:
    """What is found on a photograph, which may be smaller than the mask, and what is said of it."""
    try:
        prepared, facts = read_pixels(pixels, detector.recipe.image)
    except ImageRefusedError as refusal:
        return {"refused": refusal.reason}
    detection = detector.segment(prepared)
    size = mask.shape[1], mask.shape[0]
    called = cv2.resize(detection.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    every, surely = agree(called, mask), np.zeros(detection.mask.shape, dtype=bool)
    surest = [one for one in detection.lesions if one.score >= sure]
    for one in surest:
        top, left, bottom, right = one.bbox
        surely[top:bottom, left:right] = detection.mask[top:bottom, left:right]
    found = agree(cv2.resize(surely.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0, mask)
    return {
        "annotated": every.reference_lesions,
        "found": found.found_lesions,
        "calls": len(surest),
        "outlined": every.found_lesions,
        "outlines": len(detection.lesions),
        **measures(facts),
    }


def measures(facts: Facts) -> dict[str, Any]:
    """The measures of quality and what follows from them."""
    quality = facts.quality
    return {
        "gradable": quality.gradable,
        "quality": round(quality.score, 3),
        "flags": list(quality.flags),
        "brightness": round(quality.brightness, 4),
        "vessel_contrast": round(quality.vessel_contrast, 4),
        "focus": round(quality.focus, 4),
        "sharpness": round(quality.sharpness, 4),
        "blocks": round(quality.blocks, 2),
    }


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recall and calls of each step over those of the undegraded photographs, all photographs together."""
    base = {one["photograph"]: one for one in rows if one["kind"] == "none"}
    table = []
    for kind, steps in STEPS.items():
        for step in steps:
            here = [one for one in rows if (one["kind"], one["step"]) == (kind, step)]
            if not here:
                continue
            whole = [base[one["photograph"]] for one in here]
            line = {"kind": kind, "step": step, "photographs": len(here), **_shares(here, whole)}
            line |= {"gradable": sum(bool(one.get("gradable")) for one in here)}
            if kind in COMPENSATED:
                line["without_gain"] = _shares([one["without"] for one in here], whole)
            table.append(line)
    return table


def _shares(here: list[dict[str, Any]], whole: list[dict[str, Any]]) -> dict[str, float]:
    def share(name: str) -> float:
        return round(sum(one.get(name, 0) for one in here) / max(1, sum(one[name] for one in whole)), 3)

    names = {"recall": "found", "calls": "calls", "outlined": "outlined", "outlines": "outlines"}
    return {name: share(of) for name, of in names.items()}


def sets(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each photograph of each folder."""
    degrees = dict(text.split("=") for text in arguments.field_degrees)
    detector = Detector.load(arguments.model, threads=arguments.threads)
    for text in arguments.folders:
        name, _, folder = text.partition("=")
        config = replace(detector.recipe.image, field_degrees=float(degrees.get(name, 0)))
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif") and "mask" not in str(path).lower():
                yield {"set": name, "photograph": path.stem} | look(
                    path, config, detector if arguments.detect else None
                )


def look(path: Path, config: ImageConfig, detector: Detector | None) -> dict[str, Any]:
    """What is said of one photograph, and what is called on it."""
    try:
        prepared, facts = read_bytes(path.read_bytes(), config)
    except ImageRefusedError as refusal:
        return {"refused": refusal.reason, "detail": refusal.detail}
    fov = {"fov": [round(value, 1) for value in (facts.fov.row, facts.fov.col, facts.fov.diameter_px)]}
    found = measures(facts) | fov
    return found if detector is None else found | calls(detector.segment(prepared))


def calls(detection: Detection) -> dict[str, Any]:
    """How many lesions there are, and how many in the outer part of the field."""
    rim = RIM * detection.fov.diameter_px / 2
    return {
        "calls": len(detection.lesions),
        "rim": [(round(one.row), round(one.col)) for one in detection.lesions if one.fov_distance_px > rim],
    }


def discs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each drawn disc: the diameter of its area, pixels of photographs that all show 50 degrees."""
    for path in sorted(arguments.idrid.rglob("*_OD.tif")):
        yield {
            "photograph": path.stem,
            "diameter_px": round(2 * float(decode_mask(path.read_bytes()).sum() / np.pi) ** 0.5, 1),
        }


def angles(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The field's angles by those discs, were the median disc every eye's."""
    diameters = np.array([one["diameter_px"] for one in rows])
    found = 50 * np.median(diameters) / diameters
    within = {
        f"within_{tenths * 10}_percent": round(float((abs(found / 50 - 1) <= tenths / 10).mean()), 3)
        for tenths in (1, 2)
    }
    return within | {"degrees_5_95": [round(float(one), 1) for one in np.percentile(found, [5, 95])]}


def main() -> None:
    """Measure and write; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curves", "sets", "discs"])
    parser.add_argument("folders", nargs="*", help="NAME=FOLDER")
    parser.add_argument("--idrid", type=Path)
    parser.add_argument("--photographs", nargs="*", default=[])
    parser.add_argument("--field-degrees", nargs="*", default=[], help="NAME=DEGREES")
    parser.add_argument("--detect", action="store_true")
    parser.add_argument("--model", default="lite")
    parser.add_argument("--flips", type=int, default=1, help="looks of the 0.5x network; the shipped model has four")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    kinds: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]]
    kinds = {"curves": curves, "sets": sets, "discs": discs}
    rows = []
    for one in kinds[arguments.what](arguments):
        rows.append(one)
        report = {"benchmark": f"quality {arguments.what}", "machine": machine.describe(), "rows": rows}
        if arguments.what == "curves":
            report["pooled"] = pooled(rows)
        if arguments.what == "discs":
            report["angles"] = angles(rows)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
