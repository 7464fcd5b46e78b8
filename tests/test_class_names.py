"""Class names are text: however a program composed their letters, they are one name in every command."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from conftest import TINY, change_states, load_trained, typed_here, vit_train_here, whole_state
from PIL import Image

from vit_train.cli import data_command as data_command
from vit_train.cli import evaluate, explain, predict
from vit_train.data import ImageFolder
from vit_train.data.folder.check import check_folder
from vit_train.errors import DataError
from vit_train.training.objective import CrossEntropy

COMPOSED, APART = "B\u00e4r", "Ba\u0308r"  # as Linux and Windows type it, and as a Mac's zip unpacks
SETTINGS = (
    *(setting for setting in TINY if not setting.startswith("data.limit")),
    *("data=imagefolder", "data.in_channels=1", "data.batch_size=4", "model=vit_digits"),
    *("trainer.epochs=1", "trainer.precision=fp32", "augment=none"),
)


def fill(folder, *classes, count=6):
    for shade, name in enumerate(sorted(classes, key=lambda name: unicodedata.normalize("NFC", name))):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([shade, i]).integers(60 * shade, 60 * shade + 90, (8, 8))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def made(root, *, training=True):
    data = ImageFolder(root=str(root), num_workers=0, batch_size=4, cache="none")
    data.setup(device=torch.device("cpu"), rank=0, world_size=1, training=training)
    return data


@pytest.fixture(scope="module")
def mac(tmp_path_factory):
    """A run on a Mac's folder, with the folder and the same images from elsewhere beside it."""
    home = tmp_path_factory.mktemp("mac")
    fill(home / "mac", APART, "Fuchs", "Hund")
    fill(home / "other", COMPOSED, "Fuchs", "Hund")
    done = vit_train_here(*SETTINGS, "data.root=mac", "run_dir=run", cwd=home)
    assert done.code == 0, done.err
    return home


# ------------------------------------------------------------------------------------------------ one folder
@pytest.mark.parametrize(("train", "val"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_splits_from_two_systems(tmp_path, train, val):
    fill(tmp_path / "train", train, "Fuchs", "Hund")
    fill(tmp_path / "val", "Hund", val, "Fuchs", count=2)
    data = made(tmp_path)
    assert data.class_names == [COMPOSED, "Fuchs", "Hund"]
    assert data.sources["val"].targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.source("val", 0) == f"{tmp_path}/val/{val}/0.png"
    assert data.source("train", 0) == f"{tmp_path}/train/{train}/0.png"
    assert not [note for note in data.notes if "no validation image" in note]
    evaluated = made(tmp_path, training=False)
    assert (evaluated.class_names, evaluated.fingerprint()) == (data.class_names, data.fingerprint())
    report = check_folder(str(tmp_path), num_workers=0)
    assert report.problems == []
    assert {finding.kind for finding in report.warnings} == {"leak"}
    assert report.counts == {
        "train": {COMPOSED: 6, "Fuchs": 6, "Hund": 6},
        "val": {COMPOSED: 2, "Fuchs": 2, "Hund": 2},
    }


def test_two_folders_that_are_one_class(tmp_path):
    fill(tmp_path / "train", APART, COMPOSED, "Hund")
    line = (
        f"{tmp_path}/train holds 'Ba\\u0308r' and 'B\\xe4r', the same name in two Unicode forms: put the "
        "images of both into one of them"
    )
    for training in (True, False):
        with pytest.raises(DataError) as raised:
            made(tmp_path, training=training)
        assert str(raised.value) == line
    report = check_folder(str(tmp_path), num_workers=0)
    assert [(finding.kind, finding.text) for finding in report.problems] == [("layout", line)]
    assert report.warnings == []
    assert report.counts["train"] == {COMPOSED: 12, "Hund": 6}
    done = typed_here(data_command.main, "stats", tmp_path, cwd=tmp_path)
    assert (done.code, done.err) == (3, f"vit-data: error: {line}\n")


@pytest.mark.parametrize("name", ["Bar", COMPOSED, APART])
def test_runs_of_older_versions_find_their_data_the_same(tmp_path, name):
    """The names and sizes stored of it then, as they are on the disk."""
    fill(tmp_path, name, "Biene")
    data, classes = made(tmp_path), sorted([name, "Biene"])
    digest = hashlib.sha256(json.dumps(classes).encode())
    for split, source in data.sources.items():
        digest.update(f"\0{split}\0".encode())
        for file in source.names:
            digest.update(f"{file}\0{(tmp_path / file).stat().st_size}\0".encode())
    assert data.fingerprint() == digest.hexdigest()
    assert data.class_names == [unicodedata.normalize("NFC", each) for each in classes]


# ---------------------------------------------------------------------------------------------- the commands
def test_a_run_on_a_mac_s_folder_stores_the_composed_name(mac):
    [checkpoint] = (mac / "run/checkpoints").glob("step_*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["inference"]["class_names"] == [COMPOSED, "Fuchs", "Hund"]


def evaluated(mac, *arguments, run="run"):
    done = typed_here(evaluate.main, run, "--split", "train", *arguments, "--json", "report.json", cwd=mac)
    assert done.code == 0, done.err
    report = json.loads((mac / "report.json").read_text())
    return report["confusion"], report["loss"], report["top1"]


def test_evaluation_on_the_folder_of_another_system(mac):
    assert evaluated(mac, "data.root=other") == evaluated(mac)


def test_other_commands_take_the_name_in_both_spellings(mac):
    trained = load_trained(mac / "run", device=torch.device("cpu"))
    assert [explain.class_id(trained, name) for name in (COMPOSED, APART)] == [0, 0]
    for name in (COMPOSED, APART):
        weighted = CrossEntropy(trained.class_names, [6, 6, 6], class_weights={name: 3.0})
        assert weighted.weight.tolist() == [3.0, 1.0, 1.0]


def test_weights_of_another_system_keep_their_head(mac):
    arguments = ("data.root=other", "init_from=run", "run_dir=tuned", "trainer.max_steps=1")
    done = vit_train_here(*SETTINGS, *arguments, cwd=mac)
    assert done.code == 0, done.err
    assert "weights from" in " ".join(done.out.split())
    assert "made anew" not in done.out


@pytest.fixture
def older(mac):
    """The run as an older version wrote it."""
    run = mac / "older"
    shutil.copytree(mac / "run", run, symlinks=True)
    change_states(run, lambda state: state["inference"].update(class_names=[APART, "Fuchs", "Hund"]))
    yield run
    shutil.rmtree(run)


def test_a_run_of_an_older_version_is_evaluated_on_any_folder(mac, older):
    expected = evaluated(mac)
    assert evaluated(mac, run="older") == expected
    assert evaluated(mac, "data.root=other", run="older") == expected


def test_a_run_of_an_older_version_continues(mac, older):
    shutil.copytree(mac / "run", mac / "newer", symlinks=True)
    for run in ("newer", "older"):
        done = vit_train_here(f"resume={run}", "trainer.epochs=2", cwd=mac)
        assert done.code == 0, done.err
    assert whole_state(older) == whole_state(mac / "newer")


def test_a_run_of_an_older_version_continues_on_changed_data(mac, older):
    change_states(older, lambda state: state.update(dataset_fingerprint="0" * 64))
    done = vit_train_here("resume=force", "run_dir=older", "trainer.epochs=2", cwd=mac)
    assert done.code == 0, done.err
    assert "the data has changed since the run was started" in " ".join(done.out.split())


def test_no_name_is_a_formula_in_a_spreadsheet(tmp_path):
    """In all three files of CSV; the names of classes and images come from whoever made the folder."""
    names = ["=2+5", "+A1", "@SUM(1)", "-x", "\tend", "-5", "plain"]
    fill(tmp_path / "photos", *names)
    settings = (*SETTINGS, "data.root=photos", "data.val_fraction=0.34", "run_dir=run")
    done = vit_train_here(*settings, cwd=tmp_path)
    assert done.code == 0, done.err
    evaluated = typed_here(evaluate.main, "run", "--split", "val", "--out", "report", cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    shutil.copy(tmp_path / "photos/plain/0.png", tmp_path / "=A2.png")
    predicted = typed_here(predict.main, "run", "=A2.png", "--format", "csv", "--top-k", "7", cwd=tmp_path)
    assert predicted.code == 0, predicted.err
    texts = [predicted.out, *(path.read_text() for path in sorted((tmp_path / "report").glob("*.csv")))]
    assert len(texts) == 3
    cells = [cell for text in texts for row in csv.reader(io.StringIO(text)) for cell in row]
    assert "'=A2.png" in cells
    for name in names[:4]:
        assert {cell for cell in cells if cell in (name, f"'{name}")} == {f"'{name}"}
    assert "-5" in cells, "numbers stay numbers"
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@", "\t")]
