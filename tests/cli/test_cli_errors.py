"""Every mistake a user can make ends in one line that says what, where and what to type, and writes nothing.

The commands run through their entry point inside this process, because importing torch costs seconds; what
needs no torch, and one example of each kind that does, also runs as a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, command, environment, everything_in, vit_train_here
from PIL import Image

from vit_train.checkpoint import checkpoint_directories, load


@pytest.fixture
def typed(in_tmp):
    """`vit-train` as if typed in an empty directory."""
    return functools.partial(vit_train_here, cwd=in_tmp)


@pytest.fixture
def refused(typed, in_tmp):
    """Types a command that must fail, checks how it fails, and returns its line."""

    def run(*arguments, code=2, words=()):
        before = everything_in(in_tmp)
        done = typed(*arguments)
        assert done.code == code, done
        assert done.out == ""
        assert_one_line(done.err, words)
        assert everything_in(in_tmp) == before
        return done.err

    return run


def assert_one_line(err, words):
    assert err.startswith("vit-train: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not said in: {err}"


def folder_of_images(root, **images):
    """root/<class>/<n>.png; a class of 0 images is an empty folder."""
    for name, count in images.items():
        folder = root / name.replace("__", "/")
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 40, 90)).save(folder / f"{i}.png")
    return root


# ------------------------------------------------------------------------------------------- the configuration
CONFIG_MISTAKES = {
    "model=swim": ["model=swim: no such model", "did you mean", "swin_cifar", "choices: ", "vit_tiny"],
    "optimizer=adamm": ["no such optimizer", "did you mean 'adam'?", "choices: adam, adamw"],
    "experiment=nope": ["experiment=nope: no such experiment", "choices: ", "swin_cifar_tutorial"],
    "=3": ["=3: expected key=value, such as trainer.epochs=3"],
    "trainer.epochs=[1": ["trainer.epochs=[1: expected key=value, ", "close every bracket and quote"],
    "help": ["help: expected key=value, such as trainer.epochs=3 (vit-train --help shows more)"],
    "h" * 300: ["(vit-train --help shows more)"],
    "swin_cifar": ["swin_cifar: expected key=value, ", "(did you mean model=swin_cifar?)"],
    "few_images": ["(did you mean experiment=few_images?)"],
    "default": ["(did you mean trainer=default or tracker=default?)"],
    "cifar10": ["(did you mean data=cifar10?)"],
    "--gpus 2": ["--gpus is not a flag of vit-train; vit-train --cfg job shows every key"],
    "--output out": ["--output is not a flag of vit-train; vit-train --cfg job shows every key"],
    "model=3": ["model=3: a config is chosen by its name", "model=vit_tiny"],
    "hydra.run.dri=x": ["hydra.run.dri is not a key; did you mean 'hydra.run.dir'?"],
    "trainer.epoch=3": ["trainer.epoch: Trainer has no such key; did you mean 'trainer.epochs'?"],
    "trainer.zzz=3": ["trainer.zzz: Trainer has no such key (it has: epochs, max_steps, "],
    "+trainer.epoch=3": ["trainer.epoch: ", "no such key", "did you mean 'trainer.epochs'?"],
    "optimzer.lr=1": ["optimzer: the configuration has no such key", "did you mean 'optimizer'?"],
    "data.imgsize=8": ["data.imgsize: Digits has no such key", "did you mean 'data.img_size'?"],
    "foo=1": ["foo: the configuration has no such key", "it has: ", "trainer"],
    "lr=1e-3": ["lr: the configuration has no such key; did you mean 'optimizer.lr'?"],
    "+foo=1": ["foo: the configuration has no such key", "it has: ", "trainer"],
    "optimizer.lr=abc": ["optimizer.lr: 'abc' is not one of auto, float"],
    "optimizer.lr=-1": ["optimizer.lr: must be auto or greater than 0, got -1"],
    "optimizer.lr=atuo": ["optimizer.lr: 'atuo' is not one of auto, float; did you mean 'auto'?"],
    "augment.batch.crop_scale=[0.1]": [
        "augment.batch.crop_scale: [0.1] is not one of auto, tuple[float, float]"
    ],
    "optimizer.lr=${nope}": ["optimizer.lr: ", "'nope' not found"],
    "trainer.precision=bf17": ["trainer.precision: 'bf17'", "auto, fp32, bf16, fp16", "did you mean 'bf16'?"],
    "trainer.epochs=0": ["trainer.epochs: must be at least 1, got 0"],
    "trainer.compile=1": ["trainer.compile: expected bool, got 1 (int)"],
    "model=[vit_tiny,vit_small]": ["one model per run", "type model=vit_tiny", "-m model=vit_tiny,vit_small"],
    "model=vit_tiny model.patch_embed.patch_size=3": [
        "model.patch_embed: patch_size 3 does not divide img_size 8",
        "use one of 1, 2, 4, 8, or type data.img_size=9",
    ],
    "model.embed_dim=64 model.num_heads=5": [
        "model: num_heads 5 does not divide embed_dim 64",
        "use one of 1, 2, 4, 8",
    ],
    "data.batch_size=10 trainer.grad_accum_steps=3": [
        "data.batch_size=10 is not divisible by trainer.grad_accum_steps=3",
        "type data.batch_size=12",
    ],
    "schedule.warmup_epochs=50 data.limit=64": [
        "schedule: warmup_epochs=50 (50 steps) is longer than the run of 40 steps",
        "type fewer, or schedule.warmup_epochs=null",
    ],
    "data.val_fraction=2": ["data.val_fraction: must be less than 1, got 2"],
    "strategy.device=cuda:99": ["strategy: device 'cuda:99' is not available", "type strategy.device="],
}


@pytest.mark.parametrize("arguments", CONFIG_MISTAKES)
def test_a_configuration_mistake_is_one_line(refused, arguments):
    refused(*arguments.split(), code=2, words=CONFIG_MISTAKES[arguments])


def test_several_mistakes_are_all_said_at_once(typed, in_tmp):
    done = typed("optimizer.lr=abc", "trainer.epochs=0", "+trainer.epoch=3")
    header, *lines = done.err.splitlines()
    assert done.code == 2
    assert header == "vit-train: error: 3 errors in the configuration:"
    assert len(lines) == 3
    for line, key in zip(sorted(lines), ("optimizer.lr", "trainer.epoch", "trainer.epochs")):
        assert line.startswith(f"  {key}: "), line
    assert list(in_tmp.iterdir()) == []


def as_process(*arguments, cwd, **variables):
    return subprocess.run(
        command("vit_train", *arguments),
        cwd=cwd,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("argument", "code"), [("model=swim", 2), ("trainer.epoch=3", 2), ("data=imagefolder", 3)]
)
def test_the_process_itself_ends_with_the_code_and_the_line(tmp_path, argument, code):
    done = subprocess.run(
        command("vit_train", argument),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert_one_line(done.stderr, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argument", "code"), [("model=swim", 2), ("resume=latest", 4)])
def test_full_error_shows_a_traceback_and_still_the_line(typed, argument, code):
    """One error of Hydra's, one of ours."""
    done = typed(argument, HYDRA_FULL_ERROR="1")
    assert done.code == code
    assert "Traceback (most recent call last):" in done.err
    assert_one_line(done.err.splitlines(keepends=True)[-1], [])


@pytest.mark.parametrize("key", ["resume", "run_dir", "name", "summary", "data.root"])
def test_an_interpolation_that_leads_nowhere(refused, key):
    """Some keys are read before the configuration is checked."""
    refused(f"{key}=${{oc.env:NOTHING_OF_THAT_NAME}}", words=["NOTHING_OF_THAT_NAME"])


def test_a_mistake_in_what_is_only_shown(refused):
    line = refused("--cfg", "job", "trainer.epoch=3", words=["did you mean 'trainer.epochs'?"])
    assert "--cfg" not in line
    refused("trainr.epochs=3", "-cjob", words=["trainr.epochs", "did you mean 'trainer'?"])


def test_a_key_that_belongs_somewhere_else(refused):
    refused("model=vit_tiny", "model.patch_size=4", words=["did you mean 'model.patch_embed.patch_size'?"])
    refused("optimizer=adamW", words=["did you mean 'adamw'?"])
    line = refused(
        "data.root=photos", words=["data.root: Digits has no such key; type data=imagefolder as well"]
    )
    assert "(it has" not in line


@pytest.mark.parametrize("flag", [["--resume", "X"], ["--resume=X"], ["seed=1", "--resume", "X"]])
def test_a_key_that_is_typed_as_a_flag(refused, flag):
    refused(*flag, words=["is not a flag of vit-train; a value is typed as resume=X"])


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--epochs 3", "trainer.epochs=3"),
        ("--lr=1e-3", "optimizer.lr=1e-3"),
        ("--batch-size 64", "data.batch_size=64"),
        ("--depth 9", "model.depth=9"),
        ("--seed 3", "seed=3"),
        ("--trainer.epochs 3", "trainer.epochs=3"),
        ("--model vit_tiny", "model=vit_tiny"),
        ("--num-classes 5", "data.num_classes=5"),
    ],
)
def test_a_flag_of_other_trainers_is_answered_with_the_whole_key(refused, flag, meant):
    refused(*flag.split(), words=[f"is not a flag of vit-train; a value is typed as {meant}"])


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("evaluate", "", "vit-eval: error: the following arguments are required: RUN;"),
        ("predict", "run image --top-k 0", "vit-predict: error: argument --top-k: expected a whole number"),
        ("explain", "run image --method x", "vit-explain: error: argument --method: invalid choice: 'x'"),
        ("export", "run --format onnxx", "vit-export: error: argument --format: invalid choice: 'onnxx'"),
        ("data_command", "chek x", "vit-data: error: argument COMMAND: invalid choice: 'chek'"),
        ("data_command", "check", "vit-data: error: the following arguments are required: ROOT"),
    ],
)
def test_the_other_commands_refuse_in_one_line_too(module, arguments, said):
    done = subprocess.run(
        command(f"vit_train.cli.{module}", *arguments.split()),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert done.stderr.endswith(" --help says more\n")
    assert done.stderr.count("\n") == 1


def test_a_flag_without_its_value(refused):
    refused("--cfg", words=["--cfg", "expected one argument"])
    refused("-m", "--cfg", "job", words=["Only one of --run, --multirun, --cfg"])


# ---------------------------------------------------------------------------------------------------- the data
def test_a_data_root_that_is_none(refused, in_tmp):
    (in_tmp / "empty").mkdir()
    (in_tmp / "file").write_text("")
    (in_tmp / "photos").mkdir()
    refused("data=imagefolder", code=3, words=["data.root is not set", "type data.root="])
    words = ["data.root=photo ", "does not exist", "did you mean 'photos'?"]
    refused("data=imagefolder", "data.root=photo", code=3, words=[w.strip() for w in words])
    refused(
        "data=imagefolder", "data.root=empty", code=3, words=["empty holds no folders", "<class>/<image>"]
    )
    refused(
        "data=imagefolder", "data.root=file", code=3, words=["data.root=file is not a folder", "type the"]
    )


def test_class_folders_that_do_not_fit(refused, in_tmp):
    folder_of_images(in_tmp / "hole", cat=3, dog=0)
    refused(
        "data=imagefolder", "data.root=hole", code=3, words=["hole/dog holds no images", "fill it or remove"]
    )
    folder_of_images(in_tmp / "val", train__cat=3, train__dog=3, val__cat=1, val__dogs=1)
    refused(
        "data=imagefolder",
        "data.root=val",
        code=3,
        words=["train has no class for", "val/dogs", "did you mean 'dog'?"],
    )
    folder_of_images(in_tmp / "single", cat=3)
    refused("data=imagefolder", "data.root=single", code=3, words=["one class only (cat)", "two or more"])
    refused("data.limit=3", code=3, words=["data.limit=3", "10 classes", "type data.limit=10"])
    refused("data.num_classes=5", code=3, words=["data.num_classes=5", "digits has 10"])


@pytest.mark.parametrize("side", [28, 50])
def test_small_square_images_train_with_the_one_line_command(typed, in_tmp, side):
    """vit_tiny has patches of 16 pixels, and 28 is not a multiple of that."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = in_tmp / f"photos/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    one_line = ("data=imagefolder", "data.root=photos")
    quick = ("model.depth=1", "trainer.max_steps=1", "tracker.tensorboard=false", "run_dir=run")
    done = typed(*one_line, *quick)
    assert done.code == 0, done.err
    fitting = {28: 32, 50: 64}[side]
    said = f"data.img_size={fitting}: {side} (the size of the files) is not a multiple of the model's patch of 16"
    assert said in " ".join(done.out.split())
    assert typed("resume=run", "trainer.max_steps=2").code == 0
    assert typed(*one_line, *quick[:1], *quick[2:], "trainer.max_steps=3").code == 0, "the same run once more"
    done = typed(*one_line, *quick[:3], f"data.img_size={side}", "run_dir=other")
    assert done.code == 2
    assert f"does not divide img_size {side}; use one of " in done.err
    assert done.err.endswith(f", or type data.img_size={fitting}\n")


def test_a_folder_alone_is_told_how_to_be_typed(typed, in_tmp):
    (in_tmp / "my photos").mkdir()
    done = typed("my photos")
    assert done.code == 2
    assert_one_line(done.err, ["for a folder of images: data=imagefolder 'data.root=my photos'"])


def test_a_folder_typed_as_the_data(typed, in_tmp):
    (in_tmp / "photos").mkdir()
    assert_one_line(
        typed("data=photos").err, ["for a folder of images type data=imagefolder data.root=photos"]
    )
    assert_one_line(typed("data=digit").err, ["did you mean 'digits'?"])


def test_cifar_without_a_network_says_where_to_put_it(typed, in_tmp):
    """A proxy on a closed port of this machine: the download fails at once."""
    closed = "http://127.0.0.1:9"
    done = typed("data=cifar10", "data.root=here", http_proxy=closed, https_proxy=closed, no_proxy="")
    assert (done.code, done.out) == (3, "")
    assert_one_line(done.err, ["cifar10 is not in here", "the download failed", "fetch https://"])
    assert_one_line(done.err, ["put it at here/cifar-10-python.tar.gz", "type data.root="])
    # torchvision makes the folder; nothing may be left in it
    assert [path for path in in_tmp.rglob("*") if path != in_tmp / "here"] == []


def test_fewer_images_than_a_batch_train(typed, in_tmp):
    done = typed(*TINY, "data.limit=20", "data.batch_size=64", "trainer.epochs=1", "run_dir=r")
    assert done.code == 0, done.err
    assert "20 training images do not fill data.batch_size=64" in done.out
    assert json.loads((in_tmp / "r/result.json").read_text())["steps"] == 1


# ----------------------------------------------------------------------------------------------- run directories
@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run that was stopped after its third step, built once; tests work on copies."""
    home = tmp_path_factory.mktemp("stopped")
    done = vit_train_here(*TINY, "optimizer.lr=0.001", "trainer.stop_at_step=3", "run_dir=run", cwd=home)
    assert done.code == 0, done.err
    return home / "run"


@pytest.fixture
def run(stopped_run, in_tmp):
    """The same, in the working directory."""
    shutil.copytree(stopped_run, in_tmp / "run", symlinks=True)
    return Path("run")


def test_the_run_directory_of_another_configuration(refused, run):
    # `refused` compares every byte below the working directory, so the run is as it was
    line = refused(
        *TINY,
        "run_dir=run",
        "optimizer.lr=0.5",
        "seed=3",
        words=["run holds a run with another configuration", "optimizer.lr: 0.001 -> 0.5", "seed: 0 -> 3"],
    )
    assert "choose another run_dir" in line
    assert "run_dir:" not in line


def test_a_run_directory_that_cannot_be_one(refused, in_tmp):
    (in_tmp / "file").write_text("mine")
    (in_tmp / "full").mkdir()
    (in_tmp / "full" / "thesis.txt").write_text("mine")
    refused("run_dir=file", words=["run_dir=file cannot be made", "file is a file"])
    refused("run_dir=file/deeper/run", words=["run_dir=file/deeper/run cannot be made", "file is a file"])
    refused(
        "run_dir=full", words=["run_dir=full holds files that are not a run", "name a new or empty directory"]
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_without_permission(refused, in_tmp):
    (in_tmp / "locked").mkdir(mode=0o555)
    refused("run_dir=locked/run", words=["run_dir=locked/run cannot be written", "no permission"])


def test_nothing_to_resume(refused, in_tmp):
    refused(
        "resume=nowhere",
        code=4,
        words=["resume=nowhere", "neither config.yaml nor checkpoints", "type its directory"],
    )
    refused("resume=latest", code=4, words=["resume=latest finds no run under ./runs", "type resume=PATH"])


def test_resume_takes_single_values_only(refused, run):
    refused(
        "resume=run",
        "model=vit_cifar",
        words=["model=vit_cifar", "stored configuration", "trainer.epochs=50"],
    )
    refused(
        "resume=run", "~trainer.save_every_epochs", words=["~trainer.save_every_epochs", "only single values"]
    )
    refused("resume=run", "trainer.epoch=9", words=["trainer.epoch: ", "did you mean 'trainer.epochs'?"])
    refused("resume=run", "+foo=1", words=["+foo=1", "only single values"])
    refused("resume=run", "optimizer.lr=1", words=["another configuration", "optimizer.lr: 0.001 -> 1"])
    refused("resume=run", "trainer.epochs=x", words=["trainer.epochs: expected int, got 'x'"])


def test_a_stored_configuration_chooses_no_code(refused, run, in_tmp, monkeypatch):
    """Neither called nor imported: both would leave a file."""
    monkeypatch.syspath_prepend(str(in_tmp))
    (in_tmp / "foreign_code.py").write_text(
        "open('imported', 'w').close()\ndef model(): open('called', 'w')\n"
    )
    stored = yaml.safe_load((run / "config.yaml").read_text())
    for key, node in (
        ("model", {"_target_": "os.system", "command": "touch called"}),
        ("model", {"_target_": "foreign_code.model"}),
        ("objective", {"_target_": "foreign_code.model", "_partial_": True}),
    ):
        (run / "config.yaml").write_text(yaml.safe_dump({**stored, key: node}))
        words = ["run/config.yaml", f"{key}._target_: {node['_target_']}", "not vit-train's"]
        refused("resume=run", code=4, words=words)
    nested = {**stored["model"], "patch_embed": {"_target_": "foreign_code.model"}}
    (run / "config.yaml").write_text(yaml.safe_dump({**stored, "model": nested}))
    refused("resume=run", code=4, words=["model.patch_embed._target_: foreign_code.model"])
    # behind a prefix of ours
    (run / "config.yaml").write_text(
        yaml.safe_dump(
            {
                **stored,
                "model": {"_target_": "vit_train.data.image_data.os.system", "command": "touch called"},
            }
        )
    )
    refused("resume=run", code=4)
    assert "foreign_code" not in sys.modules
    assert not list(in_tmp.glob("called")) + list(in_tmp.glob("imported"))


# -------------------------------------------------------------------------------------------------- while training
def test_a_loss_that_is_not_finite_is_never_saved(typed, in_tmp):
    done = typed(
        *TINY,
        "optimizer.lr=1e30",
        "trainer.grad_clip_norm=null",
        "trainer.precision=fp32",
        "trainer.save_every_steps=1",
        "run_dir=r",
    )
    assert done.code == 6, done
    assert_one_line(
        done.err, ["at step 2", "Try a lower optimizer.lr", "trainer.grad_clip_norm=1", "digits image"]
    )
    assert done.err.removeprefix("vit-train: ") in (in_tmp / "r/train.log").read_text()
    saved = checkpoint_directories(in_tmp / "r/checkpoints")
    assert [path.name for path in saved] == ["step_00000001"]
    for name, tensor in load(saved[0]).tensors.items():
        assert torch.isfinite(tensor).all(), name
    assert not (in_tmp / "r/result.json").exists()


# ------------------------------------------------------------------------------------------ configs of one's own
def test_a_config_of_ones_own_is_found_and_one_that_would_be_hidden_refused(typed, refused, in_tmp):
    folder = in_tmp / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.123\n")
    (folder / "swin_cifar_tutorial.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.123\n")
    done = typed("--config-dir", "conf", "experiment=mine", "--cfg", "job")
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["optimizer"]["lr"] == 0.123
    refused(
        "--config-dir",
        "conf",
        "experiment=swin_cifar_tutorial",
        words=["swin_cifar_tutorial.yaml", "the name of a built-in config", "rename it"],
    )
