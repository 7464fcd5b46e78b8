"""Sample transforms: sizes, ranges, and that their draws do what the names say."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from vit_train import rng
from vit_train.data.transforms.sample_transforms import plain, resized_crop

POLICIES = [None, "rand", "trivial", "auto"]


def coordinates(width, height):
    """An image whose red is x + 1 and whose green is y + 1; blue marks what is not padding."""
    x, y = np.meshgrid(np.arange(width) + 1, np.arange(height) + 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=-1).astype(np.uint8))


def photograph(width=120, height=90, mode="RGB"):
    """Coarse shapes and fine grain."""
    random_state = np.random.RandomState(0)
    coarse = Image.fromarray(random_state.randint(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    grain = random_state.randint(-20, 21, (height, width, 1))
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).convert(mode)


def result_of(transform, image, *seed):
    rng.seed_cpu(0, *seed)
    return transform(image).numpy().astype(int)


# ----------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(250, 130), (90, 300), (20, 20), (256, 256)])
@pytest.mark.parametrize(("img_size", "shorter"), [(224, 256), (64, 73), (63, 63), (32, 32)])
def test_plain_crop_is_pillows_resize(img_size, shorter, size, mode):
    image = photograph(*size, mode)
    seen = plain(img_size, resize="crop")(image)
    assert seen.dtype == torch.uint8
    # the longer side is cut to whole pixels, as torchvision does it
    whole = image.resize([shorter * side // min(size) for side in size], Image.Resampling.BICUBIC)
    left, top = (round((side - img_size) / 2) for side in whole.size)
    cut = np.asarray(whole.crop((left, top, left + img_size, top + img_size))).astype(int)
    assert seen.shape == (len(mode), img_size, img_size)
    # both round between the two directions; where an oblong image is enlarged, not in the same order
    assert np.abs(seen.permute(1, 2, 0).numpy().squeeze() - cut).max() <= (1 if max(size) < 300 else 3)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_squash_keeps_everything(mode):
    image = photograph(90, 40, mode)
    seen = plain(32, resize="squash")(image).permute(1, 2, 0).numpy().squeeze()
    whole = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(seen - whole).max() <= 1


# -------------------------------------------------------------------------------------------------- the random part
def test_resized_crop_stays_within_its_area():
    transform = resized_crop(16, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    widths = []
    for draw in range(20):
        red = result_of(transform, coordinates(100, 100), draw)[0]
        assert red.shape == (16, 16)
        widths.append(red.max() - red.min())
    assert 42 <= min(widths) <= max(widths) <= 51


def test_resized_crop_reaches_every_part():
    transform = resized_crop(8, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    seen = np.stack([result_of(transform, coordinates(40, 40), draw) for draw in range(300)])
    for channel in (0, 1):
        assert seen[:, channel].min() <= 2
        assert seen[:, channel].max() >= 39


@pytest.mark.parametrize(
    ("transform", "least_side"),
    [
        (plain(224, resize="crop"), 512),
        (plain(224, resize="squash"), 448),
        (plain(32, resize="crop"), 64),
        (resized_crop(224, scale=(0.35, 1.0)), 448),
        (resized_crop(224, scale=(0.08, 1.0)), 915),
        (resized_crop(224, scale=(1.0, 1.0), ratio=(1.0, 1.0)), 448),
    ],
)
def test_how_large_an_image_must_be(transform, least_side):
    assert transform.least_side == least_side


@pytest.mark.parametrize("ratio", [(0.75, 1.3333), (0.5, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("scale", [(0.08, 0.08), (0.08, 1.0), (0.35, 0.4)])
def test_no_part_of_an_image_of_that_size_is_enlarged(scale, ratio):
    transform = resized_crop(64, scale=scale, ratio=ratio)
    crop = transform.transforms[0]
    image = Image.new("L", (transform.least_side, transform.least_side * 3 // 2))
    for draw in range(500):
        rng.seed_cpu(0, draw)
        part = crop.make_params([image])
        assert min(part["width"], part["height"]) >= 64


# ----------------------------------------------------------------------------------------------- policies and jitter
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_seed_decides_the_result_and_nothing_else(policy, jitter, mode):
    transform = resized_crop(32, scale=(0.35, 1.0), policy=policy, jitter=jitter)
    again = pickle.loads(pickle.dumps(transform))  # as a spawned worker gets it
    image = photograph(mode=mode)
    first = [result_of(transform, image, draw) for draw in range(20)]
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))  # as many as a worker process does not have
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    try:
        second = [result_of(again, image, draw) for draw in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert first[0].shape == (len(mode), 32, 32)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not np.array_equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("options", [{"policy": "rand", "num_ops": 1}, {"policy": "trivial"}])
def test_every_operation_does_to_grey_what_it_does_to_colours(options):
    """On a grey picture in both modes; what moves in from outside is grey in one, nearly grey in the other."""
    transform = resized_crop(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), **options)
    grey, colours = photograph(64, 64, "L"), photograph(64, 64, "L").convert("RGB")
    plainly = plain(32, resize="crop")(grey).numpy().astype(int)
    changed = 0
    for draw in range(150):
        one, three = result_of(transform, grey, draw), result_of(transform, colours, draw)
        assert np.abs(one - three).max() <= 11
        changed += bool(np.abs(one - plainly).max() > 1)
    assert 90 < changed < 150


@pytest.mark.parametrize(
    ("mode", "colour"), [("L", (115, 115, 115)), ("RGB", (124, 116, 104))], ids=["L", "RGB"]
)
@pytest.mark.parametrize("policy", ["rand", "trivial", "auto"])
def test_imagenets_mean_moves_in_from_outside(policy, mode, colour):
    transform = resized_crop(32, scale=(1.0, 1.0), policy=policy, num_ops=1, magnitude=30)
    outside = 0
    for draw in range(60):
        corners = result_of(transform, Image.new(mode, (64, 64), "white"), draw)[
            :, [0, 0, -1, -1], [0, -1, 0, -1]
        ]
        outside += (corners == np.array(colour)[: len(mode), None]).all(0).any()
    assert outside > 5


def test_a_greater_magnitude_changes_more():
    image = photograph()
    whole = result_of(resized_crop(32, scale=(1.0, 1.0), ratio=(1.0, 1.3334)), image)

    def change(magnitude):
        transform = resized_crop(
            32, scale=(1.0, 1.0), ratio=(1.0, 1.3334), policy="rand", magnitude=magnitude
        )
        return np.mean([np.abs(result_of(transform, image, draw) - whole).mean() for draw in range(60)])

    assert change(3) < 0.8 * change(12) < 0.64 * change(30)


def test_jitter_stays_within_its_range():
    transform = resized_crop(8, scale=(1.0, 1.0), jitter=0.4)
    levels = [result_of(transform, Image.new("RGB", (8, 8), (100, 100, 100)), draw) for draw in range(200)]
    assert all(np.ptp(level) == 0 for level in levels)  # flat stays flat, and grey grey
    assert 59 <= min(level[0, 0, 0] for level in levels) <= 64
    assert 136 <= max(level[0, 0, 0] for level in levels) <= 141


def test_a_very_long_picture_costs_no_gigabytes_and_shows_its_middle():
    rows = np.arange(20_000) // 40 % 256
    long = Image.fromarray(rows.astype(np.uint8)[:, None])
    for image in (long, long.transpose(Image.Transpose.TRANSPOSE)):
        seen = plain(224, resize="crop")(image)
        assert seen.shape == (1, 224, 224)
        assert seen.float().mean().item() == pytest.approx(rows[10_000], abs=2)
