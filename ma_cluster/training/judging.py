"""The fit of a model's judge of candidates, from what its 0.5x network proposes on the training photographs.

samples -> maps -> candidates and their measures -> `Judge`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32
from numpy import ndarray

from ma_cluster.bundle import Bundle
from ma_cluster.errors import UsageError
from ma_cluster.images.datasets import Sample, decode_mask, read_object
from ma_cluster.images.fundus import half_scale_mask
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.judge import Judge, find_candidates, measure

_LEARNING_RATE, _WEIGHT_DECAY = 2e-3, 0.05
_LESIONS, _OTHERS = 64, 192  # candidates in a mini-batch
_JITTER = 0.05  # standard deviation of the noise on standardised measures
_MARGIN = np.ones((3, 3), np.uint8)  # a candidate on a lesion's rim is that lesion


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is proposed on photographs, and which of it is a lesion."""

    measures: Float32[ndarray, "n m"]
    lesion: Bool[ndarray, "n"]


def with_judge(bundle: Bundle, samples: Sequence[Sample], threads: int | None = None, seed: int = 0) -> Bundle:
    """The bundle with a judge of candidates, fitted on `samples`.

    Args:
        bundle: with the 0.5x network that proposes.
        samples: photographs with a mask, and healthy ones, on which all that is proposed is false.
        threads: as for `Detector`.
        seed: of the fit.

    Raises:
        UsageError: the network proposes no lesion, or nothing but lesions.
    """
    detector = Detector(bundle, threads=threads)
    found = [candidates_of(detector, sample) for sample in samples]
    together = Candidates(*(np.concatenate([getattr(each, name) for each in found]) for name in ("measures", "lesion")))
    return replace(bundle, weights=bundle.weights | {"judge": fit_judge(together, seed).state_dict()})


def candidates_of(detector: Detector, sample: Sample) -> Candidates:
    """What the 0.5x network proposes on a photograph."""
    prepared = detector.prepare(read_object(sample.image))
    maps = detector.kinds(prepared)
    candidates = find_candidates(maps[0])
    truth = np.zeros(prepared.fov_half.shape, bool)
    if sample.mask is not None:
        truth = half_scale_mask(prepared.grid.crop_mask(decode_mask(read_object(sample.mask))))
    near = cv2.dilate(truth.astype(np.uint8), _MARGIN) > 0
    measures = measure(maps, prepared.enhanced_half, prepared.fov_half, candidates)
    return Candidates(measures, near[tuple(candidates.T)])


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
