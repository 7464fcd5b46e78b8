"""What was left to `auto` is decided once: numbers are stored, said with the reason, and kept by continuations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from conftest import checkpoint_hashes, vit_train_here
from PIL import Image

from vit_train.cli.evaluate import main as vit_eval

SMALL = (
    "data=imagefolder",
    "data.root=photos",
    "data.batch_size=8",
    "data.num_workers=0",
    "model.depth=1",
    "model.embed_dim=200",
    "model.num_heads=2",
    "model.patch_embed.patch_size=16",
    "trainer.epochs=2",
    "trainer.precision=fp32",
    "tracker.tensorboard=false",
)


@pytest.fixture
def photos(in_tmp):
    """Two classes of 12 images of 64 pixels."""
    draws = np.random.default_rng(0)
    for name in ("ash", "oak"):
        folder = in_tmp / "photos/train" / name
        folder.mkdir(parents=True)
        for i in range(12):
            Image.fromarray(draws.integers(1, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return in_tmp


def trained(*typed, cwd, code=0):
    done = vit_train_here(*typed, cwd=cwd)
    assert done.code == code, done.err
    return " ".join(done.out.split()) + done.err


def stored(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    batch = config["augment"]["batch"]
    return config["optimizer"]["lr"], batch["crop_scale"], batch["max_shift"]


@pytest.mark.parametrize(
    ("side", "crops", "says"),
    [(64, [0.35, 1.0], "[0.35, 1.0]"), (32, None, "null, a shift instead")],
    ids=["64", "32"],
)
def test_numbers_are_stored_said_and_continued_bit_for_bit(photos, side, crops, says):
    typed = (*SMALL, f"data.img_size={side}")
    said = trained(*typed, "run_dir=whole", cwd=photos)
    assert f"augment.batch.crop_scale={says} (auto): images of {side} pixels" in said
    assert "optimizer.lr=0.0005 (auto): blocks of width 200" in said
    assert "augment=photo, brought by data=imagefolder" in said
    assert stored(photos / "whole") == (5e-4, crops, 0.125)
    assert "auto" not in json.dumps(yaml.safe_load((photos / "whole/config.yaml").read_text())["optimizer"])

    trained(*typed, "run_dir=parts", "trainer.stop_at_step=1", cwd=photos)
    said = trained(*typed, "run_dir=parts", "trainer.stop_at_step=2", cwd=photos)  # the full command
    assert "(auto)" not in said
    trained("resume=parts", cwd=photos)
    assert stored(photos / "parts") == stored(photos / "whole")
    assert checkpoint_hashes(photos / "parts") == checkpoint_hashes(photos / "whole")

    said = trained(*typed, "run_dir=parts", "optimizer.lr=1e-3", "trainer.epochs=3", cwd=photos, code=2)
    assert "optimizer.lr: 0.0005 -> 0.001" in said
    other = "null" if crops else "[0.35,1.0]"
    said = trained(*typed, "run_dir=parts", f"augment.batch.crop_scale={other}", cwd=photos, code=2)
    assert "augment.batch.crop_scale: " in said
    trained("resume=parts", "optimizer.lr=auto", "trainer.epochs=3", cwd=photos)
    assert vit_eval(["whole"]) == 0


def test_a_run_from_before_auto_goes_on_with_what_it_has(photos):
    typed = (*SMALL, "data.img_size=64", "run_dir=run")
    old = ("augment=light", "optimizer.lr=1e-3")
    trained(*typed, *old, "trainer.stop_at_step=1", cwd=photos)
    trained(*typed, "trainer.stop_at_step=2", cwd=photos)
    trained("resume=run", cwd=photos)
    assert stored(photos / "run") == (1e-3, None, 0.125)


def test_trained_weights_take_a_tenth(photos):
    typed = (*SMALL, "data.img_size=32", "trainer.max_steps=1")
    trained(*typed, "run_dir=source", cwd=photos)
    said = trained(*typed, "run_dir=tuned", "init_from=source", cwd=photos)
    assert "optimizer.lr=5e-05 (auto): blocks of width 200; a tenth" in said
    assert "from scratch" not in said
    assert stored(photos / "tuned")[0] == 5e-5
    said = trained(*typed, "run_dir=sgd", "init_from=source", "optimizer=sgd", cwd=photos)
    assert "optimizer.lr=0.05 is made for training from scratch" in said


def test_a_typed_shift_is_taken_instead_of_crops(photos):
    typed = (*SMALL, "data.img_size=64", "trainer.max_steps=1", "augment.batch.max_shift=0.25")
    said = trained(*typed, "run_dir=run", cwd=photos)
    assert "augment.batch.crop_scale=null, a shift instead (auto): a shift was typed" in said
    assert stored(photos / "run")[1:] == (None, 0.25)
    both = vit_train_here(*typed, "augment.batch.crop_scale=[0.5,1]", "run_dir=both", cwd=photos)
    assert both.code == 2
    assert "augment.batch.max_shift=0.25: crops replace shifts; type only one of the two" in both.err
    trained(*typed, "augment.batch.max_shift=0", "run_dir=still", cwd=photos)
    assert stored(photos / "still")[1:] == ([0.35, 1.0], 0)


def test_a_sweep_may_hold_auto_beside_numbers(photos):
    trained("-m", *SMALL, "data.img_size=32", "trainer.max_steps=1", "optimizer.lr=auto,1e-3", cwd=photos)
    runs = sorted((photos / "sweeps").glob("*/*/config.yaml"))
    assert [stored(path.parent)[0] for path in runs] == [5e-4, 1e-3]
