"""Whether to go on: signals, deadlines and non-finite values, answered once per step.

The loop asks `Guard.answer` just before the optimizer moves; that is the only point of a step where the host
waits for the device. What was asked for by signal or clock is reduced over ranks together with the
non-finite flag, so every rank takes the same branch at the same step.
"""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor

from vit_train.training.strategy import SingleDevice

_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


@dataclass(frozen=True)
class Stop:
    """Why a run ends early: a signal (exit 128 + n) or a limit the user set (exit 0)."""

    reason: str
    signum: int | None = None


@dataclass(frozen=True)
class Answer:
    """What one step has to know."""

    nonfinite: bool
    skipped: bool
    stop: Stop | None


class Signals:
    """Context manager that owns the signal handlers: from before a run is built until it has said goodbye.

    The first signal sets a flag, which the loop answers at the end of a step; a second one ends the process
    at once, as it would without handlers. Where Ctrl-C is ignored, as behind a script's `&`, it stays so.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in _SIGNALS:
            if hasattr(signal, name):
                number = getattr(signal, name)
                if name == "SIGINT" and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def arrived(self) -> bool:
        """Whether a signal has arrived, without asking other ranks or the device."""
        return bool(self.signum)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum
        name = signal.Signals(signum).name
        with suppress(OSError):  # print is not safe inside a signal handler
            again = "press Ctrl-C (or send the signal) again to stop at once"
            os.write(2, f"\n{name}: stopping as soon as everything is saved; {again}\n".encode())


class Guard:
    """Answers once a step, on all ranks alike.

    Args:
        strategy: reduces the flags over ranks.
        signals: what has arrived at this process.
        stop_at_step: stop once this many steps are done.
        stop_after_minutes: stop once this much wall time has passed since the guard was made, or `start`.
    """

    def __init__(
        self,
        strategy: SingleDevice,
        signals: Signals,
        stop_at_step: int | None = None,
        stop_after_minutes: float | None = None,
    ) -> None:
        self.strategy = strategy
        self.signals = signals
        self.stop_at_step = stop_at_step
        self.minutes = stop_after_minutes
        self.deadline = math.inf
        self.start()

    def start(self) -> None:
        """The minutes begin now."""
        if self.minutes is not None:
            self.deadline = time.monotonic() + 60 * self.minutes

    def answer(self, nonfinite: Tensor, *, step: int, skipped: Tensor | None = None) -> Answer:
        """The one host read of a step.

        Args:
            nonfinite: scalar bool on the device: whether the loss or a gradient is NaN or infinite.
            step: number of steps done once this one is.
            skipped: scalar bool on the device: whether loss scaling will leave the update out.
        """
        skipped = torch.zeros_like(nonfinite) if skipped is None else skipped
        late = time.monotonic() >= self.deadline
        asked = torch.full((), 2.0 * self.signals.signum + float(late), device=nonfinite.device)
        flags = torch.stack((nonfinite.float(), skipped.float(), asked))
        bad, left_out, code = self.strategy.max(flags).tolist()
        return Answer(bool(bad), bool(left_out), self._stop(int(code), step))

    def asked(self, step: int) -> Stop | None:
        """Whether to stop where no step is being made, after `step` of them."""
        fine = torch.zeros((), dtype=torch.bool, device=self.strategy.device)
        return self.answer(fine, step=step).stop

    def stop_waiting(self) -> bool:
        """Whether to stop waiting for a batch. One process of several cannot decide that alone."""
        return self.strategy.world_size == 1 and self.signals.arrived()

    def _stop(self, code: int, step: int) -> Stop | None:
        signum, late = divmod(code, 2)
        if signum:
            return Stop(f"stopped by {signal.Signals(signum).name}", signum)
        if late:
            return Stop(f"stopped after {self.minutes:g} minutes (trainer.stop_after_minutes)")
        if self.stop_at_step is not None and step >= self.stop_at_step:
            return Stop(f"stopped at step {step} (trainer.stop_at_step)")
        return None
