"""docs/PYTHON.md, and that the door says what the commands say."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_states, environment, typed_here, vit_train_here
from PIL import Image
from torchvision.models import swin_t

import vit_train
from vit_train.cli import predict
from vit_train.errors import CheckpointError, ConfigError, DataError

PAGE = Path(__file__).parents[1] / "docs/PYTHON.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run on colour images of odd sizes, some of them with transparency."""
    folder = tmp_path_factory.mktemp("door")
    generator = np.random.default_rng(0)
    for label in ("cat", "dog", "owl"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(6):
            height, width = generator.integers(17, 70, 2)
            pixels = generator.integers(0, 256, (height, width, 3 + i % 2), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    small = "model.depth=1 model.embed_dim=24 model.num_heads=2 model.patch_embed.widths=[8,24]"
    done = vit_train_here(
        *["data=imagefolder", "data.root=images", "data.img_size=32", "model=vit_cifar", "augment=medium"],
        *f"{small} data.batch_size=6 trainer.epochs=1 strategy=one_thread trainer.precision=fp32 trainer.ema_decay=null run_dir=run".split(),
        cwd=folder,
    )
    assert done.code == 0, done
    return folder


def files_of(folder):
    return sorted((folder / "images").rglob("*.png"))


def test_the_page(tmp_path):
    """Its blocks one after another, in a new process, beside the run it speaks of."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment(), text=True, timeout=300)
    run([sys.executable, "-m", "vit_train", "run_dir=runs/digits", "trainer.epochs=20"], check=True)
    done = run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    answers = [line.split() for line in lines[:5]]
    # the digits begin with one image of each
    assert [label for label, _, _ in answers] == [index for _, _, index in answers] == list("01234")
    assert lines[5] == "torch.Size([5, 64]) [0 1 2 3 4]"
    assert lines[6] == "0"
    assert int(lines[7]) == sum(p.numel() for p in swin_t(num_classes=10).parameters())
    assert "runs/nowhere does not exist" in lines[8]


def test_importing_it_loads_no_torch():
    code = "import sys, vit_train; print('torch' in sys.modules, vit_train.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", vit_train.__version__]


def test_it_answers_as_the_command_does(trained):
    files = files_of(trained)
    done = typed_here(predict.main, "run", "images", "--top-k", "3", "--format", "jsonl", cwd=trained)
    said = [json.loads(line)["predictions"] for line in done.out.splitlines()]
    model = vit_train.load(trained / "run")
    answers = model.predict(path for path in files)
    assert len(answers) == len(said) == 18
    for answer, (best, *_) in zip(answers, said):
        assert (answer.label, round(answer.probability, 4)) == (best["class"], round(best["probability"], 4))
        assert answer.label == model.class_names[answer.probabilities.argmax()]
        assert answer.probabilities.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("form", ["text", "pillow", "array"])
def test_an_image_in_any_form(trained, form):
    """Files with transparency included, which an array of three channels cannot show."""
    files = [file for file in files_of(trained) if form != "array" or Image.open(file).mode == "RGB"]
    forms = {"text": str, "pillow": Image.open, "array": lambda file: np.asarray(Image.open(file))}
    model = vit_train.load(trained / "run")
    given = [forms[form](file) for file in files]
    for image, file in zip(given, files):
        assert torch.equal(model.transform(image), model.transform(file))
    [answer] = model.predict(given[0])
    assert answer.probabilities.tolist() == model.predict(files[0])[0].probabilities.tolist()


def test_features_are_what_the_head_sees(trained):
    model = vit_train.load(trained / "run", device="cpu")
    files = files_of(trained)[:5]
    features = model.features(files)
    with torch.inference_mode():
        logits = model.model.head(features)
    expected = torch.stack([answer.probabilities for answer in model.predict(files)])
    assert features.shape == (5, 24)
    torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-4, atol=1e-5)
    assert not model.model.head._forward_pre_hooks


def test_features_can_be_trained_on(trained):
    model = vit_train.load(trained / "run")
    features = model.features(files_of(trained)[:6])
    probe = torch.nn.Linear(features.shape[1], 3)
    probe(features).sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "PA", "1", "I;16"])
def test_a_pillow_image_of_any_mode(trained, mode):
    model = vit_train.load(trained / "run")
    image = Image.new("RGB", (40, 30), (200, 60, 20)).convert(mode if mode != "I;16" else "L")
    image = image.convert(mode) if mode == "I;16" else image
    assert model.transform(image).shape == (3, 32, 32)


def test_more_than_a_batch(trained):
    model = vit_train.load(trained / "run")
    files = files_of(trained) * 4
    assert len(files) > 64
    answers = model.predict(files)
    assert [a.label for a in answers] == [a.label for a in model.predict(files[:18])] * 4


NOT_IMAGES = {
    "float": np.zeros((8, 8, 3)),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "one channel": np.zeros((8, 8, 1), np.uint8),
    "nothing": np.zeros((0, 8, 3), np.uint8),
    "a batch": np.zeros((2, 8, 8, 3), np.uint8),
    "a tensor": torch.zeros(3, 8, 8, dtype=torch.uint8),
    "bytes": [b"GIF89a"],
    "none": None,
    "none among others": [None],
    "a number": 3,
    "a list of lists": [["a.png"]],
    "deep": Image.new("F", (8, 8)),
    "none at all": [],
    "a folder": "images/cat",
}


@pytest.mark.parametrize("given", NOT_IMAGES)
def test_what_is_not_an_image_is_one_line(trained, monkeypatch, given):
    monkeypatch.chdir(trained)
    model = vit_train.load("run")
    for ask in (model.predict, model.features):
        with pytest.raises(DataError) as raised:
            ask(NOT_IMAGES[given])
        assert "\n" not in str(raised.value)


def test_a_truncated_pillow_image_is_one_line(trained):
    file = trained / "cut.jpg"
    Image.effect_noise((60, 60), 90).save(file)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(DataError, match="cannot be used"):
        vit_train.load(trained / "run").predict(Image.open(file))


def test_a_damaged_best_checkpoint_is_said(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    steps = vit_train_here("resume=run", "trainer.epochs=2", cwd=tmp_path)
    assert steps.code == 0, steps
    weights = (tmp_path / "run" / "checkpoints" / "best").resolve() / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match=r"model.safetensors is damaged.*step_\d+ is used"):
        vit_train.load(tmp_path / "run")


@pytest.mark.parametrize("target", ["os.system", "mine.Model", "vit_train.system.durable.write"])
def test_a_stored_run_chooses_no_code(trained, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("open('called', 'w')\n")
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    node = {"_target_": target, "command": "touch called", "path": "called", "data": "x", "num_classes": 3}
    change_states(tmp_path / "run", lambda state: state["config"].update(model=node))
    with pytest.raises(CheckpointError, match="names code that is not vit-train's") as raised:
        vit_train.load("run")
    assert not (tmp_path / "called").exists()
    assert ("type trust=mine if the code is yours" in str(raised.value)) == (target == "mine.Model")


def test_what_is_wrong_is_one_line(trained, monkeypatch):
    monkeypatch.chdir(trained)
    model = vit_train.load("run")
    (trained / "broken.png").write_bytes(b"not an image")
    for error, words, call in (
        (CheckpointError, "nowhere does not exist", lambda: vit_train.load("nowhere")),
        (ConfigError, 'type device="auto"', lambda: vit_train.load("run", device="cuda:7")),
        (ConfigError, "trust=no_such_package", lambda: vit_train.load("run", trust="no_such_package")),
        (ConfigError, "is not one of auto, raw, ema", lambda: vit_train.load("run", weights="best")),
        (CheckpointError, 'give weights="raw"', lambda: vit_train.load("run", weights="ema")),
        (DataError, "broken.png is not an image", lambda: model.predict(["broken.png"])),
        (ConfigError, "swin_cifar, ", lambda: vit_train.make_model("swin_cifr")),
        (ConfigError, "did you mean 'vit_tiny.depth'?", lambda: vit_train.make_model("vit_tiny", dept=3)),
        (ConfigError, "None: no such model", lambda: vit_train.make_model(None)),
        (ConfigError, "nope", lambda: vit_train.make_model("vit_tiny", depth="${nope}")),
        (
            ConfigError,
            "not a supported",
            lambda: vit_train.make_model("vit_tiny", depth=torch.nn.Linear(1, 1)),
        ),
        (ConfigError, "does not divide img_size 100", lambda: vit_train.make_model("vit_tiny", img_size=100)),
    ):
        with pytest.raises(error) as raised:
            call()
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_key_reaches_what_refers_to_it():
    model = vit_train.make_model("vit_cifar", num_classes=3, img_size=32, embed_dim=48, num_heads=3, depth=2)
    assert model.patch_embed.embed_dim == 48
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    nested = vit_train.make_model("vit_tiny", img_size=64, depth=1, patch_embed={"patch_size": 8})
    assert nested.patch_embed.grid_size == (8, 8)


@pytest.mark.parametrize(("name", "side"), [("swin_cifar_w4", 32), ("vit_digits", 8), ("vit_tiny", 224)])
def test_the_usual_size_of_images(name, side):
    with torch.device("meta"):
        model = vit_train.make_model(name, in_channels=3)
        assert model(torch.empty(1, 3, side, side)).shape == (1, 1000)
