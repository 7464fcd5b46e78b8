"""Every config composes, passes the check, and holds what its name promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import compose
from omegaconf import OmegaConf

from vit_train.config.check import check_config
from vit_train.config.parts import without_memory
from vit_train.errors import ConfigError
from vit_train.runs.resume import flat

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONFIGS.iterdir())
    if folder.is_dir()
}
EXPERIMENTS = GROUPS["experiment"]
CHOICES = [f"{group}={name}" for group, names in GROUPS.items() if group != "experiment" for name in names]


def checked(*overrides):
    """The composed and checked configuration, as plain data."""
    cfg = compose(*overrides)
    check_config(cfg)
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return plain


def test_every_file_is_reached():
    """Nothing nested deeper, no empty group, nothing but YAML."""
    beside = {CONFIGS / "train.yaml", CONFIGS / "images.yaml"}  # the latter: what the data configs share
    reached = beside | {CONFIGS / g / f"{n}.yaml" for g, names in GROUPS.items() for n in names}
    assert set(FILES) == reached
    expected = "model data augment objective optimizer schedule strategy trainer tracker experiment"
    assert set(GROUPS) == set(expected.split())
    assert all(GROUPS.values())
    assert len(FILES) == len(beside) + len(CHOICES) + len(EXPERIMENTS)
    assert len(FILES) > 50
    assert [path for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".yaml"] == []


def test_the_defaults():
    config = checked()
    assert config["model"]["_target_"] == "vit_train.models.ViT"
    assert config["data"]["_target_"] == "vit_train.data.Digits"


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_checks(choice):
    group, _, name = choice.partition("=")
    config = checked(choice)
    written = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    for key, value in written.items():
        if key != "defaults" and not isinstance(value, dict) and "${" not in str(value):
            assert config[group][key] == value, f"{group}.{key} is not what {choice} says"


# Told by the data modules: classes, pixels, channels
TOLD = {
    "digits": (10, 8, 1),
    "cifar10": (10, 32, 3),
    "cifar100": (100, 32, 3),
    "cifar10_folder": (10, 32, 3),
    "imagefolder": (7, 224, 3),
}


@pytest.mark.parametrize("data", GROUPS["data"])
@pytest.mark.parametrize("model", GROUPS["model"])
def test_any_model_takes_any_data_or_says_which_size_it_takes(model, data):
    """Built without memory, and an image goes through."""
    classes, pixels, channels = TOLD[data]

    def built(img_size):
        told = (f"++data.num_classes={classes}", f"++data.in_channels={channels}")
        config = checked(f"model={model}", f"data={data}", *told, f"++data.img_size={img_size}")
        made = without_memory(config, None).eval()
        logits = made(torch.empty(2, channels, img_size, img_size, device="meta"))
        assert logits.shape == (2, classes)
        return config

    takes = r"(patch_size (\d+) does not divide img_size \d+; use one of [\d, ]+, or|img_size 8 is too small for \w+ "
    takes += r"features\.23;) type data\.img_size=(\d+)( or more)?"
    try:
        config = built(pixels)
    except ConfigError as error:
        says = str(error)
    else:
        says = ""
    if says:
        match = re.fullmatch(rf"model\.patch_embed: {takes}", says)
        assert match, says
        patch, fitting = int(match[2] or 16), int(match[3])
        assert fitting == min(side for side in range(pixels, 99) if side % patch == 0)
        assert data != "imagefolder", "whose size is chosen for the model"
        config = built(fitting)
    alone = checked(f"model={model}")
    assert config["model"]["_target_"] == alone["model"]["_target_"]
    width = "widths" if model == "resnet_cifar" else "embed_dim"
    assert config["model"][width] == alone["model"][width], f"data={data} replaced the typed model"
    assert config["data"]["_target_"] == checked(f"data={data}")["data"]["_target_"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_checks_and_names_its_command(name):
    checked(f"experiment={name}")
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    header = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# @package _global_\n")
    commands = [line for line in header if re.match(r"vit-train ", line)]
    assert commands, "the header holds no command"
    for command in commands:
        arguments = command.split()[1:]
        assert f"experiment={name}" in arguments
        checked(*arguments)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_key_an_experiment_sets_arrives(name):
    """A defaults list in the wrong order let train.yaml put init_from back to null, without a word."""
    written = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())
    inherited = [base for base in written.pop("defaults") if base in EXPERIMENTS]
    bases = [yaml.safe_load((CONFIGS / "experiment" / f"{base}.yaml").read_text()) for base in inherited]
    composed = OmegaConf.create(checked(f"experiment={name}"))
    set_keys = {
        key: value for each in (*bases, written) for key, value in flat(each).items() if key != "defaults"
    }
    assert len(set_keys) > 5
    for key, value in set_keys.items():
        assert OmegaConf.select(composed, key) == value, key
    typed = checked(f"experiment={name}", "init_from=mine.pth", "seed=7", "trainer.epochs=3")
    assert (typed["init_from"], typed["seed"], typed["trainer"]["epochs"]) == ("mine.pth", 7, 3)


# ------------------------------------------------------------------------------------- what was promised
def assert_holds(config, expected):
    found = {key: OmegaConf.select(OmegaConf.create(config), key, throw_on_missing=True) for key in expected}
    found = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in found.items()}
    assert found == expected


SWIN_TUTORIAL = {
    "model._target_": "vit_train.models.Swin",
    "model.embed_dim": 192,
    "model.depths": [2, 6, 2],
    "model.num_heads": [3, 6, 12],
    "model.window_size": 7,
    "model.mask_padding": False,
    "model.patch_embed.patch_size": 2,
    "data._target_": "vit_train.data.Cifar10",
    "data.batch_size": 64,
    "data.val_fraction": 0.0,
    "data.mean": [0.5, 0.5, 0.5],
    "data.std": [0.5, 0.5, 0.5],
    "data.sample_transform": None,
    "augment.sample": None,
    "objective.label_smoothing": 0.0,
    "schedule._target_": "vit_train.training.schedules.ReduceOnPlateau",
    "schedule.monitor": "train/loss",
    "schedule.mode": "min",
    "trainer.epochs": 20,
    "trainer.precision": "fp32",
    "trainer.ema_decay": None,
    "trainer.grad_clip_norm": None,
}


def test_the_swin_tutorial():
    config = checked("experiment=swin_cifar_tutorial")
    assert_holds(config, SWIN_TUTORIAL)
    assert_holds(
        config,
        {
            "optimizer._target_": "vit_train.training.optimizers.adam",
            "optimizer.lr": 1e-4,
            "optimizer.betas": [0.5, 0.999],
            "optimizer.weight_decay": 0.0,
            "schedule.factor": 0.94,
            "schedule.patience": 1,
        },
    )
    assert config["optimizer"]["lr"] * config["schedule"]["min_factor"] == pytest.approx(1e-6)


def test_the_swin_tutorial_with_sgd():
    config = checked("experiment=swin_cifar_tutorial_sgd")
    assert_holds(config, SWIN_TUTORIAL)
    assert_holds(
        config,
        {
            "optimizer._target_": "vit_train.training.optimizers.sgd",
            "optimizer.momentum": 0.9,
            "optimizer.nesterov": False,
            "schedule.factor": 0.5,
            "schedule.patience": 5,
        },
    )
    assert config["optimizer"]["lr"] * config["schedule"]["min_factor"] == pytest.approx(1e-5)


def test_the_image_folder_tutorial():
    assert_holds(
        checked("experiment=vit_imagefolder_tutorial"),
        {
            "model._target_": "vit_train.models.ViT",
            "model.qkv_bias": False,
            "model.embed_dim": 768,
            "model.depth": 12,
            "model.num_heads": 12,
            "model.head": "mlp",
            "model.patch_embed.patch_size": 16,
            "data._target_": "vit_train.data.ImageFolder",
            "data.img_size": 224,
            "data.resize": "squash",
            "data.batch_size": 32,
            "augment.sample": None,
            "optimizer._target_": "vit_train.training.optimizers.adam",
            "optimizer.lr": 1e-4,
            "optimizer.weight_decay": 0.0,
            "schedule._target_": "vit_train.training.schedules.Constant",
            "trainer.epochs": 25,
            "trainer.precision": "fp32",
            "trainer.ema_decay": None,
        },
    )


def test_the_literal_command_is_the_recipe_of_its_data():
    """`vit-train model=swin_cifar data=cifar10` brings light augmentation and the CIFAR trainer."""
    config = checked("model=swin_cifar", "data=cifar10")
    light = yaml.safe_load((CONFIGS / "augment/light.yaml").read_text())
    light["batch"] |= {"seed": 0, "num_classes": None}  # interpolated; the data knows how many classes
    trainer = yaml.safe_load((CONFIGS / "trainer/cifar.yaml").read_text())
    assert config["augment"] == light
    assert config["data"]["sample_transform"] == light["sample"]
    assert {key: config["trainer"][key] for key in trainer if key != "defaults"} == {
        key: value for key, value in trainer.items() if key != "defaults"
    }
    assert config["model"]["_target_"] == "vit_train.models.Swin"
    assert checked("model=swin_cifar", "data=cifar10", "augment=none")["augment"]["sample"] is None
