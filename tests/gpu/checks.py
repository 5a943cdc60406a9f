"""What must hold of a device, as plain functions of its name: under pytest in test_gpu.py, without it in prove.py.

Each raises AssertionError where it does not hold, and returns what it measured. On a CPU the two sides of a comparison
are the same code, which tries the check itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from fundus_set import rich_recipe, rich_set
from untrained import untrained_bundle

from ma_cluster.bundle import Bundle, load_bundle
from ma_cluster.config import HgnConfig, lite
from ma_cluster.errors import ImageFailedError, Reason
from ma_cluster.hypotheses.frrn import build_hgn
from ma_cluster.hypotheses.hgn_training import HgnBatch, hgn_losses
from ma_cluster.images.annotated import Annotated, changed, cut, draw_cuts
from ma_cluster.images.device_patches import DevicePatches
from ma_cluster.images.sample import enlarged_sample, retina
from ma_cluster.lesions.detector import Detector
from ma_cluster.refinement.resnet import build_prn
from ma_cluster.report.detections import detect_files
from ma_cluster.storage.store import open_store
from ma_cluster.training.run import TrainRequest
from ma_cluster.training.start import train_local

Figures = dict[str, Any]


def float32_maps_are_the_cpus(device: str) -> Figures:
    """`lite` at 0.5x over a whole photograph: probabilities within a thousandth."""
    return _maps(device, "float32", within=1e-3)


def bfloat16_maps_are_near_the_cpus(device: str) -> Figures:
    """999 of a thousand pixels within 0.05. A CPU has no bfloat16 detector."""
    if device == "cpu":
        return {"skipped": "a CPU has no bfloat16 detector"}
    return _maps(device, "bfloat16", within=0.05)


def _maps(device: str, precision: Any, within: float) -> Figures:
    bundle = load_bundle("lite", networks=("hgn_1x", "hgn_half", "judge"))
    bundle = replace(bundle, recipe=replace(bundle.recipe, detector=replace(bundle.recipe.detector, flips_half=1)))
    here, there = Detector(bundle), Detector(bundle, device=device, precision=precision)
    prepared = here.prepare(retina())
    ours, theirs = here.kinds(prepared), there.kinds(prepared)
    off = np.abs(ours - theirs)
    figures = {"largest": float(off.max()), "quantile_0.999": float(np.quantile(off, 0.999))}
    assert figures["largest" if precision == "float32" else "quantile_0.999"] <= within, figures
    masks = [each.segment(prepared, "sensitive").mask for each in (here, there)]
    both, either = (int(of(*masks).sum()) for of in (np.logical_and, np.logical_or))
    figures |= {"outlined_by_both": both, "outlined_by_either": either}
    assert both >= (0.99 if precision == "float32" else 0.8) * either, figures
    return figures


def refinement_maps_are_the_cpus(device: str) -> Figures:
    """The untrained refinement, patch by patch and dense: within a thousandth."""
    figures = {}
    for dense in (False, True):
        bundle = _with_refinement(dense)
        here, there = Detector(bundle), Detector(bundle, device=device)
        prepared = here.prepare(retina()[::3, ::3].copy())
        ours, theirs = here.maps(prepared), there.maps(prepared)
        off = max(float(np.abs(a - b).max()) for a, b in zip(ours.stack(), theirs.stack(), strict=True))
        figures["dense" if dense else "patch by patch"] = off
        assert off <= 1e-3, figures
    return figures


def _with_refinement(dense: bool) -> Bundle:
    bundle = untrained_bundle()
    detector = replace(bundle.recipe.detector, roi_threshold_1x=0.6, roi_threshold_half=0.6, prn_dense=dense)
    recipe = replace(bundle.recipe, detector=detector)
    torch.manual_seed(0)
    return Bundle(recipe, bundle.weights | {"prn": build_prn(recipe.prn).state_dict()}, "untrained")


def nan_is_caught(device: str) -> Figures:
    """One weight that overflows is an error, not a healthy eye."""
    detector = Detector(untrained_bundle(), device=device)
    with torch.no_grad():
        next(detector._hypotheses["hgn_half"].parameters()).fill_(float("inf"))
    try:
        detector.detect(retina()[::3, ::3].copy())
    except ImageFailedError as error:
        assert error.reason is Reason.NOT_FINITE
        return {"reason": str(error.reason)}
    raise AssertionError("a network of infinite weights passed")


def several_photographs_in_flight_are_answered_as_one_at_a_time(device: str) -> Figures:
    detector = Detector(untrained_bundle(), device=device)
    with TemporaryDirectory() as folder:
        images = [Path(folder, f"{number}.jpg") for number in range(6)]
        for image in images:
            image.write_bytes(enlarged_sample(400 + 40 * int(image.stem))[0])
        for name, in_flight in (("one", 1), ("many", 3)):
            outcomes = list(detect_files(detector, images, open_store(f"{folder}/{name}"), "default", in_flight))
            assert [outcome.name for outcome in outcomes] == [image.name for image in images]
        for image in images:
            one, many = (Path(folder, name, f"{image.stem}_mask.png").read_bytes() for name in ("one", "many"))
            assert one == many, image.name
    return {"photographs": len(images)}


def patches_are_those_cut_on_the_cpu(device: str) -> Figures:
    """All of `lite`'s augmentation but the noise."""
    rng = np.random.default_rng(1)
    eye = retina()[:800, :700].copy()
    marks = (rng.random(eye.shape[:2]) < 0.01).astype(np.uint8)
    photograph = Annotated(eye, np.ones(marks.shape, bool), marks > 0, kinds=marks)
    centres = np.column_stack([np.zeros(32), rng.integers(0, 800, 32), rng.integers(0, 700, 32)]).astype(np.int32)
    config = replace(lite().hgn_half, noise_share=0.0)
    cuts = changed(draw_cuts(centres, rng, config.colour_jitter), rng, config)
    patches, lesions = cut([photograph], cuts, 256)
    there = DevicePatches([photograph], torch.device(device))
    found, found_marks = (part.cpu().numpy() for part in there.cut(cuts, 256))
    off = np.abs(found.astype(int) - patches)
    same = int((found_marks & lesions > 0).sum()) / max(1, int((found_marks | lesions > 0).sum()))
    figures = {"mean_grey_levels": float(off.mean()), "quantile_0.999": float(np.quantile(off, 0.999)), "marks": same}
    assert figures["mean_grey_levels"] < 0.6 and figures["quantile_0.999"] <= 6 and same > 0.9, figures
    return figures


def a_step_of_training_is_the_cpus(device: str) -> Figures:
    """Losses and the gradient of a mini-batch in float32 within a hundredth, in bfloat16 within a tenth."""
    torch.manual_seed(3)
    config = HgnConfig(width=1 / 4, kinds=("MA", "HE", "EX", "SE"))
    network = build_hgn(config, 4)
    batch = HgnBatch(torch.randint(0, 255, (4, 3, 96, 96), dtype=torch.uint8), torch.rand(4, 4, 96, 96).lt(0.02))
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        wanted = _step(network, batch, config, "cpu", torch.float32)
        figures = {}
        for name, dtype, within in (("float32", torch.float32, 0.01), ("bfloat16", torch.bfloat16, 0.1)):
            found = _step(network, batch, config, device, dtype)
            figures[name] = max(abs(found[key] - wanted[key]) / abs(wanted[key]) for key in wanted)
            assert figures[name] <= within, (figures, wanted, found)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return figures


def _step(network: Any, batch: HgnBatch, config: HgnConfig, device: str, dtype: torch.dtype) -> dict[str, float]:
    model = build_hgn(config, 4)
    model.load_state_dict(network.state_dict())
    model.to(device).to(memory_format=torch.channels_last)
    losses = hgn_losses(model, batch, config, dtype=dtype)
    losses.total.backward()
    squares = [parameter.grad.float().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return {name: value.item() for name, value in losses.values().items()} | {"gradient": sum(squares).sqrt().item()}


def a_training_is_the_cpus(device: str) -> Figures:
    """Four steps of all that the training of `lite` does, patches cut on the device: losses within a fifth."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        request = TrainRequest(
            network="hgn_half", out=f"{folder}/run", recipe=rich_recipe(), epoch_steps=2, **rich_set(root)
        )
        there = train_local(request, device)
        here = there if device == "cpu" else train_local(replace(request, out=f"{folder}/cpu"))
        figures = {"losses": [epoch.losses["total"] for epoch in there.epochs]}
        for ours, theirs in zip(here.epochs, there.epochs, strict=True):
            assert abs(theirs.losses["total"] / ours.losses["total"] - 1) < 0.2, (ours, theirs)
    return figures


def a_run_by_the_clock_ends_in_time_and_saves_what_it_learnt(device: str) -> Figures:
    with TemporaryDirectory() as folder:
        config = replace(rich_recipe(), hgn_half=replace(rich_recipe().hgn_half, steps=100_000))
        request = TrainRequest(
            network="hgn_half", out=f"{folder}/run", recipe=config, minutes=0.1, **rich_set(Path(folder))
        )
        began = time.monotonic()
        result = train_local(request, device)
        figures = {"seconds": time.monotonic() - began, "steps": result.epochs[-1].step}
        assert 0 < figures["steps"] < 100_000, figures
        assert Path(result.best).is_file()
    return figures


CHECKS: tuple[Callable[[str], Figures], ...] = (
    patches_are_those_cut_on_the_cpu,
    a_step_of_training_is_the_cpus,
    a_training_is_the_cpus,
    a_run_by_the_clock_ends_in_time_and_saves_what_it_learnt,
    nan_is_caught,
    float32_maps_are_the_cpus,
    bfloat16_maps_are_near_the_cpus,
    refinement_maps_are_the_cpus,
    several_photographs_in_flight_are_answered_as_one_at_a_time,
)
