"""Whole runs with a teacher: every student learns, the teacher stays as it is, a resume is exact, and what is
damaged or hostile ends in one line."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch
import yaml
from conftest import (
    EIGHTEEN,
    PATCHES,
    TINY,
    Forked,
    build,
    checkpoint_hashes,
    vit_train_forked,
    vit_train_here,
    whole_state,
    with_trained_head,
)
from torch.nn.modules.module import register_module_forward_pre_hook

from vit_train.checkpoint import resolve_link
from vit_train.report.history import read_events

KINDS = {"soft": 0.9, "hard": 0.5, "zscore": 0.9}  # and their alpha
ONE_EPOCH = ("trainer.epochs=1", "model.embed_dim=64", "run_dir=teacher")
# 4 steps of students of each family, without whatever else would change weights
FOUR = (
    "data.limit=80",
    "data.batch_size=16",
    "data.num_workers=0",
    "trainer.max_steps=4",
    "trainer.ema_decay=null",
    "trainer.precision=fp32",
    "optimizer.weight_decay=0",
    "objective=distill",
    "run_dir=run",
)
STUDENTS = {
    "vit": ("model.embed_dim=32", "model.depth=2", "model.num_heads=2"),
    "deit": (
        "model=deit_cifar",
        "model.embed_dim=32",
        "model.depth=2",
        "model.num_heads=2",
    ),
    "swin": ("model=swin_cifar", "model.embed_dim=16", "model.depths=[1,1]", "model.num_heads=[1,2]"),
    "hybrid": ("model=hybrid_cifar", "model.embed_dim=32", "model.depth=1", "model.num_heads=2"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher of ours with one checkpoint, and files of weights as two libraries save them."""
    import timm
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("teachers")
    done = vit_train_here(*TINY, *ONE_EPOCH, cwd=folder)
    assert done.code == 0, done.err
    torch.manual_seed(1)
    for name, model in (
        ("resnet18", resnet18(num_classes=10)),
        ("resnet10t", timm.create_model("resnet10t", num_classes=10)),
    ):
        with torch.no_grad():  # so that the statistics are not those of a model that never saw an image
            with_trained_head(model).train()(torch.rand(16, 3, 32, 32))
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return folder


def taught_by(home, teacher="run"):
    """What to type for a teacher of `home`."""
    return {
        "run": (f"objective.teacher={home}/teacher",),
        "resnet18": (
            f"objective.teacher={home}/resnet18.pth",
            "objective.teacher_model=torchvision:resnet18",
        ),
        "resnet10t": (
            f"objective.teacher={home}/resnet10t.pth",
            "objective.teacher_model=timm:resnet10t",
        ),
    }[teacher]


def built(*settings):
    """The trainer of a run built in this process."""
    return build(*settings).trainer


def copies(model):
    """Parameters and buffers as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    """The names of the tensors that differ by any bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------------------- teachers and students
@pytest.mark.parametrize(
    ("teacher", "model"), [("run", "ViT"), ("resnet18", "ResNet"), ("resnet10t", "ResNet")]
)
def test_a_student_learns_from_a_teacher_of_any_origin(home, tmp_path, teacher, model) -> None:
    settings = (*TINY, "objective=distill", *taught_by(home, teacher), "run_dir=student", "trainer.epochs=2")
    done = vit_train_here(*settings, "optimizer.lr=0.01", "schedule.warmup_epochs=0", cwd=tmp_path)
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "student" / "run.json").read_text())["teacher"]
    assert about["model"] == model
    epochs = [e for e in read_events(tmp_path / "student" / "metrics.jsonl") if e["event"] == "epoch"]
    first, second = (epoch["train/loss_teacher"] for epoch in epochs)
    assert second < 0.95 * first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_learns_by_every_kind(home, in_tmp, student, kind) -> None:
    trainer = built(*FOUR, *STUDENTS[student], *taught_by(home), f"objective.kind={kind}")
    before = copies(trainer.model)
    trainer.fit()
    assert trainer.state.step == 4
    assert changed(before, trainer.model.state_dict()) == set(before), "a part learned nothing"
    loss, labels, lesson = (
        trainer.state.last[f"train/{name}"] for name in ("loss", "loss_labels", "loss_teacher")
    )
    alpha = KINDS[kind]
    assert labels > 0
    assert lesson > 0
    assert loss == pytest.approx((1 - alpha) * labels + alpha * lesson, rel=1e-5)


@pytest.mark.parametrize(("alpha", "still", "moves"), [(1, "head", "head_dist"), (0, "head_dist", "head")])
def test_labels_train_the_first_head_and_the_teacher_the_second(home, in_tmp, alpha, still, moves) -> None:
    settings = (*FOUR, *STUDENTS["deit"], *taught_by(home), f"objective.alpha={alpha}")
    trainer = built(*settings, "optimizer.lr=0.1")
    before = copies(trainer.model)
    trainer.fit()
    heads = {name for name in changed(before, trainer.model.state_dict()) if name.startswith("head")}
    assert heads == {f"{moves}.weight", f"{moves}.bias"}
    assert {f"{still}.weight", f"{still}.bias"} < set(before)


# ------------------------------------------------------------------------------------------- the teacher as it is
def test_a_teacher_is_frozen_bit_for_bit_and_kept_nowhere(home, in_tmp) -> None:
    settings = (
        *FOUR[1:],
        *STUDENTS["vit"],
        "data.limit=400",
        "trainer.max_steps=20",
        "trainer.ema_decay=0.9",
    )
    trainer = built(*settings, *taught_by(home, "resnet18"))
    teacher = trainer.objective.teach
    before = copies(teacher)
    assert any("running_var" in name for name in before)
    trainer.fit()
    assert trainer.state.step == 20
    after = teacher.state_dict()
    assert after.keys() == before.keys()
    assert changed(before, after) == set()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    theirs = {id(parameter) for parameter in teacher.parameters()}
    assert theirs.isdisjoint(id(p) for group in trainer.optimizer.param_groups for p in group["params"])
    alone = built(*settings, "objective=cross_entropy", "run_dir=alone")
    alone.fit()
    names = [set(t.strategy.snapshot(t.model, t.ema, t.optimizer)) for t in (trainer, alone)]
    assert names[0] == names[1]
    assert checkpoint_hashes(in_tmp / "run").keys() == checkpoint_hashes(in_tmp / "alone").keys() == names[0]


def steps(run):
    """Each logged step, less what depends on the clock."""
    events = [event for event in read_events(run / "metrics.jsonl") if event["event"] == "step"]
    return [{k: v for k, v in event.items() if k != "images_per_second"} for event in events]


def test_two_devices_compute_the_loss_of_one(home, tmp_path) -> None:
    """Rounding aside; SGD, because Adam scales rounding up. Draws differ with the cut, so there are none."""
    quiet = (
        "model.drop_rate=0",
        "model.attn_drop_rate=0",
        "model.drop_path_rate=0",
        "trainer.precision=fp32",
    )
    settings = (
        *TINY,
        *PATCHES,
        "model.pool=mean",
        "model.mlp_ratio=2",
        *quiet,
        "objective=distill",
        *taught_by(home, "resnet18"),
        "optimizer=sgd",
        "optimizer.lr=5e-3",  # at ten times that, five steps make more of the rounding than 1e-6
        "trainer.epochs=1",
    )
    seen = {}
    for name, devices in (("single", ()), ("data_parallel", ("strategy.devices=[cpu,cpu]",))):
        typed = (*settings, f"strategy={name}", *devices, f"run_dir={name}", "tracker.log_every_steps=1")
        done = vit_train_here(*typed, cwd=tmp_path)
        assert done.code == 0, done.err
        seen[name] = steps(tmp_path / name)
    assert len(seen["single"]) == 5
    for one, two in zip(seen["single"], seen["data_parallel"], strict=True):
        for part in ("loss", "loss_labels", "loss_teacher", "agreement"):
            assert two[part] == pytest.approx(one[part], rel=1e-6), part


def test_auto_batch_counts_the_teacher(home, tmp_path) -> None:
    """A teacher that refuses more than 4 images at a time, as a full GPU would."""

    def hook(module, arguments):
        shown = arguments[0]
        if type(module).__name__ == "ResNet" and not shown.is_meta and len(shown) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    settings = (*TINY, "objective=distill", *taught_by(home, "resnet18"), "trainer.grad_accum_steps=1")
    typed = (*settings, "trainer.auto_batch=true", "data.val_fraction=0", "run_dir=run", "trainer.epochs=1")
    handle = register_module_forward_pre_hook(hook)
    try:
        done = vit_train_here(*typed, cwd=tmp_path)
    finally:
        handle.remove()
    assert done.code == 0, done.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["grad_accum_steps"] == 4


def test_a_teacher_is_compiled_with_its_student(home, in_tmp) -> None:
    for compiled in (True, False):
        # without validation: to measure the teacher is to compile it
        settings = (*FOUR, *STUDENTS["vit"], *taught_by(home), "data.val_fraction=0")
        trainer = built(*settings, f"trainer.compile={compiled}".lower())
        for model in (trainer.model, trainer.objective.teach.model):
            assert (model._compiled_call_impl is not None) == compiled


# ----------------------------------------------------------------------------------------------------- resume
# With mixing, averaged weights, accumulation, dropout, drop path and clipping: 3 epochs of 6 steps
MIXED = (
    *EIGHTEEN,
    "objective=distill",
    "augment.batch.mixup_alpha=0.8",
    "augment.batch.cutmix_alpha=1.0",
    "tracker.log_every_steps=1",
)


@pytest.fixture(scope="module")
def unbroken(home, warm, tmp_path_factory):
    """What the uninterrupted run leaves behind."""
    folder = tmp_path_factory.mktemp("unbroken")
    vit_train_forked(*MIXED, *taught_by(home), cwd=folder)
    events = steps(folder / "run")
    assert len(events) == 18
    assert all({"loss_labels", "loss_teacher", "agreement"} < event.keys() for event in events)
    return whole_state(folder / "run"), events


def stopped_by_itself(step, settings, cwd):
    vit_train_forked(*settings, f"trainer.stop_at_step={step}", cwd=cwd)
    return step


def stopped_by_sigterm(settings, cwd):
    """While it stands still in its first save; the step it is at by then is its own affair."""
    typed = (*settings, "trainer.save_every_steps=4")
    run = Forked(*typed, cwd=cwd, fault="save.begin:1:SIGSTOP")
    _, status = os.waitpid(run.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), run.err.read_text()
    os.kill(run.pid, signal.SIGTERM)
    os.kill(run.pid, signal.SIGCONT)
    done = run.wait(check=False)
    assert done.code == 128 + signal.SIGTERM, done
    return 4


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("at", "workers"),
    [
        pytest.param(3, 2, marks=pytest.mark.faults),
        (6, 0),  # the end of an epoch
        (9, 2),
        pytest.param(12, 2, marks=pytest.mark.faults),
        pytest.param(17, 0, marks=pytest.mark.faults),
        ("SIGTERM", 2),
    ],
)
def test_interrupted_equals_uninterrupted(home, unbroken, tmp_path, at, workers) -> None:
    settings = (*MIXED, *taught_by(home), f"data.num_workers={workers}")
    stop = stopped_by_sigterm if at == "SIGTERM" else functools.partial(stopped_by_itself, at)
    first = stop(settings, tmp_path)
    last = resolve_link(tmp_path / "run" / "checkpoints" / "last").name
    assert f"step_{first:08d}" <= last < "step_00000018"
    assert not (tmp_path / "run" / "result.json").exists(), "nothing was interrupted"
    vit_train_forked("resume=run", cwd=tmp_path)
    assert (whole_state(tmp_path / "run"), steps(tmp_path / "run")) == unbroken


# ------------------------------------------------------------------------------------------ damaged and hostile
STOPPED = ("objective=distill", "trainer.precision=fp32", "run_dir=student", "trainer.stop_at_step=3")


@pytest.fixture(scope="module")
def stopped(home, tmp_path_factory):
    """A student stopped in its first epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    done = vit_train_here(*TINY, *STOPPED, *taught_by(home), cwd=folder)
    assert done.code == 0, done.err
    return folder / "student"


def refused(done):
    """One line, exit 4; the line."""
    assert done.code == 4, done
    assert done.err.count("\n") == 1
    assert done.err.startswith("vit-train: error: ")
    return done.err


def test_a_damaged_teacher_is_refused_on_start_and_on_resume(home, stopped, tmp_path) -> None:
    shutil.copytree(home / "teacher", tmp_path / "teacher", symlinks=True)
    shutil.copytree(stopped, tmp_path / "student", symlinks=True)
    (file,) = (tmp_path / "teacher" / "checkpoints").glob("step_*/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    said = refused(vit_train_here(*TINY, *STOPPED, *taught_by(tmp_path), "run_dir=new", cwd=tmp_path))
    assert "model.safetensors is damaged: its SHA-256 is not the recorded one" in said
    assert not (tmp_path / "new").exists()
    said = refused(vit_train_here("resume=student", *taught_by(tmp_path), cwd=tmp_path))
    assert "model.safetensors is damaged: its SHA-256 is not the recorded one" in said


class Bird:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def confined(cwd):
    """Called in the child: a minute, empty caches, and a folder `canary` for what no file may cause."""
    from huggingface_hub import constants

    signal.alarm(60)
    os.environ["TORCH_HOME"] = constants.HF_HUB_CACHE = str(cwd / "empty")

    def hook(event, arguments):
        if event in ("os.system", "os.exec", "socket.getaddrinfo", "socket.connect", "pickle.find_class"):
            (cwd / "canary").mkdir(exist_ok=True)

    sys.addaudithook(hook)


# what a stored configuration may say of its teacher: objective.teacher, teacher_model, and the line it gets
HOSTILE = {
    "file": ("text.pth", None, "a file does not say which model its weights are of"),
    "text": ("text.pth", "torchvision:resnet18", "is not a file that torch.save wrote"),
    "code": ("code.pth", "torchvision:resnet18", "holds Python objects beside weights"),
    "fifo": ("fifo.pth", None, "no such run, checkpoint or file"),
    "fifo of weights": ("fifo.pth", "torchvision:resnet18", "no such file or run"),
    "fifo of a folder": ("folder", "torchvision:resnet18", "folder"),
    "fifo behind safetensors": ("s.safetensors.index.json", "vit_tiny", "fifo.safetensors"),
    "fifo behind pickles": ("b.bin.index.json", "torchvision:resnet18", "fifo.bin"),
    "download": ("torchvision:resnet18", None, "is not in the cache"),
    "download of timm": ("timm:resnet10t", None, "is not in the cache"),
    "hub": ("timm:hf-hub:someone/something", None, "timm has no model"),
    "node": ({"_target_": "os.mkdir", "path": "canary"}, None, "os.mkdir"),
}


def lay_out(folder):
    """The files that `HOSTILE` names."""
    (folder / "text.pth").write_text("hunter2")
    with (folder / "code.pth").open("wb") as file:
        pickle.dump({"fc.weight": Bird(folder / "canary")}, file, protocol=2)
    (folder / "folder").mkdir()
    for name in ("fifo.pth", "fifo.safetensors", "fifo.bin", "folder/model.safetensors"):
        os.mkfifo(folder / name)
    for name, shard in (("s.safetensors", "fifo.safetensors"), ("b.bin", "fifo.bin")):
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"fc.weight": shard}}))


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes with names and fork")
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_stored_teacher_runs_nothing_fetches_nothing_and_waits_for_nothing(
    stopped, tmp_path, attack
) -> None:
    shutil.copytree(stopped, tmp_path / "student", symlinks=True)
    lay_out(tmp_path)
    place, model, message = HOSTILE[attack]
    config = yaml.safe_load((tmp_path / "student" / "config.yaml").read_text())
    config["objective"] |= {"teacher": place, "teacher_model": model, "teacher_sha256": None}
    (tmp_path / "student" / "config.yaml").write_text(yaml.safe_dump(config))
    prepare = functools.partial(confined, tmp_path)
    done = vit_train_forked("resume=student", cwd=tmp_path, check=False, prepare=prepare)
    assert message in refused(done)
    assert "hunter2" not in done.err
    assert not (tmp_path / "canary").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_teacher_that_is_a_hostile_pickle_runs_nothing(tmp_path) -> None:
    lay_out(tmp_path)
    typed = (
        "objective=distill",
        "objective.teacher=code.pth",
        "objective.teacher_model=torchvision:resnet18",
    )
    prepare = functools.partial(confined, tmp_path)
    done = vit_train_forked(*TINY, *typed, "run_dir=new", cwd=tmp_path, check=False, prepare=prepare)
    assert "holds Python objects beside weights" in refused(done)
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------- TensorBoard
def test_the_parts_of_the_loss_are_in_tensorboard(home, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    typed = (*TINY, "objective=distill", *taught_by(home), "run_dir=run", "trainer.epochs=2")
    done = vit_train_here(*typed, "tracker.tensorboard=true", "tracker.log_every_steps=1", cwd=tmp_path)
    assert done.code == 0, done.err
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    epochs = [e for e in read_events(tmp_path / "run" / "metrics.jsonl") if e["event"] == "epoch"]
    for part in ("loss_labels", "loss_teacher", "agreement"):
        for tag, events, name in (
            (f"train_step/{part}", steps(tmp_path / "run"), part),
            (f"train/{part}", epochs, f"train/{part}"),
        ):
            shown = [(scalar.step, scalar.value) for scalar in board.Scalars(tag)]
            assert shown == [(event["step"], pytest.approx(event[name], rel=1e-6)) for event in events]
            assert shown
