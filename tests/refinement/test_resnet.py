"""The patch refinement network is ResNet-50 without its max-pool."""

import torch

from ma_cluster.refinement.resnet import STRIDE, Prn


def test_full_width_has_the_parameters_of_resnet_50_with_a_head_of_two_classes():
    # ResNet-50 without its head: 23,508,032; linear 2048 -> 2: 4,098
    assert sum(p.numel() for p in Prn().parameters()) == 23_508_032 + 4_098


def test_embedding_is_a_mean_of_2048_values_that_are_never_negative():
    model = Prn().eval()
    with torch.inference_mode():
        embedding, logits = model(torch.randn(2, 3, 32, 32))
    assert embedding.shape == (2, 2048)
    assert logits.shape == (2, 2)
    assert embedding.min() >= 0


def test_overall_stride_is_16():
    model = Prn(width=1 / 8)
    with torch.inference_mode():
        features = model.stages(model.stem(torch.zeros(1, 3, 128, 64)))
    assert features.shape[2:] == (128 // STRIDE, 64 // STRIDE)


def test_the_embedding_leaves_the_context_out_of_the_mean_but_convolutions_see_it() -> None:
    torch.manual_seed(0)
    alone, wide = Prn(1 / 16).eval(), Prn(1 / 16, context=1).eval()
    wide.load_state_dict(alone.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        last = alone.stages(alone.stem(x))
        assert torch.allclose(wide(x)[0], last[:, :, 1:3, 1:3].mean(dim=(2, 3)), atol=1e-6)
        assert not torch.allclose(wide(x)[0], alone(x[:, :, 16:48, 16:48])[0], atol=1e-3)
