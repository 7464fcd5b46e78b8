"""Stopped by a signal, a run saves at a step boundary, and its continuation equals the unbroken run.

TERM, INT and USR1 in each of five places (15 cases), to the whole process group of a run with workers (3), and
two signals in a step (3), in a save (1) and while waiting for a worker (1): 23 cases, in `CASES`. The sample
that `make test` runs is 3 of them, `make test-faults` runs the other 20.

Beyond these: three real commands, a worker that is stuck in an evaluation, and a scheduler that signals the
workers as well.

Every test also shows that no process is left behind.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import EIGHTEEN, Done, Forked, command, environment, stale_files, vit_train_forked, whole_state
from torch.utils.data import get_worker_info

from vit_train.data import ArraySource, Digits
from vit_train.models import ViT
from vit_train.report.tracker import Tracker
from vit_train.training.objective import CrossEntropy

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")

STEPS_PER_EPOCH = 6
_SET_CHILD_SUBREAPER = 36  # prctl(2)


# ---------------------------------------------------------------------------------- runs that signal themselves
def send(place: str, count: int) -> None:
    """Sends this process the signals that the file `send` asks for, where it asks for them, once.

    It holds the place, how often the place must have been reached, and names: `step 9 SIGTERM`.
    """
    order = Path("send")
    if order.exists():
        wanted, number, *names = order.read_text().split()
        if (wanted, int(number)) == (place, count):
            order.unlink()
            for name in names:
                signal.raise_signal(getattr(signal, name))


class SendsInSetup(Digits):
    """Sends while the data is set up."""

    def load(self):
        send("data", 1)
        return super().load()


class SendsInModel(ViT):
    """Sends while the model is built."""

    @functools.wraps(ViT.__init__)
    def __init__(self, **settings):
        super().__init__(**settings)
        send("model", 1)


class SendsInStart(Tracker):
    """Sends when everything is built and nothing is trained yet."""

    def start(self, plan):
        super().start(plan)
        send("start", 1)


class Sends(CrossEntropy):
    """Sends between the two micro-batches of a step, or in an evaluation. Leaves a file per batch evaluated."""

    micro_batches = evaluated = 0

    def forward(self, model, images, targets):
        result = super().forward(model, images, targets)
        self.micro_batches += 1
        if self.micro_batches % 2:
            send("step", self.micro_batches // 2 + 1)
        return result

    def per_sample(self, logits, targets):
        self.evaluated += 1
        send("eval", self.evaluated)
        Path(f"evaluated_{self.evaluated}").touch()
        return super().per_sample(logits, targets)


@dataclass
class SleepySource(ArraySource):
    """A worker's read that the file `sleep` gives the number of takes until somebody makes the file `go`."""

    reads: int = 0

    def read(self, index):
        if get_worker_info() is not None and Path("sleep").exists():
            self.reads += 1
            if self.reads == int(Path("sleep").read_text()) and not Path("inside").exists():
                Path("inside").touch()
                until(Path("go").exists, seconds=60)
                Path("woken").touch()
        return super().read(index)

    def select(self, indices):
        return SleepySource(**vars(super().select(indices)))


class Sleepy(Digits):
    """The digits, with a worker that sleeps over one of them."""

    def load(self):
        found = super().load()
        found.sources["train"] = SleepySource(**vars(found.sources["train"]))
        return found


SENDS = "objective._target_=test_signals.Sends"
# one worker, so that the main process waits for the one that sleeps, and all steps before are saved
SLEEPY = ("data._target_=test_signals.Sleepy", "data.num_workers=1", "trainer.save_every_steps=4", SENDS)
IN_STEP_5, IN_EVALUATION = "67", "100"  # reads of the worker: 16 a step, 96 an epoch, 96 an evaluation


# ------------------------------------------------------------------------------------------------- processes
def until(condition, *, seconds=30):
    """Waits for something another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def children_of(pid):
    """The living processes a process has started, from /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return found


class Descendants:
    """Whoever is left of the runs that a test starts: on Linux their orphans become children of this process."""

    def __enter__(self):
        self.before = set(children_of(os.getpid()))
        self._adopt(True)
        return self

    def __exit__(self, *_):
        self._adopt(False)

    def left(self):
        found = set(children_of(os.getpid())) - self.before
        for pid in found:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return found

    def _adopt(self, yes):
        if sys.platform == "linux":
            assert ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0


@pytest.fixture(autouse=True)
def _nothing_left():
    """No process of a run outlives it by more than the few seconds in which workers notice that it is gone."""
    with Descendants() as descendants:
        yield
        ended = until(lambda: not descendants.left(), seconds=15)
        left = descendants.left()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert ended, f"still there: {left}"


def paused(*arguments, cwd, at):
    """A run that stands still where a fault point is reached."""
    run = Forked(*arguments, cwd=cwd, fault=f"{at}:SIGSTOP")
    _, status = os.waitpid(run.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), (run.out.read_text(), run.err.read_text())
    return run


def inside(run, waits_after):
    """Waits until a worker of the run sleeps and the main process has nothing left to do but to wait for it."""
    assert until((run.out.parent / "inside").exists), run.wait(check=False)
    assert until((run.out.parent / waits_after).exists), run.wait(check=False)


# ----------------------------------------------------------------------------------------------------- checks
def stopped_step(done, name, run_dir):
    """The step that a run said it has saved, which `last` must be, beside the command that continues it."""
    assert done.code == 128 + getattr(signal, name), done
    said = re.search(rf"stopped by {name}; step (\d+) is saved\. Continue with:\n  (.*)\n", done.out)
    assert said, done
    # a data module of this file's own is not vit-train's
    assert said.group(2).removesuffix(" trust=test_signals") == "vit-train resume=run"
    step = int(said.group(1))
    assert str((run_dir / "checkpoints" / "last").readlink()) == f"step_{step:08d}"
    assert "error" not in done.err
    assert "Traceback" not in done.err
    assert not (run_dir / "result.json").exists()
    return step


def continues(*arguments, cwd, to):
    vit_train_forked(*arguments, cwd=cwd)
    assert whole_state(cwd / "run") == to
    assert stale_files(cwd / "run") == []


# ---------------------------------------------------------------------------------------------- the 23 cases
def before_step_1(cwd, name):
    """While the data is set up, while the model is built, and when all is built."""
    place, target = {
        "SIGTERM": ("data", "data._target_=test_signals.SendsInSetup"),
        "SIGINT": ("model", "model._target_=test_signals.SendsInModel"),
        "SIGUSR1": ("start", "tracker._target_=test_signals.SendsInStart"),
    }[name]
    (cwd / "send").write_text(f"{place} 1 {name}")
    assert stopped_step(vit_train_forked(*EIGHTEEN, target, cwd=cwd, check=False), name, cwd / "run") == 0
    return (*EIGHTEEN, target)


def in_a_step(cwd, name):
    """The first, one inside an epoch, and the very last one."""
    step = {"SIGTERM": 1, "SIGINT": 9, "SIGUSR1": 18}[name]
    (cwd / "send").write_text(f"step {step} {name}")
    assert stopped_step(vit_train_forked(*EIGHTEEN, SENDS, cwd=cwd, check=False), name, cwd / "run") == step
    return (*EIGHTEEN, SENDS)


def in_eval(cwd, name):
    """Of 6 batches twice an epoch: the averaged weights, the raw ones in the second epoch, and the test."""
    batch, step = {"SIGTERM": (3, 6), "SIGINT": (21, 12), "SIGUSR1": (40, 18)}[name]
    (cwd / "send").write_text(f"eval {batch} {name}")
    assert stopped_step(vit_train_forked(*EIGHTEEN, SENDS, cwd=cwd, check=False), name, cwd / "run") == step
    return (*EIGHTEEN, SENDS)


def in_a_save(cwd, name):
    """In the background, while training waits for it, and in the last one."""
    fault, background, first = {
        "SIGTERM": ("save.files:2", "true", 2 * STEPS_PER_EPOCH),
        "SIGINT": ("save.renamed:1", "false", STEPS_PER_EPOCH),
        "SIGUSR1": ("save.linked_last:3", "true", 3 * STEPS_PER_EPOCH),
    }[name]
    arguments = (*EIGHTEEN, f"trainer.async_save={background}")
    done = vit_train_forked(*arguments, cwd=cwd, check=False, fault=f"{fault}:{name}")
    assert stopped_step(done, name, cwd / "run") >= first
    return ("resume=run",)


def waiting_for_a_worker(cwd, name):
    """The worker never answers; the run stops all the same."""
    (cwd / "sleep").write_text(IN_STEP_5)
    run = Forked(*EIGHTEEN, *SLEEPY, cwd=cwd)
    inside(run, "run/checkpoints/step_00000004")
    os.kill(run.pid, getattr(signal, name))
    assert stopped_step(run.wait(check=False), name, cwd / "run") == 4
    assert not (cwd / "woken").exists(), "it waited for the worker"
    return (*EIGHTEEN, *SLEEPY)


def to_the_group(cwd, name):
    """As a shell or a scheduler signals all processes of a job; the workers have left the group."""
    run = paused(*EIGHTEEN, "data.num_workers=2", cwd=cwd, at="save.begin:1")
    workers = children_of(run.pid)
    assert len(workers) >= 2
    os.killpg(run.pid, getattr(signal, name))
    os.killpg(run.pid, signal.SIGCONT)
    assert STEPS_PER_EPOCH <= stopped_step(run.wait(check=False), name, cwd / "run") < 18
    return ("resume=run",)


def twice_in_a_step(cwd, name):
    """The second one ends the process at once: step 8 is not saved, the checkpoint of step 6 is there."""
    (cwd / "send").write_text(f"step 8 {name} {name}")
    arguments = (*EIGHTEEN, SENDS, "trainer.async_save=false")
    done = vit_train_forked(*arguments, cwd=cwd, check=False)
    assert done.code == -getattr(signal, name), done
    assert str((cwd / "run/checkpoints/last").readlink()) == "step_00000006"
    return arguments


def twice_in_a_save(cwd, name):
    """Two signals arrive while a checkpoint is half written. Python handles the smaller number first."""
    run = paused(*EIGHTEEN, cwd=cwd, at="save.file:6")
    assert list((cwd / "run/checkpoints").glob(".partial_step_*"))
    assert getattr(signal, name) > signal.SIGINT
    for signum in (signal.SIGINT, getattr(signal, name), signal.SIGCONT):
        os.kill(run.pid, signum)
    done = run.wait(check=False)
    assert done.code == -getattr(signal, name), done
    return ("resume=run",)


def twice_waiting(cwd, name):
    """Two signals to a run that waits for a worker, which then ends by itself."""
    (cwd / "sleep").write_text(IN_STEP_5)
    run = Forked(*EIGHTEEN, *SLEEPY, cwd=cwd)
    inside(run, "run/checkpoints/step_00000004")
    for signum in (signal.SIGSTOP, signal.SIGINT, getattr(signal, name), signal.SIGCONT):
        os.kill(run.pid, signum)
    done = run.wait(check=False)
    assert done.code == -getattr(signal, name), done
    assert not (cwd / "woken").exists()
    (cwd / "go").touch()
    return (*EIGHTEEN, *SLEEPY)


PLACES = (before_step_1, in_a_step, in_eval, in_a_save, waiting_for_a_worker)
CASES = [
    *((interrupt, name) for interrupt in PLACES for name in ("SIGTERM", "SIGINT", "SIGUSR1")),
    *((to_the_group, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1")),
    *((twice_in_a_step, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1")),
    (twice_in_a_save, "SIGTERM"),
    (twice_waiting, "SIGTERM"),
]
SAMPLE = [(in_a_save, "SIGTERM"), (waiting_for_a_worker, "SIGUSR1"), (to_the_group, "SIGINT")]


@pytest.mark.parametrize(
    ("interrupt", "name"),
    [
        pytest.param(
            interrupt,
            name,
            marks=() if (interrupt, name) in SAMPLE else pytest.mark.faults,
            id=f"{interrupt.__name__}-{name}",
        )
        for interrupt, name in CASES
    ],
)
def test_a_run_stopped_by_a_signal_continues_bit_for_bit(tmp_path, eighteen, interrupt, name) -> None:
    assert len(CASES) == 23
    arguments = interrupt(tmp_path, name)
    assert not (tmp_path / "send").exists(), "the signal was never sent"
    continues(*arguments, cwd=tmp_path, to=eighteen)


# ------------------------------------------------------------------------------------------------ beyond them
@pytest.mark.faults
def test_a_worker_stuck_in_an_evaluation_does_not_hold_a_stopped_run(tmp_path, eighteen) -> None:
    (tmp_path / "sleep").write_text(IN_EVALUATION)
    run = Forked(*EIGHTEEN, *SLEEPY, cwd=tmp_path)
    inside(run, "evaluated_6")  # read 100 is in the seventh batch
    os.kill(run.pid, signal.SIGTERM)
    assert stopped_step(run.wait(check=False), "SIGTERM", tmp_path / "run") == 6
    assert not (tmp_path / "woken").exists(), "it waited for the worker"
    continues(*EIGHTEEN, *SLEEPY, cwd=tmp_path, to=eighteen)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_scheduler_may_signal_the_workers_too(tmp_path, eighteen, name) -> None:
    """Some find the processes of a job by their parents, not by their group."""
    run = paused(*EIGHTEEN, "data.num_workers=2", cwd=tmp_path, at="save.begin:1")
    workers = children_of(run.pid)
    assert len(workers) >= 2
    for _ in range(2):  # a second time once the first is dealt with
        for pid in workers:
            os.kill(pid, getattr(signal, name))
        time.sleep(0.2)
    os.kill(run.pid, getattr(signal, name))
    os.kill(run.pid, signal.SIGCONT)
    done = run.wait(check=False)
    stopped_step(done, name, tmp_path / "run")
    assert done.err.count(name) <= 1, "the workers have something to say, too"
    continues("resume=run", cwd=tmp_path, to=eighteen)


class Terminal:
    """A command in a terminal of its own, where keys can be typed."""

    def __init__(self, *arguments, cwd, **variables):
        self.pid, self.keyboard = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(sys.executable, command("vit_train", *arguments), {**environment(), **variables})
        self.shown = b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with suppress(OSError):  # the end of a terminal is an error on Linux
            while data := os.read(self.keyboard, 4096):
                self.shown += data

    def type(self, keys):
        os.write(self.keyboard, keys)

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        self.reader.join(10)
        os.close(self.keyboard)
        return Done(os.waitstatus_to_exitcode(status), self.shown.decode().replace("\r\n", "\n"), "")


@pytest.mark.faults
def test_ctrl_c_in_a_terminal(tmp_path, eighteen) -> None:
    run = Terminal(*EIGHTEEN, "data.num_workers=2", cwd=tmp_path, VIT_TRAIN_FAULT="save.begin:1:SIGSTOP")
    _, status = os.waitpid(run.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), run.shown
    assert len(children_of(run.pid)) >= 2
    run.type(b"\x03")
    os.kill(run.pid, signal.SIGCONT)
    stopped_step(run.wait(), "SIGINT", tmp_path / "run")
    continues("resume=run", cwd=tmp_path, to=eighteen)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_job_of_a_shell(vit_train, tmp_path, eighteen, name) -> None:
    with subprocess.Popen(
        command("vit_train", *EIGHTEEN, "data.num_workers=2"),
        cwd=tmp_path,
        env={**environment(), "VIT_TRAIN_FAULT": "save.begin:1:SIGSTOP"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as job:
        os.waitid(os.P_PID, job.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert len(children_of(job.pid)) >= 2
        os.killpg(job.pid, getattr(signal, name))
        os.killpg(job.pid, signal.SIGCONT)
        out, err = job.communicate(timeout=60)
    stopped_step(Done(job.returncode, out, err), name, tmp_path / "run")
    vit_train("resume=run")
    assert whole_state(tmp_path / "run") == eighteen
