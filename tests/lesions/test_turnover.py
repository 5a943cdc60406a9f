"""What becomes of lesions between two photographs, on registrations that are known exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_cluster.images.fundus import Grid
from ma_cluster.images.registration import Registration, View
from ma_cluster.lesions.findings import Lesion
from ma_cluster.lesions.turnover import Change, Taken, compare, to_values

SIDE = 200
GRID = Grid(0, 0, 4 * SIDE, 4 * SIDE, SIDE, SIDE)  # the photograph has four pixels for each of the reduced grid
SHIFT = 40.0  # columns of the reduced grid


def view(seen: slice = slice(0, SIDE), contrast: float = 0.1) -> View:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, seen] = True
    return View(np.zeros((SIDE, SIDE), np.float32), mask, np.full((SIDE, SIDE), contrast, np.float32), GRID)


def shifted(cols: float = 0.0, residual: float = 2.0) -> Registration:
    terms = np.zeros((6, 2))
    terms[0], terms[1], terms[2] = (0.0, cols), (400.0, 0.0), (0.0, 400.0)
    return Registration(terms, residual, residual, 1.0, 1.0, 100)


def lesion(row: float, col: float, diameter: float = 18.0, score: float = 0.9) -> Lesion:
    """Positions on the reduced grid."""
    at = (row + 0.5) * 4 - 0.5, (col + 0.5) * 4 - 0.5
    return Lesion(1, *at, (0, 0, 1, 1), 250, diameter, score, score, score, 0.0)


def counted(change: Change) -> tuple[int, int, int, int]:
    return len(change.persisting), len(change.new), len(change.gone), len(change.outside)


PLACES = st.lists(st.tuples(st.integers(5, 190), st.integers(5, 190)), max_size=8)


@given(PLACES, PLACES, st.floats(-60, 60))
def test_each_lesion_has_one_fate(earlier: Any, later: Any, cols: float) -> None:
    before, after = (Taken(view(), [lesion(*place) for place in places]) for places in (earlier, later))
    change = compare(before, after, shifted(cols))
    kept = {id(first) for first, _ in change.persisting}, {id(second) for _, second in change.persisting}
    outside = [side for side, _ in change.outside]
    assert len(kept[0]) + len(change.gone) + outside.count("before") == len(earlier)
    assert len(kept[1]) + len(change.new) + outside.count("after") == len(later)


@given(PLACES)
def test_a_photograph_and_itself_differ_in_nothing(places: Any) -> None:
    own = Taken(view(), [lesion(*place) for place in places])
    change = compare(own, own, shifted())
    assert (change.new, change.gone, change.outside) == ((), (), ())


def test_a_lesion_moves_with_the_retina() -> None:
    before, after = Taken(view(), [lesion(50, 60)]), Taken(view(), [lesion(50, 60 + SHIFT), lesion(50, 60)])
    assert counted(compare(before, after, shifted(SHIFT))) == (1, 1, 0, 0)
    assert counted(compare(before, after, shifted())) == (1, 1, 0, 0)
    assert counted(compare(before, Taken(view(), []), shifted(SHIFT))) == (0, 0, 1, 0)


def test_what_the_other_field_does_not_show_is_neither_new_nor_gone() -> None:
    before, after = Taken(view(), [lesion(50, 190)]), Taken(view(), [lesion(50, 10)])
    assert counted(compare(before, after, shifted(SHIFT))) == (0, 0, 0, 2)


@pytest.mark.parametrize("poor", ["contrast", "photograph"])
def test_nor_is_what_the_other_photograph_shows_too_poorly(poor: str) -> None:
    after = Taken(view(contrast=0.02 if poor == "contrast" else 0.1), [lesion(90, 90)], gradable=poor == "contrast")
    change = compare(Taken(view(), [lesion(50, 60)]), after, shifted())
    assert counted(change) == (0, 1, 0, 1), "what is seen on the poor one is new"


def test_a_weaker_place_confirms_a_lesion_and_is_none_itself() -> None:
    before = Taken(view(), [lesion(50, 60)], [lesion(80, 80, score=0.2), lesion(120, 120, score=0.2)])
    after = Taken(view(), [lesion(80, 80)], [lesion(50, 61, score=0.3), lesion(120, 120, score=0.3)])
    change = compare(before, after, shifted())
    assert counted(change) == (2, 0, 0, 0)


def test_a_lesion_that_split_persists_twice() -> None:
    before = Taken(view(), [lesion(50, 60, diameter=40.0)])
    after = Taken(view(), [lesion(50, 58), lesion(50, 62)])
    assert counted(compare(before, after, shifted())) == (2, 0, 0, 0)


def test_the_radius_follows_from_the_residual() -> None:
    before, after = Taken(view(), [lesion(50, 60)]), Taken(view(), [lesion(50, 65)])
    assert counted(compare(before, after, shifted(residual=2.0))) == (0, 1, 1, 0)
    assert counted(compare(before, after, shifted(residual=12.0))) == (1, 0, 0, 0)


def test_rates_are_lesions_a_year_and_there_are_none_without_a_time_or_a_registration() -> None:
    before, after = Taken(view(), [lesion(50, 60)]), Taken(view(), [lesion(90, 60), lesion(120, 60)])
    values = to_values(compare(before, after, shifted()), 0.5)
    assert (values["formation_per_year"], values["disappearance_per_year"], values["turnover_per_year"]) == (4, 2, 6)
    assert to_values(compare(before, after, shifted()), None)["turnover_per_year"] is None
    failed = to_values(None, 0.5)
    assert failed["registered"] is False and "turnover_per_year" not in failed


def test_a_change_goes_into_json(tmp_path: Any) -> None:
    import json

    own = Taken(view(), [lesion(50, 60)])
    values = to_values(compare(own, own, shifted()), 1.0)
    assert json.loads(json.dumps(values))["persisting"][0]["before"] == json.loads(
        json.dumps(dataclasses.asdict(own.called[0]))
    )
