"""Learning rate schedules.

A schedule is a function of the optimizer step alone (reduce-on-plateau also of the metrics it observed), so
resuming needs no replay.

Sources: warmup + cosine, Goyal et al. 2017 and Loshchilov and Hutter 2017.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from vit_train.construct import Fraction, NotNegative, NotNegativeFloat, Probability, Share


class Schedule:
    """Multiplier of the base learning rate; this base class is the constant schedule.

    Args:
        steps_per_epoch: optimizer steps in one epoch.
        total_steps: the budget the schedule spans, in optimizer steps.
    """

    monitor: str | None = None

    def __init__(self, steps_per_epoch: int, total_steps: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:  # noqa: ARG002
        """The multiplier for the update number `step` (from 0)."""
        return 1.0

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Sees the metrics of a finished epoch. Only reduce-on-plateau listens."""

    def state_dict(self) -> dict[str, Any]:
        """What `__call__` depends on beside the step, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""


class Constant(Schedule):
    """The base learning rate throughout."""


def _warmup_steps(steps_per_epoch: int, total_steps: int, warmup_epochs: float | None) -> int:
    if warmup_epochs is None:  # a quick look (`trainer.epochs=2`) must reach its learning rate as well
        return min(2 * steps_per_epoch, total_steps // 5)
    steps = round(warmup_epochs * steps_per_epoch)
    if steps > total_steps:
        raise ValueError(
            f"warmup_epochs={warmup_epochs:g} ({steps} steps) is longer than the run of "
            f"{total_steps} steps; type fewer, or schedule.warmup_epochs=null (2 epochs, at most a fifth of "
            "the run)"
        )
    return steps


class Cosine(Schedule):
    """Linear warmup from 0, then half a cosine down to `final_factor` at the last step.

    Args:
        steps_per_epoch, total_steps: as for `Schedule`.
        warmup_epochs: length of the warmup; null is 2, at most a fifth of the run.
        final_factor: multiplier at the end (0.01 ends at a hundredth of the base rate).
    """

    def __init__(
        self,
        steps_per_epoch: int,
        total_steps: int,
        *,
        warmup_epochs: NotNegativeFloat | None = 0.0,
        final_factor: Probability = 0.01,
    ) -> None:
        super().__init__(steps_per_epoch, total_steps)
        self.warmup_steps = _warmup_steps(steps_per_epoch, total_steps, warmup_epochs)
        self.final_factor = final_factor

    def __call__(self, step: int) -> float:
        """Never 0: the first update already moves, the last one ends at `final_factor`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        span = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


class MultiStep(Schedule):
    """Linear warmup, then times `factor` at each milestone.

    Args:
        steps_per_epoch, total_steps: as for `Schedule`.
        milestones: fractions of the whole run, in any order (0.5 is half of it), so that the schedule spans
            whatever budget it is given.
        factor: what the rate is multiplied by at each milestone.
        warmup_epochs: length of the warmup; null is 2, at most a fifth of the run.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        total_steps: int,
        *,
        milestones: tuple[Fraction, ...] = (0.6, 0.85),
        factor: Share = 0.1,
        warmup_epochs: NotNegativeFloat | None = 0.0,
    ) -> None:
        super().__init__(steps_per_epoch, total_steps)
        self.warmup_steps = _warmup_steps(steps_per_epoch, total_steps, warmup_epochs)
        self.milestones = tuple(round(m * total_steps) for m in milestones)
        self.factor = factor

    def __call__(self, step: int) -> float:
        """Warmup multiplier times `factor` to the number of milestones passed."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warmup * self.factor ** sum(step >= milestone for milestone in self.milestones)


class ReduceOnPlateau(Schedule):
    """Times `factor` when the monitored metric has not improved for more than `patience` evaluations of it.

    The rule of torch.optim.lr_scheduler.ReduceLROnPlateau (relative threshold 1e-4), as a multiplier.

    Args:
        steps_per_epoch, total_steps: as for `Schedule`; the rule does not depend on them.
        monitor: a metric of the epoch, such as train/loss, val/loss or val/top1.
        mode: whether a smaller ("min") or larger ("max") value is better.
        factor: what the rate is multiplied by.
        patience: evaluations of `monitor` in a row without a better value that are tolerated.
        min_factor: the multiplier never falls below it.
    """

    threshold = 1e-4

    def __init__(
        self,
        steps_per_epoch: int,
        total_steps: int,
        *,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        factor: Share = 0.5,
        patience: NotNegative = 5,
        min_factor: Probability = 0.01,
    ) -> None:
        super().__init__(steps_per_epoch, total_steps)
        self.monitor, self.mode = monitor, mode
        self.factor, self.patience, self.min_factor = factor, patience, min_factor
        self.multiplier = 1.0
        self.best: float | None = None
        self.bad_epochs = 0

    def __call__(self, step: int) -> float:  # noqa: ARG002
        """The multiplier the evaluations observed so far have led to."""
        return self.multiplier

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Counts the evaluation as good or bad. The monitored metric must be among those given."""
        assert self.monitor is not None
        value = metrics[self.monitor]
        if self.best is None or self._better(value, self.best):
            self.best, self.bad_epochs = value, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.multiplier = max(self.multiplier * self.factor, self.min_factor)
            self.bad_epochs = 0

    def _better(self, value: float, best: float) -> bool:
        if self.mode == "min":
            return value < best * (1 - self.threshold)
        return value > best * (1 + self.threshold)

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multiplier, self.best, self.bad_epochs = state["multiplier"], state["best"], state["bad_epochs"]
