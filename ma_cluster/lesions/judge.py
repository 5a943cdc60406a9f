"""Which of the places that are outlined are called: each candidate judged once, as a whole, by what is measured on it.

maps of the 0.5x network, enhanced photograph -> candidates -> measures -> probability of a lesion at each

A candidate is a peak of the microaneurysms' map. The network answered for each pixel; the judge weighs the candidate's
size and shape, its colour against its surroundings, and which kinds of lesions lie around it, and has learnt from all
that is proposed on healthy photographs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.errors import BundleError, UsageError
from ma_cluster.networks import probability

LEAST = 0.03
"""Probability from which a peak is a candidate."""
_APART = 7  # pixels of the 0.5x grid: the side of the square in which a candidate is the peak
_PEAK_BLUR = 0.7  # standard deviation, pixels, before peaks are looked for
_AROUND = (3, 8, 24, 64)  # pixels: half sides of the squares in which kinds of lesions are measured
_OUTLINES = (0.05, 0.15, 0.4)  # probabilities at which the candidate's component is measured
_BLURS = (0.8, 1.6, 3.0, 6.0, 12.0)  # standard deviations, pixels, whose differences tell a spot's contrast
_CURVED = (1.5, 3.0)  # standard deviations, pixels, at which a spot is told from a line
_TEXTURE = 15  # pixels: side of the square whose standard deviation is measured
_SMALLEST = 1e-4  # of a probability before its logarithm
_LEARNING_RATE, _WEIGHT_DECAY = 2e-3, 0.05
_LESIONS, _OTHERS = 64, 192  # candidates in a mini-batch
_JITTER = 0.05  # standard deviation of the noise on standardised measures


class Judge(nn.Module):
    """Measures of candidates -> log odds of a lesion: the mean of several small networks, which err apart."""

    mean: Float[Tensor, "m"]
    scale: Float[Tensor, "m"]

    def __init__(self, measures: int, hidden: int = 64, members: int = 5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(measures))
        self.register_buffer("scale", torch.ones(measures))
        self.members = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(measures, hidden), nn.ReLU(), nn.Dropout(0.2)),
                *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.2)),
                nn.Linear(hidden, 1),
            )
            for _ in range(members)
        )

    def standardised(self, measures: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """As the members take them: outliers are no further than five standard deviations off."""
        return ((measures - self.mean) / self.scale).clamp(-5, 5)

    def forward(self, measures: Float[Tensor, "n m"]) -> Float[Tensor, "n"]:
        standardised = self.standardised(measures)
        return torch.stack([member(standardised)[:, 0] for member in self.members]).mean(dim=0)


def build_judge(weights: dict[str, Tensor]) -> Judge:
    """A judge of the sizes that weights have; those of another network are left to `load_weights`."""
    first = weights.get("members.0.0.weight", torch.empty(1, 1))
    members = {key.split(".")[1] for key in weights if key.startswith("members.")}
    hidden, measures = first.shape if first.ndim == 2 else (1, 1)
    return Judge(measures, hidden, max(1, len(members)))


def check_judge(judge: nn.Module | None, kinds: int) -> None:
    """That a network of so many kinds gives what the judge weighs.

    Raises:
        BundleError: it gives more or less.
    """
    if not isinstance(judge, Judge):
        return
    blank, place = np.zeros((1, 1), np.float32), np.zeros((1, 2), np.int64)
    given = measure(np.stack([blank] * kinds), np.zeros((1, 1, 3), np.uint8), blank > 0, place).shape[1]
    if len(judge.mean) != given:
        raise BundleError(
            f"the model's judge weighs {len(judge.mean)} measures of a candidate, its 0.5x network gives {given}: fit "
            "the judge again (`ma-cluster bundle --judge`)"
        )


def find_candidates(lesion: Float32[ndarray, "h w"]) -> Int64[ndarray, "n 2"]:
    """(row, col) of the peaks of a map of microaneurysms, 0..1, on the 0.5x grid."""
    smooth = cv2.GaussianBlur(lesion, (0, 0), _PEAK_BLUR)
    peaks = (smooth >= cv2.dilate(smooth, np.ones((_APART, _APART), np.uint8))) & (lesion > LEAST)
    return np.argwhere(peaks)


def measure(
    maps: Float32[ndarray, "k h w"],
    enhanced: UInt8[ndarray, "h w 3"],
    fov: Bool[ndarray, "h w"],
    candidates: Int64[ndarray, "n 2"],
) -> Float32[ndarray, "n m"]:
    """What is measured on candidates; m depends on the number of kinds alone.

    Args:
        maps: probability of each kind of lesion against the background, microaneurysms first, on the 0.5x grid.
        enhanced: the photograph on that grid.
        fov: its field of view.
        candidates: (row, col) of each.
    """
    rows, cols = candidates.T
    edge = cv2.distanceTransform(fov.astype(np.uint8), cv2.DIST_L2, 5)
    planes = [*_of_kinds(maps), *_of_colours(enhanced), edge]
    columns = [plane[rows, cols] for plane in planes]
    return np.stack([*columns, *_of_shape(maps[0], candidates)], axis=1).astype(np.float32)


def judge_candidates(
    judge: nn.Module, maps: Float32[ndarray, "k h w"], enhanced: UInt8[ndarray, "h w 3"], fov: Bool[ndarray, "h w"]
) -> tuple[Int64[ndarray, "n 2"], Float32[ndarray, "n"]]:
    """Where candidates are, and the probability that each is a lesion.

    The arguments are those of `measure`; the judge is in eval mode.
    """
    candidates = find_candidates(maps[0])
    if not len(candidates):
        return candidates, np.zeros(0, np.float32)
    return candidates, judgements(judge, measure(maps, enhanced, fov, candidates))


def around(
    candidates: Int64[ndarray, "n 2"], probabilities: Float32[ndarray, "n"], shape: tuple[int, int]
) -> Float32[ndarray, "h w"]:
    """Each probability in a square around its candidate, the higher one where two meet, 0 elsewhere."""
    judged = np.zeros(shape, np.float32)
    judged[tuple(candidates.T)] = probabilities
    return cv2.dilate(judged, np.ones((_APART, _APART), np.uint8))


@torch.inference_mode()
def judgements(judge: nn.Module, measures: Float32[ndarray, "n m"]) -> Float32[ndarray, "n"]:
    """The probability that each candidate is a lesion."""
    device = next(judge.parameters()).device
    return probability(judge(torch.from_numpy(measures).to(device))).cpu().numpy()


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is proposed on photographs, and which of it is a lesion."""

    measures: Float32[ndarray, "n m"]
    lesion: Bool[ndarray, "n"]


def fit_judge(candidates: Candidates, seed: int, steps: int = 3000) -> Judge:
    """A judge in eval mode. Each of its members sees mini-batches of its own, a quarter of them lesions.

    Raises:
        UsageError: there are no lesions among the candidates, or nothing else.
    """
    lesions, others = np.flatnonzero(candidates.lesion), np.flatnonzero(~candidates.lesion)
    if len(lesions) == 0 or len(others) == 0:
        raise UsageError(
            f"of {len(candidates.lesion)} candidates {len(lesions)} are lesions: nothing to judge by; train the 0.5x "
            "network first"
        )
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(candidates.measures.shape[1])
        judge.mean.copy_(torch.from_numpy(candidates.measures.mean(axis=0)))
        judge.scale.copy_(torch.from_numpy(candidates.measures.std(axis=0) + np.float32(1e-6)))
        inputs = judge.standardised(torch.from_numpy(candidates.measures))
        truth = torch.from_numpy(candidates.lesion.astype(np.float32))
        optimizer = torch.optim.AdamW(judge.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        judge.train()
        for _ in range(steps):
            losses = []
            for member in judge.members:
                drawn = np.concatenate([rng.choice(lesions, _LESIONS), rng.choice(others, _OTHERS)])
                noise = _JITTER * torch.randn(len(drawn), inputs.shape[1])
                logits = member(inputs[drawn] + noise)[:, 0]
                losses.append(F.binary_cross_entropy_with_logits(logits, truth[drawn]))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            cosine.step()
    return judge.eval()


def _of_kinds(maps: Float32[ndarray, "k h w"]) -> Iterator[Float32[ndarray, "h w"]]:
    """How likely each kind is there and, at most and on average, around it."""
    for probability_of_kind in maps:
        yield _log_odds(probability_of_kind)
        for reach in _AROUND:
            side = 2 * reach + 1
            yield _log_odds(cv2.dilate(probability_of_kind, np.ones((side, side), np.uint8)))
            yield np.log(np.float32(1e-5) + cv2.blur(probability_of_kind, (side, side)))


def _of_colours(enhanced: UInt8[ndarray, "h w 3"]) -> Iterator[Float32[ndarray, "h w"]]:
    """Each channel's value, contrast of spots of three sizes, and texture; how green curves, across and along."""
    for channel in np.moveaxis(enhanced, -1, 0).astype(np.float32):
        blurred = [cv2.GaussianBlur(channel, (0, 0), sigma) for sigma in _BLURS]
        yield channel
        yield from (fine - coarse for fine, coarse in zip(blurred, blurred[2:], strict=False))
        square = (_TEXTURE, _TEXTURE)
        yield np.sqrt(np.maximum(0, cv2.blur(channel * channel, square) - cv2.blur(channel, square) ** 2))
    green = np.ascontiguousarray(enhanced[..., 1]).astype(np.float32)
    for sigma in _CURVED:
        smooth = cv2.GaussianBlur(green, (0, 0), sigma)
        xx, yy, xy = (cv2.Sobel(smooth, cv2.CV_32F, *orders) for orders in ((2, 0), (0, 2), (1, 1)))
        mean, apart = (xx + yy) / 2, np.sqrt((xx - yy) ** 2 / 4 + xy**2)
        yield mean + apart
        yield mean - apart


def _of_shape(lesion: Float32[ndarray, "h w"], candidates: Int64[ndarray, "n 2"]) -> Iterator[Float[ndarray, "n"]]:
    """Area, elongation and fill of the candidate's component at each outline; 0 and 1s where it lies in none."""
    for outline in _OUTLINES:
        above = (lesion > outline).astype(np.uint8)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
        _, _, width, height, area = stats[labels[tuple(candidates.T)]].T.astype(np.float64)
        inside = above[tuple(candidates.T)] > 0
        yield np.where(inside, np.log1p(area), 0)
        yield np.where(inside, np.maximum(width, height) / np.minimum(width, height), 1)
        yield np.where(inside, area / (width * height), 1)


def _log_odds(p: Float32[ndarray, "h w"]) -> Float32[ndarray, "h w"]:
    kept = np.clip(p, _SMALLEST, 1 - _SMALLEST)
    return np.log(kept / (1 - kept))
