"""Runs with a teacher: measured once, kept by its SHA-256, not needed afterwards."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from conftest import TINY, change_states, compose, typed_here, vit_train_here
from omegaconf import OmegaConf

from vit_train.config.check import config_dir
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
    assert (
        f"top-1 {about['top1']:.2%} of 80 validation images; classes: the same 10 [soft, T 2, alpha 0.9]"
        in said
    )


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
    assert "type the place where it is" in done.err
    assert vit_train_here(*TEACHER, "seed=1", "run_dir=other", cwd=copied).code == 0
    done = vit_train_here(*longer, "objective.teacher=other", cwd=copied)
    assert done.code == 4
    assert "is another teacher: its SHA-256 is " in done.err
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
    assert f"classifies {facts(copied)['top1']:.2%} of the validation images correctly, less than" in done.err
    assert "objective.teacher_min_top1=99.00%" in done.err
    none = ("data.val_fraction=0", "run_dir=new")
    done = vit_train_here(*TAUGHT, *none, "objective.teacher_min_top1=0.1", cwd=copied)
    assert done.code == 2
    assert "there are no validation images to measure the teacher; set data.val_fraction" in done.err
    assert not (copied / "new").exists()
    done = vit_train_here(*TAUGHT, *none, cwd=copied)
    assert done.code == 0
    assert re.search(r"teacher .*, not measured; classes: the same 10", " ".join(done.out.split()))
    assert facts(copied, "new")["top1"] is None


def test_the_mark_may_be_set_later(copied) -> None:
    done = vit_train_here("resume=student", "trainer.epochs=4", "objective.teacher_min_top1=0.99", cwd=copied)
    assert done.code == 2
    assert "less than objective.teacher_min_top1=99.00%" in done.err


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_run_whose_facts_are_lost_goes_on_with_its_mark(copied, damage) -> None:
    """The teacher is measured again: its figure is nowhere else."""
    top1 = facts(copied)["top1"]
    damage(copied / "student" / "run.json")
    mark = f"objective.teacher_min_top1={top1 / 2}"
    done = vit_train_here("resume=student", "trainer.epochs=4", mark, cwd=copied)
    assert done.code == 0, done.err
    assert facts(copied)["top1"] == top1


def test_what_was_measured_before_the_first_step_stands(copied) -> None:
    path = copied / "student" / "run.json"
    written = json.loads(path.read_text())
    written["teacher"]["top1"] = 0.4321
    path.write_text(json.dumps(written))
    done = vit_train_here("resume=student", "trainer.epochs=4", cwd=copied)
    assert done.code == 0, done.err
    assert facts(copied)["top1"] == 0.4321


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_dir() / "model").glob("*.yaml")))
def test_a_config_of_ours_is_what_hydra_composes(name) -> None:
    from vit_train.config.shipped import _merged

    cfg = compose(f"model={name}")
    ours = OmegaConf.create({"model": _merged(config_dir() / "model", name), "data": cfg.data})
    assert OmegaConf.to_container(ours.model, resolve=True) == OmegaConf.to_container(cfg.model, resolve=True)


def test_the_same_run_without_the_teacher_is_another_configuration(copied) -> None:
    done = vit_train_here(*TINY, "trainer.precision=fp32", "run_dir=student", cwd=copied)
    assert done.code == 2
    assert "student holds a run with another configuration (objective._target_: " in done.err
    done = vit_train_here(*TINY, "objective.teacher=teacher", "run_dir=new", cwd=copied)
    assert done.code == 2
    assert done.err.endswith(
        "objective.teacher: CrossEntropy has no such key (it has: label_smoothing, class_weights); "
        "objective=distill has it\n"
    )


def test_a_file_teaches_as_a_model_of_ours(copied) -> None:
    from vit_train.cli import export

    assert typed_here(export.main, "teacher", "--format", "pth", "--out", "w.pth", cwd=copied).code == 0
    file = ("objective.teacher=w.pth", "objective.teacher_model=vit_digits", "run_dir=new")
    width = [each for each in TINY if not each.startswith("model.")]
    done = vit_train_here(*width, *TAUGHT[-3:], *file, cwd=copied)
    assert done.code == 2
    assert re.search(r"does not fit ViT of .*; choose the model the weights were trained for\n$", done.err)
    wide = [each for each in TEACHER if not each.startswith("model.")]
    assert vit_train_here(*wide, "run_dir=wide", cwd=copied).code == 0
    assert typed_here(export.main, "wide", "--format", "pth", "--out", "w.pth", cwd=copied).code == 0
    done = vit_train_here(*TAUGHT, *file, "trainer.stop_at_step=7", cwd=copied)
    assert done.code == 0, done.err
    done = vit_train_here("resume=new", cwd=copied)
    assert done.code == 0, done.err
    from_run = vit_train_here(*TAUGHT, "objective.teacher=wide", "run_dir=of_run", cwd=copied)
    assert from_run.code == 0, from_run.err
    last = [read_events(copied / run / "metrics.jsonl")[-1] for run in ("new", "of_run")]
    assert last[0] == pytest.approx(last[1])


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000 + "c"])
def test_a_name_that_no_file_can_have(copied, name) -> None:
    done = vit_train_here(*TAUGHT, f"objective.teacher={name}", "run_dir=new", cwd=copied)
    assert (done.code, done.err.count("\n")) == (4, 1)

    def change(state):
        state["config"]["objective"]["teacher"] = name

    change_states(copied / "student", change)
    config = yaml.safe_load((copied / "student" / "config.yaml").read_text())
    config["objective"]["teacher"] = name
    (copied / "student" / "config.yaml").write_text(yaml.safe_dump(config))
    done = vit_train_here("resume=student", "trainer.epochs=4", cwd=copied)
    assert (done.code, done.err.count("\n")) == (4, 1)


def test_a_run_of_someone_else_does_not_choose_the_teacher_of_a_full_command(copied) -> None:
    """Its path begins as the one typed does, and leads elsewhere."""
    assert vit_train_here(*TEACHER, "seed=1", "run_dir=evil", cwd=copied).code == 0
    best = (copied / "evil" / "checkpoints" / "best").resolve().name
    place = f"{copied}/teacher/checkpoints/../../evil/checkpoints/{best}"
    path = copied / "student" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    first, config["objective"]["teacher"] = config["objective"]["teacher"], place
    path.write_text(yaml.safe_dump(config))
    done = vit_train_here(*TAUGHT, "run_dir=student", "trainer.epochs=4", cwd=copied)
    assert done.code == 0, done.err
    assert facts(copied)["source"] == first


def test_the_memory_of_a_teacher_is_counted(copied) -> None:
    parameters = facts(copied)["parameters"]
    done = vit_train_here("summary=true", *TAUGHT[:-1], cwd=copied)
    assert done.code == 0, done.err
    assert f"teacher {4 * parameters / 1e6:.1f} MB" in " ".join(done.out.split())
    done = vit_train_here(
        "summary=true", *TAUGHT, "objective.teacher=torchvision:resnet18", TORCH_HOME="empty", cwd=copied
    )
    assert done.code == 0, done.err
    assert (
        "the memory of the teacher is not counted: objective.teacher=torchvision:resnet18 is not in the"
        in " ".join(done.out.split())
    )


def test_a_student_of_itself_is_told(copied) -> None:
    done = vit_train_here(*TEACHER[:-1], *TAUGHT[-3:], "run_dir=again", "init_from=teacher", cwd=copied)
    assert done.code == 0, done.err
    assert "the student starts from the weights of its own teacher" in done.out


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
