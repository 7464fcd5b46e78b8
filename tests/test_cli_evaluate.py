"""`vit-eval`: figures that agree with the run's own, other data matched by name, and clear refusals."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import TINY, Done, environment, everything_in, vit_train_here

from vit_train.cli import data as data_command
from vit_train.cli import evaluate


def vit_eval_here(*arguments, cwd):
    """`vit-eval` as if typed in `cwd`: its entry point, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        code = evaluate.main(list(arguments))
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on the embedded digits whose best checkpoint is not among the newest."""
    home = tmp_path_factory.mktemp("digits")
    done = vit_train_here(*TINY, "trainer.keep_checkpoints=2", "run_dir=run", cwd=home)
    assert done.code == 0, done.err
    assert json.loads((home / "run/result.json").read_text())["best/epoch"] < 3, "choose another seed"
    return home / "run"


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """The digits as an image folder."""
    root = tmp_path_factory.mktemp("folder") / "digits"
    assert data_command.main(["digits", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory, digits_folder):
    """An epoch on that folder: enough to know a few digits."""
    home = tmp_path_factory.mktemp("folder_run")
    done = vit_train_here(
        "data=imagefolder",
        f"data.root={digits_folder}",
        "data.in_channels=1",
        "model=vit_digits",
        "augment=none",
        "data.num_workers=0",
        "data.batch_size=16",
        "trainer.epochs=1",
        "trainer.ema_decay=null",
        "trainer.precision=fp32",
        "schedule=constant",
        "tracker.tensorboard=false",
        "run_dir=run",
        cwd=home,
    )
    assert done.code == 0, done.err
    return home / "run"


@pytest.fixture
def typed(in_tmp):
    """`vit-eval` in this process, in an empty directory."""
    return functools.partial(vit_eval_here, cwd=in_tmp)


def report_of(typed, run, *arguments):
    """The JSON report of a successful evaluation, and what was printed."""
    done = typed(str(run), *arguments, "--json", "report.json")
    assert (done.code, done.err) == (0, "")
    return json.loads(Path("report.json").read_text()), done.out


def assert_refused(done, code, *words):
    assert (done.code, done.out) == (code, "")
    assert re.fullmatch(r"vit-eval: error: [^\n]+\n", done.err), done.err
    for word in words:
        assert word in done.err, f"{word!r} is not said in: {done.err}"


# ------------------------------------------------------------------------------------------------ the figures
def test_it_repeats_the_figures_of_the_run(typed, digits_run, in_tmp):
    run = in_tmp / "run"
    shutil.copytree(digits_run, run, symlinks=True)
    result = json.loads((run / "result.json").read_text())
    done = typed("run")
    assert (done.code, done.err) == (0, "")
    report = json.loads((run / "eval_test.json").read_text())
    assert report["top1"] == result["test/top1"]
    assert report["top5"] == result["test/top5"]
    assert report["loss"] == result["test/loss"]
    assert (report["split"], report["weights"]) == ("test", "ema")
    assert report["step"] == 5 * result["best/epoch"], "not the best checkpoint"
    assert done.out.splitlines()[-1] == "report  run/eval_test.json"
    assert f"{100 * report['top1']:.2f}" in done.out
    assert "\x1b" not in done.out


def test_the_validation_split_and_the_raw_weights(typed, digits_run):
    result = json.loads((digits_run / "result.json").read_text())
    val, _ = report_of(typed, digits_run, "--split", "val")
    assert (val["images"], val["top1"]) == (144, result["best/val/top1"])
    raw, out = report_of(typed, digits_run, "--split", "val", "--weights", "raw")
    events = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    best = next(e for e in events if e["event"] == "epoch" and e["epoch"] == result["best/epoch"])
    assert (raw["weights"], raw["top1"], raw["loss"]) == ("raw", best["val_raw/top1"], best["val_raw/loss"])
    assert raw["loss"] != val["loss"]
    assert " raw " in out


def test_the_report_adds_up(typed, digits_run):
    report, _ = report_of(typed, digits_run)
    counts = report["confusion"]["counts"]
    per_class = report["per_class"]
    assert report["images"] == 360
    assert list(per_class) == [str(digit) for digit in range(10)]
    assert sum(map(sum, counts)) == 360
    assert [sum(row) for row in counts] == [entry["images"] for entry in per_class.values()]
    assert sum(counts[i][i] for i in range(10)) == pytest.approx(report["top1"] * 360)
    for i, entry in enumerate(per_class.values()):
        assert entry["top1"] == pytest.approx(counts[i][i] / entry["images"])
    assert len(report["dataset_fingerprint"]) == 64


def test_a_checkpoint_directory_is_a_run_too(typed, digits_run, in_tmp):
    last = digits_run / "checkpoints" / "step_00000015"
    before = everything_in(last)
    done = typed(str(last))
    assert (done.code, done.err) == (0, "")
    assert everything_in(last) == before, "a checkpoint is not a place for reports"
    assert list(in_tmp.iterdir()) == []
    report, _ = report_of(typed, last)
    assert (report["step"], Path(report["checkpoint"])) == (15, last)
    best, _ = report_of(typed, digits_run, "data.batch_size=7")
    assert best["top1"] == json.loads((digits_run / "result.json").read_text())["test/top1"]


# ------------------------------------------------------------------------------------------------ other data
def subset(source, target, classes):
    """Copies the test images of some classes as a folder without splits."""
    for name in classes:
        shutil.copytree(source / "test" / name, target / name)
    return target


def test_fewer_classes_are_matched_by_name(typed, folder_run, digits_folder, in_tmp):
    whole, _ = report_of(typed, folder_run)
    assert whole["top1"] > 0.2, "it has learned too little for a mismatch to show"
    # sorted, these are ids 0, 1, 2 of the folder and 3, 6, 7 of the model
    names = ["3", "6", "7"]
    other = subset(digits_folder, in_tmp / "other", names)
    done = typed(
        str(folder_run), f"data.root={other}", "data.val_fraction=0.5", "--split", "val", "--json", "r"
    )
    assert (done.code, done.err) == (0, "")
    part = json.loads(Path("r").read_text())
    assert list(part["per_class"]) == list(whole["per_class"])
    assert {name for name, entry in part["per_class"].items() if entry["images"]} == set(names)
    assert all(part["per_class"][name]["top1"] is None for name in "0124589")
    assert sum(entry["images"] for entry in part["per_class"].values()) == part["images"]

    # all images of these classes, as a test split: exactly the rows of the whole confusion matrix
    for name in names:
        (in_tmp / "again" / "train" / name).mkdir(parents=True)
        for image in list((digits_folder / "train" / name).iterdir())[:2]:
            shutil.copy(image, in_tmp / "again" / "train" / name)
    subset(digits_folder, in_tmp / "again" / "test", names)
    rows, _ = report_of(typed, folder_run, "data.root=again")
    for i, name in enumerate(whole["per_class"]):
        expected = whole["confusion"]["counts"][i] if name in names else [0] * 10
        assert rows["confusion"]["counts"][i] == expected


def test_a_class_the_model_does_not_know(typed, folder_run, digits_folder, in_tmp):
    subset(digits_folder, in_tmp / "other", ["3", "6"])
    (in_tmp / "other" / "6").rename(in_tmp / "other" / "six")
    done = typed(str(folder_run), "data.root=other", "--split", "val")
    assert_refused(done, 3, "class 'six' of the data", "it knows: 0, 1, 2")


def test_top5_says_nothing_of_fewer_than_six_classes(digits_folder, in_tmp):
    few = in_tmp / "few"
    subset(digits_folder, few / "train", ["1", "2", "3"])
    subset(digits_folder, few / "test", ["1", "2", "3"])
    done = vit_train_here(
        "data=imagefolder",
        "data.root=few",
        "data.in_channels=1",
        "model=vit_digits",
        "model.depth=1",
        "data.num_workers=0",
        "trainer.epochs=1",
        "tracker.tensorboard=false",
        "run_dir=run",
        cwd=in_tmp,
    )
    assert done.code == 0, done.err
    assert json.loads(Path("run/result.json").read_text())["test/top5"] is None
    assert vit_eval_here("run", cwd=in_tmp).code == 0
    report = json.loads(Path("run/eval_test.json").read_text())
    assert report["top5"] is None
    assert 0 <= report["top1"] <= 1


# -------------------------------------------------------------------------------------------------- refusals
def test_a_run_that_is_not_there(typed, in_tmp):
    (in_tmp / "empty").mkdir()
    assert_refused(typed("nowhere"), 4, "nowhere does not exist", "give a run directory")
    assert_refused(typed("empty"), 4, "empty holds no checkpoint")


def test_a_damaged_checkpoint_names_the_file(typed, digits_run, in_tmp):
    shutil.copytree(digits_run, in_tmp / "run", symlinks=True)
    for name in ("ema.safetensors", "state.json"):  # the order in which they are read, backwards
        file = in_tmp / "run" / "checkpoints" / "best" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert_refused(typed("run/checkpoints/best"), 4, f"/{name} is damaged", "SHA-256")
    # of a run the next valid one is used, and the damaged one is named
    done = typed("run")
    assert done.code == 0
    assert re.search(r"vit-eval: skipped: .* is damaged", done.err)


def test_unknown_keys(typed, digits_run, in_tmp):
    run = str(digits_run)
    before = everything_in(digits_run)
    assert_refused(typed(run, "data.rot=x"), 2, "data.rot: no such key", "choices: ", "batch_size")
    assert_refused(typed(run, "data.batchsize=4"), 2, "did you mean 'batch_size'?")
    assert_refused(typed(run, "optimizer.lr=1"), 2, "optimizer.lr: evaluation uses only")
    assert_refused(typed(run, "photos"), 2, "'photos': expected key=value")
    assert_refused(typed(run, "data.batch_size=x"), 2, "data.batch_size: expected int, got 'x'")
    assert_refused(typed(run, "data.batch_size=0"), 2, "batch_size must be ", "0")
    late = typed(run, "--json", "no/such/folder/r.json")  # its tables are printed by then
    assert_refused(late._replace(out=""), 2, "--json no/such/folder/r.json cannot be written")
    assert everything_in(digits_run) == before


def test_help_imports_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vit_train.cli.evaluate", "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, flags=re.MULTILINE))
    assert "vit_train.errors" in imported, "importtime says nothing"
    assert not {"torch", "sklearn", "matplotlib", "hydra"} & imported
    assert "RUN" in done.stdout
    assert "--weights" in done.stdout
