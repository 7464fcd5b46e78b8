"""Runs with classes of the user's own: whose code a stored run may name is typed with each command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    TINY,
    Done,
    change_states,
    checkpoint_hashes,
    command,
    environment,
    typed_here,
    vit_train_here,
)
from PIL import Image
from sklearn.datasets import load_digits

from vit_train.cli import evaluate, explain, export, predict
from vit_train.config.check import GROUPS, config_dir
from vit_train.runs.stored import packages_of

MINE = '''
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_train.data import Digits
from vit_train.models import ViT
from vit_train.training.objective import CrossEntropy
from vit_train.training.schedules import Schedule
from vit_train.training.trainer import Trainer

HOME = Path(__file__).parent
with (HOME / "imported").open("a") as marker:
    marker.write("x")


class Pixels(nn.Module):
    def __init__(self, *, in_channels: int, img_size: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.hidden = nn.Linear(in_channels * img_size**2, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.hidden(images.flatten(1)).relu())


class Scaled(ViT):
    def __init__(self, *, scale: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.scale = scale

    def forward(self, images):
        return self.scale * super().forward(images)


class Paper(Digits):
    """Black digits on white."""

    def __init__(self, *, white: int = 255, **options: Any) -> None:
        super().__init__(**options)
        self.white = white

    def load(self):
        found = super().load()
        sources = {name: replace(s, images=self.white - s.images) for name, s in found.sources.items()}
        return replace(found, sources=sources)


class Fixed(Digits):
    def __init__(self, **options: Any) -> None:
        super().__init__(limit=64, **options)


class Hard(Digits):
    def __init__(self, **options: Any) -> None:
        options.setdefault("limit", 64)
        super().__init__(**options)


class Loud(Trainer):
    def __init__(self, parts: Any, **options: Any) -> None:
        super().__init__(parts, **options)


class Squared(CrossEntropy):
    """Waits in its third step, if told to, until the file `go` is there."""

    steps = 0

    def forward(self, model, images, targets):
        Squared.steps += 1
        if os.environ.get("MINE_WAITS") and Squared.steps == 3:
            (HOME / "waiting").touch()
            while not (HOME / "go").exists():
                time.sleep(0.01)
        loss, logits = super().forward(model, images, targets)
        return loss**2, logits


def momentum(model: nn.Module, *, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class Halved(Schedule):
    def __call__(self, step: int) -> float:
        return 1.0 if 2 * step < self.total_steps else 0.5
'''
IMAGES = {"img_size": 8, "in_channels": 1, "num_classes": None}
CONFIGS = {
    "data/fixed": {"_target_": "mine.Fixed", "batch_size": 16, **IMAGES},
    "data/hard": {"_target_": "mine.Hard", "batch_size": 16, **IMAGES},
    "data/bare": {"_target_": "mine.Hard", **IMAGES},
    "trainer/loud": {"_target_": "mine.Loud", "_partial_": True, "epochs": 1},
    "model/pixels": {
        "_target_": "mine.Pixels",
        **{key: f"${{data.{key}}}" for key in ("in_channels", "img_size", "num_classes")},
    },
    "optimizer/momentum": {"_target_": "mine.momentum", "_partial_": True},
    "schedule/halved": {"_target_": "mine.Halved", "_partial_": True},
}
OWN_REST = (
    "data._target_=mine.Paper",
    "data.white=250",
    "objective._target_=mine.Squared",
    "optimizer=momentum",
    "schedule=halved",
)
SCALED = (*TINY, "trainer.grad_accum_steps=1", "model._target_=mine.Scaled", "model.scale=2.0", *OWN_REST)
PIXELS = (*(each for each in TINY if not each.startswith("model.")), "model=pixels", "trainer.epochs=1")
SMALL = tuple(each for each in TINY if not each.startswith(("trainer.", "data.")))
RESUME = re.compile(r"^  (vit-train resume=.*)$", re.MULTILINE)
KEYS = ("data", "model", "objective", "optimizer", "schedule")


class Lib:
    """The folder with the package, and commands that may import it."""

    def __init__(self, folder):
        self.folder, self.marker = folder, folder / "mine" / "imported"
        (folder / "mine").mkdir()
        (folder / "mine" / "__init__.py").write_text(MINE)
        (folder / "mine" / "broken.py").write_text("def (")
        (folder / "quits.py").write_text("import sys\nsys.exit('bye')\n")
        for name, node in CONFIGS.items():
            path = folder / "conf" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(node))

    def imported(self):
        """How often the package has been."""
        return len(self.marker.read_text()) if self.marker.exists() else 0

    def train(self, *arguments, cwd):
        """`vit-train` in this process, into which the package was never imported."""
        forget()
        return vit_train_here(*arguments, cwd=cwd)

    def type(self, module, *arguments, cwd):
        """Another command likewise."""
        forget()
        return typed_here(module.main, *arguments, cwd=cwd)


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "quits")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    made = Lib(tmp_path_factory.mktemp("lib"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(made.folder))
        patch.setenv("PYTHONPATH", str(made.folder), prepend=":")
        yield made
    forget()


def finished(lib, home, *arguments):
    done = lib.train("--config-dir", str(lib.folder / "conf"), *arguments, "run_dir=run", cwd=home)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def scaled(lib, tmp_path_factory):
    """A folder with `run`, everything of which is of the package, an image, and how the run ended."""
    home = tmp_path_factory.mktemp("scaled")
    said = finished(lib, home, *SCALED).out
    Image.fromarray((255 - load_digits().images[0] * 15).astype("uint8")).save(home / "zero.png")
    return home, said


@pytest.fixture(scope="module")
def pixels(lib, tmp_path_factory):
    """A folder with `run`, whose model alone is of the package, and an image."""
    home = tmp_path_factory.mktemp("pixels")
    finished(lib, home, *PIXELS)
    Image.new("L", (8, 8)).save(home / "zero.png")
    return home


@pytest.fixture
def copied(scaled, tmp_path):
    """The first of them, to be changed."""
    return Path(shutil.copytree(scaled[0], tmp_path / "home", symlinks=True))


def one_line(done, code, program):
    """An error, which is one line."""
    assert done.code == code, done
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith(f"{program}: error: "), done.err
    return done.err


# --------------------------------------------------------------------------------------------- with trust
def goes_on(lib, said, scaled, tmp_path):
    """The command a stopped run printed, as it is, ends where the unbroken run does."""
    printed = RESUME.findall(said)
    assert printed == ["vit-train resume=run trust=mine"]
    done = lib.train(*shlex.split(printed[0])[1:], cwd=tmp_path)
    assert done.code == 0, done.err
    assert checkpoint_hashes(tmp_path / "run") == checkpoint_hashes(scaled[0] / "run")


def test_the_printed_command_continues_a_stopped_run_exactly(lib, scaled, tmp_path) -> None:
    said = finished(lib, tmp_path, *SCALED, "trainer.stop_at_step=7").out
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert all(stored[key]["_target_"].startswith("mine.") for key in KEYS)
    goes_on(lib, said, scaled, tmp_path)


def test_the_printed_command_continues_after_a_signal_exactly(lib, scaled, tmp_path) -> None:
    folder = lib.folder / "mine"
    for name in ("waiting", "go"):
        (folder / name).unlink(missing_ok=True)
    arguments = ("--config-dir", str(lib.folder / "conf"), *SCALED, "run_dir=run")
    process = subprocess.Popen(
        command("vit_train", *arguments),
        cwd=tmp_path,
        env={**environment(), "MINE_WAITS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "waiting").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    (folder / "go").touch()
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "step 3 is saved" in said
    goes_on(lib, said, scaled, tmp_path)


def test_a_finished_run_prints_commands_that_work(lib, scaled, copied) -> None:
    said = dict(re.findall(r"^(evaluate|train longer) +(.*)$", scaled[1], re.MULTILINE))
    assert said == {
        "evaluate": "vit-eval run --trust mine",
        "train longer": "vit-train resume=run trust=mine trainer.epochs=6",
    }
    done = lib.type(evaluate, *shlex.split(said["evaluate"])[1:], cwd=copied)
    assert done.code == 0, done.err
    report = json.loads((copied / "run" / "eval" / "test" / "report.json").read_text())
    result = json.loads((copied / "run" / "result.json").read_text())
    assert (report["top1"], report["loss"]) == (result["test/top1"], pytest.approx(result["test/loss"]))
    again = lib.train("resume=run", "trust=mine", cwd=copied)
    told = f"is finished: nothing to do. To see its figures, type:  {said['evaluate']}\n"
    assert again.out.endswith(told), again
    done = lib.train(*shlex.split(said["train longer"])[1:], cwd=copied)
    assert done.code == 0, done.err
    assert json.loads((copied / "run" / "result.json").read_text())["epochs"] == 6


@pytest.mark.parametrize("name", ["fixed", "hard"])
def test_what_a_subclass_hands_to_its_base_class_holds(lib, tmp_path, name) -> None:
    own = [each for each in TINY if not each.startswith("data.")]
    finished(lib, tmp_path, *own, f"data={name}", "trainer.stop_at_step=3")
    done = lib.train("resume=run", "trust=mine", cwd=tmp_path)
    assert done.code == 0, done.err
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert (state["train"]["step"], state["train"]["steps_per_epoch"]) == (12, 64 // 16)
    assert len(state["inference"]["mean"]) == 1
    assert lib.type(evaluate, "run", "--trust", "mine", cwd=tmp_path).code == 0


def test_configs_of_the_users_may_leave_keys_out(lib, tmp_path) -> None:
    finished(lib, tmp_path, *SMALL, "trainer=loud")
    bare = ("--config-dir", str(lib.folder / "conf"), *SMALL, "trainer.epochs=1")
    done = lib.train(*bare, "data=bare", cwd=tmp_path)
    assert "data.batch_size: missing" in one_line(done, 2, "vit-train")


def test_predictions_pictures_and_files(lib, copied) -> None:
    done = lib.type(predict, "run", "zero.png", "--trust", "mine", "--top-k", "1", cwd=copied)
    assert done.code == 0, done.err
    assert "zero.png" in done.out
    done = lib.type(explain, "run", "zero.png", "--trust", "mine", "--out", "drawn", cwd=copied)
    assert done.code == 0, done.err
    assert list((copied / "drawn").glob("zero*.png"))
    for file_format in ("safetensors", "onnx"):
        done = lib.type(export, "run", "--format", file_format, "--trust", "mine", cwd=copied)
        assert done.code == 0, done.err
        assert "checked" in done.out
        assert list((copied / "run" / "export").glob(f"*.{file_format}"))


def test_a_model_that_is_no_vit(lib, pixels, tmp_path) -> None:
    home = Path(shutil.copytree(pixels, tmp_path / "home", symlinks=True))
    done = lib.type(export, "run", "--format", "pt2", "--trust", "mine", "--out", "m.pt2", cwd=home)
    assert done.code == 0, done.err
    answers = torch.export.load(home / "m.pt2").module()(torch.zeros(1, 1, 8, 8))
    assert answers.shape == (1, 10)
    done = lib.type(explain, "run", "zero.png", "--trust", "mine", cwd=home)
    assert "Pixels has nothing to draw" in one_line(done, 2, "vit-explain")
    done = lib.type(predict, "run", "zero.png", "--trust", "mine", cwd=home)
    assert done.code == 0, done.err


def test_a_model_of_the_users_teaches_where_it_is_trusted(lib, pixels, tmp_path) -> None:
    home = Path(shutil.copytree(pixels, tmp_path / "home", symlinks=True))
    typed = (*TINY, "objective=distill", "objective.teacher=run", "run_dir=student")
    assert "(model._target_: mine.Pixels); type trust=mine if" in one_line(
        lib.train(*typed, cwd=home), 4, "vit-train"
    )
    assert not (home / "student").exists()
    done = lib.train(*typed, "trust=mine", "trainer.stop_at_step=7", cwd=home)
    assert done.code == 0, done.err
    assert "type trust=mine" in one_line(lib.train("resume=student", cwd=home), 4, "vit-train")
    done = lib.train("resume=student", "trust=mine", cwd=home)
    assert done.code == 0, done.err


def test_weights_are_taken_from_a_run_without_trust(lib, scaled, tmp_path) -> None:
    before = lib.imported()
    shape = [each for each in TINY if not each.startswith("trainer.epochs")]
    done = lib.train(*shape, "trainer.max_steps=1", f"init_from={scaled[0] / 'run'}", cwd=tmp_path)
    assert done.code == 0, done.err
    assert lib.imported() == before
    assert "trust" not in done.out  # nothing here is of the package


# ------------------------------------------------------------------------------------------ without trust
def asking_for_trust(home):
    """A run that says itself what is to be trusted."""
    path = home / "run" / "config.yaml"
    path.write_text(path.read_text() + "trust: [mine]\n")
    change_states(home / "run", lambda state: state["config"].update(trust=["mine"]))


@pytest.mark.parametrize("asks", [False, True])
def test_without_trust_nothing_is_imported(lib, copied, asks) -> None:
    if asks:
        asking_for_trust(copied)
    before = lib.imported()
    for module, program, rest in (
        (evaluate, "vit-eval", ()),
        (predict, "vit-predict", ("zero.png",)),
        (explain, "vit-explain", ("zero.png",)),
        (export, "vit-export", ("--format", "safetensors")),
    ):
        line = one_line(lib.type(module, "run", *rest, cwd=copied), 4, program)
        assert line.endswith("(model._target_: mine.Scaled); type --trust mine if the code is yours\n")
    line = one_line(lib.train("resume=run", cwd=copied), 4, "vit-train")
    assert all(f"{key}._target_: mine." in line for key in KEYS)
    assert line.endswith("; type trust=mine if the code is yours\n")
    (copied / "run" / "config.yaml").write_text("damaged")  # the checkpoint's copy stands in
    line = one_line(lib.train("resume=run", cwd=copied), 4, "vit-train")
    assert line.endswith("; type trust=mine if the code is yours\n")
    assert lib.imported() == before
    assert lib.type(evaluate, "run", "--trust", "mine", cwd=copied).code == 0  # the control
    assert lib.imported() == before + 1


def test_what_a_run_trusts_is_neither_used_nor_stored(lib, tmp_path) -> None:
    finished(lib, tmp_path, *PIXELS, "trainer.stop_at_step=2", "trust=mine")
    asking_for_trust(tmp_path)
    assert lib.train("resume=run", "trust=mine", cwd=tmp_path).code == 0
    stored = [tmp_path / "run" / "config.yaml", tmp_path / "run/checkpoints/last/state.json"]
    assert not [path for path in stored if "trust" in path.read_text()]


@pytest.mark.parametrize("target", ["os.system", "vit_train.inference.download.download"])
def test_what_is_not_the_users_is_not_offered(lib, copied, target) -> None:
    def change(config):
        config["data"]["_target_"] = target
        config["model"]["_target_"] = "vit_train.models.ViT"
        del config["model"]["scale"]

    path = copied / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    change_states(copied / "run", lambda state: change(state["config"]))
    for line in (
        one_line(lib.type(evaluate, "run", cwd=copied), 4, "vit-eval"),
        one_line(lib.type(evaluate, "run", "--trust", "mine", cwd=copied), 4, "vit-eval"),
        one_line(lib.train("resume=run", "trust=mine", cwd=copied), 4, "vit-train"),
    ):
        assert line.endswith(f"(data._target_: {target})\n")


@pytest.mark.parametrize("target", ["torch.load", "yaml.unsafe_load", "joblib.load"])
def test_what_this_program_itself_uses_is_not_offered(vit_train, pixels, tmp_path, target) -> None:
    home = Path(shutil.copytree(pixels, tmp_path / "home", symlinks=True))
    path = home / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    hostile = {group: {"_target_": target} for group in GROUPS}  # nothing of ours is imported on the way
    path.write_text(yaml.safe_dump({**config, **hostile}))
    done = vit_train("resume=run", cwd=home, check=False)
    line = one_line(Done(done.returncode, done.stdout, done.stderr), 4, "vit-train")
    assert line.endswith(f"trainer._target_: {target})\n")


def test_a_full_command_builds_nothing_that_is_stored(lib, tmp_path) -> None:
    swin = "model=swin_cifar model.embed_dim=16 model.depths=[1,1] model.num_heads=[1,2] model.window_size=2"
    short = "data.limit=32 data.batch_size=16 tracker.tensorboard=false trainer.max_steps=2"
    arguments = (*swin.split(), *short.split())
    assert lib.train(*arguments, "run_dir=source", cwd=tmp_path).code == 0
    full = (*arguments, "run_dir=run", "init_from=source")
    assert lib.train(*full, "trainer.stop_at_step=1", cwd=tmp_path).code == 0
    path, before = tmp_path / "run" / "config.yaml", lib.imported()
    stored = yaml.safe_load(path.read_text())
    stored["model"]["mask_padding"] = {"_target_": "mine.momentum", "model": None}
    path.write_text(yaml.safe_dump(stored))
    assert "mask_padding" in one_line(lib.train(*full, cwd=tmp_path), 2, "vit-train")
    assert lib.imported() == before


# --------------------------------------------------------------------------------------------------- the rest
@pytest.mark.parametrize("package", ["not_there", "mine.broken", "quits", ".mine", "os.path.nothing"])
def test_a_package_that_cannot_be_imported_is_one_line(lib, scaled, package) -> None:
    for done, program, option in (
        (lib.type(evaluate, "run", "--trust", package, cwd=scaled[0]), "vit-eval", "--trust "),
        (lib.train("resume=run", f"trust={package}", cwd=scaled[0]), "vit-train", "trust="),
    ):
        line = one_line(done, 2, program)
        assert f"{option}{package}".strip() + " cannot be imported" in line


@pytest.mark.parametrize("nothing", ["trust=", "trust=null", "trust=[]"])
def test_to_trust_nothing_is_not_to_trust(lib, scaled, nothing) -> None:
    line = one_line(lib.train("resume=run", nothing, cwd=scaled[0]), 4, "vit-train")
    assert line.endswith("; type trust=mine if the code is yours\n")
    line = one_line(lib.type(evaluate, "run", "--trust", "", cwd=scaled[0]), 2, "vit-eval")
    assert "--trust cannot be imported" in line


def test_mistakes_in_the_configuration_are_said_before_those_in_trust(lib, tmp_path) -> None:
    done = lib.train("trainer.epoch=1", "trust=not_there", cwd=tmp_path)
    assert "did you mean 'trainer.epochs'?" in one_line(done, 2, "vit-train")
    done = lib.train("trust=not_there", cwd=tmp_path)
    assert "trust=not_there cannot be imported" in one_line(done, 2, "vit-train")


def test_a_broken_module_of_a_trusted_package_is_one_line(lib, copied) -> None:
    change_states(copied / "run", lambda state: state["config"]["model"].update(_target_="mine.broken.Net"))
    line = one_line(lib.type(evaluate, "run", "--trust", "mine", cwd=copied), 4, "vit-eval")
    assert "mine.broken.Net cannot be imported: invalid syntax" in line


def test_nothing_of_our_own_asks_for_trust() -> None:
    nodes = [
        (group, yaml.safe_load(path.read_text()))
        for group in GROUPS
        for path in (config_dir() / group).glob("*.yaml")
    ]
    assert len(nodes) > 20
    assert not [node for group, node in nodes if packages_of({group: node})]


def test_the_example_for_contributors_works_as_it_is_written(tmp_path) -> None:
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    code, config, lines = re.findall(r"```(?:python|yaml|sh)\n(.*?)```", text, re.DOTALL)
    for name, content in (("mine/__init__.py", code), ("conf/model/pixels.yaml", config)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    export_, *typed = lines.splitlines()
    assert export_ == "export PYTHONPATH=$PWD"
    short = ["data.limit=80", "data.batch_size=16", "trainer.max_steps=5", "trainer.stop_at_step=2"]
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        train, resume, evaluated = map(shlex.split, typed)
        done = vit_train_here(*train[1:], *short, cwd=tmp_path)
        assert done.code == 0, done.err
        assert RESUME.findall(done.out) == [typed[1]]
        forget()
        done = vit_train_here(*resume[1:], cwd=tmp_path)
        assert done.code == 0, done.err
        assert typed[2] in done.out
        forget()
        assert evaluated[0] == "vit-eval"
        assert typed_here(evaluate.main, *evaluated[1:], cwd=tmp_path).code == 0
    forget()
