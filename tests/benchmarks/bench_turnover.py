"""What registration and turnover are worth: on known movements, on drawn lesions, on pairs of one eye, on two eyes.

    bench_turnover.py PART ... --shared FOLDER [--photographs N] --out FILE.json

`warps`: photographs of IDRiD and HRF seen by two smaller cameras (tests/moved_eyes.py): how far off the map is.
`strangers`: pairs of photographs of different eyes: how many are registered. `pairs`: pairs of one eye at one visit,
whose true turnover is 0: by the lesions that people have outlined, and, with `--detect`, by those that are detected.
`phantom`: lesions drawn into the earlier, the later, or both of two such cameras' photographs, and detected. FOLDER
holds idrid/, idrid_grading/, hrf_healthy/ and eophtha_ma/. What the file holds of other parts stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
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
from ma_cluster.images.decode import decode
from ma_cluster.images.fundus import Fov, find_fov
from ma_cluster.images.phantom import PhantomConfig, draw_phantom
from ma_cluster.images.registration import REDUCTION, Registration, View, read_view, register
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Lesion
from ma_cluster.lesions.turnover import Change, Taken, compare

IDRID, GRADES, HRF, EOPHTHA = "idrid", "idrid_grading/images", "hrf_healthy", "eophtha_ma/images"
SAME_EYE = (("idrid/IDRiD_39", "idrid_grading/IDRiD_grading_271"), ("IDRiD_grading_013", "IDRiD_grading_397"))
_FIRST = 5  # of the ten photographs of each set that are taken for strangers: none of them is in SAME_EYE
_NEIGHBOURS = 1  # numbers of e-ophtha that may be one eye


def named(shared: Path, *folders: str) -> dict[str, Path]:
    """Photographs by the stem of their name."""
    found = {path.stem: path for folder in folders for path in sorted((shared / folder).rglob("*.jpg"))}
    return {stem: path for stem, path in found.items() if "Groundtruths" not in str(path)}


def pixels_of(path: Path) -> ndarray:
    return decode(path.read_bytes(), ImageConfig()).pixels


@cache
def view_of(path: Path) -> View:
    return read_view(pixels_of(path), KnownField())


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


def warps(shared: Path, photographs: int, detector: Detector | None) -> dict[str, Any]:
    paths = list(named(shared, HRF).values()) + list(named(shared, IDRID).values())
    errors: list[float] = []
    said, seconds, failed = [], [], []
    for number, path in enumerate(paths[:photographs]):
        rng = np.random.default_rng(number)
        movement, pixels = random_movement(rng), pixels_of(path)
        fov = find_fov(pixels, ImageConfig())[0]
        views = tuple(read_view(shot, FIELD) for shot in two_shots(pixels, pixels, fov, movement, rng))
        began = time.process_time()
        found = register(*views)
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
        "error_px": spread(errors),
        "median_by_pair_px": spread([row[1] for row in said]),
        "p95_by_pair_px": spread([row[2] for row in said]),
        "cpu_seconds": spread(seconds),
        "columns": ["photograph", "median_px", "p95_px", "residual_px", "overlap"],
        "by_pair": said,
    }


def strangers(shared: Path, photographs: int, detector: Detector | None) -> dict[str, Any]:
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


def pairs(shared: Path, photographs: int, detector: Detector | None) -> dict[str, Any]:
    """Pairs of one eye at one visit: all that register of neighbours in e-ophtha, and two of IDRiD."""
    paths, rows = named(shared, IDRID, GRADES, EOPHTHA), []
    wanted = [tuple(Path(name).name for name in pair) for pair in SAME_EYE]
    stems = sorted(named(shared, EOPHTHA))
    wanted += [(a, b) for a, b in combinations(stems, 2) if 0 <= stems.index(b) - stems.index(a) <= _NEIGHBOURS]
    for first, second in wanted:
        views = view_of(paths[first]), view_of(paths[second])
        found = register(*views)
        if found is None:
            continue
        row: dict[str, Any] = {"pair": [first, second], "residual_px": found.residual_px, "overlap": found.overlap}
        masks = [shared / f"eophtha_ma/masks/{name}.png" for name in (first, second)]
        if all(mask.is_file() for mask in masks):
            sides = [Taken(view, outlined(mask)) for view, mask in zip(views, masks, strict=True)]
            row["outlined"] = counts(compare(sides[0], sides[1], found))
        if detector is not None and len(rows) < photographs:
            sides = [
                detected(detector, pixels_of(paths[name]), view)
                for name, view in zip((first, second), views, strict=True)
            ]
            row |= {
                "detected": counts(compare(sides[0], sides[1], found)),
                "called_alone": counts(compare(without(sides[0]), without(sides[1]), found)),
            }
        rows.append(row)
    kinds = [kind for kind in ("outlined", "detected", "called_alone") if any(kind in row for row in rows)]
    return {"pairs": rows} | {kind: summed([row[kind] for row in rows if kind in row]) for kind in kinds}


def phantom(shared: Path, photographs: int, detector: Detector | None) -> dict[str, Any]:
    """Eight lesions drawn into both, eight into the earlier and eight into the later photograph of each pair."""
    assert detector is not None, "phantom needs --detect"
    config = PhantomConfig(dots=8, haemorrhages=0, fragments=0, exudates=0)
    rows = []
    for number, path in enumerate(list(named(shared, HRF).values())[:photographs]):
        rng = np.random.default_rng(number)
        pixels, movement = pixels_of(path), random_movement(rng)
        fov = find_fov(pixels, ImageConfig())[0]
        both = draw_phantom(pixels, fov, rng, config)
        only = [draw_phantom(both.pixels, fov, rng, config) for _ in range(2)]
        shots = two_shots(only[0].pixels, only[1].pixels, fov, movement, rng)
        sides = [detected(detector.knowing(FIELD), shot, read_view(shot, FIELD)) for shot in shots]
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


def detected(detector: Detector, pixels: ndarray, view: View) -> Taken:
    """What the model calls, and what it outlines beside that."""
    found = detector.segment(detector.prepare(pixels), "sensitive")
    least = detector.recipe.detector.least_score
    called = [lesion for lesion in found.lesions if lesion.score >= least]
    return Taken(view, called, [lesion for lesion in found.lesions if lesion.score < least], found.quality.gradable)


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


PARTS: dict[str, Callable[[Path, int, Detector | None], dict[str, Any]]] = {
    "warps": warps,
    "strangers": strangers,
    "pairs": pairs,
    "phantom": phantom,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--detect", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    detector = Detector.load(threads=1) if given.detect else None
    said = json.loads(given.out.read_text()) if given.out.is_file() else {"benchmark": "turnover"}
    for part in given.parts:
        said[part] = PARTS[part](given.shared, given.photographs, detector)
        said["machine"] = machine.describe()
        given.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
