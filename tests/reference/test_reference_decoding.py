"""What the model is given of a file: against Pillow's and torchvision's own reading of every pixel."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vit_train.data.decode import decode
from vit_train.data.sample_transforms import plain, resized_crop, shorter_side

BILINEAR, BICUBIC = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC


@functools.cache
def noise(side=512):
    """The amplitude of every frequency is inversely proportional to it. It goes on at its other side."""
    random_state = np.random.RandomState(0)
    y, x = np.meshgrid(np.fft.fftfreq(side) * side, np.fft.rfftfreq(side) * side, indexing="ij")
    falling = 1 / np.maximum(np.hypot(x, y), 1)
    spectra = [np.fft.rfft2(random_state.randn(side, side)) * falling for _ in range(2)]
    grey, other = (layer / layer.std() for layer in map(np.fft.irfft2, spectra))
    levels = 128 + 50 * np.stack([grey, grey + other / 4, grey], axis=2)
    return levels.clip(0, 255).astype(np.uint8)


def photograph(width, height, seed):
    """Noise like photographs."""
    down, right = np.random.RandomState(seed).randint(512, size=2)
    rows = noise().take(np.arange(down, down + height), axis=0, mode="wrap")
    return Image.fromarray(rows.take(np.arange(right, right + width), axis=1, mode="wrap"))


def jpeg(image, orientation=1):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def upright(data):
    """Every pixel of a file, as Pillow reads it."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def psnr(a, b):
    return 10 * np.log10(255**2 / max(float(((a.double() - b.double()) ** 2).mean()), 1e-9))


def evaluated(image, img_size, resize, kind=BICUBIC):
    """torchvision's preprocessing, of a PIL image."""
    if resize == "squash":
        return F.resize(F.pil_to_tensor(image), [img_size, img_size], interpolation=kind, antialias=True)
    whole = F.resize(F.pil_to_tensor(image), [shorter_side(img_size)], interpolation=kind, antialias=True)
    return F.center_crop(whole, [img_size])


@st.composite
def odd_sides(draw, least_side, times):
    """Width and height at which a JPEG is reduced so many times, and that it does not divide."""
    shorter = times * least_side + draw(st.integers(1, times - 1))
    longer = draw(st.integers(shorter, shorter * 3 // 2)) // times * times + draw(st.integers(1, times - 1))
    return (shorter, longer) if draw(st.booleans()) else (longer, shorter)


@pytest.mark.parametrize("times", [2, 4, 8])
@given(data=st.data())
@settings(max_examples=40)
def test_a_reduced_jpeg_of_any_size_shows_the_same(times, data):
    img_size = data.draw(st.sampled_from([16, 31, 64] if times == 2 else [16, 31]))
    resize, seed = data.draw(st.sampled_from(["crop", "squash"])), data.draw(st.integers(0, 99))
    transform = plain(img_size, resize=resize)
    width, height = data.draw(odd_sides(transform.least_side, times))
    file = jpeg(photograph(width, height, seed))
    reduced = decode(file, least_side=transform.least_side)
    assert reduced.size == (-(-width // times), -(-height // times))
    whole = evaluated(upright(file), img_size, resize)
    same = psnr(transform(reduced), whole)
    assert same >= 40
    assert same >= psnr(evaluated(upright(file), img_size, resize, BILINEAR), whole)


@given(st.integers(1, 8), st.sampled_from([2, 4, 8]), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_a_turned_jpeg_of_any_size_shows_the_same(orientation, times, wide, divides, seed):
    transform = plain(32, resize="squash")
    width, height = (
        times * side + (0 if divides else times - 1) for side in ((97, 64) if wide else (64, 97))
    )
    file = jpeg(photograph(width, height, seed), orientation)
    read = decode(file, least_side=transform.least_side)
    if divides or orientation == 1:
        assert min(read.size) <= 65, "it is not reduced"
    assert psnr(transform(read), evaluated(upright(file), 32, "squash")) >= 40


@given(st.sampled_from([2, 4, 8]), st.data())
@settings(max_examples=40)
def test_a_random_part_of_a_reduced_jpeg_is_a_part_of_the_picture(times, data):
    """Of `times` as many pixels each way, beginning at `times` as many, and never of padding."""
    transform = resized_crop(24, scale=(0.5, 1.0))
    least_side = 2 * transform.least_side  # two pixels for each that even the smallest part is scaled to
    width, height = data.draw(odd_sides(least_side, times))
    file = jpeg(photograph(width, height, data.draw(st.integers(0, 99))))
    reduced = decode(file, least_side=least_side)
    assert reduced.size == (-(-width // times), -(-height // times))
    seed = data.draw(st.integers(0, 999))
    torch.manual_seed(seed)
    part = {key: times * value for key, value in transform.transforms[0].make_params([reduced]).items()}
    assert part["left"] + part["width"] <= width
    assert part["top"] + part["height"] <= height
    torch.manual_seed(seed)
    cut = F.crop(F.pil_to_tensor(upright(file)), **part)
    expected = F.resize(cut, [24, 24], interpolation=BICUBIC, antialias=True)
    assert psnr(transform(reduced), expected) >= 40


@pytest.mark.parametrize("size", [(129 * 17 + 3, 129), (129, 129 * 17 + 3)])
def test_a_reduced_strip_shows_the_same_middle(size):
    transform = plain(32, resize="crop")
    file = jpeg(photograph(*size, seed=0))
    whole, reduced = decode(file), decode(file, least_side=transform.least_side)
    assert min(reduced.size) == 65
    assert psnr(transform(reduced), transform(whole)) >= 40
