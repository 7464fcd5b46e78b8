"""`vit-export`: files beside the run, described, replaced only by something better; clear refusals."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from conftest import (
    TINY,
    change_states,
    command,
    environment,
    everything_in,
    load_trained,
    typed_here,
    vit_train_here,
)

from vit_train.cli import export


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """An epoch on the embedded digits, with averaged weights."""
    home = tmp_path_factory.mktemp("digits")
    done = vit_train_here(*TINY, "trainer.epochs=1", "run_dir=run", "name=my digits", cwd=home)
    assert done.code == 0, done.err
    return home / "run"


@pytest.fixture
def run(trained_run, in_tmp):
    """A copy of it, at `run` in an empty working directory."""
    shutil.copytree(trained_run, in_tmp / "run", symlinks=True)
    return Path("run")


@pytest.fixture
def typed(in_tmp):
    return functools.partial(typed_here, export.main, cwd=in_tmp)


def assert_refused(done, code, *words):
    assert (done.code, done.out) == (code, "")
    assert re.fullmatch(r"vit-export: error: [^\n]+\n", done.err), done.err
    for word in words:
        assert word in done.err, f"{word!r} is not said in: {done.err}"


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def files_beside(run):
    return names_in(run / "export")


# --------------------------------------------------------------------------------------------------- the files
def test_an_onnx_file_answers_as_the_model_does(typed, run):
    done = typed("run", "--format", "onnx")
    assert (done.code, done.err) == (0, "")
    assert files_beside(run) == ["my_digits.onnx", "my_digits.onnx.json"]
    assert re.search(r"checked  1, 3, 17 images: largest difference of a logit \de-0\d ", done.out)
    assert "file     run/export/my_digits.onnx  (" in done.out
    about = json.loads((run / "export/my_digits.onnx.json").read_text())
    trained = load_trained(run, device=torch.device("cpu"))
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert (about["weights"], about["step"], about["format"]) == ("ema", trained.step, "onnx")
    images = torch.randn(4, about["in_channels"], about["img_size"], about["img_size"])
    with torch.no_grad():
        expected = trained.model(images)
    session = onnxruntime.InferenceSession(run / "export/my_digits.onnx")
    (got,) = session.run(None, {"images": images.numpy()})
    assert (torch.from_numpy(got) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("file_format", ["pt2", "safetensors", "pth"])
def test_other_formats(typed, run, file_format):
    done = typed("run", "--format", file_format, "--out", f"new/folder/x.{file_format}")
    assert (done.code, done.err) == (0, "")
    assert names_in("new/folder") == [f"x.{file_format}", f"x.{file_format}.json"]
    assert not (run / "export").exists()
    assert "largest difference of a logit 0 (" in done.out


def test_weights_and_names(typed, run):
    assert typed("run", "--format", "pth", "--weights", "raw", "--names", "timm").code == 0
    about = json.loads((run / "export/my_digits.pth.json").read_text())
    assert (about["weights"], about["names"]) == ("raw", "timm")
    exported = torch.load(run / "export/my_digits.pth", weights_only=True)["state_dict"]
    raw = load_trained(run, device=torch.device("cpu"), weights="raw").model.state_dict()
    ema = load_trained(run, device=torch.device("cpu"), weights="ema").model.state_dict()
    assert all(torch.equal(exported[name], raw[name]) for name in raw)
    assert any(not torch.equal(exported[name], ema[name]) for name in ema)


def test_a_checkpoint_is_exported_into_its_run(typed, run):
    checkpoint = next((run / "checkpoints").glob("step_*"))
    before = everything_in(checkpoint)
    assert typed(str(checkpoint), "--format", "pth").code == 0
    assert files_beside(run) == ["my_digits.pth", "my_digits.pth.json"]
    assert everything_in(checkpoint) == before
    Path("copies").mkdir()
    shutil.copytree(checkpoint, "copies/mine")
    assert typed("copies/mine", "--format", "pth").code == 0
    assert files_beside(Path("copies")) == ["my_digits.pth", "my_digits.pth.json"]


def test_the_name_of_a_run_chooses_no_folder(trained_run):
    trained = load_trained(trained_run, device=torch.device("cpu"))
    for name, file in (
        ("../../x", "x"),
        ("a/b\x1b[2J", "a_b_2J"),
        ("..", "model"),
        (None, "model"),
        ("n" * 999, "n" * 100),
    ):
        trained.config["name"] = name
        assert export._default(Path("run"), trained, "onnx") == Path(f"run/export/{file}.onnx")


def test_a_file_is_replaced_by_the_new_one(typed, run):
    Path("old.pth").write_text("old")
    assert typed("run", "--format", "pth", "--out", "old.pth").code == 0
    assert "state_dict" in torch.load("old.pth", weights_only=True)
    assert names_in(".") == ["old.pth", "old.pth.json", "run"]


# ---------------------------------------------------------------------------------------------------- refusals
def test_a_diverged_model_is_refused_and_the_old_file_stays(typed, run, monkeypatch):
    """No stored run holds NaN, so the weights are spoilt on their way from the checkpoint to the file."""
    Path("old.pth").write_text("old")
    load_run = export.command.load_run

    def spoilt(*arguments):
        trained = load_run(*arguments)
        with torch.no_grad():
            next(trained.model.parameters()).fill_(float("nan"))
        return trained

    monkeypatch.setattr(export.command, "load_run", spoilt)
    done = typed("run", "--format", "pth", "--out", "old.pth")
    assert_refused(done, 5, "differ from the model's by nan")
    assert Path("old.pth").read_text() == "old"
    assert names_in(".") == ["old.pth", "run"]


@pytest.mark.skipif(os.name == "nt", reason="needs a folder that cannot be written")
def test_a_folder_that_cannot_be_written_is_one_line(typed, run):
    Path("file").touch()
    done = typed("run", "--format", "pth", "--out", "file/x.pth")
    assert_refused(done, 2, "--out file/x.pth cannot be made in ")
    if os.geteuid() != 0:  # root writes anywhere
        Path("locked").mkdir(mode=0o500)
        assert_refused(typed("run", "--format", "pth", "--out", "locked/x.pth"), 2, "cannot be made in ")
        assert names_in("locked") == []
    (run / "export/my_digits.pth.json").mkdir(parents=True)  # where the description goes
    assert_refused(typed("run", "--format", "pth"), 5, "run/export/my_digits.pth cannot be written: ")


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_what_is_no_plain_file_stays_what_it_is(typed, run):
    """Refused before RUN is even looked for; a link in a run that came from elsewhere is not followed."""
    os.mkfifo("pipe")
    Path("mine").write_text("mine")
    Path("link").symlink_to("mine")
    for name in ("pipe", "link", "/dev/null", "run/"):
        done = typed("nowhere", "--format", "pth", "--out", name)
        assert_refused(done, 2, f"--out {name} is not a plain file")
    assert Path("pipe").is_fifo()
    assert Path("link").is_symlink()
    assert Path("mine").read_text() == "mine"
    Path("outside").mkdir()
    (run / "export").symlink_to(Path("outside").absolute())
    assert_refused(typed("run", "--format", "pth"), 2, "run/export is a link", "--out")
    assert names_in("outside") == []


def test_no_image_and_no_file_of_a_run_is_replaced(typed, run):
    """Not by the description either, which is called as the file and .json."""
    (run / "result.json").unlink()  # a run that is not at its end would be, had it one
    before = everything_in(Path())
    for out, words in (
        ("new.JPG", "--out new.JPG names an image"),
        ("run/config.yaml", "--out run/config.yaml is a file of a run"),
        ("run/run", "--out run/run.json is a file of a run"),
        ("run/result", "--out run/result.json is a file of a run"),
    ):
        assert_refused(typed("run", "--format", "pth", "--out", out), 2, words)
    assert everything_in(Path()) == before


def test_what_cannot_be_meant(typed, run):
    before = everything_in(run)
    assert_refused(typed("run", "--format", "onnx", "--names", "timm"), 2, "--names is for weight files")
    assert_refused(typed("run", "--format", "pth", "--out", "run"), 2, "--out run is not a plain file")
    assert_refused(typed("run", "--format", "pth", "--names", "swin"), 2, "timm's names")
    assert_refused(typed("nowhere", "--format", "pth"), 4, "nowhere does not exist")
    assert everything_in(run) == before


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("inference", {"std": [0]}),
        ("inference", {"std": [10**400]}),
        ("inference", {"mean": [10**400]}),
        ("train", {"step": "abc"}),
        ("train", {"step": 10**400}),
    ],
)
def test_figures_that_cannot_be_are_refused(typed, run, part, change):
    change_states(run, lambda state: state[part].update(change))
    done = typed("run", "--format", "pth")
    assert_refused(done, 4, "does not describe a model that can be built")


def test_a_damaged_checkpoint_is_refused_or_said(typed, run):
    for file in run.glob("checkpoints/step_*/ema.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert_refused(typed("run", "--format", "pth"), 4, "ema.safetensors")
    assert not (run / "export").exists()


def test_usage():
    for arguments, word in (((), "RUN"), (("run",), "--format"), (("run", "--format", "zip"), "onnx")):
        done = subprocess.run(
            command("vit_train.cli.export", *arguments), env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 2
        assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from vit_train.cli import export\n"
        "try: export.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "vit-export" in done.stdout
