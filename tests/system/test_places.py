"""Folders are called as people call them: typed as a shell passes them, through every command, and back by the
commands that are printed.

Every name goes through all commands with the fault tests; one of each script does so always.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, command, environment, vit_train_here
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from vit_train.cli import data_command as data
from vit_train.cli import evaluate, explain, export, predict
from vit_train.cli.typed import for_hydra
from vit_train.system.places import as_argument, as_typed

NAMES = (
    "Bär & Söhne",
    "Ba\u0308r",  # decomposed, as a Mac's zip has it
    "Fotos [2024], Sommer",
    "2024",
    "1e3",
    "true",
    "it's",
    'it\'s "mine"',
    "#1 best",
    "a=b",
    "a,b",
    "50% off",
    "$HOME",
    "(copy) {1}",
    " led and trailed ",
    "semi;colon",
    "back\\slash",
    "ends in \\",
    "quote after \\'",
    "star* what?",
    "a|b <c>",
    "!bang",
    "two\nlines",
    "фото 2024",
    "Снимки, лето [1]",
    "写真",
    "照片（1）=新",
    "صور العائلة",
    "εικόνες & άλλα",
    "\U0001f436 dogs",
    "~tilde",
    "key: value",
)
ONE_OF_EACH_SCRIPT = (
    "Fotos [2024], Sommer",
    "Снимки, лето [1]",
    "照片（1）=新",
    "صور العائلة",
    "εικόνες & άλλα",
)
PLACES = ("data.root", "run_dir", "resume", "init_from", "objective.teacher")
SMALL = (
    *("data=imagefolder", "model=vit_digits", "augment=none", "data.img_size=8", "data.batch_size=4"),
    *("trainer.epochs=2", "tracker.tensorboard=false", "trainer.precision=fp32", "strategy=one_thread"),
    *("data.val_fraction=0", "data.num_workers=0"),
)


def read(argument):
    """(key, value) as Hydra reads what it is given."""
    (override,) = OverridesParser.create().parse_overrides(for_hydra([argument]))
    return override.key_or_group, override.value()


def test_a_printed_argument_is_no_option():
    assert as_argument("-dash") == "./-dash"
    assert as_argument("runs/a b") == "'runs/a b'"


@pytest.mark.parametrize("name", NAMES)
def test_a_place_is_the_text_that_was_typed(name):
    for key in PLACES:
        for text in (name, f"/photos/{name}/2", f"{name}/{name}"):
            assert read(f"{key}={text}") == (key, text)
            assert read(f"++{key}={text}") == (key, text)


@pytest.mark.parametrize("name", [*NAMES, "null", "${x}", "'all of it'", '"all of it"', "", "'", "''"])
def test_a_printed_place_is_read_as_itself_behind_a_real_shell(name):
    printed = as_typed("resume", name)
    seen = subprocess.run(
        ["sh", "-c", f"printf %s {printed}"], capture_output=True, check=True
    ).stdout.decode()
    if "${" not in name:
        assert read(seen) == ("resume", name)
    # without a shell's characters it is as bare as can be
    assert (printed == f"resume={name}") == (shlex.quote(name) == name and name != "null")


def test_what_keeps_its_meaning(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert read("data.root=null") == ("data.root", None)
    assert read("run_dir='a, b'") == ("run_dir", "a, b")
    assert read('run_dir="a, b"') == ("run_dir", "a, b")
    assert read("run_dir=runs/${seed}") == ("run_dir", "runs/${seed}")
    assert read("data.root=~/photos, old") == ("data.root", "/home/me/photos, old")
    assert read("data.root=~") == ("data.root", "/home/me")
    assert read("data.root=~him/photos") == ("data.root", "~him/photos")
    assert read("name=[a,b]") == ("name", ["a", "b"]), "only places are plain text"
    for flag in ("-m", "--multirun"):
        given = [flag, "data.root=a,b", "run_dir=~/x"]
        assert for_hydra(given) == ["++data.root=a,b", "++run_dir=/home/me/x", flag]
    given = ["trainer.epoch=3", "~trainer", "model=vit_tiny", "+x=1", "hydra.verbose=true", "--cfg", "job"]
    assert for_hydra(given) == given
    assert for_hydra(given[-2:] + given[:-2]) == given


@pytest.mark.parametrize("flag", ["--cfg=job", "-cjob", "--inf", "-i", "--hel", "-sc"])
def test_what_is_only_shown_is_not_added_however_the_flag_is_written(flag):
    assert for_hydra(["trainer.epoch=3", flag]) == ["trainer.epoch=3", flag]


def test_the_flags_keep_their_values_and_may_stand_anywhere():
    assert for_hydra(["--multi", "data.root=a,b"]) == ["++data.root=a,b", "--multi"]
    flags = ["--config-dir", "my=cfg", "-cd=a&b=c"]
    read_as = for_hydra([*flags[:2], "seed=1", flags[2], "run_dir=a&b"])
    assert read_as == ["++seed=1", "++run_dir='a&b'", *flags]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ONE_OF_EACH_SCRIPT else pytest.mark.faults) for n in NAMES],
)
def test_a_folder_of_this_name_goes_through_all_commands(name, in_tmp):
    rng = np.random.default_rng(0)
    for label in ("cat", name):
        (Path(name) / label).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                Path(name, label, f"{i}.png")
            )
    run = f"runs/{name}/of {name}"
    done = vit_train_here(*SMALL, f"data.root={name}", f"run_dir={run}", "trainer.stop_at_step=1", cwd=in_tmp)
    assert done.code == 0, done.err
    printed = done.out.partition("Continue with:\n  vit-train ")[2]
    done = vit_train_here(*shlex.split(printed), cwd=in_tmp)
    assert done.code == 0, done.err
    assert Path(run, "result.json").is_file()
    _, _, closing = done.out.partition("\ncurves  ")
    evaluation, longer = closing.partition("evaluate       vit-eval ")[2].split("\ntrain longer   vit-train ")
    with redirect_stdout(io.StringIO()) as out:
        assert evaluate.main([*shlex.split(evaluation), f"data.root={name}", "--split", "all"]) == 0
        assert predict.main([run, name, "--num-workers", "0"]) == 0
        assert explain.main([run, f"{name}/cat/0.png"]) == 0
        assert export.main([run, "--format", "safetensors", "--out", f"{run}/as file.safetensors"]) == 0
        assert data.main(["check", name]) == 0
        assert data.main(["stats", name]) == 0
    assert out.getvalue()
    done = vit_train_here(*shlex.split(longer), cwd=in_tmp)
    assert done.code == 0, done.err
    assert "epoch 4/4" in done.out
    for source in (run, f"{run}/as file.safetensors"):
        settings = (f"data.root={name}", f"init_from={source}", "trainer.max_steps=1", f"run_dir=new {name}")
        done = vit_train_here(*SMALL, *settings, cwd=in_tmp)
        assert done.code == 0, done.err
        assert "tensors loaded" in " ".join(done.out.split())
        subprocess.run(["rm", "-r", f"new {name}"], check=True)


@pytest.fixture
def stranger(in_tmp):
    """Types `vit-train` and the like as a user who owns nothing, has no home and no entry in passwd."""
    other = ["unshare", "--user", "--map-user=12345"]
    if not shutil.which("unshare") or subprocess.run([*other, "true"], check=False).returncode:
        pytest.skip("this machine does not let a test be another user")
    homeless = {name: value for name, value in environment().items() if name != "HOME"}

    def typed(*arguments, module="vit_train", cwd=in_tmp):
        program = [*other, *command(module, *arguments)]
        done = subprocess.run(
            program, env=homeless, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )
        return done.returncode, done.stderr

    return typed


def test_a_user_whom_nobody_knows_has_no_home_and_needs_none(stranger, in_tmp):
    """A container with `--user 12345`."""
    assert stranger(*TINY, "run_dir=~/run") == (0, "")
    assert (in_tmp / "~/run/result.json").is_file(), "not a place of that name"
    line = "vit-train: error: data.root=~nobody_knows/photos does not exist\n"
    assert stranger("data=imagefolder", "data.root=~nobody_knows/photos") == (3, line)


def test_folders_that_may_not_be_read_or_written_are_named(stranger, in_tmp):
    assert stranger(*TINY, "run_dir=run")[0] == 0
    (in_tmp / "locked").mkdir(mode=0o555)
    for closed, file in (("run/checkpoints", "run/checkpoints/best"), ("run", "run/manifest.json")):
        (in_tmp / closed).chmod(0)
        line = f"vit-eval: error: {file} cannot be read: Permission denied\n"
        assert stranger("run", module="vit_train.cli.evaluate") == (4, line)
    line = "vit-train: error: run/config.yaml cannot be read: Permission denied\n"
    assert stranger("resume=run") == (4, line)
    assert stranger(*TINY, "run_dir=run") == (4, line)
    reason = "sweeps cannot be used: Permission denied"
    assert stranger("-m", *TINY, "seed=0,1", cwd=in_tmp / "locked") == (2, f"vit-train: error: {reason}\n")
    (in_tmp / "run").chmod(0o700)


@pytest.mark.parametrize("module", ["vit_train", "vit_train.cli.evaluate", "vit_train.cli.data_command"])
def test_a_working_directory_that_was_deleted_is_said(in_tmp, module):
    arguments = {"vit_train": ["--cfg", "job"], "vit_train.cli.data_command": ["check", "x"]}.get(
        module, ["run"]
    )
    program = ["sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh"]
    done = subprocess.run(
        [*program, *command(module, *arguments)],
        env=environment() | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = "error: the working directory is gone (No such file or directory); cd to one that exists\n"
    assert done.returncode == 2
    assert done.stderr.endswith(said)
    assert done.stderr.count("\n") == 1
