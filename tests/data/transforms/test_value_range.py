"""Pictures deeper than 8 bits: one range for a data set, found on train, kept by everything that comes after."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, load_trained, vit_train_here
from PIL import Image

from vit_train.cli import data_command as vit_data
from vit_train.cli import evaluate
from vit_train.cli import export as vit_export
from vit_train.cli import predict as vit_predict
from vit_train.data import ImageFolder
from vit_train.data.folder.check import check_folder
from vit_train.inference import trained

SETTINGS = (
    *(setting for setting in TINY if not setting.startswith(("data.limit", "data.batch_size"))),
    *("data=imagefolder", "data.in_channels=1", "data.img_size=8", "data.batch_size=40", "trainer.epochs=1"),
    *("model=vit_digits", "run_dir=run"),
)
LARGEST = 4031


@pytest.fixture(params=["png", "tif", "float"])
def folder(request, tmp_path):
    """80 pictures of 12 bits, or the same as floats: half of them dark."""
    random_state = np.random.RandomState(0)
    for label, most in (("bright", LARGEST), ("dark", LARGEST // 4)):
        place = tmp_path / "photos" / label
        place.mkdir(parents=True)
        for i in range(40):
            values = (most * random_state.uniform(0.5, 1, (12, 12))).astype(np.uint16)
            values[0, 0] = most
            if request.param == "float":
                Image.fromarray(values / np.float32(LARGEST)).save(place / f"{i}.tif")
            else:
                Image.fromarray(values).save(place / f"{i}.{request.param}")
    return tmp_path / "photos"


def set_up(root, **settings):
    data = ImageFolder(root=str(root), in_channels=1, num_workers=0, **settings)
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    return data


def test_the_range_is_found_and_said(folder):
    data = set_up(folder)
    white, largest = (
        (1, 1) if data.source("train", 0).endswith("tif") and data.value_range[1] < 2 else (4095, LARGEST)
    )
    assert data.value_range == (0, white)
    assert any(
        note
        == f"data.value_range=[0, {white}]: deeper than 8 bits; the largest value of 64 files is {largest}"
        for note in data.notes
    )
    brightest = [float(data.sources["train"].read(i).getextrema()[1]) for i in range(72)]
    for level, target in zip(brightest, data.sources["train"].targets.tolist(), strict=True):
        assert level == pytest.approx((255, 64)[target] * (LARGEST / 4095 if white > 1 else 1), abs=1)


def test_a_range_that_is_typed_is_taken(folder):
    data = set_up(folder, value_range=(0.0, 65535.0))
    assert data.value_range == (0, 65535)
    assert not any("value_range" in note for note in data.notes)
    for wrong in ((1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="value_range must be black and a larger white"):
            ImageFolder(value_range=wrong)


def test_a_run_keeps_the_range_for_everything_that_comes_after(folder, tmp_path, monkeypatch, capsys):
    assert vit_train_here(*SETTINGS, f"data.root={folder}", cwd=tmp_path).code == 0
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    kept = config["data"]["value_range"]
    assert kept[0] == 0
    model = load_trained(tmp_path / "run", device=torch.device("cpu"))
    assert model.value_range == tuple(kept)

    # another folder, of dark pictures only: they are no brighter for it
    dark = tmp_path / "dark" / "dark"
    dark.mkdir(parents=True)
    for file in (folder / "dark").iterdir():
        (dark / file.name).write_bytes(file.read_bytes())
    arguments = ["run", f"data.root={tmp_path / 'dark'}", "--split", "all", "--json", "eval.json"]
    assert evaluate.main(arguments) == 0
    capsys.readouterr()
    assert vit_predict.main(["run", str(dark), "--format", "jsonl", "--top-k", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [-np.log(next(c["probability"] for c in x["predictions"] if c["class"] == "dark")) for x in lines]
    loss = json.loads((tmp_path / "eval.json").read_text())["loss"]
    assert np.mean(right) == pytest.approx(loss, abs=1e-4)

    # continued, it is adopted, also where the command does not say it
    done = vit_train_here(*SETTINGS, f"data.root={folder}", "trainer.epochs=2", cwd=tmp_path)
    assert done.code == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["value_range"] == kept
    assert vit_export.main(["run", "--format", "pth", "--out", "model.pth"]) == 0
    about = torch.load("model.pth", weights_only=True)["vit_train"]
    about = json.loads(about) if isinstance(about, str) else about
    assert [*about["value_range"]] == kept
    assert f"scaled from 0 to {kept[1]:g}" in about["input"]


@pytest.mark.parametrize("lie", [[1, 0], [0, float("nan")], [0], "all", [0, "1"], {"a": 1}])
def test_a_stored_range_is_checked(lie):
    with pytest.raises(ValueError, match=r"data\.value_range is"):
        trained._range(lie)


def test_eight_bits_have_none(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(5):
            Image.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8)).save(tmp_path / label / f"{i}.png")
    data = set_up(tmp_path)
    assert data.value_range is None
    assert not any("value_range" in note for note in data.notes)


# ------------------------------------------------------------------------------------------------ check and stats
def test_check_and_stats_say_what_is_odd_about_the_brightness(folder, capsys):
    suffix = next((folder / "dark").iterdir()).suffix
    with Image.open(folder / "bright" / f"0{suffix}") as image:
        values = np.asarray(image)
    Image.fromarray(values // 1000 if values.dtype != np.float32 else values / 400).save(
        folder / "dark" / f"x{suffix}"
    )
    Image.fromarray(np.full_like(values, values.max())).save(folder / "dark" / f"y{suffix}")
    report = check_folder(str(folder), num_workers=0)
    odd = {f.text: [i.files[0] for i in f.items] for f in report.warnings if f.kind == "brightness"}
    assert f"dark/y{suffix}" in next(files for text, files in odd.items() if "nearly constant" in text)
    assert sum(map(len, odd.values())) == 2
    assert any(note.startswith("data.value_range=[0, ") for note in report.notes)
    assert vit_data.main(["stats", str(folder), "--json", "-"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes[0].startswith("data.value_range=[0, ")
