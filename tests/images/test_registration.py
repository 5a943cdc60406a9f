"""Registration of photographs whose movement is known, and its refusal where there is nothing to register."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from jaxtyping import Float
from moved_eyes import FIELD, Movement, on_earlier, random_movement, two_shots
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.images.fundus import Fov, find_fov
from ma_cluster.images.registration import REDUCTION, Registration, View, read_view, register
from ma_cluster.images.sample import retina

RETINA = retina()


@cache
def field() -> Fov:
    return find_fov(RETINA, ImageConfig())[0]


@cache
def views(movement: Movement, seed: int = 0) -> tuple[View, View]:
    shots = two_shots(RETINA, RETINA, field(), movement, np.random.default_rng(seed))
    first, second = (read_view(shot, FIELD) for shot in shots)
    return first, second


def errors(found: Registration, movement: Movement, before: View, after: View) -> Float[ndarray, "n"]:
    """How far off it is at places that both show, pixels of canonical 1x."""
    places = np.argwhere(after.seen)[::997].astype(float)
    truth = before.grid.to_canonical(on_earlier(after.grid.to_original(places), field(), movement))
    inside = ((truth > 0) & (truth < np.array(before.seen.shape) - 1)).all(axis=1)
    inside[inside] = before.seen[tuple(truth[inside].astype(int).T)]
    return REDUCTION * np.linalg.norm(found.to_before(places[inside]) - truth[inside], axis=1)


@pytest.mark.parametrize(
    "movement",
    [
        Movement(),
        Movement(degrees=15, scale=1.1),
        Movement(shift=(0.0, 0.3), degrees=-8, gain=0.8, shade=0.2),
        Movement(bend=(0.008, -0.008), scale=0.9, gamma=1.2, blur=1 / 2000),
    ],
    ids=["none", "turned", "shifted", "bent"],
)
def test_a_known_movement_is_found(movement: Movement) -> None:
    before, after = views(movement)
    found = register(before, after)
    assert found is not None
    off = errors(found, movement, before, after)
    assert np.median(off) < 3 and np.percentile(off, 95) < 8
    assert found.residual_px < 3
    shown = (1 - 1.27 * np.hypot(*movement.shift)) * min(1.0, movement.scale) ** 2
    assert found.overlap == pytest.approx(shown, abs=0.12)


def test_the_way_back_is_the_way_there() -> None:
    before, after = views(random_movement(np.random.default_rng(3)))
    found = register(before, after)
    assert found is not None
    places = np.argwhere(before.seen)[::5003].astype(float)
    np.testing.assert_allclose(found.to_before(found.to_after(places)), places, atol=1e-6)


def test_what_is_warped_shows_the_first_photograph() -> None:
    before, after = views(Movement(degrees=10, shift=(0.1, 0.0)))
    found = register(before, after)
    assert found is not None
    warped = found.warped(after.vessels, before.seen.shape)
    both = before.seen & (found.warped(after.seen.astype(np.float32), before.seen.shape) > 0.99)
    assert np.corrcoef(warped[both], before.vessels[both])[0, 1] > 0.8
    assert np.corrcoef(after.vessels[both], before.vessels[both])[0, 1] < 0.3


def test_two_eyes_and_a_mirror_image_are_not_registered() -> None:
    before, after = views(Movement())
    mirrored = View(after.vessels[:, ::-1].copy(), after.seen[:, ::-1].copy(), after.contrast, after.grid)
    turned = View(after.vessels[::-1, ::-1].copy(), after.seen[::-1, ::-1].copy(), after.contrast, after.grid)
    assert register(before, mirrored) is None
    assert register(before, turned) is None


def test_a_picture_without_vessels_is_not_registered() -> None:
    before, after = views(Movement())
    noise = np.random.default_rng(0).normal(size=after.vessels.shape).astype(np.float32)
    for blank in (np.zeros_like(noise), noise):
        assert register(before, View(blank * after.seen, after.seen, after.contrast, after.grid)) is None


def test_registering_twice_gives_the_same() -> None:
    before, after = views(Movement(degrees=5))
    first, second = register(before, after), register(before, after)
    assert first is not None and second is not None
    np.testing.assert_array_equal(first.terms, second.terms)
