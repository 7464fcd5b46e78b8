"""Run directories made by an attacker: hostile checkpoints, 12 of 12, and hostile stored configs, 16 of 16.

Whoever wrote a run directory chose every byte of it, so each attack keeps the manifest honest: sizes and
SHA-256 are those of the hostile file. Every command runs in a process that may take one gigabyte more than
it has, has a minute, and makes a canary file when it unpickles a class, starts a shell or looks up a host.

The counts: one test per kind of attack, `test_a_hostile_checkpoint...` (12) and `test_a_hostile_config...`
(16), each with all its variants and all ways in; a sample of both runs without the faults marker, and the
totals are sample and marked cases together. What follows them is about the rest of a run directory.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from conftest import EIGHTEEN, Forked, environment, everything_in, vit_train_forked
from safetensors.torch import load_file, save

# The limits of a process are set and read as Linux has them
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

MANIFEST = "manifest.json"
TERABYTE = 10**12
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


# ----------------------------------------------------------------------------------------------- the ways in
class ForkedEval(Forked):
    """`vit-eval` likewise."""

    def _run(self, arguments, cwd, fault, prepare):
        from vit_train.cli.evaluate import main

        code = 70
        try:
            for path, descriptor in ((self.out, 1), (self.err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment())
            prepare()
            code = main([str(argument) for argument in arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def confine(canary: Path) -> None:
    """Called in the child: little memory, little time, and a canary for what no file may cause."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, resource.RLIM_INFINITY))
    signal.alarm(60)
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as `python -m` does
    os.environ["SECRET"] = "hunter2"
    os.environ["TORCH_HOME"] = str(Path.cwd() / "torch_home")

    def hook(event, arguments):
        mine = event == "subprocess.Popen" and "git" not in str(arguments[1])
        if mine or event in (
            "os.system",
            "os.exec",
            "socket.getaddrinfo",
            "socket.connect",
            "pickle.find_class",
        ):
            os.close(os.open(canary, os.O_CREAT | os.O_WRONLY))

    sys.addaudithook(hook)


class Bird:
    """Makes the canary file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def stopped(warm, tmp_path_factory):
    """A run of three epochs stopped after two, with a checkpoint of each."""
    home = tmp_path_factory.mktemp("stopped")
    vit_train_forked(*EIGHTEEN, "trainer.stop_at_step=12", cwd=home)
    assert len(checkpoints(home / "run")) == 2
    return home / "run"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it that may be changed."""
    return Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))


def checkpoints(run):
    """Its checkpoint directories, newest first."""
    return sorted((run / "checkpoints").glob("step_*"), reverse=True)


def train(run, *arguments):
    """`vit-train` beside the run, confined."""
    home = run.parent
    return vit_train_forked(
        *(arguments or ("resume=run",)), cwd=home, check=False, prepare=lambda: confine(home / "canary")
    )


def evaluate(run, *arguments):
    """`vit-eval` likewise."""
    home = run.parent
    return ForkedEval(*arguments, cwd=home, prepare=lambda: confine(home / "canary")).wait(check=False)


def assert_refused(done, run, codes, *words):
    """One line, no traceback, nothing raw for the terminal, and the canary was never made."""
    assert not (run.parent / "canary").exists(), done
    assert done.code in codes, done
    errors = re.findall(r"^vit-(?:train|eval): error: ", done.err, flags=re.MULTILINE)
    assert len(errors) == (done.code != 0), done.err
    assert "Traceback" not in done.out + done.err
    assert "\x1b" not in done.out + done.err
    assert "hunter2" not in done.out + done.err
    for word in words:
        assert word in done.err, f"{word!r} is not said in: {done.err[:2000]}"


# ------------------------------------------------------------------------------------- hostile checkpoints
def rewrite(checkpoint, name, data, **entry):
    """Replaces one file and keeps the manifest honest."""
    (checkpoint / name).unlink()
    (checkpoint / name).write_bytes(data)
    record(checkpoint, name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def record(checkpoint, name, **entry):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = entry
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def tensors_file(header, content=b""):
    """A safetensors file with this header, honest or not."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def a_pickle_in(name):
    def attack(checkpoint):
        bird = pickle.dumps(Bird(checkpoint.parents[2] / "canary"))
        if name == MANIFEST:
            (checkpoint / name).write_bytes(bird)
        else:
            rewrite(checkpoint, name, bird)

    return [attack]


def header_longer_than_the_file(checkpoint):
    for length in (10**6, 2**63, 2**64 - 1):
        rewrite(checkpoint, "model.safetensors", length.to_bytes(8, "little") + b'{"a":')


def shapes_that_lie(shape, nbytes):
    def attack(checkpoint):
        header = {"head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}
        rewrite(checkpoint, "model.safetensors", tensors_file(header, bytes(nbytes)))

    return attack


def another_shape(kind):
    def attack(checkpoint):
        file = checkpoint / f"{kind}.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "head.weight" in name)
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1, *tensors[name].shape[1:])
        rewrite(checkpoint, file.name, save(tensors))

    return attack


def a_terabyte(kind, name):
    """A sparse file whose header accounts for every byte of it."""

    def attack(checkpoint):
        header = {name: {"dtype": "F32", "shape": [TERABYTE // 4], "data_offsets": [0, TERABYTE]}}
        file = checkpoint / f"{kind}.safetensors"
        file.unlink()
        data = tensors_file(header)
        file.write_bytes(data)
        os.truncate(file, len(data) + TERABYTE)
        record(checkpoint, file.name, bytes=len(data) + TERABYTE, sha256="0" * 64)

    return attack


def oversized(name):
    def attack(checkpoint):
        text = (checkpoint / name).read_text()
        data = text.rstrip().rstrip("}").encode() + b', "x": "' + b"x" * (17 * 2**20) + b'"}'
        json.loads(data)
        if name == MANIFEST:
            (checkpoint / name).write_bytes(data)
        else:
            rewrite(checkpoint, name, data)

    return attack


def a_linked_file(name):
    def attack(checkpoint):
        outside = checkpoint.parents[2] / f"outside_{checkpoint.name}_{name}"
        (checkpoint / name).rename(outside)
        (checkpoint / name).symlink_to(outside)

    return attack


def a_linked_directory(checkpoint):
    """All of them lead outside, where there is a valid checkpoint; so do the links of the run."""
    outside = checkpoint.parents[2] / "outside"
    outside.mkdir(exist_ok=True)
    if not checkpoint.is_symlink():
        checkpoint.rename(outside / checkpoint.name)
        checkpoint.symlink_to(outside / checkpoint.name, target_is_directory=True)
    for link in ("last", "best"):
        (checkpoint.parent / link).unlink()
        (checkpoint.parent / link).symlink_to(f"../../outside/{checkpoint.name}", target_is_directory=True)


def a_path_in_the_manifest(checkpoint):
    outside = checkpoint.parents[2] / f"outside_{checkpoint.name}"
    shutil.copytree(checkpoint, outside)
    name = f"../../../{outside.name}/model.safetensors"
    assert (checkpoint / name).is_file()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"].pop("model.safetensors")
    manifest["files"]["model.safetensors"] = manifest["files"][name]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


CHECKPOINT_ATTACKS = {
    "a pickle in place of model.safetensors": a_pickle_in("model.safetensors"),
    "a pickle in place of ema.safetensors": a_pickle_in("ema.safetensors"),
    "a pickle in place of optimizer.safetensors": a_pickle_in("optimizer.safetensors"),
    "a pickle in place of state.json": a_pickle_in("state.json"),
    "a pickle in place of manifest.json": a_pickle_in(MANIFEST),
    "a header longer than the file": [header_longer_than_the_file],
    "a header that claims more than the file has": [
        shapes_that_lie([10**6, 10**6], 4000),
        shapes_that_lie([2**62, 2**62], 4000),
        shapes_that_lie([-1, 10], 40),
        shapes_that_lie([10**6] * 1000, 4000),
    ],
    "tensors of another shape": [another_shape("model"), another_shape("ema"), another_shape("optimizer")],
    "a sparse file of a terabyte": [
        a_terabyte("model", "head.weight"),
        a_terabyte("ema", "head.weight"),
        a_terabyte("optimizer", "head.weight/exp_avg"),
    ],
    "more JSON than there can be": [oversized("state.json"), oversized(MANIFEST)],
    "a file that is a link": [
        a_linked_file("model.safetensors"),
        a_linked_file("state.json"),
        a_linked_file(MANIFEST),
    ],
    "a directory that leads outside": [a_linked_directory, a_path_in_the_manifest],
}
CHECKPOINT_SAMPLE = ("a pickle in place of model.safetensors",)


def sampled(attacks, sample):
    assert {*sample} <= {*attacks}
    return [name if name in sample else pytest.param(name, marks=pytest.mark.faults) for name in attacks]


@pytest.mark.parametrize("kind", sampled(CHECKPOINT_ATTACKS, CHECKPOINT_SAMPLE))
def test_a_hostile_checkpoint_is_refused(stopped, tmp_path, kind) -> None:
    assert len(CHECKPOINT_ATTACKS) == 12
    for number, attack in enumerate(CHECKPOINT_ATTACKS[kind]):
        home = tmp_path / str(number)
        run = Path(shutil.copytree(stopped, home / "run", symlinks=True))
        for checkpoint in checkpoints(run):
            attack(checkpoint)
        before = everything_in_but_huge(run)
        newest = f"run/checkpoints/{checkpoints(run)[0].name}"
        assert_refused(train(run, "resume=run"), run, {4}, "checkpoint")
        assert_refused(train(run, *EIGHTEEN), run, {4}, "checkpoint")
        assert_refused(train(run, f"resume={newest}"), run, {4}, "checkpoint")
        assert_refused(evaluate(run, "run"), run, {4})
        assert_refused(evaluate(run, newest), run, {4})
        assert_refused(evaluate(run, "run/checkpoints/best"), run, {4})
        assert everything_in_but_huge(run) == before
        (run / "config.yaml").unlink()
        assert_refused(train(run, "resume=run"), run, {4})


def everything_in_but_huge(folder):
    return {
        p.relative_to(folder): p.read_bytes() if p.is_file() and p.stat().st_size < 10**9 else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("kind", sampled(CHECKPOINT_ATTACKS, CHECKPOINT_SAMPLE))
def test_the_run_goes_on_from_the_checkpoint_before_a_hostile_one(run, kind) -> None:
    newest, before = checkpoints(run)
    kept = before.name
    CHECKPOINT_ATTACKS[kind][0](newest)
    done = train(run, "resume=run")
    assert done.code == 0, done
    assert not (run.parent / "canary").exists()
    assert f"after step {int(kept[5:])}, epoch 2" in done.out
    assert (run / "result.json").is_file()


def test_the_canary_is_made_when_a_pickle_is_loaded(stopped, tmp_path) -> None:
    bird = pickle.dumps(Bird(tmp_path / "canary"))
    pickle.loads(bird)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "deed",
    [
        lambda: os.system("true"),
        lambda: socket.getaddrinfo("localhost", 80),
        lambda: pickle.loads(pickle.dumps(Bird("made"))),
    ],
)
def test_the_canary_is_made_by_what_no_file_may_cause(tmp_path, deed) -> None:
    def prepare():
        confine(tmp_path / "canary")
        deed()
        os._exit(0)

    Forked(cwd=tmp_path, prepare=prepare).wait()
    assert (tmp_path / "canary").exists()


# ----------------------------------------------------------------------------------- hostile configurations
def at(path, value):
    """A variant: the stored configuration with one value replaced."""

    def change(config):
        *parents, last = path.split(".")
        node = config
        for part in parents:
            node = node[part]
        node[last] = value

    return change


def named(target, **arguments):
    """Variants: this target in the place of the model, of the data, of what they contain, and of a helper."""
    node = {"_target_": target, **arguments}
    return [
        at("model", node),
        at("data", node),
        at("model.patch_embed", node),
        at("data.sample_transform", {**node, "_partial_": True}),
        at("tracker", {**node, "_partial_": True}),
    ]


def text(text):
    """A variant of config.yaml that is no dump of a dict."""

    def change(config):
        return text if isinstance(text, str) else text(config)

    return change


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def without(group):
    def change(config):
        del config[group]

    return change


def wide(config):
    """A consistent model of 120 GB."""
    config["model"]["embed_dim"] = config["model"]["patch_embed"]["embed_dim"] = 10**5


LAUGHS = "\n".join(
    ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
)
WIDE = f"b: &b [{', '.join(['0'] * 20_000)}]\nc: [{', '.join(['*b'] * 20_000)}]\n"
SHELL = "touch canary"

CONFIG_ATTACKS = {
    "os.system": named("os.system", command=SHELL) + named("posix.system", command=SHELL)[:2],
    "exec and eval": named("builtins.exec", source="open('canary', 'w')") + named("builtins.eval")[:2],
    "subprocess.Popen": named("subprocess.Popen", args=["touch", "canary"]),
    "through a module that ours imports": [
        change
        for target in (
            "vit_train.models.vit.torch.load",
            "vit_train.models.vit.nn.Linear",
            "vit_train.models.hybrid.torch.hub.load",
            "vit_train.models.vit.torch.utils.cpp_extension.load",
            "vit_train.data.loading.workers.os.system",
            "vit_train.data.image_data.ImageData.__init__.__globals__",
            "vit_train.models.ViT.__init__.__builtins__.exec",
            "vit_train.models./../../evil.Model",
            "vit_train.models...evil.Model",
        )
        for change in named(target, f="canary", command=SHELL)[:2]
    ],
    "importlib.import_module": named("importlib.import_module", name="evil"),
    "a module beside the run": named("evil.Model") + named("evil.sub.Model")[:2],
    "tags of YAML": [
        text(f"!!python/object/apply:os.system ['{SHELL}']"),
        text(lambda c: yaml.safe_dump(c) + f"x: !!python/object/apply:os.system ['{SHELL}']\n"),
        text(lambda c: yaml.safe_dump(c) + "x: !!python/name:os.system\n"),
        text(lambda c: yaml.safe_dump(c) + "x: !!python/module:evil\n"),
        text(lambda c: yaml.safe_dump(c) + "x: !!python/object/new:subprocess.Popen [[touch, canary]]\n"),
        text(lambda c: yaml.safe_dump(c) + "x: !!binary aGE=\n"),
        text(lambda c: yaml.safe_dump(c) + "x: !!set {a, b}\n"),
        text(lambda c: yaml.safe_dump(c) + "x: 2001-99-99\n"),
        text(lambda c: yaml.safe_dump(c) + "x: 2001-01-01\n"),
        text(lambda c: yaml.safe_dump(c) + f"x: {'9' * 5000}\n"),
    ],
    "a node inside a list": [
        at("model.patch_embed", [{"_target_": "os.system", "command": SHELL}]),
        at("model.depth", [[{"_target_": "evil.Model"}]]),
        at("data.mean", [{"_target_": "os.system", "command": SHELL}]),
        at("trainer.epochs", [{"x": [{"_target_": "os.system", "command": SHELL}]}]),
        at("model._target_", ["os.system"]),
        at("model._target_", {"_target_": "os.system", "command": SHELL}),
    ],
    "a partial node": [
        at("model._partial_", True),
        at("data._partial_", True),
        at("strategy._partial_", True),
        at("model.patch_embed._partial_", True),
        at("model", {"_target_": "os.system", "_partial_": True}),
        at("trainer._partial_", False),
        at("optimizer._partial_", "yes"),
    ],
    "Hydra's own": named("hydra.utils.instantiate", config={"_target_": "os.system", "command": SHELL})
    + named("hydra._internal.instantiate._instantiate2.instantiate", config={"_target_": "os.system"})
    + named("hydra.utils.call")[:2]
    + [at("hydra", {"run": {"dir": "/tmp/elsewhere"}}), at("model._recursive_", True)],
    "references": [
        at("data.root", "${oc.env:SECRET}"),
        at("name", "${oc.env:SECRET}"),
        at("name", "x ${oc.decode:${oc.env:SECRET}}"),
        at("seed", "${oc.decode:'1'}"),
        at("model", "${data}"),
        at("seed", "${custom:1}"),
        at("name", "???"),
        at("model.depth", "???"),
        lambda config: config.update({"${oc.env:SECRET}": 1}),
    ],
    "a few bytes that stand for billions": [
        text(LAUGHS),
        text(WIDE),
        text("a: &a [*a]"),
        text("a: &a {b: *a}"),
        text("a: &a [*a, *a]\nmodel: *a\n"),
        text(lambda c: yaml.safe_dump(c) + LAUGHS),
        text(lambda c: yaml.safe_dump(c) + WIDE),
    ],
    "far too large, far too deep": [
        text("a: " + "x" * 300 * 2**20),
        text("[" * 100_000),
        text("a: " + "{a: " * 500 + "1" + "}" * 500),
        at("name", "x" * 2**20),
        at("model.depth", nested(300)),
        at("x", nested(120)),
        at("data.mean", [0] * 150_000),
    ],
    "ours, in a place they are not for": [
        *named("vit_train.checkpoint.Checkpointer", run_dir="elsewhere")[:2],
        *named("vit_train.cli.train.main")[:2],
        *named("vit_train.system.durable.write", path="canary", data="x")[:2],
        *named("vit_train.report.tracker.Tracker", run_dir="elsewhere", console=None),
        *named("vit_train.data.loading.workers.detach_worker", worker_id=1)[:2],
        at("model", {"_target_": "vit_train.data.Cifar10", "root": "elsewhere"}),
        *named(
            "vit_train.data.Cifar10.load",
            self={"_target_": "vit_train.data.Cifar10", "root": "elsewhere"},
        ),
        *named(
            "vit_train.report.tracker.Tracker.start",
            self={"_target_": "vit_train.report.tracker.Tracker", "run_dir": "elsewhere", "console": None},
            plan={"_target_": "vit_train.training.tracker.Plan", "first_step": 1},
        ),
        at("tracker.run_dir", "elsewhere"),
        at("model", {"_target_": "vit_train.layers.DropPath"}),
        at("model", {"_target_": "vit_train.layers.drop_path_schedule", "rate": 0.1, "depth": 3}),
        at("model", {"_target_": "vit_train.layers.Mlp", "dim": 8, "hidden_dim": 8}),
        at("optimizer._target_", "vit_train.training.optimizers.set_lr"),
        at("optimizer", {"_target_": "vit_train.training.optimizers.named_state", "_partial_": True}),
        at("schedule", {"_target_": "vit_train.training.objective.CrossEntropy", "_partial_": True}),
        at("objective", {"_target_": "vit_train.training.schedules.Constant", "_partial_": True}),
        at("augment.batch", {"_target_": "vit_train.data.Digits", "_partial_": True}),
        at("strategy", {"_target_": "vit_train.training.strategy.scatter"}),
        at("trainer", {"_target_": "vit_train.training.trainer.Batch", "_partial_": True}),
    ],
    "sizes that lie": [
        at("model.depth", 10**9),
        at("model.depth", 10_000),
        at("model.depth", 10**30),
        at("model.embed_dim", 10**9),
        wide,
        at("model.num_heads", 10**9),
        at("model.num_classes", 10**9),
        at("model.mlp_ratio", 1e9),
        at("model.mlp_ratio", float("inf")),
        at("model.patch_embed.patch_size", 10**9),
        at("model.patch_embed.img_size", 10**9),
        at("model", {"_target_": "vit_train.layers.drop_path_schedule", "rate": 0.1, "depth": 10**10}),
        at(
            "model.patch_embed",
            {"_target_": "vit_train.layers.drop_path_schedule", "rate": 0.1, "depth": 10**10},
        ),
    ],
    "data and strategy of the wrong kind": [
        at("data._target_", "vit_train.data.Batch"),
        at(
            "data",
            {"_target_": "vit_train.data.Batch", "images": "x", "targets": 1, "index": [], "draw": None},
        ),
        at(
            "data",
            {"_target_": "vit_train.data.transforms.batch_transforms.Normalize", "mean": [0.5], "std": [0.5]},
        ),
        at("data", {"_target_": "vit_train.data.loading.splits.keep"}),
        at("data", "digits"),
        at("data", None),
        at("data", ["x"]),
        at("data.batch_size", "sixteen"),
        at("data.batch_size", -1),
        at("data.in_channels", "one"),
        at("data.in_channels", 3),
        at("data.img_size", 16),
        at("data.img_size", "8"),
        at("data.mean", "x"),
        at("data.mean", ["x"]),
        at("data.num_workers", "many"),
        at("data.val_fraction", float("nan")),
        at("data.sample_transform", {"_target_": "vit_train.data.Digits"}),
        at("strategy", {"_target_": "vit_train.training.strategy.SingleDevice", "device": "abacus"}),
        at("strategy", 5),
        at("trainer", {}),
        at("trainer", "x"),
        at("trainer.precision", ["fp32"]),
        at("trainer.precision", "fp3"),
        *(without(group) for group in ("model", "data", "strategy", "trainer", "seed")),
    ],
}
CONFIG_SAMPLE = ("a node inside a list",)


@pytest.mark.parametrize("kind", sampled(CONFIG_ATTACKS, CONFIG_SAMPLE))
def test_a_hostile_config_is_refused(stopped, tmp_path, kind) -> None:
    assert len(CONFIG_ATTACKS) == 16
    failures = []
    for number, change in enumerate(CONFIG_ATTACKS[kind]):
        run = Path(shutil.copytree(stopped, tmp_path / str(number) / "run", symlinks=True))
        for folder in (run, run.parent):
            (folder / "evil.py").write_text(f"open({str(run.parent / 'canary')!r}, 'w')\n")
        try:
            _try_config(run, change)
        except AssertionError as error:
            failures.append(f"variant {number}: {str(error)[:3000]}")
        shutil.rmtree(run.parent)
    assert not failures, "\n\n".join(failures)


def _try_config(run, change):
    stored = yaml.safe_load((run / "config.yaml").read_text())
    config = copy.deepcopy(stored)
    changed = change(config)
    hostile = yaml.safe_dump(config) if changed is None else changed
    (run / "config.yaml").write_text(hostile)
    for checkpoint in checkpoints(run):  # a config.yaml that cannot be used is taken from here
        state = json.loads((checkpoint / "state.json").read_text())
        copied = config if changed is None else None
        rewrite(checkpoint, "state.json", json.dumps({**state, "config": copied}).encode())
    assert_refused(train(run, "resume=run"), run, {2, 3, 4})
    used = (0,) if evaluated(config) == evaluated(stored) and changed is None else ()
    assert_refused(evaluate(run, f"run/checkpoints/{checkpoints(run)[0].name}"), run, {*used, 2, 3, 4})
    (run / "config.yaml").unlink()
    assert_refused(train(run, "resume=run"), run, {2, 3, 4})
    assert not (run / "result.json").exists()
    # the user's own command says what the tracker is, and the device, whatever is stored
    (run / "config.yaml").write_text(hostile)
    mine = {"name": None, "tracker": None, "strategy": None}
    free = without_workers({**config, **mine}) == without_workers({**stored, **mine})
    assert_refused(train(run, *EIGHTEEN), run, {0, 2, 3, 4} if free and changed is None else {2, 3, 4})
    assert not (run.parent / "elsewhere").exists()


def without_workers(config):
    data = config.get("data")
    return {**config, "data": {**data, "num_workers": None}} if isinstance(data, dict) else config


def evaluated(config):
    """What `vit-eval` takes from a stored configuration."""
    used = {key: copy.deepcopy(config.get(key)) for key in ("model", "data", "strategy", "trainer")}
    if isinstance(used["data"], dict):
        used["data"].pop("sample_transform", None)
    if isinstance(used["trainer"], dict):
        used["trainer"] = used["trainer"].get("precision")
    return used


# ----------------------------------------------------------------------------- the rest of a run directory
@pytest.mark.faults
def test_a_hostile_config_file_is_passed_over_where_a_checkpoint_holds_a_copy(run) -> None:
    (run / "config.yaml").write_text(f"!!python/object/apply:os.system ['{SHELL}']")
    done = train(run, "resume=run")
    assert done.code == 0, done
    assert not (run.parent / "canary").exists()
    assert "the configuration comes from" in done.out


@pytest.mark.faults
def test_pretrained_backbones_are_built_without_a_download(stopped, tmp_path) -> None:
    settings = (
        *EIGHTEEN,
        "~model",
        "+model._target_=vit_train.models.ViT",
        "+model.patch_embed._target_=vit_train.models.HybridEmbed",
        "+model.patch_embed.backbone=resnet18",
        "+model.patch_embed.layer=layer1",
        "+model.patch_embed.small_stem=true",
        "+model.patch_embed.img_size=8",
        "+model.patch_embed.in_channels=1",
        "+model.patch_embed.patch_size=4",
        "+model.patch_embed.embed_dim=16",
        "+model.patch_embed.pretrained=false",
        "+model.embed_dim=16",
        "+model.depth=1",
        "+model.num_heads=2",
        "+model.num_classes=10",
        "trainer.stop_at_step=6",
    )
    vit_train_forked(*[s for s in settings if not s.startswith("model.")], cwd=tmp_path)
    run = tmp_path / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["patch_embed"]["pretrained"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for checkpoint in checkpoints(run):
        state = json.loads((checkpoint / "state.json").read_text())
        rewrite(checkpoint, "state.json", json.dumps({**state, "config": config}).encode())
    for done in (evaluate(run, "run"), train(run, "resume=run", "trainer.stop_at_step=8")):
        assert done.code == 0, done
        assert not (tmp_path / "canary").exists()
        assert not (tmp_path / "torch_home").exists()
    shutil.rmtree(run / "checkpoints")
    assert_refused(train(run, "resume=run"), run, {4}, "a stored configuration may not start a download")


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", ["train.log", "metrics.jsonl", "run.json", ".config.yaml", ".run.json", "checkpoints"]
)
def test_a_run_does_not_write_through_a_link(run, tmp_path, name) -> None:
    outside = tmp_path / "outside"
    if (run / name).exists():
        (run / name).rename(outside)
    else:
        outside.write_text("mine")
    (run / name).symlink_to(outside)
    before = everything_in(outside) if outside.is_dir() else outside.read_bytes()
    assert_refused(train(run, "resume=run"), run, {4}, name)
    assert_refused(train(run, *EIGHTEEN), run, {4}, name)
    assert (everything_in(outside) if outside.is_dir() else outside.read_bytes()) == before


def test_a_report_is_not_written_through_a_link(run, tmp_path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.json").write_text("mine")
    (run / "eval").mkdir()
    (run / "eval" / "test").symlink_to(mine)
    assert_refused(evaluate(run, "run"), run, {2}, "test is not a directory")
    (run / "eval" / "test").unlink()
    (run / "eval").rmdir()
    (run / "eval").symlink_to(mine)
    assert_refused(evaluate(run, "run"), run, {2}, "eval is a link")
    (run / "eval").unlink()
    (run / "eval" / "test").mkdir(parents=True)
    (run / "eval" / "test" / "report.json").symlink_to(mine / "report.json")
    (run / "tensorboard").mkdir(exist_ok=True)
    (run / "tensorboard" / "eval_test").symlink_to(mine)
    done = evaluate(run, "run")
    assert done.code == 0, done
    assert json.loads((run / "eval" / "test" / "report.json").read_text())["split"] == "test"
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"report.json": "mine"}


@pytest.mark.faults
@pytest.mark.parametrize("name", ["config.yaml", "run.json", "train.log"])
def test_nobody_waits_for_a_pipe_in_a_run_directory(run, name) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert_refused(train(run, "resume=run"), run, {4}, name)


@pytest.mark.faults
def test_nobody_waits_for_a_pipe_in_a_checkpoint(run) -> None:
    for checkpoint in checkpoints(run):
        (checkpoint / "model.safetensors").unlink()
        os.mkfifo(checkpoint / "model.safetensors")
        record(checkpoint, "model.safetensors", bytes=0, sha256=hashlib.sha256(b"").hexdigest())
    assert_refused(evaluate(run, "run"), run, {4}, "not a plain file")
    assert_refused(train(run, "resume=run"), run, {4}, "not a plain file")


LINES = [
    "[" * 10**5,
    "[]",
    "{}",
    '{"event": [], "step": 1}',
    '{"event": "epoch", "step": "x"}',
    '{"event": "step", "step": 1}',
]


@pytest.mark.faults
@pytest.mark.parametrize("facts", ["[" * 10**5, "[]", '{"versions": 3}', '{"started": {}}', "\x00"])
def test_hostile_records_are_passed_over(run, facts) -> None:
    (run / "run.json").write_text(facts)
    (run / "metrics.jsonl").write_text("\n".join([*LINES, "\x00"]))
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "best").write_bytes(b"\xff" * 90)
    done = train(run, "resume=run")
    assert done.code == 0, done
    assert all(json.loads(line)["event"] for line in (run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.faults
@pytest.mark.parametrize(
    "train_state",
    [
        {"step": 10**9},
        {"closed_epochs": 0},
        {"best": 5},
        {"best": {"val/top1": "\x1b[2J"}},
        {"last": {"val/loss": "x"}},
        {"seconds": float("inf")},
        {"sums": [1]},
        {"sums": ["x"] * 4},
        {"anchor": "../../elsewhere"},
        {"schedule": 5},
        {"unheard_of": 1},
    ],
)
def test_a_hostile_training_state_is_refused(run, train_state) -> None:
    for checkpoint in checkpoints(run):
        state = json.loads((checkpoint / "state.json").read_text())
        state["train"] |= train_state
        rewrite(checkpoint, "state.json", json.dumps(state).encode())
    assert_refused(train(run, "resume=run"), run, {4})


@pytest.mark.faults
def test_a_hostile_best_checkpoint_is_not_what_is_tested_in_the_end(run) -> None:
    _, older = checkpoints(run)
    CHECKPOINT_ATTACKS["a sparse file of a terabyte"][0](older)
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "best").symlink_to(older.name)
    done = train(run, "resume=run")
    assert done.code == 0, done
    assert (run / "result.json").is_file()


@pytest.mark.faults
def test_names_of_classes_cannot_steer_the_terminal(run) -> None:
    names = [f"{ESCAPE}[bold red]{i}[/] :boom: \u202e \ud800" for i in range(10)]
    for checkpoint in checkpoints(run):
        state = json.loads((checkpoint / "state.json").read_text())
        state["inference"]["class_names"] = names
        rewrite(checkpoint, "state.json", json.dumps(state).encode())
    done = evaluate(run, "run")  # the digits are not among these classes
    assert_refused(done, run, {3}, "\\x1b[2J")
    assert not {"\x07", "\u202e"} & {*done.err}
    data = run.parent / "photos"
    from PIL import Image

    for name in names[:2]:  # a folder may have such names, too
        folder = data / name.replace("\ud800", "").replace("/", "")
        folder.mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    done = vit_train_forked(
        "data=imagefolder", "data.root=photos", "data.in_channels=1", "data.img_size=8", "model=vit_digits",
        "model.depth=1", "data.num_workers=0", "augment=none", "trainer.epochs=1", "tracker.tensorboard=false",
        "run_dir=photo_run", cwd=run.parent,
    )  # fmt: skip
    table = evaluate(run, "photo_run", "--split", "val")
    assert table.code == 0, table
    for out in (done.out, table.out, (run.parent / "photo_run" / "train.log").read_text()):
        assert not {"\x1b", "\x07", "\u202e"} & {*out}
        assert "\\x1b[2J" in out
    assert "[bold" in table.out  # a narrow column breaks it
    assert "\ud83d\udca5" not in table.out
