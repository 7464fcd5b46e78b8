"""SIGKILL at any moment of a run costs at most one save interval, and nothing is left over.

The count: 12 named points of a save x 3 saves (36) and 100 random times are the 136. Beside them stand 2 points
that only some saves reach x 3 (6), 5 of a step that is saved twice, 2 of a worker that is just starting, 1
after the result, 1 before the first step, and 10 random times of a run with everything on: 161 cases in this file
with `-m ""`, of which a plain `pytest` runs a sample of 7.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import EIGHTEEN, Forked, stale_files, vit_train_forked, whole_state

from vit_train.checkpoint import Checkpointer, checkpoint_directories, newest_valid
from vit_train.data.loading.workers import detach_worker
from vit_train.report.history import read_events
from vit_train.report.tracker import Tracker
from vit_train.training.objective import CrossEntropy

# Saves inside epochs and at their ends; everything is logged at every step, so that a gap or a repetition shows
SETTINGS = (*EIGHTEEN, "tracker.tensorboard=true", "tracker.log_every_steps=1", "trainer.save_every_steps=4")
SAVED = (4, 6, 8, 12, 16, 18)

BEFORE_IT_COUNTS = ("begin", "made", "file", "files", "manifest", "synced")
ONCE_IT_COUNTS = ("renamed", "durable", "linked_last", "last", "best", "end")
SAMPLE = ("files-4", "last-6")


# Whatever draws, remembers or happens beside the steps, on at once
EVERYTHING = (
    *SETTINGS,
    "augment.batch.mixup_alpha=0.8",
    "augment.batch.cutmix_alpha=1.0",
    "augment.batch.erase_prob=0.5",
    "data.sampler=balanced",
    "objective.class_weights=auto",
    "trainer.ema_decay=0.9",
    "trainer.async_save=true",
    "data.num_workers=2",
)


@pytest.fixture(scope="module")
def unbroken(warm, tmp_path_factory):
    """The same run when nothing interrupts it, and how long it takes."""
    return undisturbed(tmp_path_factory.mktemp("unbroken"), SETTINGS)


def undisturbed(folder, settings):
    before = time.monotonic()
    vit_train_forked(*settings, cwd=folder)
    seconds = time.monotonic() - before
    run = folder / "run"
    return (
        seconds,
        shown_steps(run),
        lines(run),
        [p.name for p in checkpoint_directories(run / "checkpoints")],
    )


def shown_steps(run):
    """The steps of each tag, as the reader behind TensorBoard's pages sees them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={TENSORS: 0}).Reload()
    tags = [tag for tag in events.Tags()[TENSORS] if tag.startswith(("train", "val", "test/", "epoch"))]
    return {tag: [event.step for event in events.Tensors(tag)] for tag in tags if tag != "train_batch"}


def lines(run):
    """What each line of metrics.jsonl is about."""
    return [(event["event"], event["step"]) for event in read_events(run / "metrics.jsonl")]


def newest_step(run):
    """Step of the newest checkpoint that verifies; 0 before the first."""
    found, _ = newest_valid(run)
    return 0 if found is None else found.state["train"]["step"]


def check_whole(run, eighteen, unbroken):
    """A continued run cannot be told from one that was never killed."""
    _, scalars, logged, kept = unbroken
    assert whole_state(run) == eighteen
    assert shown_steps(run) == scalars
    assert all(step < later for steps in scalars.values() for step, later in pairwise(steps))
    assert lines(run) == logged
    assert stale_files(run) == []
    assert [path.name for path in checkpoint_directories(run / "checkpoints")] == kept


def continuation(run, *typed):
    """What a user types: `resume=`, but for a run that had not even begun or needs code of the user's own."""
    return typed if typed or not (run / "config.yaml").exists() else ("resume=run",)


def named(points, saves):
    for point in points:
        for save in saves:
            marks = () if f"{point}-{save}" in SAMPLE else pytest.mark.faults
            yield pytest.param(point, save, id=f"{point}-{save}", marks=marks)


@pytest.mark.parametrize(("point", "save"), named(BEFORE_IT_COUNTS + ONCE_IT_COUNTS, (1, 4, 6)))
def test_killed_at_a_point_of_a_save(eighteen, unbroken, tmp_path, point, save) -> None:
    run = tmp_path / "run"
    number = 4 * (save - 1) + 2 if point == "file" else save  # the second of four files
    # in the background, or while training waits for it
    waiting = (f"trainer.async_save={save != 4}",)
    killed = vit_train_forked(
        *SETTINGS, *waiting, cwd=tmp_path, fault=f"save.{point}:{number}:SIGKILL", check=False
    )
    assert killed.code == -signal.SIGKILL, killed
    saved = SAVED[: save if point in ONCE_IT_COUNTS else save - 1]
    assert newest_step(run) == (saved[-1] if saved else 0)
    # before the first save, the same command does it as well
    again = (*SETTINGS, *waiting) if not saved and point in ("begin", "file") else ()
    vit_train_forked(*continuation(run, *again), cwd=tmp_path)
    check_whole(run, eighteen, unbroken)


# the `best` link at the end of each epoch, a removal from the third checkpoint on
@pytest.mark.parametrize(("point", "count"), named(("linked_best", "removing"), (1, 2, 3)))
@pytest.mark.faults
def test_killed_at_a_point_that_some_saves_reach(eighteen, unbroken, tmp_path, point, count) -> None:
    killed = vit_train_forked(*SETTINGS, cwd=tmp_path, fault=f"save.{point}:{count}:SIGKILL", check=False)
    assert killed.code == -signal.SIGKILL, killed
    assert newest_step(tmp_path / "run") in SAVED[count - 1 :]
    vit_train_forked("resume=run", cwd=tmp_path)
    check_whole(tmp_path / "run", eighteen, unbroken)


class StopsInEvaluation(CrossEntropy):
    """Sends a real SIGTERM in the evaluation after the step that the file `stop_at` names, once."""

    calls = 0

    def forward(self, model, images, targets):
        self.calls += 1
        return super().forward(model, images, targets)

    def per_sample(self, logits, targets):
        if self.calls == 2 * int(Path("stop_at").read_text()) and not Path("stopped").exists():
            Path("stopped").touch()
            signal.raise_signal(signal.SIGTERM)
        return super().per_sample(logits, targets)


@pytest.mark.parametrize(
    ("point", "step"),
    [("replaced", 6), ("replaced", 12), ("replaced", 18), ("made", 12), ("renamed", 12)],
)
@pytest.mark.faults
def test_killed_while_a_step_is_saved_a_second_time(eighteen, unbroken, tmp_path, point, step) -> None:
    """An interrupted evaluation saved the step; its continuation closes the epoch and saves it again."""
    (tmp_path / "stop_at").write_text(str(step))
    arguments = (*SETTINGS, "objective._target_=test_kill.StopsInEvaluation")
    stopped = vit_train_forked(*arguments, cwd=tmp_path, check=False)
    assert stopped.code == 128 + signal.SIGTERM, stopped
    assert newest_step(tmp_path / "run") == step
    killed = vit_train_forked(*arguments, cwd=tmp_path, fault=f"save.{point}:1:SIGKILL", check=False)
    assert killed.code == -signal.SIGKILL, killed
    assert newest_step(tmp_path / "run") == step
    vit_train_forked(*arguments, cwd=tmp_path)
    check_whole(tmp_path / "run", eighteen, unbroken)


def killed_once_there_is_a_place_for_checkpoints():
    make = Checkpointer.make

    def made(checkpointer):
        make(checkpointer)
        os.kill(os.getpid(), signal.SIGKILL)

    Checkpointer.make = made


def test_killed_before_the_first_step(eighteen, unbroken, tmp_path) -> None:
    killed = vit_train_forked(
        *SETTINGS, cwd=tmp_path, check=False, prepare=killed_once_there_is_a_place_for_checkpoints
    )
    assert killed.code == -signal.SIGKILL, killed
    vit_train_forked(*SETTINGS, cwd=tmp_path)
    check_whole(tmp_path / "run", eighteen, unbroken)


class KilledAtTheEnd(Tracker):
    """Dies once the result is written, before the logs are closed."""

    def close(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_right_after_the_result_is_written(eighteen, unbroken, tmp_path) -> None:
    """The run counts as finished: nothing would be logged again."""
    killed = vit_train_forked(
        *SETTINGS, "tracker._target_=test_kill.KilledAtTheEnd", cwd=tmp_path, check=False
    )
    assert killed.code == -signal.SIGKILL, killed
    check_whole(tmp_path / "run", eighteen, unbroken)


def descendants(pid):
    """(process id, start time) of everything started by a process, from /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        about = status(int(folder.name))
        if about is not None:
            parents[int(folder.name)] = about
    found, waiting = set(), [pid]
    while waiting:
        parent = waiting.pop()
        children = [p for p, (ppid, _, _) in parents.items() if ppid == parent]
        found |= {(child, parents[child][2]) for child in children}
        waiting += children
    return found


def status(pid):
    """(parent, state, start time) of a process, or None once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), fields[0], int(fields[19])


def still_running(processes):
    """Those of them that are alive; a dead one that nobody has waited for is not."""
    now = {(pid, started): status(pid) for pid, started in processes}
    return {key for key, about in now.items() if about and about[2] == key[1] and about[1] not in "ZX"}


def left_after_a_while(processes):
    """Those of them that are still alive when a worker must have noticed that its run is gone."""
    until = time.monotonic() + 15
    while still_running(processes) and time.monotonic() < until:
        time.sleep(0.1)
    return still_running(processes)


def kill_at(delay, *arguments, cwd):
    """Starts a run, and kills it and nothing else after `delay` seconds. Returns what is left of its workers."""
    run = Forked(*arguments, cwd=cwd)
    time.sleep(delay)
    workers = descendants(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    done = run.wait(check=False)
    assert done.code in (0, -signal.SIGKILL), done
    return workers


def requested(run):
    """The saves that were asked for: each begins by flushing the log, which is what is read here."""
    events = read_events(run / "metrics.jsonl")
    return [step for step in SAVED if events and step <= events[-1]["step"]]


@pytest.fixture(scope="module")
def rich(warm, tmp_path_factory):
    """State and lines of the run with everything, when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("rich")
    return undisturbed(folder, EVERYTHING), whole_state(folder / "run")


@pytest.mark.parametrize(
    "case", [pytest.param(i, marks=() if i == 4 else pytest.mark.faults) for i in range(10)]
)
def test_killed_at_a_random_time_with_everything_on(rich, tmp_path, case) -> None:
    (seconds, *_), state = rich
    moment = seconds * (case + random.Random(case).random()) / 10
    children = kill_at(moment, *EVERYTHING, cwd=tmp_path)
    vit_train_forked(*(continuation(tmp_path / "run") or EVERYTHING), cwd=tmp_path)
    check_whole(tmp_path / "run", state, rich[0])
    assert left_after_a_while(children) == set()


@pytest.mark.parametrize(
    "case", [pytest.param(i, marks=() if i == 61 else pytest.mark.faults) for i in range(100)]
)
def test_killed_at_a_random_time(eighteen, unbroken, tmp_path, case) -> None:
    run, draw = tmp_path / "run", random.Random(case)
    num_workers = (0, 1, 0, 2, 0)[case % 5]
    background = case % 4 != 3
    settings = (
        *SETTINGS,
        f"data.num_workers={num_workers}",
        f"trainer.async_save={background}",
    )
    seconds = unbroken[0]
    # one time from each hundredth of the run, so that they are spread over all of it
    children = kill_at(seconds * (case + draw.random()) / 100, *settings, cwd=tmp_path)
    times = [None] if case % 3 else [None, seconds * draw.random()]
    for delay in times:
        asked = requested(run)
        # the last save asked for may not have begun: in the background it waits for the one before
        behind = 3 if background else 2
        assert newest_step(run) >= ([0, 0, 0, *asked][-behind] if asked else 0)
        if delay is not None:
            children |= kill_at(delay, *continuation(run, *(() if run.exists() else settings)), cwd=tmp_path)
    vit_train_forked(*(continuation(run) or settings), cwd=tmp_path)
    check_whole(run, eighteen, unbroken)
    assert left_after_a_while(children) == set()


@pytest.mark.parametrize(
    "dies", ["before the worker is set up", pytest.param("after that", marks=pytest.mark.faults)]
)
def test_a_worker_ends_when_its_run_is_killed_while_it_starts(warm, dies) -> None:
    """The DataLoader's own watch begins later than that."""
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        worker = multiprocessing.get_context("fork").Process(target=start_late, args=(write, dies))
        worker.start()
        os.write(write, f"{worker.pid}\n".encode())
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    pid = int(os.read(read, 20))
    worker = {(pid, status(pid)[2])}
    os.waitpid(run, 0)
    assert still_running(worker), "it had no time to be left behind"
    assert left_after_a_while(worker) == set()


def start_late(pipe, dies):
    """A worker that is slow to start: its parent is killed meanwhile."""
    os.close(pipe)
    parent = os.getppid()
    if dies == "after that":
        detach_worker(0)
    while os.getppid() == parent:
        time.sleep(0.01)
    time.sleep(0.2)
    if dies != "after that":
        detach_worker(0)
    time.sleep(60)
