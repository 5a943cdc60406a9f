"""What the benchmarks look at: a photograph, with the truth where lesions were drawn in, and a model's networks."""

from __future__ import annotations

import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray
from PIL import Image
from torch import nn

from ma_cluster.bundle import Bundle, load_bundle
from ma_cluster.config import ImageConfig
from ma_cluster.images.datasets import decode_mask
from ma_cluster.images.reading import Prepared, read_bytes
from ma_cluster.images.sample import write_sample
from ma_cluster.lesions.detector import Detection, Detector, build_network
from ma_cluster.networks import FlipAugmented, fold

SAMPLE_SIDE_PX = 3464
"""Side of the sample photograph as it is enlarged: 12 megapixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured, and how. Picklable: each benchmark runs in a process of its own."""

    model: str = "lite"
    """Name of a model that ships, or a bundle's folder."""
    image: Path | None = None
    """A photograph; None takes one of `ma-cluster sample`, enlarged to 12 megapixels, whose lesions are known."""
    threads: int = 1
    """CPU threads of the networks, ours and the peers'."""
    device: str = "cpu"
    """Where the networks run."""
    repeats: int = 1
    """Passes of which the fastest counts."""

    def bundle(self, flips_half: int | None = None) -> Bundle:
        """The model, if asked with other flips at 0.5x."""
        bundle = load_bundle(self.model)
        if flips_half is None:
            return bundle
        detector = replace(bundle.recipe.detector, flips_half=flips_half)
        return replace(bundle, recipe=replace(bundle.recipe, detector=detector))

    def photograph(self) -> Photograph:
        """The photograph to look at."""
        return _sample() if self.image is None else Photograph(self.image.name, self.image.read_bytes(), None)

    def fastest_detection(self, bundle: Bundle, data: bytes) -> Detection:
        """What a model says of an encoded photograph, with the seconds of the fastest pass."""
        detector = Detector(bundle, device=self.device, threads=self.threads)
        detections = [detector.detect(data) for _ in range(self.repeats)]
        return min(detections, key=lambda detection: sum(detection.seconds.values()))

    def fastest(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest pass; waits for a GPU to finish."""
        seconds = []
        for _ in range(self.repeats):
            started = time.perf_counter()
            work()
            if torch.device(self.device).type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)


@dataclass(frozen=True, slots=True)
class Photograph:
    """An encoded photograph; `truth` on its own grid, None where it is not known."""

    name: str
    data: bytes
    truth: Bool[ndarray, "h w"] | None

    def prepared(self, config: ImageConfig) -> Prepared:
        """The photograph as the networks take it."""
        return read_bytes(self.data, config)[0]


def hypothesis_network(bundle: Bundle, name: str, device: str, *, folded: bool) -> nn.Module:
    """A hypothesis network as a plain script has it, or, `folded`, as the detector has it."""
    recipe = bundle.recipe
    network = build_network(name, recipe, bundle.weights[name])
    network.to(device).eval()
    if folded:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fold(network)
    flips = recipe.detector.flips_1x if name == "hgn_1x" else recipe.detector.flips_half
    return FlipAugmented(network, flips)


def peak_mb() -> int:
    """This process's largest resident memory so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _sample() -> Photograph:
    with tempfile.TemporaryDirectory() as folder:
        (sample,) = write_sample(folder, images=1).photographs
        pixels = np.asarray(Image.open(Path(folder) / sample.image))
        assert sample.mask is not None
        truth = decode_mask((Path(folder) / sample.mask).read_bytes())
    size = (SAMPLE_SIDE_PX, SAMPLE_SIDE_PX)
    large = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    out = io.BytesIO()
    Image.fromarray(large).save(out, format="JPEG", quality=92)
    known = cv2.resize(truth.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    return Photograph("ma-cluster sample, enlarged to 12 megapixels", out.getvalue(), known)
