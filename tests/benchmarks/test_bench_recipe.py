"""The figures of the recipe's parts, on photographs whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_recipe import CALLS, ROW, figures, found_at_calls

from ma_cluster.evaluation.pooling import PHOTOGRAPHS, encode_photographs
from ma_cluster.evaluation.scoring import LesionCounts, PixelCounts, coarse, label
from ma_cluster.evaluation.tally import Photograph

FEWEST = 6  # photographs: with fewer nothing is told


def photograph(name: str, lesions: list[float], false: list[float]) -> Photograph:
    """Lesions of a pixel that are given these probabilities, and pixels that are none but are given those."""
    probability, truth = np.zeros((40, 40), np.float32), np.zeros((40, 40), bool)
    for row, scores in enumerate((lesions, false)):
        for column, score in enumerate(scores):
            probability[4 + 8 * row, 2 + 4 * column] = score
            truth[4 + 8 * row, 2 + 4 * column] = not row
    pixels = coarse(PixelCounts.of(probability, truth))
    return Photograph(1, name, not lesions, 0, {ROW: pixels}, {ROW: LesionCounts.of(probability, label(truth))})


def run(lesion: float, false: float) -> list[Photograph]:
    """Photographs with two lesions, one of them always faint, and two healthy ones with a false call each."""
    ill = [photograph(f"ill {number}", [lesion, 0.3], [0.5]) for number in range(FEWEST)]
    return [*ill, *(photograph(f"healthy {number}", [], [false]) for number in range(2))]


def test_the_lesions_found_are_counted_where_healthy_photographs_have_few_calls() -> None:
    annotated, healthy = (np.ones((1, count), np.int64) for count in (FEWEST, 2))
    assert CALLS < 1
    assert found_at_calls(run(lesion=0.9, false=0.7), annotated, healthy) == pytest.approx([0.5])
    assert found_at_calls(run(lesion=0.6, false=0.7), annotated, healthy) == pytest.approx([0])
    assert found_at_calls(run(lesion=0.6, false=0.1), annotated, healthy) == pytest.approx([1])
    once, twice = np.ones((2, FEWEST), np.int64), np.array([[2, 0], [0, 2]])
    one_clean = [*run(0.6, 0.1)[:-1], photograph("healthy 1", [], [0.8])]
    assert found_at_calls(one_clean, once, twice) == pytest.approx([1, 0])


def test_a_part_is_held_against_the_whole_recipe_of_its_fold_and_seed_and_a_seed_against_the_first(
    tmp_path: Path,
) -> None:
    runs = {
        "whole_5_1": run(lesion=0.9, false=0.7),
        "whole_5_2": run(lesion=0.8, false=0.7),
        "healthy_5_1": run(lesion=0.4, false=0.7),
        "healthy_4_1": run(lesion=0.4, false=0.7),
    }
    for name, photographs in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / PHOTOGRAPHS).write_bytes(encode_photographs(photographs))
    told = figures(tmp_path)
    assert told["runs"].keys() == runs.keys()
    assert told["folds"]["photographs"] == FEWEST
    assert told["differences"].keys() == {"whole_5_2", "healthy_5_1"}
    without, seed = told["differences"]["healthy_5_1"], told["differences"]["whole_5_2"]
    assert without["average_precision"]["better"] == without["froc_mean"]["better"] == "holds"
    assert without["found_at_calls"] == {"ours": 0.5, "theirs": 0.0, "ci_low": 0.5, "ci_high": 0.5}
    assert seed["average_precision"]["better"] == "cannot be told"
    assert seed["found_at_calls"]["ci_high"] == 0
