"""The learning rate that `optimizer.lr=auto` takes, from the widths that the papers' tables have."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from torch import nn

from vit_train.config.check import Launch, plain
from vit_train.config.describe import describe
from vit_train.construct import make
from vit_train.training.optimizers import auto_lr

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))

# Width of most blocks -> models. ViT: Dosovitskiy et al. 2020, table 1; DeiT: Touvron et al. 2021, table 1; Swin: Liu
# et al. 2021, section 3.3: stages of C, 2C, 4C, 8C, of which the third has 6 of 12 blocks (tiny) or 18 of 24.
TABLE = [
    (64, "vit_digits"),
    (192, "vit_tiny deit_tiny deit_tiny_distilled vit_cifar deit_cifar"),
    (256, "hybrid_cifar"),  # of this project, as the two before
    (2 * 192, "swin_cifar swin_cifar_w4"),  # of this project: 6 of 10 blocks are in the second stage
    (384, "vit_small deit_small deit_small_distilled"),
    (4 * 96, "swin_tiny swin_small"),
    (4 * 128, "swin_base"),
    (
        768,
        "vit_base vit_base_32 deit_base deit_base_distilled hybrid_resnet50_base hybrid_vgg vit_scratch_tutorial",
    ),
    (4 * 192, "swin_large"),
    (1024, "vit_large vit_large_32"),
    (1280, "vit_huge"),
]
WITHOUT_BLOCKS = {"resnet_cifar": 256}  # Jordan 2024, airbench94: width of the last group
WIDTHS = WITHOUT_BLOCKS | {name: width for width, names in TABLE for name in names.split()}


def compose(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose("train", overrides=list(overrides))


def side_of(model):
    return 8 if model == "vit_digits" else 32 if "cifar" in model else 224


@functools.cache
def outlined(model):
    data = (f"data.img_size={side_of(model)}", "data.num_classes=10")
    node = plain(compose("data=imagefolder", f"model={model}", *data))["model"]
    with torch.device("meta"):
        return make(node)


def described(*typed):
    return describe(compose(*typed), Launch(overrides=list(typed)))


def test_every_model_is_in_the_table():
    assert sorted(WIDTHS) == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_the_rate_follows_from_the_width_of_the_paper(model):
    width, kind = WIDTHS[model], "a model" if model in WITHOUT_BLOCKS else "blocks"
    expected = 1e-3 if width <= 192 else 5e-4 if width <= 384 else 2e-4
    assert auto_lr(outlined(model), fine_tuned=False) == (expected, f"{kind} of width {width}")
    rate, reason = auto_lr(outlined(model), fine_tuned=True)
    assert rate == pytest.approx(expected / 10)
    assert "a tenth" in reason


def test_a_model_without_blocks_tells_its_width_or_that_it_does_not():
    model = nn.Linear(3, 2)
    rate, reason = auto_lr(model, fine_tuned=False)
    assert (rate, reason) == (5e-4, "Linear has no blocks and no embed_dim that gives its width")
    for embed_dim, expected in ((192, 1e-3), (193, 5e-4), (384, 5e-4), (385, 2e-4)):
        model.embed_dim = embed_dim
        assert auto_lr(model, fine_tuned=False) == (expected, f"a model of width {embed_dim}")


@pytest.mark.parametrize(
    ("typed", "rate", "reason"),
    [
        ("data=imagefolder model.depth=1", 1e-3, "blocks of width 192"),
        ("data=imagefolder model=vit_base model.depth=1", 2e-4, "blocks of width 768"),
        ("data=imagefolder model=vit_huge model.depth=1", 2e-4, "blocks of width 1280"),
        ("data=imagefolder model=swin_tiny data.img_size=64", 5e-4, "blocks of width 384"),
        ("data=imagefolder model=vit_small model.depth=1 init_from=x.pth", 5e-5, "a tenth"),
        ("data=imagefolder model=vit_base model.depth=1 optimizer.lr=3e-4", 3e-4, None),
        ("data=cifar10 model.depth=1", 2e-3, None),
        ("data=cifar10 model=swin_cifar model.depths=[1,3,1]", 2e-3, None),
        ("data=cifar100 model=swin_cifar_w4 model.depths=[1,3,1]", 2e-3, None),
        ("data=cifar10 model=swin_cifar model.depths=[1,3,1] optimizer=adamw", 5e-4, "blocks of width 384"),
        ("", 2e-3, None),
        ("optimizer=adamw", 1e-3, "blocks of width 64"),
    ],
)
def test_the_rate_of_a_command(typed, rate, reason):
    found = described(*typed.split())
    assert found.config["optimizer"]["lr"] == pytest.approx(rate)
    said = [note for note in found.notes if note.startswith("optimizer.lr=")]
    assert len(said) == (reason is not None)
    assert all(f"optimizer.lr={rate:g} (auto): " in note and reason in note for note in said)
