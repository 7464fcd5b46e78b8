"""Batch transforms: the arithmetic of normalisation."""

import pytest
import torch

from vit_train.data import Batch, Normalize

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def batch_of(images):
    ids = torch.arange(len(images))
    return Batch(images, ids, ids, torch.zeros_like(ids))


def test_normalize_is_exact_to_float32():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).clone()
    batch = batch_of(images)
    out, targets = Normalize(MEAN, STD)(batch, 0, 0)
    mean = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), (images.double() / 255 - mean) / std, atol=5e-7, rtol=0)
    assert targets is batch.targets
    assert images.dtype == torch.uint8


def test_normalize_has_nothing_to_save_and_moves():
    transform = Normalize(MEAN, STD)
    assert transform.state_dict() == {}
    assert {b.device.type for b in transform.to("meta").buffers()} == {"meta"}


def test_a_mean_without_its_std_is_refused():
    with pytest.raises(ValueError, match="one positive std for each mean"):
        Normalize(MEAN, (0.5,))
    with pytest.raises(ValueError, match="one positive std for each mean"):
        Normalize((0.5,), (0.0,))
