"""What a trainer is made of (the parts build.py hands over) and where it stands (what a resume restores)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from vit_train.checkpoint import Checkpointer
from vit_train.data import Batch, DataModule
from vit_train.training.guard import Signals
from vit_train.training.schedules import Schedule
from vit_train.training.strategy import SingleDevice
from vit_train.training.tracker import NullTracker

Transform = Callable[[Batch, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Parts:
    """Everything the trainer works with.

    Attributes:
        make_optimizer: model -> optimizer.
        make_schedule: (steps per epoch, total steps) -> schedule.
        train_transform, eval_transform: (uint8 batch, epoch, step) -> (float images, targets), on the device.
        signals: what has arrived at this process.
        about: plain data stored with every checkpoint beside the state: configuration, class names ...
    """

    model: nn.Module
    data: DataModule
    objective: Any
    make_optimizer: Callable[[nn.Module], Optimizer]
    make_schedule: Callable[[int, int], Schedule]
    train_transform: Transform
    eval_transform: Transform
    strategy: SingleDevice
    tracker: NullTracker
    checkpointer: Checkpointer
    signals: Signals
    seed: int
    about: dict[str, Any]


@dataclass
class TrainState:
    """Where a run stands: all of it but the tensors. Kept in state.json."""

    step: int = 0  # optimizer steps done
    steps_per_epoch: int = 0  # what an epoch of this data has
    closed_epochs: int = 0  # epochs evaluated, observed and saved
    # of the open epoch: loss, top-1 hits, top-5 hits, images, then the parts of the loss where it has some
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    best: dict[str, float] | None = None  # metrics of the best epoch, and which it was
    evaluations_since_best: int = 0  # that brought no better top-1: what early stopping counts
    stopped_early: bool = False
    scaled_in_a_row: int = 0  # updates that loss scaling left out
    nonfinite_in_a_row: int = 0  # steps left out by trainer.on_nonfinite=skip
    rollbacks: int = 0  # by trainer.on_nonfinite=rollback
    # Step of the last save that was due, which a rollback goes to. A save that a signal, a limit or
    # early stopping asked for does not count: the interrupted run would go back to another step than the
    # uninterrupted one.
    anchor: int | None = None
    seconds: float = 0.0  # wall time of training and evaluation, interruptions not counted
    last: dict[str, float] = field(default_factory=dict)  # metrics of the newest closed epoch
    schedule: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    # Where the budget ended inside an epoch: all of this as it was before that epoch was closed
    before_cut: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The state a checkpoint holds.

        Raises:
            ValueError: a value is of another kind than it ever is.
            TypeError: one is unknown.
        """
        state, usual = cls(**values), cls()
        for field_ in fields(cls):
            value, default = getattr(state, field_.name), getattr(usual, field_.name)
            kinds = (int, float) if isinstance(default, float) else type(default)
            if default is not None and (not isinstance(value, kinds) or (type(value) is int and value < 0)):
                raise ValueError(f"{field_.name} is {value!r}")
        best = {"val/top1": 0.0} if state.best is None else state.best
        figures = [*state.sums, state.seconds, *state.last.values(), *best.values()]
        if len(state.sums) < 4 or "val/top1" not in best or not all(map(_is_figure, figures)):
            raise ValueError("a figure is missing or no number")
        if not isinstance(state.anchor, int | None):
            raise ValueError(f"anchor is {state.anchor!r}")
        if state.before_cut is not None and cls.from_json(state.before_cut).step != state.step:
            raise ValueError("before_cut is of another step")
        return state

    def kept_steps(self) -> set[int]:
        """Steps of the checkpoints that stay: best and anchor, also those of before the cut."""
        states = (vars(self), self.before_cut or {})
        steps = [s for of in states for s in (of.get("anchor"), (of.get("best") or {}).get("step"))]
        return {int(step) for step in steps if step is not None}

    def check_position(self, steps_per_epoch: int, total_steps: int) -> None:
        """That its step lies in the epoch which is open, or at the end of the run.

        Raises:
            ValueError: it does not.
        """
        first = self.closed_epochs * steps_per_epoch
        if not first <= self.step <= first + steps_per_epoch and self.step != total_steps:
            raise ValueError(f"step {self.step} is not in epoch {self.closed_epochs + 1}")

    def judge(self, metrics: dict[str, float], epoch: int) -> bool:
        """Whether these validation metrics are the best so far, and remembers them if so.

        By top-1, then by the lower loss: on a small split many epochs tie. Patience counts top-1 alone.
        """
        improved = self.best is None or metrics["val/top1"] > self.best["val/top1"]
        self.evaluations_since_best = 0 if improved else self.evaluations_since_best + 1
        rank = (metrics["val/top1"], -metrics.get("val/loss", math.inf))
        if self.best is not None and rank <= (self.best["val/top1"], -self.best.get("val/loss", math.inf)):
            return False
        self.best = {**metrics, "epoch": epoch + 1, "step": self.step}
        return True


def check_listeners(
    schedule: Schedule, early_stop_patience: int | None, sizes: Mapping[str, int], *, ema: bool
) -> None:
    """The schedule and early stopping can only listen to what a run measures on its splits, of these `sizes`.

    Raises:
        ValueError: they could not.
    """
    splits = ["train"] + (["val"] if sizes["val"] else []) + (["val_raw"] if sizes["val"] and ema else [])
    known = [f"{split}/{name}" for split in splits for name in ("loss", "top1")]
    if schedule.monitor is not None and schedule.monitor not in known:
        raise ValueError(
            f"schedule.monitor={schedule.monitor} is not measured here; choose {', '.join(known)}"
        )
    if early_stop_patience is not None and not sizes["val"]:
        raise ValueError("trainer.early_stop_patience needs a validation split; set data.val_fraction")


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
