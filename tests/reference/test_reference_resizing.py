"""Resizing, cropping, mixing and normalising on odd sizes against Pillow, torchvision and formulas in float64.

`bicubic` below is Keys' kernel (1981) with a = -0.5, widened where the picture shrinks, written as a matrix: what Pillow
documents as BICUBIC with antialiasing. A uint8 result may differ from it by its own rounding (0.5) and by that of the
picture between the two directions (0.5, times the 1.25 that the kernel's absolute values sum to), and by weights in 16
bits: 1.3 levels in all, as long as no value between is cut at black or white. Pictures here leave room for that.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as one

from vit_train.data import Batch
from vit_train.data.transforms.batch_transforms import (
    Augment,
    Normalize,
    cutmix,
    erase,
    resized_crop,
    shift_flip,
)
from vit_train.data.transforms.sample_transforms import plain, seen_box
from vit_train.data.transforms.sample_transforms import resized_crop as sample_crop
from vit_train.data.transforms.stats import channel_stats

LEVELS = 1.3
BICUBIC = v2.InterpolationMode.BICUBIC


def bicubic(first, last, side, number):
    """(number, side): how much pixel j of `side` counts in pixel i of `number`, which show [first, last)."""
    step = (last - first) / number
    width = max(step, 1.0)
    centre = first + (np.arange(number) + 0.5) * step
    pixel = np.arange(side)
    x = np.abs(pixel + 0.5 - centre[:, None]) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def resized(pixels, height, width):
    """float64 (..., height, width) of (..., H, W)."""
    down = bicubic(0, pixels.shape[-2], pixels.shape[-2], height)
    across = bicubic(0, pixels.shape[-1], pixels.shape[-1], width)
    return down @ pixels.astype(np.float64) @ across.T


def noise(size, channels, seed):
    """uint8 (C, H, W) of any value that leaves room for overshoot; the finest grain there is."""
    width, height = size
    return np.random.default_rng(seed).integers(64, 192, (channels, height, width), dtype=np.uint8)


def as_image(pixels):
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


SIDES = st.one_of(st.integers(1, 20), st.integers(20, 150))
SIZES = st.tuples(SIDES, SIDES)
OUTPUTS = st.sampled_from([1, 3, 7, 24, 31, 63, 64, 65, 75])
CHANNELS = st.sampled_from([1, 3])
SEEDS = st.integers(0, 2**32 - 1)


# ------------------------------------------------------------------------------------------------ evaluation
def shown(img_size):
    """What the shorter side is scaled to."""
    return round(img_size / 0.875) if img_size >= 64 else img_size


@given(SIZES, OUTPUTS, CHANNELS, SEEDS)
@settings(max_examples=150)
def test_squash(size, img_size, channels, seed):
    pixels = noise(size, channels, seed)
    found = plain(img_size, resize="squash")(as_image(pixels)).numpy()
    assert (found.shape, found.dtype) == ((channels, img_size, img_size), np.uint8)
    assert np.abs(found - resized(pixels, img_size, img_size)).max() <= LEVELS
    pillow = np.asarray(as_image(pixels).resize((img_size, img_size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - pillow.reshape(img_size, img_size, channels).transpose(2, 0, 1)).max() <= 2


@given(SIZES, OUTPUTS, CHANNELS, SEEDS)
@settings(max_examples=150)
def test_crop(size, img_size, channels, seed):
    """The shorter side scaled, the longer one with it (torchvision cuts it to whole pixels), the middle of it."""
    pixels, short = noise(size, channels, seed), shown(img_size)
    width, height = (int(short * side / min(size)) for side in size)
    left, top = (round((side - img_size) / 2) for side in (width, height))
    found = plain(img_size, resize="crop")(as_image(pixels)).numpy()
    assert (found.shape, found.dtype) == ((channels, img_size, img_size), np.uint8)
    if max(size) > 16 * min(size):  # the ends are cut off first, which moves the pixels by a part of one
        return
    whole = resized(pixels, height, width)
    assert np.abs(found - whole[:, top : top + img_size, left : left + img_size]).max() <= LEVELS


OBLONG = st.builds(
    lambda short, times, more, turned: (short * times + more, short)[:: -1 if turned else 1],
    st.integers(1, 5),
    st.integers(16, 40),
    st.integers(0, 4),
    st.booleans(),
)


@given(st.one_of(SIZES, OBLONG), OUTPUTS, st.sampled_from(["crop", "squash"]), CHANNELS, SEEDS)
@settings(max_examples=200)
def test_the_box_that_is_said_to_be_seen_is_seen(size, img_size, resize, channels, seed):
    """Also of pictures so oblong that their ends are cut off before anything is scaled: the box is in their middle."""
    pixels = noise(size, channels, seed)
    found = plain(img_size, resize=resize)(as_image(pixels)).numpy()
    left, top, right, bottom = seen_box(*size, img_size=img_size, resize=resize)
    down, across = bicubic(top, bottom, size[1], img_size), bicubic(left, right, size[0], img_size)
    assert np.abs(found - down @ pixels.astype(np.float64) @ across.T).max() <= LEVELS
    for start, end, side in ((left, right, size[0]), (top, bottom, size[1])):
        # whole pixels are cut from the scaled picture: half of one, of which each is (end - start) / img_size
        assert abs((start + end) / 2 - side / 2) <= (end - start) / img_size / 2 + 1e-9


# ------------------------------------------------------------------------------------- training, on the CPU
@given(
    size=SIZES,
    img_size=OUTPUTS,
    channels=CHANNELS,
    scale=st.sampled_from([(0.08, 1.0), (0.35, 0.4), (1.0, 1.0)]),
    ratio=st.sampled_from([(0.75, 1.3333), (1.0, 1.0), (0.3, 3.0)]),
    seed=SEEDS,
)
@settings(max_examples=100)
def test_random_crops_are_torchvisions(size, img_size, channels, scale, ratio, seed):
    """The part that its own transform takes of the picture with the same seed, and that part scaled."""
    pixels = noise(size, channels, seed)
    torch.manual_seed(seed)
    found = sample_crop(img_size, scale=scale, ratio=ratio)(as_image(pixels)).numpy()
    torch.manual_seed(seed)
    theirs = v2.RandomResizedCrop(img_size, scale=scale, ratio=ratio, interpolation=BICUBIC, antialias=True)
    expected = one.pil_to_tensor(theirs(as_image(pixels))).numpy().astype(int)
    assert (found.shape, found.dtype) == ((channels, img_size, img_size), np.uint8)
    assert np.abs(found - expected).max() <= 2
    torch.manual_seed(seed)
    part = theirs.make_params([as_image(pixels)])
    rows, columns = (slice(part[a], part[a] + part[b]) for a, b in (("top", "height"), ("left", "width")))
    assert np.abs(found - resized(pixels[:, rows, columns], img_size, img_size)).max() <= LEVELS


# ----------------------------------------------------------------------------------- training, on the device
@st.composite
def batches(draw):
    """uint8 (B, C, H, W), and what draws the rest."""
    shape = tuple(draw(st.integers(1, most)) for most in (5, 4, 37, 37))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8), generator


def boxes_in(images, generator):
    """(B, 4) int64: a box of any size within each image, the smallest and the whole included."""
    (b, _, *sides), boxes = images.shape, []
    for side in sides:
        length = torch.randint(1, side + 1, (b,), generator=generator)
        first = (torch.rand(b, generator=generator) * (side - length + 1)).long()
        boxes.append((first, length))
    return torch.stack([boxes[0][0], boxes[1][0], boxes[0][1], boxes[1][1]], 1)


@given(batches(), st.booleans())
@settings(max_examples=150)
def test_crops_of_a_batch(batch, in_place):
    """Against the formula to a thousandth of a level, and torchvision in float32 to a hundredth."""
    images, generator = batch
    boxes = boxes_in(images, generator)
    if in_place:
        boxes = torch.tensor([[0, 0, *images.shape[-2:]]]).expand(len(images), 4)
    flip = torch.rand(len(images), generator=generator) < 0.5
    found = resized_crop(images, boxes, flip)
    size = list(images.shape[-2:])
    for image, box, mirrored, result in zip(images, boxes.tolist(), flip.tolist(), found):
        top, left, height, width = box
        part = image[:, top : top + height, left : left + width].numpy()
        expected = torch.from_numpy(resized(part, *size)).clamp(0, 255)
        torchvisions = one.resized_crop(image.float(), *box, size, BICUBIC, antialias=True).clamp(0, 255)
        if mirrored:
            expected, torchvisions = expected.flip(-1), torchvisions.flip(-1)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-3)
        if size[1] > 1:  # torch 2.14 gives every row of a picture one pixel wide the value of the first
            torch.testing.assert_close(result, torchvisions, rtol=0, atol=1e-2)


@given(batches(), st.integers(0, 40))
@settings(max_examples=100)
def test_shifts_of_a_batch(batch, most):
    """Farther than the picture is wide, too."""
    images, generator = batch
    (b, _, h, w) = images.shape
    down, right = torch.randint(-most, most + 1, (2, b), generator=generator)
    flip = torch.rand(b, generator=generator) < 0.5
    found = shift_flip(images, down, right, flip, most=most)
    assert found.dtype == torch.uint8
    for image, y, x, mirrored, result in zip(images, down.tolist(), right.tolist(), flip.tolist(), found):
        expected = np.zeros(image.shape, dtype=np.uint8)
        for row in range(max(0, y), min(h, h + y)):
            for column in range(max(0, x), min(w, w + x)):
                expected[:, row, column] = image[:, row - y, column - x]
        assert np.array_equal(result, expected[..., ::-1] if mirrored else expected)


@given(batches(), st.booleans())
def test_rectangles_painted_over(batch, nothing):
    images, generator = batch
    boxes = boxes_in(images, generator) * (0 if nothing else 1)
    colours = torch.randn(images.shape[:2], generator=generator)
    found = erase(images.float(), boxes, colours)
    for image, box, colour, result in zip(images.float(), boxes.tolist(), colours, found):
        assert torch.equal(result, one.erase(image, *box, colour[:, None, None]))


@given(batches(), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100)
def test_cutmix(batch, share, y, x):
    """The box of the paper's algorithm: cut out around (x, y), its sides sqrt(1 - share) of the image's."""
    images, _ = batch
    mixed, stays = cutmix(images, share, y, x)
    h, w = images.shape[-2:]
    edges = [(centre - np.sqrt(1 - share) / 2, centre + np.sqrt(1 - share) / 2) for centre in (y, x)]
    rows, columns = (
        [round(side * float(np.clip(edge, 0, 1))) for edge in pair] for pair, side in zip(edges, (h, w))
    )
    expected = images.numpy().copy()
    part = (slice(None), slice(None), slice(*rows), slice(*columns))
    expected[part] = images.numpy()[::-1][part]
    assert np.array_equal(mixed, expected)
    assert stays == pytest.approx(1 - (rows[1] - rows[0]) * (columns[1] - columns[0]) / (h * w), abs=1e-12)


@given(
    batches(), st.sampled_from(["mixup", "cutmix"]), st.floats(0.1, 3), st.integers(0, 99), st.integers(1, 9)
)
@settings(max_examples=100)
def test_targets_are_mixed_as_the_pictures_are(batch, kind, alpha, step, classes):
    """The share of a picture's own pixels, found again from the pictures, is that of its class; odd batches have a
    middle one, which is mixed with itself."""
    images, generator = batch
    b, channels = images.shape[:2]
    targets, index = torch.randint(classes, (b,), generator=generator), torch.arange(b)
    transform = Augment(
        (0.0,) * channels, (1.0,) * channels, seed=3, num_classes=classes, **{f"{kind}_alpha": alpha}
    )
    mixed, probabilities = transform(Batch(images, targets, index, torch.zeros_like(index)), 0, step)
    own, other = images.double() / 255, images.flip(0).double() / 255
    differs = own != other
    if kind == "mixup":
        shares = ((mixed.double() - other) / (own - other))[differs]
        share = float(shares.median()) if len(shares) else None
        if share is not None:
            torch.testing.assert_close(mixed.double(), share * own + (1 - share) * other, rtol=0, atol=2e-5)
    else:
        changed = torch.where(differs, (mixed.double() - own).abs() > 1e-5, torch.zeros_like(differs))
        share = 1 - float(changed[:, 0].sum() / differs[:, 0].sum()) if differs[:, 0].all() else None
    expected = torch.eye(classes)[targets]
    if share is not None:
        expected = share * expected + (1 - share) * expected.flip(0)
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(b))


# --------------------------------------------------------------------------------------------- normalising
@given(batches(), st.data())
def test_normalising_is_torchvisions(batch, data):
    """To the last bits of float32: a value may be a thousand deviations from the mean."""
    images, _ = batch
    index = torch.zeros(len(images), dtype=torch.int64)
    mean = tuple(data.draw(st.floats(0, 1)) for _ in range(images.shape[1]))
    std = tuple(data.draw(st.floats(1e-3, 1)) for _ in range(images.shape[1]))
    found, _ = Normalize(mean, std)(Batch(images, index, index, index), 0, 0)
    expected = one.normalize(images.double() / 255, list(mean), list(std))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-7 * max(1 / min(std), 1))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 23), SEEDS)
def test_statistics_are_numpys(cuts, channels, side, seed):
    """Of all pixels together, whatever the batches."""
    random = np.random.default_rng(seed)
    levels = random.integers(1, 257, channels)[:, None, None]
    pixels = (random.random((sum(cuts), channels, side, side)) * levels).astype(np.uint8)
    pieces = torch.from_numpy(pixels).split(cuts)
    data = SimpleNamespace(
        in_channels=channels, eval_loader=lambda _split: [SimpleNamespace(images=piece) for piece in pieces]
    )
    found = channel_stats(data, "train")
    assert found.num_images == len(pixels)
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)) / 255, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)) / 255, rtol=0, atol=1e-9)
