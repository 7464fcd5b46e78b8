"""The recipes of papers: their values, and two steps of each on generated images."""

import json

import numpy as np
import pytest
from conftest import vit_train_here
from PIL import Image
from test_configs import assert_holds, checked

# Touvron et al. 2021, table 9, and the arguments of facebookresearch/deit; Liu et al. 2021, A2.1, and its config.py
BOTH = {
    "data.img_size": 224,
    "data.batch_size": 1024,
    "data.sampler": "uniform",
    "optimizer._target_": "vit_train.training.optimizers.adamw",
    "optimizer.lr": 5e-4 * 1024 / 512,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.layer_decay": 1.0,
    "objective.label_smoothing": 0.1,
    "schedule._target_": "vit_train.training.schedules.Cosine",
    "schedule.final_factor": 0.01,
    "augment.sample.scale": [0.08, 1.0],
    "augment.sample.policy": "rand",
    "augment.sample.magnitude": 9,
    "augment.sample.jitter": 0.0,
    "augment.batch.hflip_prob": 0.5,
    "augment.batch.erase_prob": 0.25,
    "augment.batch.mixup_alpha": 0.8,
    "augment.batch.cutmix_alpha": 1.0,
    "augment.batch.mix_prob": 1.0,
    "augment.batch.mix_switch_prob": 0.5,
    "model.drop_rate": 0.0,
    "model.attn_drop_rate": 0.0,
    "trainer.epochs": 300,
}
DEIT = BOTH | {
    "model.embed_dim": 384,
    "model.depth": 12,
    "model.num_heads": 6,
    "model.drop_path_rate": 0.1,
    "schedule.warmup_epochs": 5.0,
    "data.repeats": 3,
    "trainer.ema_decay": 0.99996,
    "trainer.grad_clip_norm": None,
}
PUBLISHED = {
    "deit_small_imagenet": DEIT | {"model._target_": "vit_train.models.ViT"},
    "deit_small_distilled_imagenet": DEIT
    | {
        "model._target_": "vit_train.models.DeiT",
        "objective.kind": "hard",
        "objective.alpha": 0.5,
        "objective.heads": "distill",
        "objective.teacher": "torchvision:regnet_y_16gf",
    },
    "swin_tiny_imagenet": BOTH
    | {
        "model._target_": "vit_train.models.Swin",
        "model.embed_dim": 96,
        "model.depths": [2, 2, 6, 2],
        "model.drop_path_rate": 0.2,
        "schedule.warmup_epochs": 20.0,
        "data.repeats": 1,
        "trainer.ema_decay": None,
        "trainer.grad_clip_norm": 5.0,
    },
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog", "owl"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = noise.integers(0, 256, (230, 250, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_values(name):
    assert_holds(checked(f"experiment={name}"), PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_steps_on_generated_images(name, photos, tmp_path):
    two_steps = (f"data.root={photos}", "data.batch_size=4", "trainer.max_steps=2", "data.num_workers=0")
    two_steps += ("trainer.precision=fp32", "tracker.tensorboard=false", "schedule.warmup_epochs=0")
    typed = [f"experiment={name}", *two_steps, f"run_dir={tmp_path / name}"]
    if "distilled" in name:
        teacher = tmp_path / "teacher"
        done = vit_train_here(
            "experiment=deit_small_imagenet", "model.depth=1", *two_steps, f"run_dir={teacher}", cwd=tmp_path
        )
        assert done.code == 0, done.err
        typed.append(f"objective.teacher={teacher}")
    done = vit_train_here(*typed, cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / name / "result.json").read_text())
    assert result["steps"] == 2
    assert np.isfinite(result["last/val/loss"])
