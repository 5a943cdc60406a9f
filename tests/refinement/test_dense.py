"""The PRN in shared computation answers at each lattice point what the strided network answers around it."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ma_cluster.images.patches import crop
from ma_cluster.refinement.dense import DensePrn, refine_dense
from ma_cluster.refinement.patchwise import Patchwise, refine
from ma_cluster.refinement.resnet import STRIDE, Prn

STRIDES = (1, 2, 4, 8, 16)
SEEN = 112  # pixels to each side of a position that its value in the last map may depend on, at most


@pytest.fixture(scope="module")
def network() -> Prn:
    """Untrained and thin, with batch norms that do something, and answers all over 0..1."""
    torch.manual_seed(0)
    model = Prn(width=1 / 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return _spread(model)


@pytest.fixture(scope="module")
def narrow(network: Prn) -> Prn:
    """A copy whose kernels see one position each: how a patch is padded cannot matter, only where positions lie."""
    model = copy.deepcopy(network)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            middle = module.kernel_size[0] // 2
            centre = module.weight.data[:, :, middle, middle].clone()
            module.weight.data.zero_()[:, :, middle, middle] = centre
    return _spread(model)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def roi():
    roi = np.zeros((70, 90), dtype=bool)
    roi[33:49, 21:37] = True
    roi[67:, 85:] = True  # to the last pixel: patches hang over the edge
    return roi


@pytest.mark.parametrize("patch_px", [32, 48])  # half a patch: a multiple of 16, and none
@pytest.mark.parametrize("stride_px", STRIDES)
def test_where_padding_cannot_matter_the_answer_is_the_patchwise_one(narrow, image, roi, patch_px, stride_px):
    dense = refine_dense(DensePrn(narrow, patch_px, stride_px), image, roi)
    reference = refine(Patchwise(narrow, patch_px, stride_px), image, roi)
    assert np.ptp(reference[roi]) > 0.1
    np.testing.assert_allclose(dense, reference, atol=1e-4)


@pytest.mark.parametrize("stride_px", STRIDES)
def test_a_lattice_point_gets_what_the_strided_network_says_of_its_patch_in_context(network, image, roi, stride_px):
    dense = refine_dense(DensePrn(network, 48, stride_px), image, roi)
    points = [(row, col) for row, col in np.argwhere(roi).tolist() if row % stride_px == 0 == col % stride_px]
    points = points[:: -(-len(points) // 8)]
    expected = [_in_context(network, image, row, col, 48) for row, col in points]
    np.testing.assert_allclose([dense[point] for point in points], expected, atol=1e-4)


@pytest.mark.parametrize("stride_px", STRIDES)
def test_the_shared_trunk_is_the_strided_one_shifted_and_stitched(network, stride_px):
    x, every, border = _noise(1, 256, 240), STRIDE // stride_px, SEEN // STRIDE
    with torch.inference_mode():
        woven = DensePrn(network, 32, stride_px).scores(x)
        assert woven.shape == (1, 1, (256 - 2 * SEEN) // stride_px, (240 - 2 * SEEN) // stride_px)
        for row, col in {(0, 0), (0, every - 1), (every // 2, 0), (every - 1, every // 2)}:
            phase = woven[..., row::every, col::every]
            shifted = _scores(network, x[..., row * stride_px :, col * stride_px :])[..., border:, border:]
            torch.testing.assert_close(phase, shifted[..., : phase.shape[2], : phase.shape[3]], atol=3e-4, rtol=0)


def test_lattices_agree_on_the_points_they_share(network, image):
    everywhere = np.zeros(image.shape[:2], dtype=bool)
    everywhere[16:33, 16:33] = True
    finest = refine_dense(DensePrn(network, 32, 1), image, everywhere)
    assert np.ptp(finest[everywhere]) > 0.05
    for stride_px in STRIDES[1:]:
        coarse = refine_dense(DensePrn(network, 32, stride_px), image, everywhere)
        shared = (slice(16, 33, stride_px),) * 2
        np.testing.assert_allclose(coarse[shared], finest[shared], atol=1e-4)


def test_the_answer_does_not_depend_on_how_tiles_fall(network):
    image = np.random.default_rng(1).integers(0, 256, (40, 600, 3), dtype=np.uint8)
    wide, cut = np.zeros((2, 40, 600), dtype=bool)
    wide[8:33, 8:593] = True  # more than one tile can hold
    cut[16:25, 472:553] = True  # across the border of two
    model = DensePrn(network, 32, 8)
    whole = refine_dense(model, image, wide)
    np.testing.assert_allclose(refine_dense(model, image, cut), whole * cut, atol=1e-5)
    assert whole[:, :8].max() == 0 < whole[wide].min()


def test_an_empty_region_costs_nothing_and_answers_nothing(network, image):
    assert not refine_dense(DensePrn(network, 32, 4), image, np.zeros(image.shape[:2], dtype=bool)).any()


@pytest.mark.parametrize(("patch_px", "stride_px"), [(32, 3), (32, 32), (32, 0), (40, 4), (0, 4)])
def test_a_lattice_that_does_not_meet_the_networks_is_refused(network, patch_px, stride_px):
    with pytest.raises(ValueError, match="patchwise"):
        DensePrn(network, patch_px, stride_px)


def test_the_network_that_was_copied_stays_as_it_was(network):
    before = copy.deepcopy(network)
    DensePrn(network, 32, 1)
    assert [module.stride for module in network.modules() if isinstance(module, nn.Conv2d)] == [
        module.stride for module in before.modules() if isinstance(module, nn.Conv2d)
    ]
    for name, value in network.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])


def _in_context(model: Prn, image: np.ndarray, row: int, col: int, patch_px: int) -> float:
    """The patch around a pixel, cut with all the context that its positions see, through the network as trained."""
    tile = crop(image, row, col, patch_px + 2 * SEEN, fill=128)
    first, side = SEEN // STRIDE, patch_px // STRIDE
    with torch.inference_mode():
        features = _trunk(model, (torch.from_numpy(tile).permute(2, 0, 1)[None].float() - 128) / 128)
        own = features[..., first : first + side, first : first + side]
        return torch.softmax(model.classify(own.mean(dim=(2, 3))), dim=1)[0, 1].item()


def _scores(model: Prn, x: Tensor) -> Tensor:
    """The difference of logits at each position of the last map."""
    logits = model.classify(_trunk(model, x).permute(0, 2, 3, 1))
    return (logits[..., 1] - logits[..., 0])[:, None]


def _trunk(model: Prn, x: Tensor) -> Tensor:
    return model.stages(model.stem(x))


def _spread(model: Prn) -> Prn:
    """Scale the head so that logits of noise differ by about 1 around 0."""
    with torch.no_grad():
        _, logits = model.eval()(_noise(64, 32, 32))
        scale = 1 / (logits[:, 1] - logits[:, 0]).std()
        model.classify.weight *= scale
        model.classify.bias.copy_((model.classify.bias - logits.mean(dim=0)) * scale)
    return model


def _noise(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
