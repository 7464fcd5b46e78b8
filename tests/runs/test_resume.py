"""Interrupted equals uninterrupted, bit for bit: every tensor of the last checkpoint hashed.

A handful of real commands; the many cases are new processes forked from this warm one.

Dropout, attention dropout, drop path, augmentation, accumulation, clipping and the average are all on.
"""

from __future__ import annotations

import functools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, checkpoint_hashes, vit_train_forked

from vit_train.checkpoint import Checkpointer, Snapshot, load, resolve_link
from vit_train.training.objective import CrossEntropy


def numbers(run_dir: Path) -> list[tuple]:
    """What the run logged, less what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [tuple((k, v) for k, v in sorted(e.items()) if k != "images_per_second") for e in events]


def loading(workers):
    """From the cache, or image by image in workers: not a bit may depend on it."""
    return ("data.cache=ram",) if workers == 0 else ("data.cache=none", f"data.num_workers={workers}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nothing interrupts: 3 epochs of 5 steps, two micro-batches each."""
    folder = tmp_path_factory.mktemp("unbroken")
    vit_train_forked(*TINY, "run_dir=run", cwd=folder)
    return folder / "run"


@pytest.fixture
def forked(tmp_path):
    """`vit-train` in a new process forked from this one, in an empty working directory."""
    return functools.partial(vit_train_forked, cwd=tmp_path)


@pytest.mark.parametrize(("stop", "workers"), [(3, 0), (5, 2)])
def test_fresh_commands_continue_bit_for_bit(vit_train, unbroken, tmp_path, stop, workers) -> None:
    vit_train(*TINY, "run_dir=run", *loading(workers), f"trainer.stop_at_step={stop}")
    vit_train("resume=run")
    assert checkpoint_hashes(tmp_path / "run") == checkpoint_hashes(unbroken)


# within an epoch, at its end (where evaluation, schedule and averages are due), right after the first step
@pytest.mark.parametrize("stop", [1, 3, 5, 8, 10, 12])
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_equals_uninterrupted(forked, unbroken, tmp_path, stop, workers) -> None:
    forked(*TINY, "run_dir=run", *loading(workers), f"trainer.stop_at_step={stop}")
    part = checkpoint_hashes(tmp_path / "run")
    assert part != checkpoint_hashes(unbroken), "nothing was interrupted"
    forked("resume=run")
    assert checkpoint_hashes(tmp_path / "run") == checkpoint_hashes(unbroken)
    assert numbers(tmp_path / "run")[-1] == numbers(unbroken)[-1]


# everything that draws, about samples on the CPU, samples on the device, batches and the order of an epoch
HEAVY = (
    *TINY,
    "run_dir=run",
    "augment=deit",
    "augment.sample.jitter=0.3",
    "augment.batch.mix_off_epoch=3",
    "data.sampler=balanced",
    "objective.class_weights={3: 2.0}",
)


def test_heavy_augmentation_continues_bit_for_bit_with_another_cache(forked, tmp_path) -> None:
    forked(*HEAVY, "data.cache=none")
    whole = checkpoint_hashes(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    forked(*HEAVY, "data.cache=none", "data.num_workers=2", "trainer.stop_at_step=7")
    assert checkpoint_hashes(tmp_path / "run") != whole, "nothing was interrupted"
    forked("resume=run", "data.cache=ram", "data.num_workers=0")
    assert checkpoint_hashes(tmp_path / "run") == whole


class SignalsInside(CrossEntropy):
    """Sends a real SIGTERM between the two micro-batches of step 8, once."""

    calls = 0

    def forward(self, model, images, targets):
        result = super().forward(model, images, targets)
        self.calls += 1
        if self.calls == 15 and not Path("signalled").exists():
            Path("signalled").touch()
            signal.raise_signal(signal.SIGTERM)
        return result


def test_a_signal_inside_an_accumulated_step_waits_for_its_end(forked, unbroken, tmp_path) -> None:
    arguments = (*TINY, "run_dir=run", "objective._target_=test_resume.SignalsInside")
    stopped = forked(*arguments, check=False)
    assert stopped.code == 128 + signal.SIGTERM, stopped
    assert "stopped by SIGTERM; step 8 is saved" in stopped.out
    forked(*arguments)
    assert checkpoint_hashes(tmp_path / "run") == checkpoint_hashes(unbroken)


def test_a_chain_of_interruptions_equals_none(forked, unbroken, tmp_path) -> None:
    forked(*TINY, "run_dir=run", "trainer.stop_at_step=2")
    for stop in (4, 5, 9, 14):
        forked("resume=run", f"trainer.stop_at_step={stop}")
    forked("resume=run")
    assert checkpoint_hashes(tmp_path / "run") == checkpoint_hashes(unbroken)
    epochs = [dict(event) for event in numbers(tmp_path / "run") if dict(event)["event"] == "epoch"]
    assert epochs == [dict(event) for event in numbers(unbroken) if dict(event)["event"] == "epoch"]


def test_the_same_command_continues_its_run_dir(forked, unbroken, tmp_path) -> None:
    forked(*TINY, "run_dir=run", "trainer.stop_at_step=7")
    # other workers and other logging change no weight
    forked(*TINY, "run_dir=run", *loading(1), "tracker.log_every_steps=1")
    assert checkpoint_hashes(tmp_path / "run") == checkpoint_hashes(unbroken)


def test_another_seed_is_another_run(forked, unbroken, tmp_path) -> None:
    forked(*TINY, "run_dir=run", "seed=1")
    assert checkpoint_hashes(tmp_path / "run") != checkpoint_hashes(unbroken)


def _without(kind: str, tensors: dict, state: dict) -> None:
    """Leaves one piece of a checkpoint out."""
    if kind == "average":
        for name in [n for n in tensors if n.startswith("ema/")]:
            tensors[name] = tensors[name.replace("ema/", "model/")].clone()
    elif kind == "first moments":
        for name in [n for n in tensors if n.endswith("/exp_avg")]:
            tensors[name] = torch.zeros_like(tensors[name])
    elif kind == "optimizer step counts":
        for name in [n for n in tensors if n.endswith("/step")]:
            tensors[name] = torch.ones_like(tensors[name])
    elif kind == "position":
        state["train"]["step"] -= 1
    else:
        raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["average", "first moments", "optimizer step counts", "position"])
def test_a_piece_of_state_left_out_is_noticed(forked, unbroken, tmp_path, kind) -> None:
    """The negative control: the comparison above is able to fail."""
    forked(*TINY, "run_dir=run", "trainer.stop_at_step=8")
    path = resolve_link(tmp_path / "run" / "checkpoints" / "last")
    checkpoint = load(path)
    tensors, state = dict(checkpoint.tensors), json.loads(json.dumps(checkpoint.state))
    _without(kind, tensors, state)
    state.pop("format")
    Checkpointer(tmp_path / "run").save(Snapshot(tensors, state, step=8, best=False, keep=2))
    forked("resume=run")
    assert checkpoint_hashes(tmp_path / "run") != checkpoint_hashes(unbroken)


def test_plateau_and_early_stopping_survive_an_interruption(forked, tmp_path) -> None:
    listening = (
        "schedule=plateau",
        "schedule.monitor=train/loss",
        "schedule.mode=max",  # the loss falls, so the plateau acts, whatever torch rounds
        "schedule.patience=0",
        "schedule.factor=0.5",
        "trainer.early_stop_patience=3",
        "trainer.epochs=8",
    )
    forked(*TINY, *listening, "run_dir=whole")
    forked(*TINY, *listening, "run_dir=parts", "trainer.stop_at_step=8")
    forked("resume=parts")
    states = [
        load(resolve_link(tmp_path / run / "checkpoints" / "last")).state["train"]
        for run in ("whole", "parts")
    ]
    for state in states:
        state.pop("seconds")
    assert states[0] == states[1]
    assert states[0]["schedule"]["multiplier"] < 1, "the plateau never acted: nothing was tested"
    assert checkpoint_hashes(tmp_path / "whole") == checkpoint_hashes(tmp_path / "parts")
