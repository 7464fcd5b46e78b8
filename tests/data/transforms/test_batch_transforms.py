"""Batch transforms: the same pixels as torchvision's, one image at a time, with the same parameters."""

import math

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as one

from vit_train.data import Batch
from vit_train.data.transforms.batch_transforms import (
    BOX_DRAWS,
    Augment,
    Normalize,
    cutmix,
    erase,
    random_boxes,
    resized_crop,
    shift_flip,
)
from vit_train.rng import uniform

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def pictures(number, side=32, seed=0):
    """Smooth and noisy ones, as photographs are both."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, side // 4, side // 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    noise = torch.randn(number, 3, side, side, generator=generator) * 20
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def batch_of(images, index=None):
    ids = torch.arange(len(images)) if index is None else index
    return Batch(images, ids % 10, ids, torch.zeros_like(ids))


def made(**settings):
    return Augment(MEAN, STD, **{"seed": 0, "num_classes": 10, **settings})


# ------------------------------------------------------------------------------------------------- normalising
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


# ---------------------------------------------------------------------------------------- as torchvision's do
@pytest.mark.parametrize("most", [0, 4])
def test_shift_and_flip(most):
    images = pictures(40)
    down, right = torch.randint(-most, most + 1, (2, 40))
    flip = torch.rand(40) < 0.5
    out = shift_flip(images, down, right, flip, most=most)
    for image, y, x, mirrored, result in zip(images, down.tolist(), right.tolist(), flip.tolist(), out):
        expected = one.crop(one.pad(image, [most] * 4), most - y, most - x, 32, 32)
        assert torch.equal(result, one.horizontal_flip(expected) if mirrored else expected)


@pytest.mark.parametrize("side", [32, 48])
def test_resized_crop(side):
    number = 60
    images, flip = pictures(number, side), torch.rand(number) < 0.5
    draws = torch.rand(number, BOX_DRAWS)
    boxes = random_boxes(draws, (side, side), (0.08, 1.0), (3 / 4, 4 / 3), erased=False)
    out = resized_crop(images, boxes, flip)
    worst = 0.0
    for image, box, mirrored, result in zip(images, boxes.tolist(), flip.tolist(), out):
        expected = one.resized_crop(
            image.float(), *box, [side, side], InterpolationMode.BICUBIC, antialias=True
        ).clamp(0, 255)
        expected = one.horizontal_flip(expected) if mirrored else expected
        worst = max(worst, (result - expected).abs().max().item())
    assert worst < 0.01  # of 255


def test_the_whole_image_as_crop_is_the_image():
    images = pictures(3)
    whole = torch.tensor([[0, 0, 32, 32]]).expand(3, 4)
    assert torch.allclose(
        resized_crop(images, whole, torch.zeros(3, dtype=torch.bool)), images.float(), atol=1e-3
    )


def test_erase():
    images, colours = torch.randn(20, 3, 32, 32), torch.randn(20, 3)
    boxes = random_boxes(torch.rand(20, BOX_DRAWS), (32, 32), (0.02, 1 / 3), (0.3, 1 / 0.3), erased=True)
    boxes[::2] = 0
    out = erase(images, boxes, colours)
    for image, (top, left, height, width), colour, result in zip(images, boxes.tolist(), colours, out):
        value = colour[:, None, None]
        assert torch.equal(result, one.erase(image, top, left, height, width, value))
    assert torch.equal(out[0], images[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("y", "x"), [(0.5, 0.5), (0.05, 0.98)])
def test_cutmix_says_how_much_of_an_image_stays(share, y, x):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    mixed, stays = cutmix(images, share, y, x)
    for i in range(4):
        assert (mixed[i] == i).float().mean().item() == pytest.approx(stays)
        assert (mixed[i] == 3 - i).float().mean().item() == pytest.approx(1 - stays)
    if (y, x) == (0.5, 0.5):
        assert stays == pytest.approx(share, abs=0.05)
    else:
        assert stays >= share - 0.05  # what sticks out is cut


# ---------------------------------------------------------------------------------------------------- the draws
def test_boxes_lie_in_the_image_and_cover_what_they_should():
    boxes = random_boxes(torch.rand(20_000, BOX_DRAWS), (24, 32), (0.2, 0.5), (1 / 2, 2), erased=False)
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 24).all()
    assert (left + width <= 32).all()
    assert (top + height).max() == 24
    assert (left + width).max() == 32
    share = (height * width) / (24 * 32)
    assert 0.18 < share.min() < 0.21
    assert 0.48 < share.max() < 0.54
    assert share.mean().item() == pytest.approx(0.35, abs=0.01)


def test_uniform_numbers_are_uniform_and_independent():
    index = torch.arange(100_000)
    numbers = uniform(index, torch.zeros_like(index), 4, 0, "augment", 0).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.stack([torch.histc(column, 100, 0, 1) for column in numbers.T])
    assert ((counts - 1000) ** 2 / 1000).sum(1).max() < 99 + 5 * math.sqrt(2 * 99)  # chi-squared, 5 sigma
    others = uniform(index, torch.ones_like(index), 4, 0, "augment", 0).double()
    epochs = uniform(index, torch.zeros_like(index), 4, 0, "augment", 1).double()
    columns = torch.cat([numbers, others, epochs, numbers.roll(1, 0)], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(16)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)


def test_draws_depend_on_the_sample_and_not_on_its_batch():
    images = pictures(64)
    settings = {"max_shift": 0.125, "hflip_prob": 0.5, "erase_prob": 0.5}
    whole, _ = made(**settings)(batch_of(images), 3, 0)
    order = torch.randperm(64)[:20]
    part, _ = made(**settings)(batch_of(images[order], order), 3, 99)
    assert torch.equal(part, whole[order])
    again, _ = made(**settings)(batch_of(images), 4, 0)
    assert sum(torch.equal(a, b) for a, b in zip(whole, again)) < 10
    repeat = batch_of(images)._replace(draw=torch.ones(64, dtype=torch.int64))
    assert sum(torch.equal(a, b) for a, b in zip(whole, made(**settings)(repeat, 3, 0)[0])) < 10
    assert not torch.equal(whole, made(**settings, seed=1)(batch_of(images), 3, 0)[0])


def test_each_probability_and_range_is_met():
    images = torch.full((20_000, 1, 8, 8), 255, dtype=torch.uint8)
    images[:, :, :, :4] = 51
    only = Augment((0.0,), (1.0,), seed=0, num_classes=10, hflip_prob=0.3)
    flipped = only(batch_of(images), 0, 0)[0][:, 0, 0, 0] > 0.5
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.015)
    shifts = Augment((0.0,), (1.0,), seed=0, num_classes=10, max_shift=0.25)
    out = shifts(batch_of(torch.full_like(images, 255)), 0, 0)[0]
    rows = out[:, 0].amax(2).sum(1)  # 8 less the shift
    counts = torch.bincount(rows.round().long())
    assert counts[:6].tolist() == [0] * 6
    assert (counts[6:] / 20_000).tolist() == pytest.approx([2 / 5, 2 / 5, 1 / 5], abs=0.015)
    erased = Augment((0.0,), (1.0,), seed=0, num_classes=10, erase_prob=0.25)(batch_of(images), 0, 0)[0]
    changed = (erased - images / 255).flatten(1).abs().amax(1) > 1e-5
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.015)


def test_crops_stand_in_place_of_shifts():
    batch = batch_of(pictures(5))
    crops = made(crop_scale=(0.5, 1.0))
    assert torch.equal(made(crop_scale=(0.5, 1.0), max_shift=0.1)(batch, 0, 0)[0], crops(batch, 0, 0)[0])


def test_nothing_on_is_normalize():
    batch = batch_of(pictures(5))
    assert torch.equal(made()(batch, 0, 0)[0], Normalize(MEAN, STD)(batch, 0, 0)[0])


# ------------------------------------------------------------------------------------------------------ mixing
def test_mixup_mixes_images_and_targets_alike():
    batch = batch_of(pictures(6))
    plain, _ = made()(batch, 0, 0)
    images, targets = made(mixup_alpha=0.8)(batch, 0, 7)
    share = targets[0, 0].item()
    assert 0 < share < 1
    assert torch.allclose(images, share * plain + (1 - share) * plain.flip(0), atol=1e-5)
    assert targets.shape == (6, 10)
    assert torch.allclose(targets.sum(1), torch.ones(6))
    assert targets[0, 5].item() == pytest.approx(1 - share)


def test_mixing_is_a_function_of_seed_and_step():
    batch = batch_of(pictures(6))
    augment = made(mixup_alpha=0.8, cutmix_alpha=1.0)
    first = augment(batch, 0, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, augment(batch, 0, 7)))
    assert not torch.equal(first[1], augment(batch, 0, 8)[1])


def test_the_switch_the_probability_and_the_end_of_mixing():
    batch = batch_of(torch.arange(2, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32) * 200)
    augment = made(mixup_alpha=1.0, cutmix_alpha=1.0, mix_prob=0.6, mix_switch_prob=0.25, mix_off_epoch=5)
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for step in range(1000):
        images, targets = augment(batch, 0, step)
        colours = len(images[0, 0].unique())
        kinds["none" if targets.ndim == 1 else "mixup" if colours == 1 else "cutmix"] += 1
    # a rectangle without any pixel, or of all, looks like mixup here
    assert kinds["none"] == pytest.approx(400, abs=60)
    assert kinds["cutmix"] == pytest.approx(150, abs=50)
    always = made(mixup_alpha=1.0, mix_off_epoch=5)
    assert [always(batch, epoch, 3)[1].ndim for epoch in (0, 3, 4, 5)] == [2, 2, 1, 1]
