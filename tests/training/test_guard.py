"""Whether to go on: real signals sent to real processes, deadlines, steps, non-finite flags."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import pytest
import torch

from vit_train.training.guard import Answer, Guard, Signals
from vit_train.training.strategy import SingleDevice

FINE, BAD = torch.tensor(False), torch.tensor(True)
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@contextmanager
def guard(**limits):
    """A guard whose process listens to signals."""
    with Signals() as signals:
        yield Guard(SingleDevice(device="cpu"), signals, **limits)


def test_without_a_reason_it_goes_on() -> None:
    with guard() as it:
        assert it.answer(FINE, step=1) == Answer(nonfinite=False, skipped=False, stop=None)
        assert not it.signals.arrived()


def test_a_nonfinite_step_is_told_and_is_no_stop() -> None:
    with guard() as it:
        assert it.answer(BAD, step=1) == Answer(nonfinite=True, skipped=False, stop=None)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("late", [False, True])
def test_a_signal_is_answered_at_the_next_step(number, late) -> None:
    """Also where the time is up: the signal decides the exit code."""
    with guard(stop_after_minutes=0.0 if late else None) as it:
        os.kill(os.getpid(), number)
        assert it.signals.arrived()
        answer = it.answer(FINE, step=1)
        assert (answer.stop.signum, answer.stop.reason) == (number, f"stopped by {number.name}")
        assert not answer.nonfinite
        both = it.answer(BAD, step=1)
        assert both.nonfinite
        assert both.stop.signum == number


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_ctrl_c_that_is_ignored_stays_so_and_a_schedulers_signals_do_not(asked) -> None:
    """A run that a script started in the background is not stopped by Ctrl-C meant for the script."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, asked)}
    try:
        with guard() as it:
            os.kill(os.getpid(), signal.SIGINT)
            assert it.answer(FINE, step=1).stop is None
            os.kill(os.getpid(), asked)
            assert it.answer(FINE, step=2).stop.signum == asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_handlers_are_those_of_before() -> None:
    def mine(number, frame):
        raise AssertionError("nobody sends it")

    outside = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGUSR1, mine)
    try:
        before = [signal.getsignal(number) for number in SIGNALS]
        with guard():
            assert all(signal.getsignal(n) != handler for n, handler in zip(SIGNALS, before))
        assert [signal.getsignal(number) for number in SIGNALS] == before
        with pytest.raises(KeyError), guard():
            raise KeyError("an error inside")
        assert [signal.getsignal(number) for number in SIGNALS] == before
    finally:
        signal.signal(signal.SIGUSR1, outside[2])


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(second) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with guard():
                os.kill(os.getpid(), signal.SIGTERM)
                os.write(write, b"alive")
                os.kill(os.getpid(), second)
                time.sleep(1)
                os.write(write, b" still")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second
    assert said == "alive"


def test_the_deadline() -> None:
    with guard(stop_after_minutes=0.1 / 60) as it:
        assert it.answer(FINE, step=1).stop is None
        time.sleep(0.11)
        stop = it.answer(FINE, step=2).stop
    assert stop.signum is None
    assert stop.reason == "stopped after 0.00166667 minutes (trainer.stop_after_minutes)"


def test_the_step_to_stop_at() -> None:
    with guard(stop_at_step=5) as it:
        assert [it.answer(FINE, step=step).stop is None for step in (0, 4, 5, 6)] == [
            True,
            True,
            False,
            False,
        ]
        stop = it.answer(FINE, step=5).stop
    assert (stop.reason, stop.signum) == ("stopped at step 5 (trainer.stop_at_step)", None)


def test_the_answer_is_that_of_any_rank() -> None:
    """The host reads what the strategy reduced, not its own flags."""

    class Crowd(SingleDevice):
        """Another rank got SIGUSR1 and saw a NaN."""

        def max(self, x):
            return torch.maximum(x, torch.tensor([1.0, 0.0, 2.0 * signal.SIGUSR1]))

    answer = Guard(Crowd(device="cpu"), Signals()).answer(FINE, step=1)
    assert answer.nonfinite
    assert answer.stop.signum == signal.SIGUSR1
