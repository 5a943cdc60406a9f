"""Two photographs of one eye -> where each place of the earlier one lies on the later one, or that nobody can say.

    canonical photographs, reduced -> vessel pictures -> SIFT matches -> similarity (RANSAC)
        -> patches that follow it, correlated -> quadratic -> residual, overlap, agreement -> Registration | None

A similarity carries the eye's movement before the camera, the quadratic terms what the curved retina adds to it. The
residual is measured on patches that the fit has not seen. Pictures of two eyes give some matches by chance, but no
overlap that agrees; so the agreement decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig, KnownField
from ma_cluster.images.fundus import Grid, locate
from ma_cluster.images.quality import local_mean

REDUCTION = 4
"""Pixels of canonical 1x for each pixel of the grid that is registered: vessels are 2 to 8 pixels wide there."""
_IMAGE = ImageConfig(fov_diameter_px=ImageConfig().fov_diameter_px / REDUCTION)
_SIGMA = 1 / 30  # of the local mean and contrast, over the FOV's diameter
_RIM = 1 / 40  # of the FOV's diameter: lens shading, and half a patch
_FEATURES = 3000
_RATIO = 0.85  # of the distances of the nearest and the second match (Lowe 2004)
_REACH_PX = 6.0  # of RANSAC: the curved retina is off the similarity by so much
_LEAST_MATCHES = 12
_SCALES = 0.75, 1.33
_MOST_DEGREES = 40.0
_PATCH, _STEP = 41, 20  # pixels of the reduced grid
_SEARCHES = 10, 5, 4  # pixels about where the fit before says
_LEAST_PEAK = 0.45  # correlation of a patch with its place
_LEAST_PATCHES = 40
_LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class View:
    """A photograph as it is registered: its vessels on the reduced grid, and where they can be seen."""

    vessels: Float32[ndarray, "h w"]
    """Contrast of the green channel in local standard deviations, 0 outside the field of view."""
    seen: Bool[ndarray, "h w"]
    """Field of view without its rim."""
    contrast: Float32[ndarray, "h w"]
    """Local standard deviation of the green channel, 0..1."""
    grid: Grid
    """Between the photograph and the reduced grid."""

    @cached_property
    def features(self) -> tuple[Float[ndarray, "n 2"], Float32[ndarray, "n 128"]]:
        """Points (x, y) and their RootSIFT descriptors (Arandjelovic and Zisserman 2012)."""
        picture = np.clip(128 + 40 * self.vessels, 0, 255).astype(np.uint8)
        sift = cv2.SIFT.create(nfeatures=_FEATURES, contrastThreshold=0.02, edgeThreshold=15)
        points, described = sift.detectAndCompute(picture, self.seen.astype(np.uint8))
        if described is None:
            return np.zeros((0, 2)), np.zeros((0, 128), np.float32)
        shares = described / np.maximum(described.sum(axis=1, keepdims=True), 1e-6)
        return np.array([point.pt for point in points]).reshape(-1, 2), np.sqrt(shares).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Registration:
    """The map from places of one photograph to those of another; positions (row, col) on their reduced grids."""

    terms: Float[ndarray, "6 2"]
    """Of 1, r, c, r^2, rc, c^2, with r and c the position over `_UNIT`."""
    residual_px: float
    """Median distance at patches that the fit has not seen, pixels of canonical 1x."""
    residual_95_px: float
    """95th percentile of it."""
    overlap: float
    """Share of the first field of view that the second one shows, too."""
    agreement: float
    """Median correlation of patches spread over the overlap."""
    patches: int

    def to_after(self, places: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
        """Places of the first photograph on the second one."""
        return _mapped(self.terms, places)

    def to_before(self, places: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
        """Places of the second photograph on the first one, by Newton's method."""
        found = np.array(places, dtype=float)
        for _ in range(_NEWTON):
            off = places - _mapped(self.terms, found)
            found += np.linalg.solve(_jacobian(self.terms, found), off[:, :, None])[:, :, 0]
        return found

    def warped(self, after: ndarray, shape: tuple[int, int]) -> ndarray:
        """The second photograph, or what else lies on its grid, as the first one's grid of `shape` shows it."""
        return _warped(after, self.terms, shape)


_UNIT = 400.0  # pixels: positions over it are about 1, and the normal equations well conditioned
_NEWTON = 6


def read_view(pixels: UInt8[ndarray, "h w 3"], field: KnownField) -> View:
    """What of an upright photograph is registered.

    Raises:
        ImageRefusedError: too_small, no_fov, or unsupported.
    """
    fundus = locate(pixels, field.told(_IMAGE))
    return view(fundus.canonical, fundus.canonical_fov, fundus.grid)


def view(rgb: UInt8[ndarray, "h w 3"], fov: Bool[ndarray, "h w"], grid: Grid) -> View:
    """The view of a photograph that lies on the reduced grid."""
    diameter_px = _IMAGE.fov_diameter_px
    sigma = _SIGMA * diameter_px
    green = (rgb[:, :, 1].astype(np.float32) - local_mean(rgb, fov, sigma)[:, :, 1]) / 255
    green[~fov] = 0
    weight = cv2.GaussianBlur(fov.astype(np.float32), (0, 0), 2 * sigma)
    spread = np.sqrt(cv2.GaussianBlur(green**2, (0, 0), 2 * sigma) / np.maximum(weight, 1e-3))
    side = 2 * round(_RIM * diameter_px) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    seen = cv2.erode(fov.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    vessels = np.clip(cv2.GaussianBlur(green, (0, 0), 1.0) / np.maximum(spread, 2e-3), -3, 3)
    vessels[~fov] = 0
    return View(vessels.astype(np.float32), seen, spread.astype(np.float32), grid)


def register(before: View, after: View) -> Registration | None:
    """The map from `before` to `after`; None where they show no common places that anybody could vouch for."""
    terms = _similarity(before, after)
    if terms is None:
        return None
    places = _grid_of(before.seen)
    for reach in _SEARCHES:
        found, at, peaks = _correlated(before, after, terms, places, reach)
        good = peaks >= _LEAST_PEAK
        if good.sum() < _LEAST_PATCHES:
            return None
        terms, kept = _fitted(found[good], at[good])
    held_out = _held_out(found[good][kept], at[good][kept])
    agreement, overlap = _agreement(before, after, terms)
    if agreement < _LEAST_AGREEMENT or not _plausible(terms):
        return None
    residual, residual_95 = (float(REDUCTION * value) for value in np.percentile(held_out, [50, 95]))
    return Registration(terms, residual, residual_95, overlap, agreement, int(kept.sum()))


def _similarity(before: View, after: View) -> Float[ndarray, "6 2"] | None:
    """A first map, without quadratic terms."""
    (points, described), (others, other_described) = before.features, after.features
    if min(len(points), len(others)) < _LEAST_MATCHES:
        return None
    pairs = cv2.BFMatcher(cv2.NORM_L2).knnMatch(described, other_described, k=2)
    matches = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < _RATIO * pair[1].distance]
    if len(matches) < _LEAST_MATCHES:
        return None
    start = np.array([points[match.queryIdx] for match in matches])
    end = np.array([others[match.trainIdx] for match in matches])
    cv2.setRNGSeed(0)
    similarity, inliers = cv2.estimateAffinePartial2D(
        start, end, method=cv2.RANSAC, ransacReprojThreshold=_REACH_PX, maxIters=5000, confidence=0.999
    )
    if similarity is None or inliers.sum() < _LEAST_MATCHES:
        return None
    (a, b, x), (c, d, y) = similarity  # of x and y, which are col and row
    terms = np.zeros((6, 2))
    terms[0], terms[1], terms[2] = (y, x), (d * _UNIT, b * _UNIT), (c * _UNIT, a * _UNIT)
    return terms if _plausible(terms) else None


def _plausible(terms: Float[ndarray, "6 2"]) -> bool:
    """Whether it is a movement that an eye before a camera makes: no mirror image, about as large, hardly turned."""
    jacobian = terms[1:3] / _UNIT
    scale = np.sqrt(abs(np.linalg.det(jacobian)))
    turned = np.degrees(np.arctan2(jacobian[1, 0] - jacobian[0, 1], jacobian[0, 0] + jacobian[1, 1]))
    right_handed = bool(np.linalg.det(jacobian) > 0)
    return right_handed and bool(_SCALES[0] <= scale <= _SCALES[1]) and bool(abs(turned) <= _MOST_DEGREES)


def _grid_of(seen: Bool[ndarray, "h w"]) -> Float[ndarray, "n 2"]:
    rows, cols = np.mgrid[_PATCH // 2 : seen.shape[0] : _STEP, _PATCH // 2 : seen.shape[1] : _STEP]
    places = np.stack([rows.ravel(), cols.ravel()], axis=1)
    return places[seen[places[:, 0], places[:, 1]]].astype(float)


def _correlated(
    before: View, after: View, terms: Float[ndarray, "6 2"], places: Float[ndarray, "n 2"], reach: int
) -> tuple[Float[ndarray, "m 2"], Float[ndarray, "m 2"], Float[ndarray, "m"]]:
    """Patches of `before` that both views hold, where each lies on `after`, and the correlation there."""
    onto = _mapped(terms, places)
    inside = holds(after.seen, onto)
    half = _PATCH // 2
    warped = np.pad(_warped(after.vessels, terms, before.seen.shape), half + reach)
    vessels = np.pad(before.vessels, half)
    start, end, peaks = [], [], []
    for place in places[inside]:
        row, col = (int(value) for value in place)
        patch = vessels[row : row + _PATCH, col : col + _PATCH]
        window = warped[row : row + _PATCH + 2 * reach, col : col + _PATCH + 2 * reach]
        scores = cv2.matchTemplate(window, patch, cv2.TM_CCOEFF_NORMED)
        peak, shift = _peak(scores)
        if shift is None:
            continue
        start.append(place)
        end.append(place + shift - reach)
        peaks.append(peak)
    start_at, end_at = np.array(start).reshape(-1, 2), np.array(end).reshape(-1, 2)
    return start_at, _mapped(terms, end_at), np.array(peaks, dtype=float)


def _peak(scores: Float32[ndarray, "n n"]) -> tuple[float, Float[ndarray, "2"] | None]:
    """The largest correlation and its place, to a part of a pixel by a parabola; None on the border, or of a blank."""
    row, col = np.unravel_index(int(np.argmax(scores)), scores.shape)
    peak = float(scores[row, col])
    last = scores.shape[0] - 1
    if not np.isfinite(peak) or min(row, col) == 0 or max(row, col) == last:
        return peak, None
    shift = np.array([row, col], dtype=float)
    for axis, (low, high) in enumerate(
        ((scores[row - 1, col], scores[row + 1, col]), (scores[row, col - 1], scores[row, col + 1]))
    ):
        bend = low + high - 2 * peak
        shift[axis] += 0.0 if bend >= 0 else float(np.clip((low - high) / (2 * bend), -0.5, 0.5))
    return peak, shift


def _fitted(
    start: Float[ndarray, "n 2"], end: Float[ndarray, "n 2"]
) -> tuple[Float[ndarray, "6 2"], Bool[ndarray, "n"]]:
    """Quadratic terms by least squares, without what lies far off: patches that have found another vessel."""
    kept = np.ones(len(start), dtype=bool)
    design = _design(start)
    for _ in range(6):
        terms, *_ = np.linalg.lstsq(design[kept], end[kept], rcond=None)
        off = np.linalg.norm(design @ terms - end, axis=1)
        limit = max(0.5, 3 * float(np.median(off[kept])))
        kept = off <= limit
    return terms, kept


def _held_out(start: Float[ndarray, "n 2"], end: Float[ndarray, "n 2"]) -> Float[ndarray, "n"]:
    """Distance of each patch from where a fit without its fifth of them puts it."""
    fold = np.arange(len(start)) % 5
    off = np.zeros(len(start))
    for number in range(5):
        own = fold == number
        terms, *_ = np.linalg.lstsq(_design(start[~own]), end[~own], rcond=None)
        off[own] = np.linalg.norm(_mapped(terms, start[own]) - end[own], axis=1)
    return off


def _agreement(before: View, after: View, terms: Float[ndarray, "6 2"]) -> tuple[float, float]:
    """Median correlation of patches where both are seen, at rest, and the share of `before` that `after` shows."""
    warped = _warped(after.vessels, terms, before.seen.shape)
    both = before.seen & (_warped(after.seen.astype(np.float32), terms, before.seen.shape) > 0.5)
    if not both.any():
        return 0.0, 0.0
    sums = [
        cv2.boxFilter(product * both, -1, (_PATCH, _PATCH), normalize=False)
        for product in (before.vessels * warped, before.vessels**2, warped**2)
    ]
    correlation = sums[0] / np.sqrt(np.maximum(sums[1] * sums[2], 1e-6))
    places = _grid_of(both).astype(int)
    if len(places) == 0:
        return 0.0, 0.0
    return float(np.median(correlation[places[:, 0], places[:, 1]])), float(both.sum() / before.seen.sum())


def _warped(image: ndarray, terms: Float[ndarray, "6 2"], shape: tuple[int, ...]) -> ndarray:
    rows, cols = np.indices(shape, dtype=np.float64)
    at = _mapped(terms, np.stack([rows.ravel(), cols.ravel()], axis=1)).reshape(*shape, 2).astype(np.float32)
    return cv2.remap(image, at[:, :, 1], at[:, :, 0], cv2.INTER_LINEAR)


def holds(mask: Bool[ndarray, "h w"], places: Float[ndarray, "n 2"]) -> Bool[ndarray, "n"]:
    """Whether each place lies on a pixel of the mask that is set."""
    at = np.rint(places).astype(int)
    inside = ((at >= 0) & (at < mask.shape)).all(axis=1)
    at = np.clip(at, 0, np.array(mask.shape) - 1)
    return inside & mask[at[:, 0], at[:, 1]]


def _design(places: Float[ndarray, "n 2"]) -> Float[ndarray, "n 6"]:
    row, col = places.T / _UNIT
    return np.stack([np.ones_like(row), row, col, row**2, row * col, col**2], axis=1)


def _mapped(terms: Float[ndarray, "6 2"], places: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
    return _design(places) @ terms


def _jacobian(terms: Float[ndarray, "6 2"], places: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2 2"]:
    """[:, i, j]: of coordinate i of the image by coordinate j of the place."""
    row, col = places.T / _UNIT
    by_row = (terms[1] + 2 * row[:, None] * terms[3] + col[:, None] * terms[4]) / _UNIT
    by_col = (terms[2] + row[:, None] * terms[4] + 2 * col[:, None] * terms[5]) / _UNIT
    return np.stack([by_row, by_col], axis=2)
