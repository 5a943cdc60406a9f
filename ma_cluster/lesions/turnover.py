"""Lesions of two photographs of one eye -> which persist, are new or gone, or lie where the other shows nothing.

A lesion persists where the other photograph has one at its place, be it one that is outlined and not sure enough to be
called: a detector that wavers is no change of the eye. One without is new or gone only where the other photograph
shows the place well enough to say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from ma_cluster.images.registration import REDUCTION, Registration, View, holds
from ma_cluster.lesions.findings import Lesion

_JITTER_PX = 3.0  # of a lesion's centre from photograph to photograph, pixels of canonical 1x [U]
_LEAST_CONTRAST = 0.35  # share of this photograph's local contrast that the other one must have at a lesion's place [U]


@dataclass(frozen=True, slots=True)
class Taken:
    """A photograph as it is compared. Lesions are on its own grid."""

    view: View
    called: Sequence[Lesion]
    weaker: Sequence[Lesion] = ()
    """Places that are outlined and not called: they confirm a lesion of the other photograph, and are none."""
    gradable: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    """What has become of the lesions, each on the grid of its own photograph."""

    registration: Registration
    radius_px: float
    """How far apart two centres may lie, beyond half the larger one's diameter: pixels of canonical 1x."""
    persisting: tuple[tuple[Lesion, Lesion], ...]
    """Before and after; where one has split, it is in both pairs."""
    new: tuple[Lesion, ...]
    gone: tuple[Lesion, ...]
    outside: tuple[tuple[Literal["before", "after"], Lesion], ...]
    """Those without a partner of which the other photograph cannot say anything."""

    def rates(self, years: float | None) -> dict[str, float | None]:
        """Lesions a year that have come and gone, and their sum, the turnover; None where the time is not known."""
        if years is None or years <= 0:
            return dict.fromkeys(("formation_per_year", "disappearance_per_year", "turnover_per_year"))
        formed, lost = len(self.new) / years, len(self.gone) / years
        return {"formation_per_year": formed, "disappearance_per_year": lost, "turnover_per_year": formed + lost}


def compare(before: Taken, after: Taken, registration: Registration) -> Change:
    """What has become of each lesion that is called on either photograph."""
    radius = _JITTER_PX + registration.residual_95_px
    earlier, later = [*before.called, *before.weaker], [*after.called, *after.weaker]
    start, end = _places(earlier, before.view), _places(later, after.view)
    moved = registration.to_after(start)
    near = _near(moved, end, (_diameters(earlier, before.view), _diameters(later, after.view)), radius / REDUCTION)
    pairs = {
        pair
        for pair in _nearest(near) | {(first, second) for second, first in _nearest(near.T)}
        if pair[0] < len(before.called) or pair[1] < len(after.called)
    }
    kept, again = {first for first, _ in pairs}, {second for _, second in pairs}
    told = _can_tell(after, moved, before.view, start)
    told_before = _can_tell(before, registration.to_before(end), after.view, end)
    lost = [number for number in range(len(before.called)) if number not in kept]
    found = [number for number in range(len(after.called)) if number not in again]
    return Change(
        registration,
        radius,
        tuple((earlier[first], later[second]) for first, second in sorted(pairs)),
        tuple(later[number] for number in found if told_before[number]),
        tuple(earlier[number] for number in lost if told[number]),
        (
            *(("before", earlier[number]) for number in lost if not told[number]),
            *(("after", later[number]) for number in found if not told_before[number]),
        ),
    )


def to_values(change: Change | None, years: float | None) -> dict[str, Any]:
    """The content of compare.json; None is two photographs that could not be registered, which have no rates."""
    if change is None:
        return {
            "registered": False,
            "detail": "no common places that could be vouched for: another eye or field, or too poor to tell",
        }
    registration = change.registration
    return {
        "registered": True,
        "residual_px": registration.residual_px,
        "residual_95_px": registration.residual_95_px,
        "overlap": registration.overlap,
        "agreement": registration.agreement,
        "radius_px": change.radius_px,
        "years": years,
        **change.rates(years),
        "persisting": [{"before": asdict(first), "after": asdict(second)} for first, second in change.persisting],
        "new": [asdict(lesion) for lesion in change.new],
        "gone": [asdict(lesion) for lesion in change.gone],
        "outside": [{"on": side, **asdict(lesion)} for side, lesion in change.outside],
        "transform": registration.terms.tolist(),
    }


def _places(lesions: Sequence[Lesion], view: View) -> Float[ndarray, "n 2"]:
    at = np.array([(lesion.row, lesion.col) for lesion in lesions], dtype=float).reshape(-1, 2)
    return view.grid.to_canonical(at)


def _diameters(lesions: Sequence[Lesion], view: View) -> Float[ndarray, "n"]:
    return np.array([lesion.diameter_px * view.grid.scale for lesion in lesions], dtype=float)


def _near(
    moved: Float[ndarray, "n 2"],
    end: Float[ndarray, "m 2"],
    diameters: tuple[Float[ndarray, "n"], Float[ndarray, "m"]],
    radius: float,
) -> Float[ndarray, "n m"]:
    """Distances between lesions that may be one; infinite between others."""
    apart = np.linalg.norm(moved[:, None] - end[None], axis=2)
    limit = radius + np.maximum(diameters[0][:, None], diameters[1][None]) / 2
    return np.where(apart <= limit, apart, np.inf)


def _nearest(near: Float[ndarray, "n m"]) -> set[tuple[int, int]]:
    """Each row that has a partner, with its nearest."""
    if near.size == 0:
        return set()
    return {(row, int(near[row].argmin())) for row in range(len(near)) if np.isfinite(near[row].min())}


def _can_tell(other: Taken, there: Float[ndarray, "n 2"], own: View, here: Float[ndarray, "n 2"]) -> Bool[ndarray, "n"]:
    """Whether the other photograph shows the places of lesions well enough to miss them."""
    seen = holds(other.view.seen, there)
    if not other.gradable:
        return np.zeros_like(seen)
    contrast = _at(other.view.contrast, there) / np.maximum(_at(own.contrast, here), 1e-6)
    return seen & (contrast >= _LEAST_CONTRAST)


def _at(image: ndarray, places: Float[ndarray, "n 2"]) -> Float[ndarray, "n"]:
    at = np.clip(np.rint(places).astype(int), 0, np.array(image.shape) - 1)
    return image[at[:, 0], at[:, 1]].astype(float)
