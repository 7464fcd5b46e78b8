"""What the model is given of a file: against Pillow's and torchvision's own reading of every pixel."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vit_train.data.transforms.decode import decode, find_range
from vit_train.data.transforms.sample_transforms import plain, resized_crop, shorter_side

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


# -------------------------------------------------------------------------------------------- deeper than 8 bits
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values, key=None):
    """A PNG of 16 bits, written out: (H, W) grey or (H, W, 2, 3, 4) grey with alpha, colour, colour with alpha."""
    height, width = values.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[values.size // (height * width)]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    transparent = b"" if key is None else chunk(b"tRNS", np.array(key, dtype=">u2").tobytes())
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return file.getvalue()


def levels(values, black, white):
    return np.clip(np.floor((values.astype(np.float64) - black) * 255 / (white - black) + 0.5), 0, 255)


def assert_levels(read, expected):
    """Within float32: where a value is half a level, either."""
    difference = np.abs(np.asarray(read).astype(float) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


WRITERS = {
    "png": lambda v: png16(v),
    "png colour": lambda v: png16(np.stack([v, v, v], axis=2)),
    "tiff 16": lambda v: tiff(v.astype(np.uint16)),
    "tiff 32": lambda v: tiff(v.astype(np.int32)),
    "tiff float": lambda v: tiff(v.astype(np.float32)),
}
RANGES = st.sampled_from([(0, 255), (0, 1023), (0, 4095), (100, 3000), (0, 16383), (0, 65535)])


@given(st.sampled_from(sorted(WRITERS)), RANGES, st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_deep_values_are_scaled_linearly_in_every_container(writer, value_range, width, height, seed):
    values = np.random.RandomState(seed).randint(0, value_range[1] + 1, (height, width))
    read = decode(WRITERS[writer](values), value_range=value_range)
    assert_levels(read.convert("L"), levels(values, *value_range))


@given(st.sampled_from([-3.0, 0.0, 0.25]), st.sampled_from([1.0, 0.5, 900.0]), st.integers(0, 99))
def test_floats_have_the_white_of_the_data_set(black, extent, seed):
    """Not their own: a dark picture stays dark, and what leaves the range is clipped."""
    white = black + extent
    values = black + extent * np.random.RandomState(seed).uniform(-0.2, 0.4, (9, 7)).astype(np.float32)
    assert_levels(decode(tiff(values), value_range=(black, white)), levels(values, black, white))


@given(st.integers(1, 4), st.integers(0, 65535), st.integers(0, 99))
def test_a_colour_key_is_compared_at_its_depth(channels, key, seed):
    """A pixel that shares the high bytes stays opaque; transparent is what equals the key, or has no alpha."""
    random_state = np.random.RandomState(seed)
    values = random_state.randint(0, 65536, (8, 6, channels))
    colours = channels if channels % 2 else channels - 1
    values[:4, :, :colours] = key
    values[:2, :, 0] = key ^ 1  # the same high byte
    if channels % 2:
        data, opaque = png16(values.squeeze(), [key] * channels), (values != key).any(2)
    else:
        values[..., -1] = random_state.choice([0, 65535], (8, 6))
        data, opaque = png16(values), values[..., -1] > 0
    read = np.asarray(decode(data, background=(10, 20, 30)))
    seen = levels(np.broadcast_to(values[..., :colours], (8, 6, 3)), 0, 65535)
    assert_levels(read, np.where(opaque[..., None], seen, (10, 20, 30)))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_eight_bits_have_no_range(mode):
    file = io.BytesIO()
    photograph(40, 30, 0).convert(mode).save(file, "PNG")
    assert np.array_equal(decode(file.getvalue()), decode(file.getvalue(), value_range=(50, 90)))


@given(
    st.sampled_from([(0.9, 1), (1, 1), (2, 255), (255, 255), (256, 65535), (65535, 65535), (70000, 70000)]),
    st.booleans(),
)
def test_floats_of_a_folder_have_one_range(tmp_path_factory, case, negative):
    largest, white = case
    folder = tmp_path_factory.mktemp("floats")
    for i, share in enumerate((0.1, 1.0, 0.5)):
        values = np.linspace(-1 if negative else 0, largest * share, 12, dtype=np.float32).reshape(3, 4)
        (folder / f"{i}.tif").write_bytes(tiff(values))
    found, _ = find_range(sorted(map(str, folder.iterdir())))
    assert found == pytest.approx((-1, largest) if negative else (0, white))


@given(st.sampled_from([3, 255, 256, 1023, 1024, 4000, 4096, 16384, 65535]), st.booleans())
def test_integers_of_a_folder_have_the_white_of_their_bits(tmp_path_factory, largest, is_png):
    folder = tmp_path_factory.mktemp("integers")
    for i, most in enumerate((largest // 2, largest)):
        values = np.arange(6).reshape(2, 3) * most // 5
        (folder / f"{i}.x").write_bytes(png16(values) if is_png else tiff(values.astype(np.uint16)))
    photograph(9, 9, 0).save(folder / "eight bits.png")
    (folder / "broken.png").write_bytes(b"nothing")
    found, note = find_range(sorted(map(str, folder.iterdir())))
    bits = next(bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits)
    assert found == (0, 2**bits - 1)
    assert note == (
        f"data.value_range=[0, {2**bits - 1}]: deeper than 8 bits; the largest value of 2 files is {largest}"
    )
