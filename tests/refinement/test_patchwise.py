"""The PRN over a region of interest."""

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ma_cluster.images.patches import crop
from ma_cluster.refinement.patchwise import Patchwise, interpolate, lattice_nodes, refine
from ma_cluster.refinement.resnet import Prn


class CentreBrightness(nn.Module):
    """Stands where the network stands, and answers the red value of the patch's centre pixel as its logit."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "n 3 s s"]) -> tuple[Tensor, Tensor]:
        centre = x[:, 0, x.shape[2] // 2, x.shape[3] // 2]
        return centre[:, None], torch.stack([torch.zeros_like(centre), centre], dim=1)


@pytest.fixture
def ramp():
    rows, cols = np.indices((40, 50))
    return np.repeat((2 * rows + 3 * cols)[:, :, None], 3, axis=2).astype(np.uint8)


@pytest.fixture
def roi():
    roi = np.zeros((40, 50), dtype=bool)
    roi[5:20, 7:30] = True
    roi[39, 49] = True
    return roi


def test_each_pixel_of_the_region_gets_the_answer_of_the_patch_around_it(ramp, roi):
    answer = refine(Patchwise(CentreBrightness(), patch_px=16, stride_px=1), ramp, roi)
    expected = 1 / (1 + np.exp(-(ramp[:, :, 0].astype(float) - 128) / 128))
    assert np.abs(answer - expected * roi).max() < 1e-6


def test_a_stride_interpolates_between_answers(ramp, roi):
    exact = refine(Patchwise(CentreBrightness(), patch_px=16, stride_px=1), ramp, roi)
    coarse = refine(Patchwise(CentreBrightness(), patch_px=16, stride_px=4), ramp, roi)
    inner = roi.copy()
    inner[39, 49] = False  # beyond the last lattice point the grid ends, there is nothing to interpolate towards
    assert np.abs(coarse - exact)[inner].max() < 2e-3


def test_only_lattice_points_that_a_pixel_needs_are_computed():
    roi = np.zeros((9, 9), dtype=bool)
    roi[3, 4] = True
    nodes = lattice_nodes(roi, 2)
    assert sorted(map(tuple, np.argwhere(nodes))) == [(1, 2), (2, 2)]  # rows 2 and 4, column 4


def test_interpolation_is_exact_at_lattice_points():
    lattice = np.random.default_rng(0).random((5, 6), dtype=np.float32)
    assert (interpolate(lattice, (17, 21), 4)[::4, ::4] == lattice).all()


def test_the_network_sees_what_crop_cuts():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    roi = np.zeros((40, 40), dtype=bool)
    roi[2, 37] = True
    torch.manual_seed(0)
    model = Prn(width=1 / 8).eval()
    patch = torch.from_numpy(crop(image, 2, 37, 32, fill=128)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        _, logits = model((patch.float() - 128) / 128)
    alone = torch.sigmoid(logits[0, 1] - logits[0, 0]).item()
    assert refine(Patchwise(model, patch_px=32, stride_px=1), image, roi)[2, 37] == pytest.approx(alone, abs=1e-6)
