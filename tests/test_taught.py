"""Runs with a teacher: measured once, kept by its SHA-256, not needed afterwards."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import TINY, change_states, typed_here, vit_train_here

from vit_train.report.history import read_events

TEACHER = (*TINY, "model.embed_dim=64", "run_dir=teacher")
TAUGHT = (*TINY, "objective=distill", "objective.teacher=teacher", "trainer.precision=fp32")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a finished teacher, and a finished student of it."""
    folder = tmp_path_factory.mktemp("taught")
    assert vit_train_here(*TEACHER, cwd=folder).code == 0
    done = vit_train_here(*TAUGHT, "run_dir=student", cwd=folder)
    assert done.code == 0, done.err
    (folder / "said").write_text(done.out)
    return folder


@pytest.fixture
def copied(taught, tmp_path):
    """The same in a folder of its own, as if it had been trained there."""
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True, symlinks=True)

    def move(state):
        objective = state["config"]["objective"]
        objective["teacher"] = objective["teacher"].replace(str(taught), str(tmp_path))

    change_states(tmp_path / "student", move)
    for file in (tmp_path / "student" / "config.yaml", tmp_path / "student" / "run.json"):
        file.write_text(file.read_text().replace(str(taught), str(tmp_path)))
    return tmp_path


def facts(folder, run="student"):
    return json.loads((folder / run / "run.json").read_text())["teacher"]


def test_the_loss_is_that_of_its_parts(taught) -> None:
    events = read_events(taught / "student" / "metrics.jsonl")
    seen = 0
    for event in events:
        prefix = {"step": "", "epoch": "train/"}.get(event["event"])
        if prefix is not None:
            labels, teacher = event[f"{prefix}loss_labels"], event[f"{prefix}loss_teacher"]
            assert event[f"{prefix}loss"] == pytest.approx(0.1 * labels + 0.9 * teacher, rel=1e-5)
            assert 0 <= event[f"{prefix}agreement"] <= 1
            seen += 1
    assert seen >= 5


def test_who_taught_is_said_and_written_down(taught) -> None:
    figures = json.loads((taught / "teacher" / "result.json").read_text())
    about = facts(taught)
    best = (taught / "teacher" / "checkpoints" / "best").resolve()
    assert about["source"] == str(best)
    assert about["top1"] == pytest.approx(figures["best/val/top1"])
    assert about["classes"] == "the same 10" and len(about["sha256"]) == 64  # noqa: PT018
    said = " ".join((taught / "said").read_text().split())
    assert f"teacher teacher/{best.name}: ViT, {about['parameters'] / 1e6:.2f}M parameters" in said
    assert f"top-1 {about['top1']:.2%} of the validation images; classes: the same 10" in said


def test_a_student_needs_no_teacher_afterwards(copied) -> None:
    from vit_train.cli import evaluate, export

    shutil.rmtree(copied / "teacher")
    for main, typed in (
        (evaluate.main, ["student"]),
        (export.main, ["student", "--format", "safetensors"]),
    ):
        done = typed_here(main, *typed, cwd=copied)
        assert done.code == 0, done.err


def test_a_teacher_that_is_gone_moved_or_another_one(copied) -> None:
    longer = ("resume=student", "trainer.epochs=4")
    (copied / "teacher").rename(copied / "moved")
    done = vit_train_here(*longer, cwd=copied)
    assert done.code == 4
    assert done.err.count("\n") == 1
    assert "no such run, checkpoint or file" in done.err
    assert "type objective.teacher= with the place where it is now" in done.err
    assert vit_train_here(*TEACHER, "seed=1", "run_dir=other", cwd=copied).code == 0
    done = vit_train_here(*longer, "objective.teacher=other", cwd=copied)
    assert done.code == 4
    assert "is another teacher (SHA-256 " in done.err
    measured = facts(copied)
    done = vit_train_here(*longer, "objective.teacher=moved", cwd=copied)
    assert done.code == 0, done.err
    assert facts(copied) == {**measured, "source": measured["source"].replace("/teacher/", "/moved/")}


def test_the_full_command_again_takes_the_checkpoint_the_run_began_with(copied) -> None:
    first = facts(copied)
    longer = vit_train_here("resume=teacher", "trainer.epochs=6", "trainer.keep_checkpoints=9", cwd=copied)
    assert longer.code == 0, longer.err
    best = (copied / "teacher" / "checkpoints" / "best").resolve()
    assert str(best) != first["source"], "the test needs a better checkpoint than before"
    done = vit_train_here(*TAUGHT, "run_dir=student", "trainer.epochs=4", cwd=copied)
    assert done.code == 0, done.err
    assert facts(copied) == first


def test_a_teacher_below_the_mark_is_refused_before_anything_is_written(copied) -> None:
    done = vit_train_here(*TAUGHT, "run_dir=new", "objective.teacher_min_top1=0.99", cwd=copied)
    assert done.code == 2
    assert f"knows {facts(copied)['top1']:.2%} of the validation images, less than" in done.err
    assert "objective.teacher_min_top1=99.00%" in done.err
    none = ("data.val_fraction=0", "run_dir=new")
    done = vit_train_here(*TAUGHT, *none, "objective.teacher_min_top1=0.1", cwd=copied)
    assert done.code == 2
    assert "needs validation images" in done.err
    assert not (copied / "new").exists()
    done = vit_train_here(*TAUGHT, *none, cwd=copied)
    assert done.code == 0
    assert "not measured" in done.out
    assert facts(copied, "new")["top1"] is None


def test_a_student_of_itself_is_told(copied) -> None:
    done = vit_train_here(*TEACHER[:-1], *TAUGHT[-3:], "run_dir=again", "init_from=teacher", cwd=copied)
    assert done.code == 0, done.err
    assert "the student is its own teacher" in done.out


def test_a_hostile_teacher_is_not_built(copied) -> None:
    def change(state):
        state["config"]["model"] = {"_target_": "os.system", "command": "touch owned"}

    change_states(copied / "teacher", change)
    done = vit_train_here(*TAUGHT, "run_dir=new", cwd=copied)
    assert done.code == 4
    assert "os.system" in done.err
    assert not (copied / "owned").exists()
    assert not (copied / "new").exists()


def test_without_a_teacher_nothing_begins(in_tmp) -> None:
    done = vit_train_here("objective=distill", "run_dir=new", cwd=in_tmp)
    assert done.code == 2
    assert done.err == (
        "vit-train: error: objective.teacher: missing; type objective.teacher=RUN (a run or checkpoint), "
        "torchvision:NAME or timm:NAME\n"
    )
    assert not (in_tmp / "new").exists()
