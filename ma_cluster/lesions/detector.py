"""The only place where the stages are joined: a photograph -> its lesions. Every command goes through here."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from torch import nn

from ma_cluster.bundle import DETECTING, Bundle, load_bundle, load_weights
from ma_cluster.config import DetectorConfig, KnownField, OperatingPoint, Recipe
from ma_cluster.errors import ImageFailedError, Reason
from ma_cluster.hypotheses.frrn import build_hgn
from ma_cluster.hypotheses.maps import can_reach, fuse, probability_map, scale_odds, upsample_half
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.fundus import Fov
from ma_cluster.images.patches import Tiling
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import read_bytes, read_pixels
from ma_cluster.lesions.table import Lesion, find_lesions
from ma_cluster.machine import dedicate
from ma_cluster.networks.inference import FlipAugmented, TileExecutor, fold
from ma_cluster.refinement.dense import DensePrn, refine_dense
from ma_cluster.refinement.patchwise import Patchwise, refine
from ma_cluster.refinement.resnet import Prn, build_prn

Map = Float32[ndarray, "ch cw"]
Refiner = Literal["prn", "cls"]
REFINERS: tuple[Refiner, ...] = get_args(Refiner)
_GPU_TILES = 8  # the largest feature maps of the paper's network on tiles of 512 are then 0.4 GB each; never timed


@dataclass(frozen=True, slots=True)
class Detection:
    """What is known of one photograph. `mask` and the lesions are on the grid of the upright photograph."""

    lesions: tuple[Lesion, ...]
    mask: Bool[ndarray, "h w"]
    fov: Fov
    quality: Quality
    seconds: dict[str, float] = field(compare=False)
    """Wall time of the stages prepare (where `detect` did it), hgn, prn and lesions."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the photograph, pixels."""
        return self.mask.shape[0], self.mask.shape[1]


@dataclass(frozen=True, slots=True)
class Maps:
    """The probability maps before fusion, on the canonical 1x grid. The PRN's are None in a bundle without one."""

    hgn_1x: Map
    hgn_half: Map
    prn_1x: Map | None
    prn_half: Map | None

    def stack(self) -> list[Map]:
        """The maps that are there, in order."""
        return [m for m in (self.hgn_1x, self.hgn_half, self.prn_1x, self.prn_half) if m is not None]

    def fused(self, config: DetectorConfig) -> Map:
        """The map that decides: the detector's mean, with its weights, of the maps that are there."""
        stack = self.stack()
        return fuse(stack, config.fusion, _weights(config, len(stack)))


class Detector:
    """A loaded model, ready to look at photographs. Stateless between calls."""

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        """
        Args:
            bundle: the model.
            device: where the networks run: cpu, cuda, cuda:1, ...
            threads: tiles at a time on a CPU. The whole process is dedicated to them for good: torch has one thread in
                each, and freed memory is kept. None leaves the process alone: one tile at a time, which torch's own
                threads share.
        """
        recipe = bundle.recipe
        self.recipe: Recipe = recipe
        self.digest = bundle.digest
        self.stage = bundle.stage
        networks = {name: build_network(name, recipe) for name in bundle.weights}
        for name, network in networks.items():
            load_weights(network, bundle.weights[name], name)
            network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            fold(network)
        self._hypotheses = {
            "hgn_1x": FlipAugmented(networks["hgn_1x"], recipe.detector.flips_1x),
            "hgn_half": FlipAugmented(networks["hgn_half"], recipe.detector.flips_half),
        }
        self._refiners = {name: _refiner(networks[name], recipe) for name in REFINERS if name in networks}
        on_cpu = torch.device(device).type == "cpu"
        tile_map = map if threads is None else dedicate(threads)
        self._executor = TileExecutor(tile_map=tile_map) if on_cpu else TileExecutor(tiles=_GPU_TILES)

    @classmethod
    def load(
        cls,
        model: str | Path = "lite",
        *,
        device: str = "cpu",
        threads: int | None = None,
        digest: str | None = None,
        operating_point: OperatingPoint = "default",
    ) -> Detector:
        """Load what detection uses of a model: not `cls`, which `Detector(load_bundle(model))` has, too.

        Args:
            model: name of one that ships with the package, or the folder or URL of a bundle.
            device: where the networks run: cpu, cuda, cuda:1, ...
            threads: of the constructor; a process that only detects is fastest with one for each core.
            digest: that the model must have; None takes whichever is there.
            operating_point: which of the places that are outlined are called: the sure ones, or all.

        Raises:
            BundleError: the model is not there, damaged or another one.
            StoreError: the store of a URL does not answer.
        """
        bundle = load_bundle(model, networks=DETECTING, wanted=digest)
        return cls(at_operating_point(bundle, operating_point), device=device, threads=threads)

    def knowing(self, field: KnownField) -> Detector:
        """The detector of photographs of a known field."""
        known = copy.copy(self)
        known.recipe = replace(self.recipe, image=field.told(self.recipe.image))
        return known

    @property
    def refiners(self) -> tuple[Refiner, ...]:
        """The refinement networks that the bundle has."""
        return tuple(self._refiners)

    def detect(self, image: str | Path | bytes | UInt8[ndarray, "h w 3"]) -> Detection:
        """Find the lesions of one photograph: a path, encoded bytes, or upright RGB.

        Raises:
            ImageRefusedError: it cannot be scored; its `reason` is from the closed list.
            ImageFailedError: not_finite, where a network's answer is no number.
            FileNotFoundError: the path leads nowhere.
        """
        started = time.perf_counter()
        prepared = self.prepare(image)
        prepare_seconds = time.perf_counter() - started
        detection = self.segment(prepared)
        return replace(detection, seconds={"prepare": prepare_seconds} | detection.seconds)

    def prepare(self, image: str | Path | bytes | UInt8[ndarray, "h w 3"]) -> Prepared:
        """The part before the networks: decode, find the FOV, bring to scale, enhance."""
        if isinstance(image, ndarray):
            return read_pixels(image, self.recipe.image)[0]
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        return read_bytes(data, self.recipe.image)[0]

    def segment(self, prepared: Prepared) -> Detection:
        """The networks, their fusion, and the lesion table; each network looks only where it can make a lesion.

        The hypothesis network at 0.5x, a quarter of the pixels, looks everywhere, that at 1x where it leaves the
        question open, and the PRN where both do.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "hgn"):
            half = self._half(prepared)
            if self.recipe.detector.weight_1x > 0:
                at_best = Maps(np.ones_like(half), half, None, None)
                one = self._one(prepared, self._undecided(prepared, at_best))
            else:
                one = np.zeros_like(half)
            maps = Maps(one, half, None, None)
        if self.stage == "prn":
            with _timed(seconds, "prn"):
                maps = self._refinements(prepared, maps, "prn", self._undecided(prepared, maps))
        with _timed(seconds, "lesions"):
            detection = self.decide(prepared, maps)
        return replace(detection, seconds=seconds)

    def decide(self, prepared: Prepared, maps: Maps) -> Detection:
        """Fusion and the lesion table alone."""
        config = self.recipe.detector
        lesions, mask = find_lesions(maps.fused(config), prepared.grid, prepared.fov, prepared.shape, config)
        return Detection(lesions, mask, prepared.fov, prepared.quality, {})

    def maps(self, prepared: Prepared) -> Maps:
        """The probability maps of every stage, everywhere."""
        hypotheses = self.hypotheses(prepared)
        return self.refinements(prepared, hypotheses) if self.stage == "prn" else hypotheses

    def hypotheses(self, prepared: Prepared) -> Maps:
        """The maps of the two hypothesis networks alone."""
        return Maps(self._one(prepared, prepared.fov_1x), self._half(prepared), None, None)

    def _one(self, prepared: Prepared, needed: Bool[ndarray, "ch cw"]) -> Map:
        return self._hypothesis("hgn_1x", prepared.enhanced_1x, needed)

    def _half(self, prepared: Prepared) -> Map:
        half = self._hypothesis("hgn_half", prepared.enhanced_half, prepared.fov_half)
        return upsample_half(half, prepared.fov_1x.shape) * prepared.fov_1x

    def _hypothesis(self, name: str, enhanced: UInt8[ndarray, "h w 3"], needed: Bool[ndarray, "h w"]) -> Map:
        config = self.recipe.detector
        tiling = Tiling(needed.shape[0], needed.shape[1], config.tile_px, config.halo_px)
        return _finite(probability_map(self._hypotheses[name], enhanced, needed, tiling, self._executor), name)

    def refinements(self, prepared: Prepared, hypotheses: Maps, network: Refiner = "prn") -> Maps:
        """All maps: the PRN runs once over the union of both regions of interest, its two maps are that within each.

        With `network` "cls" they are those of the PRN trained without triplet loss, in the PRN's place.
        """
        return self._refinements(prepared, hypotheses, network, prepared.fov_1x)

    def _refinements(
        self, prepared: Prepared, hypotheses: Maps, network: Refiner, needed: Bool[ndarray, "ch cw"]
    ) -> Maps:
        """All maps; the PRN's hold where `needed`, elsewhere they may be lower than they should."""
        rois = self._regions(hypotheses)
        union = rois[0] | rois[1]
        if self.recipe.prn.scale == "1x":
            refined = self._refine(network, prepared.enhanced_1x, union & needed)
        else:  # a pixel at 1x is interpolated from the pixels at 0.5x that its neighbours lie in
            region = _halved(union) & _halved(_grown(needed, 1))
            refined = upsample_half(self._refine(network, prepared.enhanced_half, region), union.shape)
        refined = scale_odds(refined, self.recipe.detector.prn_odds)
        return Maps(hypotheses.hgn_1x, hypotheses.hgn_half, refined * rois[0], refined * rois[1])

    def _regions(self, hypotheses: Maps) -> tuple[Bool[ndarray, "ch cw"], Bool[ndarray, "ch cw"]]:
        config = self.recipe.detector
        return hypotheses.hgn_1x > config.roi_threshold_1x, hypotheses.hgn_half > config.roi_threshold_half

    def _undecided(self, prepared: Prepared, hypotheses: Maps) -> Bool[ndarray, "ch cw"]:
        """Pixels that may yet be part of a lesion, and those whose values it takes to say so."""
        config = self.recipe.detector
        regions = self._regions(hypotheses) if self.stage == "prn" else ()
        stack = hypotheses.stack()
        fusion = config.fusion, _weights(config, len(stack) + len(regions))
        open_yet = can_reach(config.threshold, stack, regions, fusion)
        return _grown(open_yet, prepared.grid.reach_px) & prepared.fov_1x

    def _refine(self, name: Refiner, enhanced: UInt8[ndarray, "h w 3"], roi: Bool[ndarray, "h w"]) -> Map:
        refiner = self._refiners[name]
        if isinstance(refiner, DensePrn):
            return _finite(refine_dense(refiner, enhanced, roi, self._executor.tile_map), name)
        return _finite(refine(refiner, enhanced, roi, self._executor.tile_map), name)


def build_network(name: str, recipe: Recipe) -> nn.Module:
    """`hgn_1x`, `hgn_half`, `prn` or `cls`, freshly initialised."""
    if name in REFINERS:
        return build_prn(recipe.prn)
    return build_hgn(recipe.hgn_1x if name == "hgn_1x" else recipe.hgn_half)


def _finite(probability: Map, network: str) -> Map:
    """A map as it is.

    Raises:
        ImageFailedError: not_finite. Any comparison with such a value is false: the photograph would pass as healthy.
    """
    if not np.isfinite(probability).all():
        detail = f"network {network} gave values that are no numbers; try another device or precision, or another model"
        raise ImageFailedError(Reason.NOT_FINITE, detail)
    return probability


def at_operating_point(bundle: Bundle, point: OperatingPoint) -> Bundle:
    """The bundle whose detector calls what it does at an operating point."""
    if point == "default":
        return bundle
    detector = replace(bundle.recipe.detector, least_score=0.0)
    return replace(bundle, recipe=replace(bundle.recipe, detector=detector))


def _refiner(network: nn.Module, recipe: Recipe) -> DensePrn | Patchwise:
    """A folded PRN as the recipe runs it."""
    stride_px = recipe.detector.prn_stride_px
    if not recipe.detector.prn_dense:
        return Patchwise(network, recipe.prn.cut_px, stride_px)
    assert isinstance(network, Prn)
    return DensePrn(network, recipe.prn.patch_px, stride_px)


def _weights(config: DetectorConfig, maps: int) -> list[float]:
    """Of the first so many maps of `Maps.stack`."""
    return [config.weight_1x, 1.0] * (maps // 2)


def _halved(mask: Bool[ndarray, "h w"]) -> Bool[ndarray, "hh hw"]:
    """Pixels at 0.5x of whose four one is set."""
    return mask[::2, ::2] | mask[1::2, ::2] | mask[::2, 1::2] | mask[1::2, 1::2]


def _grown(mask: Bool[ndarray, "h w"], by_px: int) -> Bool[ndarray, "h w"]:
    side = 2 * by_px + 1
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
