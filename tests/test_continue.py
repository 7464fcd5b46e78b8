"""What a continuation refuses, and what it survives: other data, a smaller budget, damage, early stopping."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import TINY, everything_in, vit_train_here
from PIL import Image

from vit_train.checkpoint import checkpoint_directories


def flip(file) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def make_folder(root, classes=("cat", "dog"), images=12) -> None:
    for number, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(images):
            Image.new("L", (8, 8), 20 * i + 5 * number).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run on digits that was stopped after step 7 of 15."""
    home = tmp_path_factory.mktemp("stopped")
    done = vit_train_here(*TINY, "run_dir=run", "trainer.stop_at_step=7", cwd=home)
    assert done.code == 0, done.err
    return home / "run"


@pytest.fixture
def run(stopped, in_tmp):
    """A copy of it in the working directory."""
    shutil.copytree(stopped, in_tmp / "run", symlinks=True)
    return in_tmp / "run"


def refused(*arguments, cwd, code) -> str:
    before = everything_in(cwd)
    done = vit_train_here(*arguments, cwd=cwd)
    assert (done.code, done.err.count("\n")) == (code, 1), done
    assert everything_in(cwd) == before
    return done.err


def test_other_data_under_the_same_name_is_refused(in_tmp) -> None:
    make_folder(in_tmp / "photos")
    make_folder(in_tmp / "others", classes=("apple", "zebra"))
    small = [o for o in TINY if not o.startswith("data.limit")]
    folder = ("data=imagefolder", "data.root=photos", "data.in_channels=1", "model=vit_digits")
    done = vit_train_here(*small, *folder, "run_dir=run", "trainer.stop_at_step=1", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "not what run was trained on" in refused("resume=run", "data.root=others", cwd=in_tmp, code=3)
    # moved, it is the same data
    (in_tmp / "photos").rename(in_tmp / "moved")
    done = vit_train_here("resume=run", "data.root=moved", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "as stored" in done.out


@pytest.mark.parametrize("budget", ["trainer.epochs=2", "trainer.max_steps=8", "trainer.max_steps=14"])
def test_a_budget_cannot_shrink(run, in_tmp, budget) -> None:
    assert "fewer than the 15" in refused("resume=run", budget, cwd=in_tmp, code=2)


def test_a_run_with_nothing_valid_is_not_started_over(run, in_tmp) -> None:
    for path in checkpoint_directories(run / "checkpoints"):
        flip(path / "model.safetensors")
    assert "holds no valid checkpoint" in refused("resume=run", cwd=in_tmp, code=4)


def test_a_damaged_newest_checkpoint_costs_one_interval(run, in_tmp) -> None:
    newest, *older = checkpoint_directories(run / "checkpoints")
    assert older
    flip(newest / "optimizer.safetensors")
    done = vit_train_here("resume=run", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "checkpoint skipped: " in done.out
    assert newest.name in done.out


def test_a_run_that_stopped_early_can_be_grown(in_tmp) -> None:
    listening = ("trainer.early_stop_patience=1", "optimizer.lr=0.0", "trainer.epochs=6")
    assert vit_train_here(*TINY, *listening, "run_dir=run", cwd=in_tmp).code == 0
    first = json.loads((in_tmp / "run/result.json").read_text())
    assert first["stopped_early"]
    assert vit_train_here("resume=run", "trainer.epochs=8", cwd=in_tmp).code == 0
    assert json.loads((in_tmp / "run/result.json").read_text())["steps"] > first["steps"]


def test_resuming_from_another_directory_finds_the_data(in_tmp) -> None:
    make_folder(in_tmp / "photos")
    folder = ("data=imagefolder", "data.root=photos", "data.in_channels=1", "model=vit_digits")
    small = [o for o in TINY if not o.startswith("data.limit")]
    assert vit_train_here(*small, *folder, "run_dir=run", "trainer.stop_at_step=1", cwd=in_tmp).code == 0
    (in_tmp / "elsewhere").mkdir()
    done = vit_train_here("resume=../run", cwd=in_tmp / "elsewhere")
    assert done.code == 0, done.err


def test_a_printed_command_can_be_pasted(in_tmp) -> None:
    """With a space in the path, through the shell's own splitting."""
    import shlex

    done = vit_train_here(*TINY, "run_dir='my runs/x'", "trainer.stop_at_step=1", cwd=in_tmp)
    assert done.code == 0, done.err
    printed = done.out.splitlines()[-1].strip()
    assert printed.startswith("vit-train ")
    assert vit_train_here(*shlex.split(printed)[1:], cwd=in_tmp).code == 0


def test_a_machine_that_changed_is_said(run, in_tmp) -> None:
    facts = json.loads((run / "run.json").read_text())
    facts["versions"]["torch"] = "1.0"
    (run / "run.json").write_text(json.dumps(facts))
    done = vit_train_here("resume=run", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "torch 1.0 -> " in done.out
    assert "last bits" in " ".join(done.out.split())
