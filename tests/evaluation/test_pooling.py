"""Photographs of two evaluations paired, and what false pixels lie on, on data whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from photographs import fundus_photograph

from ma_cluster.config import ImageConfig
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.false_pixels import PLACES, false_pixels
from ma_cluster.evaluation.figures import group_numbers
from ma_cluster.evaluation.pooling import (
    decode_photographs,
    encode_photographs,
    paired_differences,
    pool,
    resampled_sensitivity,
)
from ma_cluster.evaluation.scoring import RATES, LesionCounts, PixelCounts, coarse, label, sensitivity_at
from ma_cluster.evaluation.tally import Photograph
from ma_cluster.images.fundus import Fov
from ma_cluster.images.reading import read_pixels
from ma_cluster.storage.parquet import from_parquet, to_parquet


def looked_at(number: int, skill: float) -> Photograph:
    """A photograph with ten lesions of nine pixels, as a model of so much skill sees it."""
    rng = np.random.default_rng(number)
    truth = np.zeros((120, 120), bool)
    for place in range(10):
        truth[10 * place + 2 : 10 * place + 5, 12 * (place % 9) + 2 : 12 * (place % 9) + 5] = True
    odds = rng.normal(-3, 1.5, truth.shape) + truth * skill
    probability = (1 / (1 + np.exp(-odds))).astype(np.float32)
    pixels = coarse(PixelCounts.of(probability, truth))
    lesions = LesionCounts.of(probability, label(truth))
    return Photograph(
        number, f"{number:064x}", False, 3, {"hgn_half": pixels}, {"hgn_half": lesions}, 2, 1, {"edge": 4}
    )


def test_what_is_written_of_photographs_is_read_again() -> None:
    ours = [looked_at(1, 3.0), Photograph(2, "b", True, 0, group="eve")]
    found = decode_photographs(encode_photographs(ours))
    assert [each.group for each in found] == ["", "b"], "a patient's name is not written"
    older = to_parquet(from_parquet(encode_photographs(ours)).drop_columns("group"))
    assert [each.group for each in decode_photographs(older)] == ["", ""]
    assert [(each.number, each.digest, each.healthy, each.called) for each in found] == [
        (each.number, each.digest, each.healthy, each.called) for each in ours
    ]
    assert (found[0].found, found[0].false, found[0].false_on) == (2, 1, {"edge": 4})
    assert (found[0].pixels["hgn_half"] == ours[0].pixels["hgn_half"]).all()
    assert (found[0].lesions["hgn_half"].found == ours[0].lesions["hgn_half"].found).all()
    assert found[1].pixels == {} == found[1].lesions


def test_a_name_that_all_photographs_of_an_evaluation_have_groups_none_of_those_pooled() -> None:
    def evaluation(name: str, numbers: range) -> list[Photograph]:
        named = [replace(looked_at(number, 3.0), group=name) for number in numbers]
        return decode_photographs(encode_photographs(named))

    pooled = [*evaluation("north", range(4)), *evaluation("south", range(4, 8))]
    assert sorted(group_numbers([each.group for each in pooled])) == list(range(8))


def test_a_better_model_is_found_better_in_whatever_order_its_photographs_come() -> None:
    good = [looked_at(number, 5.0) for number in range(8)]
    poor = [looked_at(number, 2.0) for number in reversed(range(8))]
    for ours, theirs, word in ((good, poor, "holds"), (poor, good, "does not"), (good, good, "cannot be told")):
        said = paired_differences(pool(ours), pool(theirs))
        assert [(each["row"], each["figure"]) for each in said] == [
            ("hgn_half", "average_precision"),
            ("hgn_half", "froc_mean"),
        ]
        assert {each["better"] for each in said} == {word}
        for each in said:
            assert each["ci_low"] <= each["ours"] - each["theirs"] + 1e-4
            assert each["ours"] - each["theirs"] - 1e-4 <= each["ci_high"]


def test_other_photographs_cannot_be_compared_nor_the_same_ones_pooled() -> None:
    with pytest.raises(UsageError, match="1 in the first alone, 1 in the second"):
        paired_differences(pool([looked_at(1, 3.0)]), pool([looked_at(2, 3.0)]))
    with pytest.raises(UsageError, match="more than one of the evaluations"):
        pool([looked_at(1, 3.0), looked_at(1, 2.0)])


def test_a_resampled_sensitivity_is_that_of_the_photographs_drawn() -> None:
    counts = [looked_at(number, 3.0).lesions["hgn_half"] for number in range(3)]
    (ours,) = resampled_sensitivity(counts, np.array([[2, 0, 1]]))
    drawn = counts[0] + counts[0] + counts[2]
    assert ours == pytest.approx(np.mean([sensitivity_at(drawn, rate) for rate in RATES]))


def test_each_false_pixel_lies_on_the_first_thing_that_it_may_lie_on() -> None:
    pixels = fundus_photograph((600, 600), Fov(300.0, 300.0, 560.0), noise=0)
    pixels[200:206, 150:450] //= 3  # a vessel
    prepared, _ = read_pixels(pixels, ImageConfig(fov_diameter_px=560.0))
    truth, called, haemorrhage, disc = (np.zeros((600, 600), bool) for _ in range(4))
    truth[400, 300] = haemorrhage[420:430, 300:310] = disc[290:310, 430:450] = True
    called[400, 300:305] = True  # one true, four on its rim
    called[425, 305] = called[300, 435:437] = called[203, 300:303] = called[350, 200] = True
    called[300, 30:35] = True  # beside the edge at column 20
    found = false_pixels(called, truth, {"HE": haemorrhage, "OD": disc}, prepared)
    assert list(found) == list(PLACES)
    expected = {"rim": 4, "haemorrhage": 1, "optic_disc": 2, "edge": 5, "vessel": 3, "nothing": 1}
    assert {place: count for place, count in found.items() if count} == expected
