"""Sample transforms: sizes, ranges, and that their draws do what the names say."""

import numpy as np
import pytest
import torch
from PIL import Image

from vit_train import rng
from vit_train.data.sample_transforms import plain, resized_crop_flip, shift_flip


def coordinates(width, height):
    """An image whose red is x + 1 and whose green is y + 1; blue marks what is not padding."""
    x, y = np.meshgrid(np.arange(width) + 1, np.arange(height) + 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(("img_size", "shorter"), [(224, 256), (64, 73), (63, 63), (32, 32)])
def test_plain_crop_resizes_by_the_rule(img_size, shorter):
    transform = plain(img_size, resize="crop")
    assert transform.transforms[0].size == [shorter]
    assert transform(coordinates(250, 130)).size == (img_size, img_size)


def test_shifts_reach_every_offset_and_no_further():
    transform = shift_flip(16, max_shift=0.125, hflip_prob=0.0)
    seen = set()
    for draw in range(400):
        rng.seed_cpu(0, draw)
        pixels = np.asarray(transform(coordinates(16, 16))).astype(int)
        inside = pixels[..., 2] > 0
        rows, columns = np.nonzero(inside)
        dx = {int(v) for v in (pixels[..., 0] - 1 - np.arange(16))[inside]}
        dy = {int(v) for v in (pixels[..., 1] - 1 - np.arange(16)[:, None])[inside]}
        assert len(dx) == len(dy) == 1
        seen.add((dx.pop(), dy.pop()))
        assert pixels[~inside].max(initial=0) == 0
        assert len(rows) >= 14 * 14
        assert len(columns) >= 14 * 14
    assert seen == {(x, y) for x in range(-2, 3) for y in range(-2, 3)}


@pytest.mark.parametrize("hflip_prob", [0.0, 0.5, 1.0])
def test_mirroring_follows_its_probability(hflip_prob):
    transform = shift_flip(8, max_shift=0.0, hflip_prob=hflip_prob)
    rng.seed_cpu(0, "flip")
    mirrored = [np.asarray(transform(coordinates(8, 8)))[0, 0, 0] == 8 for _ in range(400)]
    assert np.mean(mirrored) == pytest.approx(hflip_prob, abs=0.1 if hflip_prob == 0.5 else 0)


def test_an_oblong_image_is_scaled_then_cropped_along_its_length():
    transform = shift_flip(8, max_shift=0.0, hflip_prob=0.0)
    rng.seed_cpu(0)
    starts = set()
    for _ in range(100):
        result = transform(coordinates(24, 8))
        assert result.size == (8, 8)
        starts.add(int(np.asarray(result)[0, 0, 0]) - 1)
    assert starts == set(range(17))


def test_resized_crop_stays_within_its_area():
    transform = resized_crop_flip(16, scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip_prob=0.0)
    rng.seed_cpu(0)
    widths = []
    for _ in range(20):
        result = transform(coordinates(100, 100))
        assert result.size == (16, 16)
        red = np.asarray(result)[..., 0].astype(int)
        widths.append(red.max() - red.min())
    assert 42 <= min(widths) <= max(widths) <= 51


@pytest.mark.parametrize(
    "factory",
    [
        lambda: shift_flip(32, max_shift=0.125, hflip_prob=0.5),
        lambda: resized_crop_flip(32, scale=(0.35, 1.0), ratio=(0.75, 1.3333), hflip_prob=0.5),
    ],
)
def test_the_seed_decides_the_result(factory):
    def result(seed):
        torch.manual_seed(seed + 1000)  # must not matter
        rng.seed_cpu(0, "sample", seed)
        return np.asarray(factory()(coordinates(40, 36)))

    assert np.array_equal(result(1), result(1))
    assert any(not np.array_equal(result(1), result(seed)) for seed in range(2, 5))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: shift_flip(8, max_shift=-0.1, hflip_prob=0.5), "max_shift must not be negative, got -0.1"),
        (lambda: shift_flip(8, max_shift=0.1, hflip_prob=1.5), "hflip_prob must be within 0 and 1, got 1.5"),
        (lambda: resized_crop_flip(8, scale=(0.5, 0.1), ratio=(1, 1), hflip_prob=0), "scale must ascend"),
        (lambda: resized_crop_flip(8, scale=(0.5, 1), ratio=(0, 1), hflip_prob=0), "ratio must ascend"),
    ],
)
def test_values_out_of_range_are_refused(call, line):
    with pytest.raises(ValueError, match=line):
        call()
