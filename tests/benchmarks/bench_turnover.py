"""What registration and turnover are worth: on known movements, on drawn lesions, on pairs of one eye, on two eyes.

    bench_turnover.py PART ... --shared FOLDER [--photographs N] --out FILE.json

`warps`: photographs of IDRiD and HRF seen by two smaller cameras (tests/moved_eyes.py): how far off the map is.
`strangers`: pairs of photographs of different eyes: how many are registered. `pairs`: pairs of one eye at one visit,
whose true turnover is 0: by the lesions that people have outlined, and, with `--detect`, by those that are detected.
`phantom`: lesions drawn into the earlier, the later, or both of two such cameras' photographs, and detected.
`laterality`: the eye that the picture tells beside the one that people see (known_eyes.json, IDRiD and HRF), and the
disc beside IDRiD's masks. FOLDER holds idrid/, idrid_grading/, hrf_healthy/ and eophtha_ma/. What the file holds of
other parts stays. Detections, which take almost all of the time, are kept in --cache, if it is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy import ndarray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from moved_eyes import FIELD, Camera, Movement, on_earlier, random_movement, two_shots

from ma_cluster import machine
from ma_cluster.config import ImageConfig, KnownField
from ma_cluster.errors import ImageRefusedError
from ma_cluster.images.fundus import Fov, find_fov, locate
from ma_cluster.images.laterality import LEAST_CONFIDENCE, tell_eye
from ma_cluster.images.phantom import PhantomConfig, draw_phantom
from ma_cluster.images.registration import REDUCTION, Registration, View, read_view, register
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Lesion
from ma_cluster.lesions.turnover import Change, Taken, compare

IDRID, GRADES, HRF, EOPHTHA = "idrid", "idrid_grading/images", "hrf_healthy", "eophtha_ma/images"
_EOPHTHA_PAIRS = "1273 1274 1275 1276 1883 1884 1885 1886 7104 7105 7155 7156 7157 7158 7237 7238 7239 7240 7331 7333"
_NUMBERS = [f"C000{number}" for number in _EOPHTHA_PAIRS.split()]
SAME_EYE = (
    *(("IDRiD_39", "IDRiD_grading_271"), ("IDRiD_grading_013", "IDRiD_grading_397")),
    *zip(_NUMBERS[::2], _NUMBERS[1::2], strict=True),
)
"""Those of e-ophtha are neighbours that register; to the eye they are macula- and disc-centred fields of one eye."""
_FIRST = 5  # of the ten photographs of each set that are taken for strangers
_NEIGHBOURS = 1  # numbers of e-ophtha that may be one eye


@dataclass(frozen=True, slots=True)
class Outlines:
    """All places that a model outlines on a photograph, and whether it is gradable; kept in `cache` if there is one."""

    detector: Detector
    cache: Path | None

    def knowing(self, field: KnownField) -> Outlines:
        return dataclasses.replace(self, detector=self.detector.knowing(field))

    def __call__(self, pixels: ndarray) -> tuple[list[Lesion], bool]:
        what = [self.detector.digest, repr(self.detector.recipe.image), hashlib.sha256(pixels.tobytes()).hexdigest()]
        kept = None if self.cache is None else self.cache / f"{hashlib.sha256(repr(what).encode()).hexdigest()}.json"
        if kept is not None and kept.is_file():
            values, gradable = json.loads(kept.read_text())
            return [Lesion(**(one | {"bbox": tuple(one["bbox"])})) for one in values], gradable
        found = self.detector.segment(self.detector.prepare(pixels), "sensitive")
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps([[dataclasses.asdict(one) for one in found.lesions], found.quality.gradable]))
        return list(found.lesions), found.quality.gradable


def named(shared: Path, *folders: str) -> dict[str, Path]:
    """Photographs by the stem of their name."""
    found = {path.stem: path for folder in folders for path in sorted((shared / folder).rglob("*.jpg"))}
    return {stem: path for stem, path in found.items() if "Groundtruths" not in str(path)}


def pixels_of(path: Path, shrunk: int = 1) -> ndarray:
    """The photograph; by 2, 4 or 8 its JPEG decodes to a part of its size, in a part of the time."""
    picture = Image.open(path)
    picture.draft("RGB", (picture.width // shrunk, picture.height // shrunk))
    return np.asarray(picture.convert("RGB"))


@cache
def view_of(path: Path) -> View:
    """As `read_view` gives it; photographs that are large enough are decoded at half their size."""
    return read_view(pixels_of(path, 2 if Image.open(path).width > 3000 else 1), KnownField())


def spread(values: Any) -> dict[str, float]:
    return {name: float(np.percentile(values, at)) for name, at in (("median", 50), ("p95", 95), ("largest", 100))}


def off(found: Registration, movement: Movement, fov: Fov, views: tuple[View, View]) -> ndarray:
    """Distances from the truth at places that both show, pixels of canonical 1x."""
    before, after = views
    places = np.argwhere(after.seen)[::997].astype(float)
    truth = before.grid.to_canonical(on_earlier(after.grid.to_original(places), fov, movement))
    inside = ((truth > 0) & (truth < np.array(before.seen.shape) - 1)).all(axis=1)
    inside[inside] = before.seen[tuple(truth[inside].astype(int).T)]
    return REDUCTION * np.linalg.norm(found.to_before(places[inside]) - truth[inside], axis=1)


def warps(shared: Path, photographs: int, outlines: Outlines | None) -> dict[str, Any]:
    by_set = (named(shared, folder).values() for folder in (HRF, IDRID))
    paths = [path for pair in zip(*by_set, strict=False) for path in pair]
    errors: list[float] = []
    said, seconds, failed, unread = [], [], [], []
    for number, path in enumerate(paths[:photographs]):
        rng = np.random.default_rng(number)
        movement, pixels = random_movement(rng), pixels_of(path, 2)
        fov = find_fov(pixels, ImageConfig())[0]
        try:
            views = [read_view(shot, FIELD) for shot in two_shots(pixels, pixels, fov, movement, rng)]
        except ImageRefusedError:  # the large photograph's own cut leaves too little of a disc
            unread.append(path.stem)
            continue
        began = time.process_time()
        found = register(views[0], views[1])
        seconds.append(time.process_time() - began)
        if found is None:
            failed.append(path.stem)
            continue
        own = off(found, movement, fov, (views[0], views[1]))
        errors.extend(own)
        said.append([path.stem, float(np.median(own)), float(np.percentile(own, 95)), found.residual_px, found.overlap])
    return {
        "pairs": len(seconds),
        "failed": failed,
        "without_a_field": unread,
        "error_px": spread(errors),
        "median_by_pair_px": spread([row[1] for row in said]),
        "p95_by_pair_px": spread([row[2] for row in said]),
        "cpu_seconds": spread(seconds),
        "columns": ["photograph", "median_px", "p95_px", "residual_px", "overlap"],
        "by_pair": said,
    }


def strangers(shared: Path, photographs: int, outlines: Outlines | None) -> dict[str, Any]:
    """`photographs` pairs of different eyes: of ten photographs in a row of each set, which may be of one patient."""
    by_set = [list(named(shared, folder).items())[_FIRST : _FIRST + 10] for folder in (IDRID, GRADES, HRF, EOPHTHA)]
    everything = [item for own in by_set for item in own]
    pairs = [
        (one, other)
        for one, other in combinations(everything, 2)
        if not (
            one in by_set[3]
            and other in by_set[3]
            and abs(by_set[3].index(one) - by_set[3].index(other)) <= _NEIGHBOURS
        )
    ]
    near = [pair for pair in pairs if any(pair[0] in own and pair[1] in own for own in by_set)]
    far = [pair for pair in pairs if pair not in near]
    chosen = np.random.default_rng(0).permutation(len(far))[: max(0, photographs - len(near))]
    asked = [*near[:photographs], *(far[int(number)] for number in chosen)]
    registered = []
    for (first_name, first_path), (second_name, second_path) in asked:
        found = register(view_of(first_path), view_of(second_path))
        if found is not None:
            registered.append([first_name, second_name, found.agreement, found.overlap, found.residual_px])
    return {"pairs": len(asked), "registered": registered}


def pairs(shared: Path, photographs: int, outlines: Outlines | None) -> dict[str, Any]:
    """Pairs of one eye at one visit, or of two shots of it."""
    paths, rows = named(shared, IDRID, GRADES, EOPHTHA), []
    for first, second in SAME_EYE:
        views = view_of(paths[first]), view_of(paths[second])
        found = register(*views)
        if found is None:
            continue
        row: dict[str, Any] = {"pair": [first, second], "residual_px": found.residual_px, "overlap": found.overlap}
        masks = [shared / f"eophtha_ma/masks/{name}.png" for name in (first, second)]
        if all(mask.is_file() for mask in masks):
            sides = [Taken(view, outlined(mask)) for view, mask in zip(views, masks, strict=True)]
            row["outlined"] = counts(compare(sides[0], sides[1], found))
        if outlines is not None and len(rows) < photographs:
            row |= by_detection(outlines, paths[first], paths[second])
        rows.append(row)
    kinds = [kind for kind in ("outlined", "detected", "called_alone") if any(kind in row for row in rows)]
    return {"pairs": rows} | {kind: summed([row[kind] for row in rows if kind in row]) for kind in kinds}


def by_detection(outlines: Outlines, *paths: Path) -> dict[str, Any]:
    """What has changed by the lesions that are called, confirmed by what is outlined beside them, or called alone."""
    whole = [pixels_of(path) for path in paths]
    first, second = (detected(outlines, pixels, read_view(pixels, KnownField())) for pixels in whole)
    found = register(first.view, second.view)
    assert found is not None, "they register at half their size"
    alone = compare(without(first), without(second), found)
    return {"detected": counts(compare(first, second, found)), "called_alone": counts(alone)}


def phantom(shared: Path, photographs: int, outlines: Outlines | None) -> dict[str, Any]:
    """Eight lesions drawn into both, eight into the earlier and eight into the later photograph of each pair."""
    assert outlines is not None, "phantom needs --detect"
    config = PhantomConfig(dots=8, haemorrhages=0, fragments=0, exudates=0)
    rows = []
    for number, path in enumerate(list(named(shared, HRF).values())[:photographs]):
        rng = np.random.default_rng(number)
        pixels, movement = pixels_of(path), random_movement(rng)
        fov = find_fov(pixels, ImageConfig())[0]
        both = draw_phantom(pixels, fov, rng, config)
        only = [draw_phantom(both.pixels, fov, rng, config) for _ in range(2)]
        shots = two_shots(only[0].pixels, only[1].pixels, fov, movement, rng)
        sides = [detected(outlines.knowing(FIELD), shot, read_view(shot, FIELD)) for shot in shots]
        found = register(sides[0].view, sides[1].view)
        rows.append(
            {"photograph": path.stem, "registered": found is not None}
            | (
                {}
                if found is None
                else truth_of(compare(sides[0], sides[1], found), sides, (both, *only), (fov, movement))
            )
        )
    return {"pairs": rows, "all": summed([row for row in rows if row["registered"]])}


def truth_of(change: Change, sides: list[Taken], drawn: Any, moved: tuple[Fov, Movement]) -> dict[str, int]:
    """How the drawn lesions ended. Those found are at the place of a drawn one, within 10 pixels of the photograph."""
    fov, movement = moved
    camera = Camera(fov, np.array(movement.shift))
    to_small = camera.diameter / 2 + camera.margin

    def at_later(lesions: Any) -> ndarray:
        places = np.array([(one.row, one.col) for one in lesions]).reshape(-1, 2)
        return on_earlier(places, fov, movement)

    def at_earlier(lesions: Any) -> ndarray:
        return np.array([(one.row, one.col) for one in lesions]).reshape(-1, 2)

    dots = [
        np.array([(dot.row, dot.col) for dot in each.dots]).reshape(-1, 2) - camera.centres()[0] + to_small
        for each in drawn
    ]
    common, removed, added = dots
    before, after = at_earlier(sides[0].called), at_later(sides[1].called)
    found_before, found_after = near(common, before), near(common, after)
    persisting = at_earlier([pair[0] for pair in change.persisting])
    return {
        "common": len(common),
        "common_found_on_both": int((found_before & found_after).sum()),
        "common_matched": int((found_before & found_after & near(common, persisting)).sum()),
        "removed_found": int(near(removed, before).sum()),
        "removed_gone": int(near(removed, at_earlier(change.gone)).sum()),
        "removed_outside": int(
            near(removed, at_earlier([lesion for side, lesion in change.outside if side == "before"])).sum()
        ),
        "added_found": int(near(added, after).sum()),
        "added_new": int(near(added, at_later(change.new)).sum()),
        "added_outside": int(
            near(added, at_later([lesion for side, lesion in change.outside if side == "after"])).sum()
        ),
        "common_called_new_or_gone": int(
            (near(common, at_later(change.new)) | near(common, at_earlier(change.gone))).sum()
        ),
        "drawn_each": len(removed),
    }


def near(places: ndarray, lesions: ndarray) -> ndarray:
    if len(lesions) == 0:
        return np.zeros(len(places), dtype=bool)
    return np.linalg.norm(places[:, None] - lesions[None], axis=2).min(axis=1) <= 10


def detected(outlines: Outlines, pixels: ndarray, view: View) -> Taken:
    """What the model calls, and what it outlines beside that."""
    lesions, gradable = outlines(pixels)
    least = outlines.detector.recipe.detector.least_score
    called = [lesion for lesion in lesions if lesion.score >= least]
    return Taken(view, called, [lesion for lesion in lesions if lesion.score < least], gradable)


def without(side: Taken) -> Taken:
    return Taken(side.view, side.called, (), side.gradable)


def outlined(mask: Path) -> list[Lesion]:
    """The lesions of a reference mask."""
    pixels = np.asarray(Image.open(mask).convert("L")) > 127
    _, _, stats, centres = cv2.connectedComponentsWithStats(pixels.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    return [
        Lesion(
            number, float(y), float(x), (0, 0, 0, 0), int(area), float(2 * np.sqrt(area / np.pi)), 1.0, 1.0, 1.0, 0.0
        )
        for number, ((x, y), area) in enumerate(zip(centres[1:], areas, strict=True), 1)
    ]


def counts(change: Change) -> dict[str, int]:
    return {name: len(getattr(change, name)) for name in ("persisting", "new", "gone", "outside")}


def summed(rows: list[dict[str, Any]]) -> dict[str, int]:
    names = [name for name, value in rows[0].items() if type(value) is int] if rows else []
    return {"photograph_pairs": len(rows)} | {name: sum(row[name] for row in rows) for name in names}


def laterality(shared: Path, photographs: int, outlines: Outlines | None) -> dict[str, Any]:
    """Decoded at a quarter of their size."""
    config = ImageConfig(fov_diameter_px=ImageConfig().fov_diameter_px / 4)
    known = json.loads(Path(__file__).with_name("known_eyes.json").read_text())
    truth = {name: eye for eye, names in known.items() for name in names.split()}
    discs = {path.stem.removesuffix("_OD"): path for path in (shared / IDRID).rglob("*_OD.tif")}
    figures: dict[str, Any] = {}
    for folder in (IDRID, GRADES, HRF):
        told, off = [], []
        for name, path in named(shared, folder).items():
            side = tell_eye(locate(pixels_of(path, 4), config), config.fov_diameter_px)
            assert side is not None
            told.append([name, truth[name], side.eye, side.confidence])
            if name in discs:
                mask = np.asarray(Image.open(discs[name])) > 0
                diameter = 2 * np.sqrt(mask.sum() / np.pi)
                off.append(float(np.linalg.norm(np.argwhere(mask).mean(axis=0) - 4 * np.array(side.disc)) / diameter))
        figures[folder.partition("/")[0]] = figures_of_eyes(told)
        if off:
            figures["disc_off_diameters"] = spread(off) | {"within_half": float((np.array(off) < 0.5).mean())}
    return figures


def figures_of_eyes(told: list[list[Any]]) -> dict[str, Any]:
    """Of rows of name, true eye, told eye and confidence."""
    right = [eye == truth for _, truth, eye, _ in told]
    sure = [confidence >= LEAST_CONFIDENCE for *_, confidence in told]
    both = sum(r and s for r, s in zip(right, sure, strict=True))
    return {
        "photographs": len(told),
        "right": sum(right),
        "accuracy": wilson(sum(right), len(told)),
        "sure": sum(sure),
        "sure_and_right": both,
        "accuracy_of_sure": wilson(both, sum(sure)),
        "wrong": [row for row, r in zip(told, right, strict=True) if not r],
    }


def wilson(right: int, of: int) -> list[float]:
    """A share, and the ends of its 95 % interval (Wilson 1927)."""
    share, z = right / of, 1.96
    middle, half = share + z**2 / (2 * of), z * float(np.sqrt(share * (1 - share) / of + z**2 / (4 * of**2)))
    return [share, *((middle + sign * half) / (1 + z**2 / of) for sign in (-1, 1))]


PARTS: dict[str, Callable[[Path, int, Outlines | None], dict[str, Any]]] = {
    "warps": warps,
    "strangers": strangers,
    "pairs": pairs,
    "phantom": phantom,
    "laterality": laterality,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--detect", action="store_true")
    parser.add_argument("--cache", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    outlines = Outlines(Detector.load(threads=1), given.cache) if given.detect else None
    said = json.loads(given.out.read_text()) if given.out.is_file() else {"benchmark": "turnover"}
    for part in given.parts:
        said[part] = PARTS[part](given.shared, given.photographs, outlines)
        said["machine"] = machine.describe()
        given.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
