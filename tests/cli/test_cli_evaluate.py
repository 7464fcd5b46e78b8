"""`vit-eval`: figures that agree with the run's own, other data matched by name, and clear refusals."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PATCHES,
    TINY,
    environment,
    everything_in,
    load_trained,
    typed_here,
    vit_train_here,
    whole_state,
)
from hydra import compose, initialize_config_dir
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_train.cli import data_command as data_command
from vit_train.cli import evaluate
from vit_train.config.check import config_dir, plain
from vit_train.errors import ConfigError, DataError
from vit_train.report.evaluation_files import FILES
from vit_train.system import faults


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on the embedded digits whose best checkpoint is not among the newest."""
    home = tmp_path_factory.mktemp("digits")
    # 80 images to train on, all of the others to evaluate
    images = ("data.limit=null", "data.train_fraction=0.062")
    settings = (*TINY, *PATCHES, *images, "trainer.keep_checkpoints=2", "run_dir=run")
    for seed in range(2, 12):  # of most, with any version of torch
        done = vit_train_here(*settings, f"seed={seed}", cwd=home)
        assert done.code == 0, done.err
        if json.loads((home / "run/result.json").read_text())["best/epoch"] < 3:
            break
        shutil.rmtree(home / "run")
    else:
        pytest.fail("the best checkpoint of every seed is the newest")
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
    return functools.partial(typed_here, evaluate.main, cwd=in_tmp)


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
    report = json.loads((run / "eval/test/report.json").read_text())
    assert report["top1"] == result["test/top1"]
    assert report["top5"] == result["test/top5"]
    assert report["loss"] == result["test/loss"]
    assert (report["split"], report["weights"]) == ("test", "ema")
    assert report["step"] == 5 * result["best/epoch"], "not the best checkpoint"
    assert done.out.splitlines()[-1] == "report  run/eval/test/report.html"
    assert {path.name for path in (run / "eval/test").iterdir()} == {*FILES}
    assert [path.name for path in (run / "eval").iterdir()] == ["test"], "something was left beside it"
    assert not (run / "tensorboard").exists(), "the run was trained without TensorBoard"
    assert f"{100 * report['top1']:.2f}" in done.out
    assert "\x1b" not in done.out


def test_the_validation_split_and_the_raw_weights(typed, digits_run):
    result = json.loads((digits_run / "result.json").read_text())
    val, _ = report_of(typed, digits_run, "--split", "val")
    assert (val["images"], val["top1"]) == (145, result["best/val/top1"])
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
    assert (
        report["dataset_fingerprint"]
        == json.loads((digits_run / "run.json").read_text())["dataset_fingerprint"]
    )
    assert sum(entry["images"] for entry in report["calibration"]) == 360


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
    assert_refused(
        done,
        3,
        "the model does not know class 'six' of the data",
        "the model knows: 0, 1, 2",
        "rename the folder, or leave it out",
    )


def test_of_many_unknown_classes_five_are_named() -> None:
    with pytest.raises(DataError) as error:
        evaluate.class_map(["Bird", "cat", "d", "e", "f", "g", "h"], ["bird", "cat"])
    named = "'Bird', 'd', 'e', 'f', 'g' and 1 more"
    assert f"the model does not know the classes {named} of the data" in str(error.value)
    assert "upper and lower case included" in str(error.value)
    with pytest.raises(DataError, match="classes 'a', 'c' of the data"):
        evaluate.class_map(["a", "b", "c"], ["b"])


def test_a_run_on_other_data_is_evaluated_on_a_folder(typed, digits_run, digits_folder, in_tmp):
    """The same digits as files give the figures of the embedded ones, which were read likewise."""
    own, _ = report_of(typed, digits_run)
    for overrides in (
        ["data=imagefolder", f"data.root={digits_folder}"],
        [f"data.root={digits_folder}", "data=imagefolder"],
    ):
        found, _ = report_of(typed, digits_run, *overrides)
        assert (found["split"], found["images"], found["data"]) == ("test", 360, str(digits_folder))
        assert (found["top1"], found["confusion"]) == (own["top1"], own["confusion"])
        assert found["loss"] == pytest.approx(own["loss"], rel=1e-5)
    subset(digits_folder, in_tmp / "flat", ["3", "6"])
    flat, _ = report_of(typed, digits_run, "data=imagefolder", "data.root=flat", "data.batch_size=7")
    assert flat["split"] == "all"
    assert flat["images"] == sum(own["per_class"][name]["images"] for name in ("3", "6"))


def test_a_folder_for_a_model_of_other_data_is_squashed_to_its_size() -> None:
    stored = {
        "_target_": "vit_train.data.Cifar10",
        "root": "data",
        "batch_size": 9,
        "num_workers": 0,
        "limit": 5,
    }
    inference = {"class_names": ["a"], "mean": [0.1] * 3, "std": [0.2] * 3, "img_size": 32, "in_channels": 3}
    found = evaluate.with_overrides({"data": stored}, ["data.root=x", "data=imagefolder"], inference)["data"]
    wanted = {"_target_": "vit_train.data.ImageFolder", "root": "x", "resize": "squash", "limit": None}
    kept = {"batch_size": 9, "num_workers": 0, **{k: v for k, v in inference.items() if k != "class_names"}}
    assert found == {**found, **wanted, **kept}
    assert "class_names" not in found
    assert evaluate.other_root({**found, "root": "data"}, stored) == Path("data"), "taken for the run's own"


@pytest.mark.parametrize("typed_value", ["1e3", "7", "null", "'7'", "[0,1e3]", "true", "a b", "{a: 1e3}"])
def test_a_value_means_what_it_means_to_vit_train(typed_value) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("train", overrides=[f"++data.worker_timeout_seconds={typed_value}"])
    stored = {"data": {"worker_timeout_seconds": 1}}
    found = evaluate.with_overrides(stored, [f"data.worker_timeout_seconds={typed_value}"], {})
    assert found["data"]["worker_timeout_seconds"] == plain(composed)["data"]["worker_timeout_seconds"]


def test_the_folder_of_a_run_is_still_its_own_when_it_is_called_a_folder(typed, folder_run):
    plain, _ = report_of(typed, folder_run)
    again, _ = report_of(typed, folder_run, "data=imagefolder")
    assert (again["split"], again["loss"]) == ("test", plain["loss"])


def test_other_data_that_is_no_folder(typed, digits_run):
    run = str(digits_run)
    assert_refused(typed(run, "data=cifar10"), 2, "data=cifar10: ", "type data=imagefolder data.root=")
    assert_refused(typed(run, "data.root=x"), 2, "type data=imagefolder data.root=x")
    assert_refused(typed(run, "data=imagefolder"), 3, "data.root is not set")
    assert_refused(typed(run, "strategy=ddp"), 2, "evaluation uses only data.*, strategy.*")


def test_images_the_run_was_trained_on_are_counted(typed, folder_run, digits_run, digits_folder, in_tmp):
    train, _ = report_of(typed, folder_run, "--split", "train")
    known = f"the model was trained on {train['images']:,} of these {train['images']:,} images"
    assert [note.split(":")[0] for note in train["notes"]] == [known]
    assert typed(str(folder_run), "--split", "all", "--out", "all").code == 0
    whole = json.loads(Path("all/report.json").read_text())
    known = f"the model was trained on {train['images']:,} of these 1,797 images"
    assert whole["notes"][0].startswith(known)
    assert known in Path("all/report.html").read_text()
    assert known in report_of(typed, folder_run, "--split", "all")[1]
    # more than the run took: which ones they were is not said
    some, _ = report_of(typed, digits_run, "--split", "train", "data.train_fraction=1.0")
    assert some["notes"][0].startswith("the model was trained on some of these 1,292 images")
    # a copy is the same data; other images are not
    shutil.copytree(digits_folder, in_tmp / "copy")
    assert report_of(typed, folder_run, "data.root=copy", "--split", "all")[0]["notes"] == whole["notes"]
    subset(digits_folder, in_tmp / "other", ["3", "6"])
    assert not any("trained on" in x for x in report_of(typed, folder_run, "data.root=other")[0]["notes"])
    assert report_of(typed, folder_run)[0]["notes"] == []


def test_of_few_images_each_one_counts(typed, folder_run, digits_folder, in_tmp):
    subset(digits_folder, in_tmp / "few", ["3"])
    images = len(list((in_tmp / "few").rglob("*.png")))
    shutil.copytree(in_tmp / "few" / "3", in_tmp / "few" / "6")
    for image in list((in_tmp / "few" / "6").iterdir())[40 - images :]:
        image.unlink()
    report, out = report_of(typed, folder_run, "data.root=few")
    assert report["images"] == 40
    assert "40 images only: a single one moves top-1 by 2.5 points" in report["notes"][-1]
    assert report["notes"][-1] in out


def test_a_limit_that_may_leave_out_images_is_noted(typed, digits_run, in_tmp):
    told = "data.limit=80 may leave out images: type data.limit=null to evaluate all of them"
    assert vit_train_here(*TINY, *PATCHES, "data.limit=80", "run_dir=limited", cwd=in_tmp).code == 0
    report, out = report_of(typed, Path("limited"))
    assert (report["images"], report["notes"][0]) == (80, told)
    assert told in out
    assert report_of(typed, Path("limited"), "data.limit=null")[0]["notes"] == []
    # 360 test images: nothing is left out
    assert report_of(typed, digits_run, "data.limit=400")[0]["notes"] == []
    report, _ = report_of(typed, digits_run, "data.limit=80", "trainer.precision=bf16")
    assert (report["images"], report["notes"][0], report["precision"]) == (80, told, "bf16")
    assert report_of(typed, digits_run, "trainer.precision=fp32")[0]["precision"] == "fp32"


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
    assert typed_here(evaluate.main, "run", cwd=in_tmp).code == 0
    report = json.loads(Path("run/eval/test/report.json").read_text())
    assert report["top5"] is None
    assert 0 <= report["top1"] <= 1


def test_all_of_a_flat_folder_is_evaluated(typed, folder_run, digits_folder, in_tmp):
    subset(digits_folder, in_tmp / "other", ["3", "6", "7"])
    images = len(list((in_tmp / "other").rglob("*.png")))
    report, out = report_of(typed, folder_run, "data.root=other")
    assert (report["split"], report["images"]) == ("all", images)
    assert f"other has no test or val split: all of its {images} images are evaluated" in out
    tenth, out = report_of(typed, folder_run, "data.root=other", "--split", "val")
    assert tenth["images"] < images / 5
    assert "all of its" not in out


def test_a_folder_with_nothing_but_a_split(typed, folder_run, digits_folder, in_tmp):
    """Somebody else's test folder: no train/, fewer classes, and one of them only."""
    whole, _ = report_of(typed, folder_run)
    subset(digits_folder, in_tmp / "theirs" / "test", ["6"])
    found, _ = report_of(typed, folder_run, "data.root=theirs")
    assert (found["split"], found["images"]) == ("test", whole["per_class"]["6"]["images"])
    assert found["confusion"]["counts"][6] == whole["confusion"]["counts"][6]
    assert found["macro"]["recall"] == found["per_class"]["6"]["recall"], "other classes count as 0"
    (in_tmp / "theirs" / "test").rename(in_tmp / "theirs" / "valid")
    again, _ = report_of(typed, folder_run, "data.root=theirs")
    assert (again["split"], again["images"], again["loss"]) == ("val", found["images"], found["loss"])
    refused = typed(str(folder_run), "data.root=theirs", "--split", "train")
    assert_refused(refused, 3, "no train images", "--split with one of val")


def rows_of(csv_file):
    with Path(csv_file).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("settings", [("data.batch_size=7",), ("data.batch_size=64", "data.num_workers=2")])
def test_every_image_of_every_split_once(typed, folder_run, digits_folder, settings):
    """Training images too, without augmentation and without a dropped tail."""
    done = typed(str(folder_run), "--split", "all", "--out", "report", *settings)
    assert (done.code, done.err) == (0, "")
    rows = rows_of("report/predictions.csv")
    assert sorted(row["file"] for row in rows) == sorted(map(str, digits_folder.rglob("*.png")))
    assert all(Path(row["file"]).parent.name == row["true"] for row in rows)
    parts = [report_of(typed, folder_run, "--split", split)[0] for split in ("train", "val", "test")]
    whole = json.loads(Path("report/report.json").read_text())
    assert whole["images"] == sum(part["images"] for part in parts) == 1797
    assert whole["top1"] * 1797 == pytest.approx(sum(part["top1"] * part["images"] for part in parts))


def test_training_images_are_those_the_run_was_trained_on(typed, digits_run):
    report, _ = report_of(typed, digits_run, "--split", "train")
    assert report["images"] == 80  # data.train_fraction
    assert report_of(typed, digits_run, "--split", "train", "data.train_fraction=1.0")[0]["images"] == 1292


# -------------------------------------------------------------------------------------------------- the files
def test_the_figures_are_those_of_scikit_learn(typed, folder_run):
    assert typed(str(folder_run), "--out", "deep/report").code == 0
    report = json.loads(Path("deep/report/report.json").read_text())
    rows = rows_of("deep/report/predictions.csv")
    true, predicted = ([row[key] for row in rows] for key in ("true", "predicted"))
    names = list(report["per_class"])
    figures = precision_recall_fscore_support(true, predicted, labels=names, zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "images"), figures):
        assert [entry[key] for entry in report["per_class"].values()] == pytest.approx(values.tolist()), key
    macro = precision_recall_fscore_support(true, predicted, labels=names, zero_division=0, average="macro")
    assert list(report["macro"].values()) == pytest.approx(macro[:3])
    assert report["confusion"]["counts"] == confusion_matrix(true, predicted, labels=names).tolist()
    assert report["top1"] == pytest.approx(accuracy_score(true, predicted))
    assert report["loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows]), rel=1e-5)
    wrong = sorted(-float(r["confidence"]) for r in rows if r["true"] != r["predicted"])
    assert [-entry["confidence"] for entry in report["mistakes"]] == pytest.approx(wrong[:25], abs=1e-6)
    first = report["mistakes"][0]
    assert {"file": first["file"], "true": first["true"], "predicted": first["predicted"]}.items() <= next(
        row for row in rows if row["file"] == first["file"]
    ).items()
    table = list(csv.reader(Path("deep/report/confusion.csv").read_text().splitlines()))
    assert table[0] == ["true class", *names]
    assert table[4] == [names[3], *map(str, report["confusion"]["counts"][3])]
    for name in ("confusion", "reliability", "mistakes"):
        picture = Image.open(f"deep/report/{name}.png").convert("L")
        assert min(picture.size) > 300
        assert len(set(picture.getdata())) > 20, "blank"


def test_a_later_report_replaces_an_earlier_one_whole_or_not_at_all(typed, folder_run, in_tmp):
    assert typed(str(folder_run), "--out", "report", "--split", "val").code == 0
    before = everything_in(in_tmp)
    faults.arm("write:0:50000:ENOSPC")
    try:
        done = typed(str(folder_run), "--out", "report")
    finally:
        faults.arm(None)
    assert_refused(done._replace(out=""), 2, "report cannot be written: No space left on device")
    assert everything_in(in_tmp) == before
    assert typed(str(folder_run), "--out", "report").code == 0
    assert json.loads(Path("report/report.json").read_text())["split"] == "test"
    assert [path.name for path in in_tmp.iterdir()] == ["report"]


def test_folders_of_the_same_name_have_reports_of_their_own(typed, folder_run, digits_folder, in_tmp):
    shutil.copytree(folder_run, in_tmp / "run", symlinks=True)
    for place, name in (("one", "3"), ("two", "6")):
        subset(digits_folder, in_tmp / place / "photos" / "test", [name])
        assert typed("run", f"data.root={place}/photos").code == 0
    assert typed("run", "--weights", "raw", "--tta", "hflip").code == 0
    names = sorted(path.name for path in Path("run/eval").iterdir())
    assert len(names) == 3
    assert [re.sub("-[0-9a-f]{6}_", "-#_", name) for name in names] == ["photos-#_test"] * 2 + [
        "test_hflip_raw"
    ]
    images = {json.loads((path / "report.json").read_text())["images"] for path in Path("run/eval").iterdir()}
    assert len(images) == 3


def test_mirrored_images_are_averaged_and_named(typed, folder_run):
    plain, _ = report_of(typed, folder_run)
    mirrored, out = report_of(typed, folder_run, "--tta", "hflip")
    assert (plain["tta"], mirrored["tta"]) == (None, "hflip")
    assert "hflip" in out
    assert mirrored["loss"] != plain["loss"]
    trained = load_trained(folder_run, device=torch.device("cpu"))
    _, data = evaluate.build_data(trained.config)
    images, targets = trained.batch_transform()(data.examples("test", 360), 0, 0)
    with torch.no_grad():
        mean = (trained.model(images).softmax(1) + trained.model(images.flip(-1)).softmax(1)) / 2
    assert mirrored["top1"] == pytest.approx((mean.argmax(1) == targets).float().mean().item())
    assert mirrored["loss"] == pytest.approx(-mean[range(360), targets].log().mean().item(), rel=1e-4)


def test_tensorboard_gets_a_run_beside_the_run_which_resumes_as_before(typed, digits_run, in_tmp):
    shutil.copytree(digits_run, in_tmp / "run", symlinks=True)
    shutil.copytree(digits_run, in_tmp / "plain", symlinks=True)
    (in_tmp / "run" / "tensorboard").mkdir()
    for _ in range(2):  # the second replaces the first
        assert typed("run").code == 0
    (events,) = Path("run/tensorboard/eval_test").iterdir()
    accumulator = EventAccumulator(str(events)).Reload()
    report = json.loads(Path("run/eval/test/report.json").read_text())
    scalars = {tag: accumulator.Scalars(tag)[0] for tag in accumulator.Tags()["scalars"]}
    expected = {
        **{f"eval/{k}": report[k] for k in ("top1", "top5", "loss", "ece")},
        "eval/macro_f1": report["macro"]["f1"],
    }
    assert {tag: scalar.value for tag, scalar in scalars.items()} == pytest.approx(expected)
    assert {scalar.step for scalar in scalars.values()} == {report["step"]}
    assert set(accumulator.Tags()["images"]) == {"eval/confusion", "eval/reliability", "eval/mistakes"}
    for run in ("run", "plain"):
        done = vit_train_here(f"resume={run}", "trainer.epochs=4", cwd=in_tmp)
        assert done.code == 0, done.err
    assert whole_state(in_tmp / "run") == whole_state(in_tmp / "plain")


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
    for value in ("!!bool maybe", "!!int ''", "!!timestamp abc", "[1", "1,2", "range(3)"):
        done = typed(run, f"data.batch_size={value}")
        assert_refused(done, 2, repr(f"data.batch_size={value}"), "expected key=value")
    for override in ("+data.limit=5", "++trainer.precision=fp32", "data.limit@data=5", "~data.limit"):
        assert_refused(typed(run, override), 2, f"{override!r}: expected key=value")
    assert_refused(typed(run, "data.rot=x"), 2, "data.rot: no such key", "choices: ", "batch_size")
    assert_refused(typed(run, "data.batchsize=4"), 2, "did you mean 'batch_size'?")
    assert_refused(
        typed(run, "optimizer.lr=1"),
        2,
        "optimizer.lr: evaluation uses only data.*, strategy.* and trainer.precision",
    )
    assert_refused(typed(run, "photos"), 2, "'photos': expected key=value")
    assert_refused(typed(run, "data.batch_size=x"), 2, "data.batch_size: expected int, got 'x'")
    assert_refused(typed(run, "data.batch_size=0"), 2, "data.batch_size: must be at least 1, got 0", "0")
    (in_tmp / "file").write_text("")
    assert_refused(typed(run, "--json", "file/r.json"), 2, "--json file/r.json cannot be made in")
    assert_refused(typed(run, "--out", "file/report"), 2, "file/report cannot be made in", "--out")
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "thesis.tex").write_text("")
    assert_refused(typed(run, "--out", "mine"), 2, "mine holds thesis.tex", "--out")
    assert everything_in(digits_run) == before


def test_what_is_no_plain_file_stays_what_it_is(typed, digits_run, in_tmp):
    """Refused before RUN is even looked for."""
    os.mkfifo("pipe")
    Path("mine").write_text("mine")
    Path("link").symlink_to("mine")
    for name in ("pipe", "link", "/dev/null", "."):
        assert_refused(typed("nowhere", "--json", name), 2, f"--json {name} is not a plain file")
    assert Path("pipe").is_fifo()
    assert Path("link").is_symlink()
    assert Path("mine").read_text() == "mine"
    run = shutil.copytree(digits_run, in_tmp / "run", symlinks=True)
    (run / "eval").symlink_to(in_tmp)
    assert_refused(typed("run"), 2, "run/eval is a link", "--out")


def test_a_tilde_is_the_home_directory(typed, digits_run, in_tmp, monkeypatch):
    monkeypatch.setenv("HOME", str(in_tmp / "home"))
    (in_tmp / "home").mkdir()
    assert typed(str(digits_run), "--out", "~/report", "--json", "~/new/folder/report.json").code == 0
    assert {path.name for path in (in_tmp / "home").iterdir()} == {"report", "new"}
    assert (in_tmp / "home/new/folder/report.json").is_file()
    assert not Path("~").exists()


def test_precision_is_that_of_vit_predict_unless_it_is_typed(digits_run) -> None:
    cpu, trained = torch.device("cpu"), load_trained(digits_run, device=torch.device("cpu"))
    for stored in ("fp16", "bf16", "fp32", "auto"):
        trained.config["trainer"]["precision"] = stored
        assert evaluate.precision_of(trained, trained.config, cpu, []) == trained.precision()
    typed = {"trainer": {"precision": "bf16"}}
    assert evaluate.precision_of(trained, typed, cpu, ["trainer.precision=bf16"]) == "bf16"
    typed = {"trainer": {"precision": "fp16"}}
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        evaluate.precision_of(trained, typed, cpu, ["trainer.precision=fp16"])


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
