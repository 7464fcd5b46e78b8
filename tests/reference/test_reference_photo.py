"""Crops of photographs as they look: which part was cut out is read from the pixels, whose colours say where they were."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from vit_train.config.check import plain
from vit_train.config.parts import resolve_auto
from vit_train.construct import make
from vit_train.data.batch import Batch

CONFIGS = Path(__file__).parents[2] / "configs"


@functools.cache
def batch_node(augment):
    """Without what refers to other groups, for speed."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=[f"augment={augment}"])
    return OmegaConf.to_container(cfg)["augment"]["batch"] | {
        "seed": 0,
        "num_classes": 10,
    }


def transform(augment, side, **typed):
    """The batch transform that a run on images of that size would have; pixels come out as 0 to 1."""
    node = {**batch_node(augment), **typed}
    cfg = OmegaConf.create({"augment": {"batch": node}, "data": {"img_size": side}, "optimizer": {"lr": 0.1}})
    resolve_auto(cfg, [f"augment.batch.{key}={value}" for key, value in typed.items()], nn.Identity())
    return make(plain(cfg)["augment"]["batch"])((0.0,) * 3, (1.0,) * 3)


def batch_of(images, first):
    number = len(images)
    ids = torch.arange(first, first + number)
    return Batch(images, torch.zeros(number, dtype=torch.int64), ids, torch.zeros_like(ids))


def ramps(number, side):
    """Red grows from left to right, green from top to bottom, blue is 200: nothing is black."""
    red = torch.linspace(50, 250, side).expand(side, side)
    image = torch.stack([red, red.T, torch.full((side, side), 200.0)])
    return image.round().to(torch.uint8).expand(number, 3, side, side).contiguous()


def slope(values):
    """(B,) share of the picture that a row of (B, side) covers, in the middle, where no edge matters."""
    side = values.shape[1]
    a, b = side // 4, side - 1 - side // 4
    return (values[:, b] - values[:, a]).abs() * 255 / 200 * (side - 1) / (b - a)


@given(side=st.integers(64, 256), epoch=st.integers(0, 9), first=st.integers(0, 10**9))
def test_photographs_are_cropped_and_nothing_black_moves_in(side, epoch, first):
    images, _ = transform("photo", side)(batch_of(ramps(8, side), first), epoch, 0)
    assert images.shape == (8, 3, side, side)
    assert float(images[:, 2].min()) * 255 > 199
    assert float(images.min()) * 255 > 45  # bicubic resizing may undershoot a little
    width, height = slope(images[:, 0].mean(1)), slope(images[:, 1].mean(2))
    assert float((width * height).min()) > 0.35 - 0.05
    assert float(torch.stack([width, height]).max()) < 1 + 0.03
    assert float((width * height).std()) > 0.01, "all parts are of one size"


@given(side=st.integers(1, 63), epoch=st.integers(0, 9), seed=st.integers(0, 10**6))
def test_small_images_are_exactly_what_light_makes_of_them(side, epoch, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (5, 3, side, side), generator=generator, dtype=torch.uint8)
    batch = batch_of(images, seed)
    photo, light = (transform(name, side)(batch, epoch, 0)[0] for name in ("photo", "light"))
    assert torch.equal(photo, light)


def test_a_typed_shift_stands_in_place_of_crops():
    images, _ = transform("photo", 96, max_shift=0.25)(batch_of(ramps(64, 96), 0), 0, 0)
    assert float(images[:, 2].min()) == 0
    assert float((slope(images[:, 0].amax(1)) - 1).abs().median()) < 0.02
