"""What a continuation refuses, and what it survives: other data, a smaller budget, damage, early stopping."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest
from conftest import (
    PATCHES,
    TINY,
    checkpoint_hashes,
    command,
    environment,
    everything_in,
    vit_train_here,
)
from PIL import Image

from vit_train.checkpoint import checkpoint_directories, directory_name


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
    line = refused("resume=run", "data.root=others", cwd=in_tmp, code=3)
    assert "differs from the data that run was trained on" in line
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
    listening = ("trainer.early_stop_patience=1", "optimizer.lr=1e-30", "trainer.epochs=6")
    assert vit_train_here(*TINY, *listening, "run_dir=run", cwd=in_tmp).code == 0
    first = json.loads((in_tmp / "run/result.json").read_text())
    assert first["stopped_early"]
    assert vit_train_here("resume=run", "trainer.epochs=8", cwd=in_tmp).code == 0
    assert json.loads((in_tmp / "run/result.json").read_text())["steps"] > first["steps"]


def test_a_run_that_stopped_early_goes_on_with_more_patience(in_tmp) -> None:
    """And is then the run that had this patience from the start. With a rate this low nothing gets better."""
    settings = (*TINY, *PATCHES, "optimizer.lr=1e-12", "trainer.epochs=7")
    done = vit_train_here(*settings, "trainer.early_stop_patience=1", "run_dir=run", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "stopped early: no better validation top-1 in 1 evaluation\n" in done.out
    assert done.out.endswith("train longer   vit-train resume=run trainer.early_stop_patience=2\n")
    figures = in_tmp / "run/result.json"
    first = json.loads(figures.read_text())
    assert first["stopped_early"]
    done = vit_train_here("resume=run", "trainer.early_stop_patience=3", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "trainer.early_stop_patience: 1 -> 3 " in " ".join(done.out.split()) + " "
    assert "the schedule now spans" not in done.out
    straight = (*settings, "trainer.early_stop_patience=3", "run_dir=straight")
    assert vit_train_here(*straight, cwd=in_tmp).code == 0
    assert json.loads(figures.read_text())["steps"] == first["steps"] + 10
    assert checkpoint_hashes(in_tmp / "run") == checkpoint_hashes(in_tmp / "straight")
    before = figures.read_bytes()
    for patience in (2, 3):  # nothing is left to do
        done = vit_train_here("resume=run", f"trainer.early_stop_patience={patience}", cwd=in_tmp)
        assert (done.code, done.err) == (0, "")
        assert done.out == "run is finished: nothing to do. To see its figures, type:  vit-eval run\n"
    assert figures.read_bytes() == before
    done = vit_train_here("resume=run", "trainer.early_stop_patience=null", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "trainer.early_stop_patience: 3 -> null" in " ".join(done.out.split()), "as it is typed"
    assert json.loads(figures.read_text())["epochs"] == 7


def test_where_a_run_stopped_early_is_not_where_a_rollback_goes_once_it_has_more_patience(in_tmp) -> None:
    settings = (*TINY, *PATCHES, "optimizer.lr=1e-12", "trainer.epochs=7", "trainer.on_nonfinite=rollback")
    patient = ("trainer.early_stop_patience=3", "trainer.stop_at_step=12")
    for arguments in (
        (*settings, "trainer.save_every_epochs=5", "trainer.early_stop_patience=1", "run_dir=run"),
        ("resume=run", *patient),
        (*settings, "trainer.save_every_epochs=5", *patient, "run_dir=straight"),
    ):
        done = vit_train_here(*arguments, cwd=in_tmp)
        assert done.code == 0, done.err
    last = (in_tmp / name / "checkpoints/last/state.json" for name in ("run", "straight"))
    continued, straight = ({**json.loads(path.read_text())["train"], "seconds": 0} for path in last)
    assert continued == straight
    assert (straight["step"], straight["anchor"]) == (12, 5), "the first epoch is the best, and was due"


def test_epochs_do_not_lengthen_a_run_that_counts_steps(in_tmp) -> None:
    assert vit_train_here(*TINY, "trainer.max_steps=4", "run_dir=run", cwd=in_tmp).code == 0
    done = vit_train_here("resume=run", "trainer.epochs=6", cwd=in_tmp)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "run ended at trainer.max_steps=4, whatever trainer.epochs is" in done.err
    done = vit_train_here("resume=run", "trainer.epochs=1", "trainer.max_steps=null", cwd=in_tmp)
    assert done.code == 0, done.err
    assert json.loads((in_tmp / "run/result.json").read_text())["steps"] == 5


def test_growth_that_is_interrupted_at_once_is_not_forgotten(in_tmp) -> None:
    listening = ("trainer.early_stop_patience=1", "optimizer.lr=1e-30", "trainer.epochs=6")
    assert vit_train_here(*TINY, *listening, "run_dir=run", cwd=in_tmp).code == 0
    first = json.loads((in_tmp / "run/result.json").read_text())
    grown = ("resume=run", "trainer.epochs=8", "trainer.stop_after_minutes=0")
    assert "is saved" in vit_train_here(*grown, cwd=in_tmp).out
    assert vit_train_here("resume=run", cwd=in_tmp).code == 0
    assert json.loads((in_tmp / "run/result.json").read_text())["steps"] > first["steps"]


def test_a_run_may_live_in_a_folder_called_checkpoints(in_tmp) -> None:
    short = ("trainer.max_steps=4", "run_dir=checkpoints/one")
    done = vit_train_here(*TINY, *short, "trainer.stop_at_step=2", cwd=in_tmp)
    assert done.code == 0, done.err
    done = vit_train_here("resume=checkpoints/one", cwd=in_tmp)
    assert done.code == 0, done.err
    assert (in_tmp / "checkpoints/one/result.json").exists()


def test_a_finished_run_whose_checkpoints_are_gone_is_not_started_over(in_tmp) -> None:
    assert vit_train_here(*TINY, "trainer.epochs=1", "run_dir=run", cwd=in_tmp).code == 0
    shutil.rmtree(in_tmp / "run/checkpoints")
    said = refused("resume=run", "trainer.epochs=2", cwd=in_tmp, code=4)
    assert "its checkpoints are gone" in said


def test_an_interruption_at_a_due_save_moves_no_anchor(in_tmp) -> None:
    """A rollback of the continuation goes where that of the uninterrupted run would go."""
    due = ("trainer.save_every_steps=2", "trainer.on_nonfinite=rollback", "run_dir=run")
    assert vit_train_here(*TINY, *due, "trainer.stop_at_step=2", cwd=in_tmp).code == 0
    assert anchor(in_tmp) == 2
    assert vit_train_here("resume=run", "trainer.stop_at_step=3", cwd=in_tmp).code == 0
    assert anchor(in_tmp) == 2


def test_a_policy_may_become_rollback_before_any_due_save(in_tmp) -> None:
    assert vit_train_here(*TINY, "run_dir=run", "trainer.stop_at_step=3", cwd=in_tmp).code == 0
    assert anchor(in_tmp) is None
    rollback = ("resume=run", "trainer.on_nonfinite=rollback", "trainer.stop_at_step=4")
    assert vit_train_here(*rollback, cwd=in_tmp).code == 0
    assert anchor(in_tmp) == 3


def anchor(home):
    path = checkpoint_directories(home / "run/checkpoints")[0]
    return json.loads((path / "state.json").read_text())["train"]["anchor"]


def test_a_reader_that_goes_away_ends_no_run(in_tmp) -> None:
    shell = subprocess.run(
        f"{shlex.join(command('vit_train', *TINY, 'run_dir=run'))} | head -n 1",
        shell=True,
        cwd=in_tmp,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert shell.stdout.count("\n") == 1
    assert (in_tmp / "run/result.json").exists(), shell.stderr
    assert "test" in (in_tmp / "run/train.log").read_text()


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


# ---------------------------------------------------------------------------------------- although it changed
SMALL = [o for o in TINY if not o.startswith("data.limit")]
FOLDER = (*SMALL, "data=imagefolder", "data.root=photos", "data.in_channels=1", "model=vit_digits")


@pytest.fixture
def on_photos(in_tmp):
    """A run on a folder of two classes, stopped after the first of its three steps."""
    make_folder(in_tmp / "photos")
    done = vit_train_here(*FOLDER, "run_dir=run", "trainer.stop_at_step=1", cwd=in_tmp)
    assert done.code == 0, done.err
    return in_tmp / "photos"


def test_changed_data_is_taken_where_the_user_insists(on_photos, in_tmp) -> None:
    (on_photos / "dog/11.png").rename(on_photos / "dog/12.png")
    line = refused("resume=run", cwd=in_tmp, code=3)
    assert "type resume=force run_dir=run to continue anyway" in line
    done = vit_train_here("resume=force", "run_dir=run", "trainer.stop_at_step=2", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "the data has changed since the run was started (resume=force)" in " ".join(done.out.split())
    done = vit_train_here("resume=run", cwd=in_tmp)  # from here on it is the data of the run
    assert done.code == 0, done.err
    assert json.loads((in_tmp / "run/result.json").read_text())["steps"] == 3


def test_other_classes_are_never_taken(on_photos, in_tmp) -> None:
    (on_photos / "dog").rename(on_photos / "wolf")
    line = refused("resume=force", "run_dir=run", cwd=in_tmp, code=3)
    assert "the data has other classes than run was trained on; start a new run" in line


def test_another_number_of_steps_is_never_taken(on_photos, in_tmp) -> None:
    for i in range(20):
        shutil.copy(on_photos / "dog/1.png", on_photos / f"dog/more_{i}.png")
    line = refused("resume=force", "run_dir=run", cwd=in_tmp, code=3)
    assert "with the changed data an epoch has 2 steps instead of 1" in line


def test_a_continuation_goes_on_where_it_is(run, in_tmp) -> None:
    line = refused("resume=run", "run_dir=other", cwd=in_tmp, code=2)
    assert "run_dir=other: resume= goes on in run; leave run_dir out, or type init_from=run instead" in line
    assert not (in_tmp / "other").exists()
    assert vit_train_here("resume=run", "run_dir=./run/", cwd=in_tmp).code == 0


def test_to_insist_takes_a_run(in_tmp) -> None:
    assert "resume=force needs the run" in refused("resume=force", cwd=in_tmp, code=2)
    assert "resume= is empty; type resume=PATH/TO/RUN" in refused("resume=", cwd=in_tmp, code=2)
    assert "no run there" in refused("resume=force", "run_dir=none", cwd=in_tmp, code=4)


# ------------------------------------------------------------------------------------------ which one it is
def test_only_the_newest_checkpoint_can_be_continued(run, in_tmp) -> None:
    """A run has one history: what was logged and saved after an older one would be in the way."""
    newest, older = checkpoint_directories(run / "checkpoints")
    line = refused(f"resume=run/checkpoints/{older.name}", cwd=in_tmp, code=2)
    assert f"{older.name} is not the newest checkpoint of the run: {newest.name} is" in line
    done = vit_train_here(f"resume={newest.name}", cwd=newest.parent)
    assert done.code == 0, done.err
    assert (run / "checkpoints" / directory_name(15)).is_dir()


def test_the_newest_checkpoint_by_its_name_has_no_stand_in(run, in_tmp) -> None:
    newest = checkpoint_directories(run / "checkpoints")[0]
    flip(newest / "model.safetensors")
    assert "is damaged" in refused(f"resume=run/checkpoints/{newest.name}", cwd=in_tmp, code=4)


DAMAGED = {
    "missing": None,
    "empty": "",
    "half": "name: run\nmodel: {_target_: vit_train.models.V",
    "a list": "- name\n- seed\n",
    "binary": "\x00\x01",
    "too large": "x: " + "y" * 2**20,
    "a reference": "name: ${oc.env:HOME}",
    "no truth": "seed: !!bool maybe",
    "no number": "seed: !!int ''",
    "no fraction": "seed: !!float abc",
    "no time": "seed: !!timestamp abc",
    "a number of 5,000 digits": f"seed: {'9' * 5000}",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("command", [("resume=run",), (*TINY, "run_dir=run")], ids=["resume", "full"])
def test_a_damaged_configuration_is_that_of_the_newest_checkpoint(run, in_tmp, damage, command) -> None:
    before = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    if DAMAGED[damage] is not None:
        (run / "config.yaml").write_text(DAMAGED[damage])
    done = vit_train_here(*command, "trainer.stop_at_step=8", cwd=in_tmp)
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "run/config.yaml" in said
    assert "the configuration comes from run/checkpoints/step_00000007" in said
    assert (run / "config.yaml").read_text() == before.replace("stop_at_step: 7", "stop_at_step: 8")
    assert (run / "checkpoints" / directory_name(8)).is_dir()


def test_without_configuration_and_checkpoint_there_is_no_run(run, in_tmp) -> None:
    (run / "config.yaml").write_text("- a list")
    for path in checkpoint_directories(run / "checkpoints"):
        flip(path / "state.json")
    assert "run/config.yaml is damaged" in refused("resume=run", cwd=in_tmp, code=4)
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "checkpoints")
    assert "no run there" in refused("resume=run", cwd=in_tmp, code=4)


def test_a_directory_with_nothing_but_leftovers_of_a_crash_can_be_used(in_tmp) -> None:
    (in_tmp / "run").mkdir()
    (in_tmp / "run/.config.yaml").write_text("half a conf")
    (in_tmp / "run/train.log").touch()
    done = vit_train_here(*TINY, "run_dir=run", "trainer.max_steps=1", cwd=in_tmp)
    assert done.code == 0, done.err
    assert [path for path in (in_tmp / "run").iterdir() if path.name.startswith(".")] == []
    (in_tmp / "other").mkdir()
    (in_tmp / "other/thesis.tex").touch()
    assert "holds files that are not a run" in refused(*TINY, "run_dir=other", cwd=in_tmp, code=2)


# ------------------------------------------------------------------------------------------------- no secrets
VALUE = "hunter2-f3a9c1"


@pytest.mark.parametrize(
    "variable", ["MY_TOKEN", "WANDB_API_KEY", "DB_PASSWORD", "aws_secret", "CREDENTIALS"]
)
@pytest.mark.parametrize("default", ["", ",nothing"])
def test_a_secret_of_the_environment_does_not_become_part_of_a_run(in_tmp, variable, default) -> None:
    before = everything_in(in_tmp)
    done = vit_train_here(
        *TINY, f"name=${{oc.env:{variable}{default}}}", "run_dir=run", cwd=in_tmp, **{variable: VALUE}
    )
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert f"${{oc.env:{variable}}} would be written into the run directory" in done.err
    assert VALUE not in done.out + done.err
    assert everything_in(in_tmp) == before


def test_not_even_an_error_repeats_a_secret(in_tmp) -> None:
    done = vit_train_here(*TINY, "data.batch_size=${oc.env:MY_TOKEN}", cwd=in_tmp, MY_TOKEN=VALUE)
    assert done.code == 2
    assert VALUE not in done.out + done.err


def test_a_continuation_takes_no_secret_either(run, in_tmp) -> None:
    before = everything_in(in_tmp)
    done = vit_train_here("resume=run", "name=${oc.env:MY_TOKEN}", cwd=in_tmp, MY_TOKEN=VALUE)
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert VALUE not in done.out + done.err
    assert everything_in(in_tmp) == before


def test_a_run_holds_nothing_else_of_the_environment(in_tmp) -> None:
    """What a user takes from it by name does become part of it."""
    done = vit_train_here(
        *TINY,
        "name=${oc.env:PROJECT}",
        "run_dir=run",
        "trainer.max_steps=1",
        "tracker.tensorboard=true",
        cwd=in_tmp,
        PROJECT="named-by-me",
        MY_TOKEN=VALUE,
        SOME_SETTING="something-i-never-typed",
    )
    assert done.code == 0, done.err
    contents = [content for content in everything_in(in_tmp).values() if content]
    assert any(b"named-by-me" in content for content in contents)
    for value in (VALUE, "something-i-never-typed"):
        assert not any(value.encode() in content for content in contents)


def test_to_insist_on_unchanged_data_is_to_resume(run, in_tmp) -> None:
    shutil.copytree(run, in_tmp / "other", symlinks=True)
    assert vit_train_here("resume=run", cwd=in_tmp).code == 0
    assert vit_train_here("resume=force", "run_dir=other", cwd=in_tmp).code == 0
    assert checkpoint_hashes(in_tmp / "run") == checkpoint_hashes(in_tmp / "other")
