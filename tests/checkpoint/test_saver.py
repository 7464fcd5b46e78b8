"""When checkpoints are written: in the background, one at a time, and again where it failed."""

from __future__ import annotations

import dataclasses
import time
from threading import Event, Thread

import pytest
import torch
from conftest import TINY, build

from vit_train.checkpoint import Checkpointer, Snapshot, checkpoint_directories, load, resolve_link
from vit_train.checkpoint.saver import Saver
from vit_train.errors import CheckpointError, SaveError
from vit_train.system import faults
from vit_train.training.guard import Guard, Signals

SOON = 30  # seconds after which a test fails instead of waiting for ever


class Held(Checkpointer):
    """A slow disk: each save waits until `go` is set."""

    def __init__(self, run_dir) -> None:
        super().__init__(run_dir)
        self.began, self.go = Event(), Event()
        self.diary = []

    def save(self, snapshot):
        self.diary.append(f"begin {snapshot.step}")
        self.began.set()
        assert self.go.wait(SOON)
        path = super().save(snapshot)
        self.diary.append(f"end {snapshot.step}")
        return path


class Broken(Checkpointer):
    """A bug of ours, not of the disk."""

    def save(self, snapshot):
        raise KeyError("a bug")


def snapshot(step, *, best=False, value=0.0):
    return Snapshot({"model/w": torch.full((3,), value)}, {"train": {"step": step}}, step, best, 2, ())


def saver(checkpointer, *, background=True):
    said = []
    it = Saver(checkpointer, background=background, say=said.append)
    it.said = said
    return it


def saved(run_dir):
    """The steps on disk."""
    return sorted(int(path.name[-8:]) for path in checkpoint_directories(run_dir / "checkpoints"))


@pytest.fixture
def full_disk():
    """Switches a file system that refuses every checkpoint on and off."""

    def switch(full):
        faults.arm("save.files:1:ENOSPC" if full else None)

    yield switch
    faults.arm(None)


# ------------------------------------------------------------------------------------------- in the background
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path) -> None:
    it = saver(Held(tmp_path))
    it.save(snapshot(1))  # would wait for ever otherwise
    assert it.checkpointer.began.wait(SOON)
    assert saved(tmp_path) == []
    it.checkpointer.go.set()
    it.wait()
    assert saved(tmp_path) == [1]


def test_in_the_foreground_it_is_there_on_return(tmp_path) -> None:
    saver(Checkpointer(tmp_path), background=False).save(snapshot(1))
    assert saved(tmp_path) == [1]


def test_one_is_in_flight_at_a_time(tmp_path) -> None:
    it = saver(Held(tmp_path))
    it.save(snapshot(1))
    assert it.checkpointer.began.wait(SOON)
    it.checkpointer.began.clear()
    second = Thread(target=it.save, args=(snapshot(2),))
    second.start()
    assert not it.checkpointer.began.wait(0.3), "two saves at a time"
    it.checkpointer.go.set()
    second.join(SOON)
    it.wait()
    assert it.checkpointer.diary == ["begin 1", "end 1", "begin 2", "end 2"]


def test_other_ranks_write_nothing(tmp_path) -> None:
    it = saver(Broken(tmp_path))
    it.save(dataclasses.replace(snapshot(1), tensors={}))
    it.finish()
    assert not (tmp_path / "checkpoints").exists()


def test_steps_made_meanwhile_do_not_change_what_is_written(in_tmp) -> None:
    trainer = build(*TINY, "run_dir=run").trainer
    trainer.saver.checkpointer = held = Held(in_tmp / "run")
    trainer.guard, trainer.started = Guard(trainer.strategy, Signals()), time.monotonic()
    trainer.train_loader.set_position(0, 0)
    batches = iter(trainer.train_loader)
    for _ in range(2):
        trainer.train_step(next(batches), 0)
    then = trainer.strategy.snapshot(trainer.model, trainer.ema, trainer.optimizer)
    sums = trainer.sums.tolist()
    trainer.save(best=False)
    assert held.began.wait(SOON)
    for batch in batches:
        trainer.train_step(batch, 0)
    now = trainer.strategy.snapshot(trainer.model, trainer.ema, trainer.optimizer)
    held.go.set()
    trainer.saver.finish()
    checkpoint = load(in_tmp / "run/checkpoints/step_00000002")
    assert checkpoint.tensors.keys() == then.keys()
    assert [name for name in then if not torch.equal(checkpoint.tensors[name], then[name])] == []
    # the control: every parameter, average and slot has moved since
    assert [name for name in then if torch.equal(now[name], then[name])] == []
    assert (checkpoint.state["train"]["step"], trainer.state.step) == (2, 5)
    assert checkpoint.state["train"]["sums"] == sums != trainer.sums.tolist()


# ------------------------------------------------------------------------------------------------- that failed
def test_a_failed_save_is_said_and_the_run_goes_on(tmp_path, full_disk) -> None:
    it = saver(Checkpointer(tmp_path))
    it.save(snapshot(1))
    it.wait()
    full_disk(True)
    it.save(snapshot(2))
    it.wait()
    assert saved(tmp_path) == [1]
    (line,) = it.said
    assert "step_00000002 could not be written: No space left on device" in line
    assert line.endswith("Saving is tried again at the next interval")
    full_disk(False)
    it.save(snapshot(3))
    it.finish()
    assert saved(tmp_path) == [1, 3]


def test_three_failures_in_a_row_end_the_run(tmp_path, full_disk) -> None:
    it = saver(Checkpointer(tmp_path))
    full_disk(True)
    for step in (1, 2):
        it.save(snapshot(step))
        it.wait()
    full_disk(False)
    it.save(snapshot(3))  # what was counted starts anew
    it.finish()
    full_disk(True)
    for step in (4, 5, 6):
        it.save(snapshot(step))
    with pytest.raises(SaveError, match=r"3 saves in a row failed: .*step_00000006 could not be written"):
        it.save(snapshot(7))
    assert saved(tmp_path) == [3]
    assert len(it.said) == 5


def test_at_the_end_one_failure_is_an_error(tmp_path, full_disk) -> None:
    it = saver(Checkpointer(tmp_path))
    full_disk(True)
    it.save(snapshot(1))
    with pytest.raises(SaveError, match="step_00000001 could not be written"):
        it.finish()


def test_a_best_checkpoint_that_failed_comes_first(tmp_path, full_disk) -> None:
    it = saver(Checkpointer(tmp_path))
    full_disk(True)
    it.save(snapshot(1, best=True, value=1.0))
    it.save(snapshot(2))
    it.wait()
    full_disk(False)
    it.save(snapshot(3))
    it.finish()
    links = {link: resolve_link(tmp_path / "checkpoints" / link).name for link in ("best", "last")}
    assert links == {"best": "step_00000001", "last": "step_00000003"}
    assert saved(tmp_path) == [1, 3]
    assert load(tmp_path / "checkpoints/best").tensors["model/w"].eq(1).all()
    it.save(snapshot(4))  # and is not written over and over
    it.finish()
    assert saved(tmp_path) == [1, 3, 4]


def test_a_better_one_takes_the_place_of_a_best_that_failed(tmp_path, full_disk) -> None:
    it = saver(Checkpointer(tmp_path))
    full_disk(True)
    it.save(snapshot(1, best=True))
    it.wait()
    full_disk(False)
    it.save(snapshot(2, best=True))
    it.finish()
    assert saved(tmp_path) == [2]
    assert resolve_link(tmp_path / "checkpoints/best").name == "step_00000002"


# ------------------------------------------------------------------------------------------------ on the way out
def test_a_bug_in_the_thread_reaches_the_main_thread(tmp_path) -> None:
    for ask in (Saver.wait, Saver.finish, lambda it: it.save(snapshot(2)), lambda it: it.checkpoint_of(1)):
        it = saver(Broken(tmp_path))
        it.save(snapshot(1))
        with pytest.raises(KeyError, match="a bug"):
            ask(it)
    with pytest.raises(KeyError, match="a bug"):
        saver(Broken(tmp_path), background=False).save(snapshot(1))


def test_close_waits_for_the_save_in_flight(tmp_path) -> None:
    it = saver(Held(tmp_path))
    it.save(snapshot(1))
    closing = Thread(target=it.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    it.checkpointer.go.set()
    closing.join(SOON)
    assert it.checkpointer.diary == ["begin 1", "end 1"]


def test_close_raises_nothing(tmp_path, full_disk) -> None:
    """A run on its way out has a reason of its own."""
    saver(Checkpointer(tmp_path)).close()
    broken = saver(Broken(tmp_path))
    broken.save(snapshot(1))
    broken.close()
    failing = saver(Checkpointer(tmp_path))
    full_disk(True)
    failing.save(snapshot(1))
    failing.close()
    assert len(failing.said) == 1


# ------------------------------------------------------------------------------------------------- going back
def test_the_checkpoint_of_a_step_is_read_once_it_is_written(tmp_path) -> None:
    it = saver(Held(tmp_path))
    it.save(snapshot(1, value=5.0))
    found = []
    reader = Thread(target=lambda: found.append(it.checkpoint_of(1)))
    reader.start()
    reader.join(0.2)
    assert found == []
    it.checkpointer.go.set()
    reader.join(SOON)
    assert found[0].tensors["model/w"].eq(5).all()


def test_for_a_damaged_checkpoint_the_newest_valid_one_stands_in(tmp_path) -> None:
    it = saver(Checkpointer(tmp_path), background=False)
    for step in (1, 2):
        it.save(snapshot(step, value=float(step)))
    (tmp_path / "checkpoints/step_00000002/model.safetensors").write_bytes(b"")
    assert it.checkpoint_of(2).state["train"]["step"] == 1
    (line,) = it.said
    assert "model.safetensors is damaged" in line
    assert line.endswith("; going back to step_00000001 instead")
    (tmp_path / "checkpoints/step_00000001/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_00000002.* is damaged"):
        it.checkpoint_of(2)
