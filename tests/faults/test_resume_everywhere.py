"""Resume is exact everywhere: every step, fresh processes, chains, and controls that show what would be noticed.

Each run is 3 epochs of 6 steps with everything on that draws or remembers. `make test-faults` runs the cases
marked `faults`, `make test` the others; the totals of this file (34 interruptions, 12 in fresh processes, 2
chains, 8 negative controls) are both together.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import EIGHTEEN, PATCHES, vit_train_forked, whole_state
from PIL import Image

from vit_train.data.loading.loaders import SampleLoader, Samples, TrainSteps
from vit_train.training.trainer import Trainer

slow = pytest.mark.faults


# ----------------------------------------------------------------------------------------------- every step
@pytest.mark.parametrize(
    ("step", "workers"),
    [
        pytest.param(step, workers, marks=() if (step, workers) in ((6, 0), (9, 2)) else slow)
        for workers in (0, 2)
        for step in range(1, 18)
    ],
)
def test_interrupted_at_any_step_equals_uninterrupted(eighteen, tmp_path, step, workers) -> None:
    settings = (*EIGHTEEN, f"data.num_workers={workers}")
    vit_train_forked(*settings, f"trainer.stop_at_step={step}", cwd=tmp_path)
    assert not (tmp_path / "run" / "result.json").exists(), "nothing was interrupted"
    vit_train_forked("resume=run", cwd=tmp_path)
    assert whole_state(tmp_path / "run") == eighteen


# at the start, the end and in the middle of epochs
@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 5, 6, 9, 12])
def test_fresh_processes_continue_each_other(vit_train, eighteen, tmp_path, step, workers) -> None:
    vit_train(*EIGHTEEN, f"data.num_workers={workers}", f"trainer.stop_at_step={step}")
    vit_train("resume=run")
    assert whole_state(tmp_path / "run") == eighteen


@pytest.mark.faults
@pytest.mark.parametrize(("step", "workers", "then"), [(8, 0, 2), (17, 2, 1)])
def test_fresh_processes_may_have_other_workers_logs_and_saves(
    vit_train, eighteen, tmp_path, step, workers, then
) -> None:
    """By the full command. When it saved last is another matter; everything trained and measured is not."""
    vit_train(*EIGHTEEN, f"data.num_workers={workers}", f"trainer.stop_at_step={step}")
    other = (f"data.num_workers={then}", "tracker.log_every_steps=1", "trainer.save_every_steps=4")
    vit_train(*EIGHTEEN, *other)
    state = whole_state(tmp_path / "run")
    assert {"model", "ema", "optimizer"} == {name.split("/")[1] for name in state if name.count("/") > 1}
    assert state == eighteen  # the last save is due at the end of the last epoch in both


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_a_chain_of_17_interruptions_equals_none(eighteen, tmp_path, workers) -> None:
    vit_train_forked(*EIGHTEEN, f"data.num_workers={workers}", "trainer.stop_at_step=1", cwd=tmp_path)
    for step in range(2, 18):
        vit_train_forked("resume=run", f"trainer.stop_at_step={step}", cwd=tmp_path)
        assert (tmp_path / f"run/checkpoints/step_{step:08d}").is_dir()
    vit_train_forked("resume=run", cwd=tmp_path)
    assert whole_state(tmp_path / "run") == eighteen


# ------------------------------------------------------------------------------------------ negative controls
class Forgets(Trainer):
    """Leaves out of a resume what the environment variable FORGET names; without it nothing."""

    def resume(self, checkpoint) -> None:
        what = os.environ.get("FORGET")
        fresh = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        schedule, scaler = self.schedule.state_dict(), self.scaler.state_dict()
        super().resume(checkpoint)
        state = self.state
        if what == "parameters":
            self.model.load_state_dict(fresh)
        elif what == "optimizer slots":
            self.optimizer.state.clear()
        elif what == "average":
            self.ema.module.load_state_dict(fresh)
        elif what == "step":
            state.step = 0
        elif what == "schedule":
            self.schedule.load_state_dict(schedule)
        elif what == "best and early stopping":
            state.best, state.evaluations_since_best = None, 0
        elif what == "scaler":
            self.scaler.load_state_dict(scaler)
        elif what == "sampler position":
            continued, set_position = state.step, self.train_loader.set_position
            self.train_loader.set_position = lambda epoch, step: set_position(
                epoch, 0 if state.step == continued else step
            )
        else:
            assert what is None, what


class ForgetsScaled(Forgets):
    """The same with gradients of the range of fp16, and a loss scale that tries to grow every few steps."""

    @functools.wraps(Trainer.__init__)
    def __init__(self, parts, **settings) -> None:
        super().__init__(parts, **settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        for parameter in self.model.parameters():
            parameter.register_hook(lambda gradient: gradient.half().float())


CONTROLLED = (*EIGHTEEN, "trainer._target_=test_resume_everywhere.Forgets")
LISTENING = (
    *CONTROLLED,
    "schedule=plateau",
    "schedule.monitor=train/loss",
    "schedule.mode=max",  # the loss falls, which then counts as bad: the plateau acts after each epoch
    "schedule.patience=0",
    "schedule.factor=0.5",
)
# A rate of 0 and no batch norm, whose statistics would move: the first epoch stays the best, and the third is
# the second without a better one
PATIENT = (
    *CONTROLLED,
    *PATCHES,
    "optimizer.lr=1e-30",
    "trainer.early_stop_patience=2",
    "trainer.epochs=5",
)
SCALED = (*EIGHTEEN, "trainer._target_=test_resume_everywhere.ForgetsScaled")


@pytest.fixture(scope="module")
def unbroken(warm, tmp_path_factory):
    """The state at the end of the uninterrupted run of a command, made once for each."""

    @functools.cache
    def run(settings):
        folder = tmp_path_factory.mktemp("unbroken")
        vit_train_forked(*settings, cwd=folder)
        return whole_state(folder / "run")

    return run


def names(different, prefix):
    return {key for key in different if key.startswith(prefix)}


# What must differ, and what must not: a control that breaks more than it names shows nothing about it
CONTROLS = {
    "parameters": (CONTROLLED, 9, ["last/model/"], []),
    "optimizer slots": (CONTROLLED, 9, ["last/optimizer/norm.weight/step"], []),
    "average": (CONTROLLED, 9, ["last/ema/"], ["last/model/", "last/optimizer/"]),
    "step": (CONTROLLED, 4, ["last/optimizer/norm.weight/step", "last/model/"], []),
    "schedule": (LISTENING, 14, ["last/state", "last/model/"], ["last/optimizer/norm.weight/step"]),
    "best and early stopping": (PATIENT, 15, ["best/name", "last/name", "last/state"], []),
    "scaler": (SCALED, 9, ["last/state", "last/model/"], []),
    "sampler position": (CONTROLLED, 9, ["last/model/"], ["last/optimizer/norm.weight/step", "last/name"]),
}


@pytest.mark.parametrize(
    "piece", [pytest.param(p, marks=() if p == "sampler position" else slow) for p in CONTROLS]
)
def test_a_piece_of_state_that_a_resume_drops_is_noticed(unbroken, tmp_path, piece) -> None:
    """The comparison passes where nothing is dropped, and fails in the piece that is."""
    settings, stop, noticed, untouched = CONTROLS[piece]
    whole = unbroken(settings)
    vit_train_forked(*settings, f"trainer.stop_at_step={stop}", cwd=tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "dropped", symlinks=True)
    vit_train_forked(*settings, cwd=tmp_path)
    assert whole_state(tmp_path / "run") == whole

    def forget():
        os.environ["FORGET"] = piece

    vit_train_forked(*settings, "run_dir=dropped", cwd=tmp_path, prepare=forget)
    after = whole_state(tmp_path / "dropped")
    assert after.keys() == whole.keys()
    different = {key for key in whole if after[key] != whole[key]}
    for prefix in noticed:
        assert names(different, prefix), f"{prefix}: nothing was noticed"
    for prefix in untouched:
        assert names(different, prefix) == set()
    if piece == "schedule":
        assert after["last/state"]["schedule"] != whole["last/state"]["schedule"]
        assert whole["last/state"]["schedule"]["multiplier"] < 1, "the plateau never acted"
    if piece == "best and early stopping":
        assert (whole["last/state"]["step"], whole["last/state"]["stopped_early"]) == (18, True)
        assert after["last/state"]["best"] != whole["last/state"]["best"]
        assert after["last/state"]["step"] > 18
    if piece == "scaler":
        assert whole["last/state"]["scaler"]["scale"] < 2.0**20, "no update was ever left out"
        assert after["last/state"]["scaler"] != whole["last/state"]["scaler"]


# ---------------------------------------------------------------------------------------------- skipping ahead
class Counting:
    """Grey images of one pixel, and which of them were read, by any process."""

    def __init__(self, size: int) -> None:
        self.targets = np.zeros(size, dtype=np.int64)
        self.reads = torch.zeros(size, dtype=torch.int64).share_memory_()

    def read(self, index: int) -> Image.Image:
        self.reads[index] += 1
        return Image.new("L", (1, 1))

    def name(self, index: int) -> str:
        return f"image {index}"

    def select(self, indices):
        raise AssertionError("nobody splits it")

    def update(self, digest) -> None:
        raise AssertionError("nobody asks what it is")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_100000_batches_takes_under_a_second_and_reads_no_image(workers) -> None:
    source = Counting(500_000)
    samples = Samples(source, None, seed=0, in_channels=1, img_size=1)
    steps = TrainSteps(source.targets, batch_size=4, seed=0, rank=0, world_size=1)
    loader = SampleLoader(samples, steps, num_workers=workers, pin_memory=False, persistent=False)
    order = [[index for _, index, _ in keys] for keys in steps]
    started = time.monotonic()
    loader.set_position(0, 100_000)
    batches = iter(loader)
    first = next(batches)
    seconds = time.monotonic() - started
    print(json.dumps({"workers": workers, "skipped": 100_000, "seconds": round(seconds, 3)}))
    assert seconds < 1
    assert first.index.tolist() == order[100_000]
    batches.close()  # the workers have read ahead, but nothing twice and nothing of what was skipped
    read = set(source.reads.nonzero().flatten().tolist())
    assert source.reads.max() == 1
    assert read.isdisjoint({index for keys in order[:100_000] for index in keys})
    if workers == 0:
        assert read == set(order[100_000])
