"""The only place where the stages are joined: a photograph -> its lesions. Every command goes through here."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.bundle import DETECTING, Bundle, load_bundle, load_weights
from ma_cluster.config import JUDGE, KnownField, OperatingPoint, Recipe
from ma_cluster.errors import ImageFailedError, Reason
from ma_cluster.hypotheses.frrn import build_hgn, kinds_in
from ma_cluster.hypotheses.maps import (
    Map,
    Maps,
    can_reach,
    grown,
    halved,
    map_weights,
    probability_maps,
    scale_odds,
    upsample_half,
)
from ma_cluster.images.patches import Tiling
from ma_cluster.images.reading import Prepared, read_bytes, read_pixels
from ma_cluster.lesions.findings import (
    Detection,
    check_grading,
    find_lesions,
    image_score,
    photograph_features,
    triage,
)
from ma_cluster.lesions.judge import around, build_judge, check_judge, judge_candidates
from ma_cluster.networks import FlipAugmented, Precision, fold, tile_executor
from ma_cluster.refinement.dense import as_run, refine_any
from ma_cluster.refinement.resnet import build_prn

Refiner = Literal["prn", "cls"]
REFINERS: tuple[Refiner, ...] = get_args(Refiner)


class Detector:
    """A loaded model, ready to look at photographs. Stateless between calls."""

    def __init__(
        self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None, precision: Precision = "float32"
    ) -> None:
        """
        Args:
            bundle: the model.
            device: where the networks run: cpu, cuda, cuda:1, ...
            threads: tiles at a time on a CPU. The whole process is dedicated to them for good: torch has one thread in
                each, and freed memory is kept. None leaves the process alone: one tile at a time, which torch's own
                threads share.
            precision: of the HGNs on a GPU: bfloat16 moves probabilities by hundredths; float32 switches TF32 off.

        Raises:
            UsageError: torch finds no such device, or bfloat16 is asked of a CPU.
        """
        self._executor = tile_executor(device, threads, precision)
        recipe = bundle.recipe
        self.recipe: Recipe = recipe
        self.digest = bundle.digest
        self.stage = bundle.stage
        networks = {name: build_network(name, recipe, weights) for name, weights in bundle.weights.items()}
        kinds = kinds_in(bundle.weights["hgn_half"])
        check_grading(recipe.grading, kinds, JUDGE in networks)
        check_judge(networks.get(JUDGE), kinds)
        for network in networks.values():
            network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            fold(network)
        self._hypotheses = {
            "hgn_1x": FlipAugmented(networks["hgn_1x"], recipe.detector.flips_1x),
            "hgn_half": FlipAugmented(networks["hgn_half"], recipe.detector.flips_half),
        }
        self._judge = networks.get(JUDGE)
        self._refiners = {name: as_run(networks[name], recipe) for name in REFINERS if name in networks}

    @classmethod
    def load(
        cls,
        model: str | Path = "lite",
        *,
        device: str = "cpu",
        threads: int | None = None,
        digest: str | None = None,
        precision: Precision = "float32",
    ) -> Detector:
        """Load what detection uses of a model: not `cls`, which `Detector(load_bundle(model))` has, too.

        Args:
            model: name of one that ships with the package, or the folder or URL of a bundle.
            device: where the networks run: cpu, cuda, cuda:1, ...
            threads: of the constructor, as `precision`; a process that only detects is fastest with one for each core.
            digest: that the model must have; None takes whichever is there.

        Raises:
            BundleError: the model is not there, damaged or another one.
            StoreError: the store of a URL does not answer.
        """
        bundle = load_bundle(model, networks=DETECTING, wanted=digest)
        return cls(bundle, device=device, threads=threads, precision=precision)

    def knowing(self, field: KnownField) -> Detector:
        """The detector of photographs of a known field."""
        known = copy.copy(self)
        known.recipe = replace(self.recipe, image=field.told(self.recipe.image))
        return known

    @property
    def looks_at_half_alone(self) -> bool:
        """Whether nothing but the 0.5x network has a say in its lesions."""
        config = self.recipe.detector
        return config.weight_1x == 0 and (self.stage != "prn" or config.weight_prn == 0)

    @property
    def refiners(self) -> tuple[Refiner, ...]:
        """The refinement networks that the bundle has."""
        return tuple(self._refiners)

    def detect(
        self, image: str | Path | bytes | UInt8[ndarray, "h w 3"], operating_point: OperatingPoint = "default"
    ) -> Detection:
        """Find the lesions of one photograph.

        Args:
            image: a path, encoded bytes, or upright RGB.
            operating_point: which of the places that are outlined are called: the sure ones, or all.

        Raises:
            ImageRefusedError: it cannot be scored; its `reason` is from the closed list.
            ImageFailedError: not_finite, where a network's answer is no number.
            FileNotFoundError: the path leads nowhere.
        """
        started = time.perf_counter()
        prepared = self.prepare(image)
        prepare_seconds = time.perf_counter() - started
        detection = self.segment(prepared, operating_point)
        return replace(detection, seconds={"prepare": prepare_seconds} | detection.seconds)

    def prepare(self, image: str | Path | bytes | UInt8[ndarray, "h w 3"]) -> Prepared:
        """The part before the networks: decode, find the FOV, bring to scale, enhance."""
        if isinstance(image, ndarray):
            return read_pixels(image, self.recipe.image)[0]
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        return read_bytes(data, self.recipe.image)[0]

    def segment(self, prepared: Prepared, operating_point: OperatingPoint = "default") -> Detection:
        """The networks, their fusion, and what follows; each network looks only where it can make a lesion.

        The hypothesis network at 0.5x, a quarter of the pixels, looks everywhere, that at 1x where it leaves the
        question open, and the PRN where both do.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "hgn"):
            kinds = self.kinds(prepared)
            half = _on_1x(kinds[0], prepared)
            if self.recipe.detector.weight_1x > 0:
                at_best = Maps(np.ones_like(half), half, None, None)
                one = self._one(prepared, self._undecided(prepared, at_best))
            else:
                one = np.zeros_like(half)
            maps = self._maps(one, half, kinds, prepared)
        if self.stage == "prn" and self.recipe.detector.weight_prn > 0:
            with _timed(seconds, "prn"):
                maps = self.refinements(prepared, maps, "prn", self._undecided(prepared, maps))
        with _timed(seconds, "lesions"):
            detection = self.decide(prepared, maps, operating_point)
        return replace(detection, seconds=seconds)

    def decide(self, prepared: Prepared, maps: Maps, operating_point: OperatingPoint = "default") -> Detection:
        """Fusion, the lesion table and the triage alone."""
        config, quality = self.recipe.detector, prepared.quality
        if operating_point == "sensitive":
            config = replace(config, least_score=0.0)
        grid, shape = prepared.grid, prepared.shape
        judged = None if maps.judged is None else grid.uncrop(upsample_half(maps.judged, prepared.fov_1x.shape), shape)
        smallest_px = config.min_area_px / grid.scale**2
        fused = grid.uncrop(maps.fused(config), shape)
        lesions, mask = find_lesions(fused, judged, smallest_px, prepared.fov, config)
        score, refer_at = maps.image_score, self.recipe.grading.refer_at
        todo = triage(len(lesions), score, refer_at, gradable=quality.gradable)
        return Detection(lesions, score, todo, mask, prepared.fov, quality, {}, operating_point)

    def maps(self, prepared: Prepared) -> Maps:
        """The probability maps of every stage, everywhere."""
        hypotheses = self.hypotheses(prepared)
        return self.refinements(prepared, hypotheses) if self.stage == "prn" else hypotheses

    def hypotheses(self, prepared: Prepared, *, half_alone: bool = False) -> Maps:
        """The maps of the two hypothesis networks alone, or of that at 0.5x: then the other's is 0."""
        kinds = self.kinds(prepared)
        half = _on_1x(kinds[0], prepared)
        one = np.zeros_like(half) if half_alone else self._one(prepared, prepared.fov_1x)
        return self._maps(one, half, kinds, prepared)

    def features(self, prepared: Prepared) -> dict[str, float]:
        """What the photograph's own answer follows from, by name."""
        kinds = self.kinds(prepared)
        return photograph_features(kinds, prepared.fov_half, self._judgements(kinds, prepared)[1])

    def _maps(self, one: Map, half: Map, kinds: Float32[ndarray, "k hh hw"], prepared: Prepared) -> Maps:
        """Those of the hypothesis networks, with what is said of the photograph and of the candidates."""
        grading, fov = self.recipe.grading, prepared.fov_half
        candidates, said = self._judgements(kinds, prepared)
        score = image_score(photograph_features(kinds, fov, said), grading) if grading.features else None
        return Maps(one, half, None, None, score, None if said is None else around(candidates, said, fov.shape))

    def _judgements(
        self, kinds: Float32[ndarray, "k hh hw"], prepared: Prepared
    ) -> tuple[Int64[ndarray, "n 2"], Float32[ndarray, "n"] | None]:
        """Where candidates are, and what the judge says of each; None without a judge."""
        if self._judge is None:
            return np.zeros((0, 2), np.int64), None
        candidates, said = judge_candidates(self._judge, kinds, prepared.enhanced_half, prepared.fov_half)
        return candidates, _finite(said, JUDGE)

    def _one(self, prepared: Prepared, needed: Bool[ndarray, "ch cw"]) -> Map:
        return self._hypothesis("hgn_1x", prepared.enhanced_1x, needed)[0]

    def kinds(self, prepared: Prepared) -> Float32[ndarray, "k hh hw"]:
        """The maps of all kinds of lesion that the 0.5x network tells apart, on its grid."""
        return self._hypothesis("hgn_half", prepared.enhanced_half, prepared.fov_half)

    def _hypothesis(
        self, name: str, enhanced: UInt8[ndarray, "h w 3"], needed: Bool[ndarray, "h w"]
    ) -> Float32[ndarray, "k h w"]:
        config = self.recipe.detector
        tiling = Tiling(needed.shape[0], needed.shape[1], config.tile_px, config.halo_px)
        return _finite(probability_maps(self._hypotheses[name], enhanced, needed, tiling, self._executor), name)

    def refinements(
        self,
        prepared: Prepared,
        hypotheses: Maps,
        network: Refiner = "prn",
        needed: Bool[ndarray, "ch cw"] | None = None,
    ) -> Maps:
        """All maps: the PRN runs once over the union of both regions of interest, its two maps are that within each.

        With `network` "cls" they are those of the PRN trained without triplet loss, in the PRN's place. They hold where
        `needed`, by default everywhere; elsewhere they may be lower than they should.
        """
        needed = prepared.fov_1x if needed is None else needed
        rois = self._regions(hypotheses)
        union = rois[0] | rois[1]
        if self.recipe.prn.scale == "1x":
            refined = self._refine(network, prepared.enhanced_1x, union & needed)
        else:  # a pixel at 1x is interpolated from the pixels at 0.5x that its neighbours lie in
            region = halved(union) & halved(grown(needed, 1))
            refined = upsample_half(self._refine(network, prepared.enhanced_half, region), union.shape)
        refined = scale_odds(refined, self.recipe.detector.prn_odds)
        return replace(hypotheses, prn_1x=refined * rois[0], prn_half=refined * rois[1])

    def _regions(self, hypotheses: Maps) -> tuple[Bool[ndarray, "ch cw"], Bool[ndarray, "ch cw"]]:
        config = self.recipe.detector
        return hypotheses.hgn_1x > config.roi_threshold_1x, hypotheses.hgn_half > config.roi_threshold_half

    def _undecided(self, prepared: Prepared, hypotheses: Maps) -> Bool[ndarray, "ch cw"]:
        """Pixels that may yet be part of a lesion, and those whose values it takes to say so."""
        config = self.recipe.detector
        regions = self._regions(hypotheses) if self.stage == "prn" else ()
        stack = hypotheses.stack()
        fusion = config.fusion, map_weights(config, len(stack) + len(regions))
        open_yet = can_reach(config.threshold, stack, regions, fusion)
        return grown(open_yet, prepared.grid.reach_px) & prepared.fov_1x

    def _refine(self, name: Refiner, enhanced: UInt8[ndarray, "h w 3"], roi: Bool[ndarray, "h w"]) -> Map:
        return _finite(refine_any(self._refiners[name], enhanced, roi, self._executor.tile_map), name)


def build_network(name: str, recipe: Recipe, weights: dict[str, Tensor]) -> nn.Module:
    """`hgn_1x`, `hgn_half`, `prn`, `cls` or `judge` of a recipe, with these weights.

    Raises:
        BundleError: they are of another network.
    """
    network: nn.Module
    if name in REFINERS:
        network = build_prn(recipe.prn)
    elif name == JUDGE:
        network = build_judge(weights)
    else:
        network = build_hgn(recipe.hgn_1x if name == "hgn_1x" else recipe.hgn_half, kinds_in(weights))
    load_weights(network, weights, name)
    return network


def _on_1x(half: Float32[ndarray, "hh hw"], prepared: Prepared) -> Map:
    return upsample_half(half, prepared.fov_1x.shape) * prepared.fov_1x


def _finite(probability: Float32[ndarray, "*s"], network: str) -> Float32[ndarray, "*s"]:
    """Maps as they are.

    Raises:
        ImageFailedError: not_finite. Any comparison with such a value is false: the photograph would pass as healthy.
    """
    if not np.isfinite(probability).all():
        detail = f"network {network} gave values that are no numbers; try another device or precision, or another model"
        raise ImageFailedError(Reason.NOT_FINITE, detail)
    return probability


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
