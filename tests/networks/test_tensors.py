"""From logits to probabilities."""

from __future__ import annotations

import pytest
import torch

from ma_cluster.networks.tensors import probability


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_overflow_in_any_precision_is_no_certainty(dtype: torch.dtype) -> None:
    logits = (torch.tensor([0.0, 200.0, -200.0], dtype=dtype) * torch.finfo(dtype).max).float()
    assert not torch.isfinite(probability(logits)[1:]).any()
    assert not torch.isfinite(probability(logits - logits[1])).any(), "infinity less infinity"


def test_a_finite_logit_has_its_sigmoid() -> None:
    logits = torch.linspace(-80, 80, 33)
    assert torch.equal(probability(logits), torch.sigmoid(logits))
