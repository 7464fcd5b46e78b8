"""Class weights for names that neither the command line nor YAML can take: from a file, in which all are text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import build, vit_train_here
from PIL import Image

WEIGHTS = {"été": 2.0, "true": 3.0, "1e3": 4.5, "null": 0.5, "a class": 1.0, "no": 2.5, "08": 3.5}
SETTINGS = (
    *("data=imagefolder", "data.root=d", "model=vit_digits", "augment=none", "data.img_size=8"),
    *("data.val_fraction=0", "tracker.tensorboard=false", "trainer.max_steps=1", "run_dir=run"),
)


@pytest.fixture
def folder(in_tmp):
    rng = np.random.default_rng(0)
    for name in WEIGHTS:
        Path("d", name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(Path("d", name, f"{i}.png"))
    lines = [
        f'"{name}": {weight}' if " " in name else f"{name}: {weight}" for name, weight in WEIGHTS.items()
    ]
    Path("my weights.yaml").write_text("\n".join(lines), encoding="utf-8")
    # a Mac's editor decomposes
    Path("w.json").write_text(json.dumps({"e\u0301te\u0301": 7, "08": "0.25"}, indent="\t"), encoding="utf-8")
    return in_tmp


def weights_with(*settings):
    trainer = build(*SETTINGS, *settings).trainer
    return dict(zip(trainer.parts.data.class_names, trainer.objective.weight.tolist()))


def test_every_name_gets_its_weight(folder):
    assert weights_with("objective.class_weights='my weights.yaml'") == WEIGHTS
    others = dict.fromkeys(WEIGHTS, 1.0)
    assert weights_with("objective.class_weights=w.json") == {**others, "été": 7.0, "08": 0.25}


def test_the_run_keeps_the_weights_and_not_the_file(folder):
    typed = "objective.class_weights=my weights.yaml"
    done = vit_train_here(*SETTINGS, typed, cwd=folder)
    assert done.code == 0, done.err
    stored = yaml.safe_load((folder / "run/config.yaml").read_text(encoding="utf-8"))
    assert stored["objective"]["class_weights"] == WEIGHTS
    done = vit_train_here(*SETTINGS, typed, "trainer.max_steps=2", cwd=folder)
    assert done.code == 0, done.err
    (folder / "my weights.yaml").unlink()
    done = vit_train_here("resume=run", "trainer.max_steps=3", cwd=folder)
    assert done.code == 0, done.err
    # and a stored configuration names no file to read
    stored["objective"]["class_weights"] = "w.json"
    (folder / "run/config.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    done = vit_train_here("resume=run", "trainer.max_steps=4", cwd=folder)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "objective.class_weights: 'w.json' is not one of auto" in done.err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            "{été:2}",
            [
                "objective.class_weights={",
                "if a class name cannot be typed, use a file",
                "objective.class_weights=FILE.yaml",
            ],
        ),
        ("{x:2}", ["class_weights names 'x', which is not a class", "objective.class_weights=FILE.yaml"]),
        ("gone.yaml", ["objective.class_weights=gone.yaml is not a file of `class: weight`", "No such file"]),
        ("broken.yaml", ["objective.class_weights=broken.yaml is not a file of `class: weight`"]),
        ("list.yaml", ["list.yaml is not a file of `class: weight`: expected one `name: weight` a line"]),
        ("empty.yaml", ["empty.yaml is not a file of `class: weight`: expected one `name: weight` a line"]),
        (
            "nested.yaml",
            ["nested.yaml is not a file of `class: weight`: expected one `name: weight` a line"],
        ),
        ("deep.yaml", ["deep.yaml is not a file of `class: weight`: maximum recursion"]),
        ("words.yaml", ["objective.class_weights=words.yaml is not", "could not convert string to float"]),
        ("low.yaml", ["objective.class_weights.no: must be greater than 0, got -1"]),
    ],
)
def test_what_cannot_be_weights_is_one_line(folder, typed, words):
    for name, text in (
        ("broken", "a: [1"),
        ("list", "- 1"),
        ("words", "no: many"),
        ("low", "no: -1"),
        ("empty", ""),
        ("nested", "a:\n  b: 1"),
        ("deep", "[" * 10_000),
    ):
        Path(f"{name}.yaml").write_text(text)
    done = vit_train_here(*SETTINGS, f"objective.class_weights={typed}", cwd=folder)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in done.err
    assert not Path("run").exists()
