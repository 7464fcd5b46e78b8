"""Optimizer factories and learning rate schedules.

A factory takes the model and returns a torch optimizer; parameters are grouped here, once, by name and shape.
A schedule is a function of the optimizer step alone (reduce-on-plateau also of the metrics it observed), so
resuming needs no replay.

Sources: decoupled weight decay, Loshchilov and Hutter 2019 (arXiv 1711.05101); no decay on norms, biases and
position tables as in DeiT and Swin; warmup + cosine, Goyal et al. 2017 and Loshchilov and Hutter 2017.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from vit_train.construct import NotNegativeFloat


@runtime_checkable
class HasNoWeightDecay(Protocol):
    """A model that names parameters weight decay must not touch."""

    def no_weight_decay(self) -> set[str]:
        """Parameter names, as in `named_parameters()`."""
        ...


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; vectors (norms, biases) and what the model names do not.

    Args:
        model: every parameter with `requires_grad` lands in exactly one group.
        weight_decay: of the first group.
    """
    exempt = model.no_weight_decay() if isinstance(model, HasNoWeightDecay) else set()
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fused(model: nn.Module) -> bool:
    """One kernel for all parameters where torch has it (cpu, cuda, mps): several times the loop's speed."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    return kinds <= {"cpu", "cuda", "mps"} and all(p.is_floating_point() for p in model.parameters())


def adamw(
    model: nn.Module,
    *,
    lr: NotNegativeFloat,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW with decay groups (`decay_groups`).

    Args:
        model: whose parameters are optimised.
        lr: base learning rate; the schedule multiplies it.
        weight_decay: decoupled, of matrices only.
        betas: decay of the two moment averages.
        eps: added to the denominator.
    """
    return AdamW(decay_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=_fused(model))


def adam(
    model: nn.Module,
    *,
    lr: NotNegativeFloat,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Plain Adam, one group (weight decay is L2 on everything, as the tutorials have it)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Adam(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_fused(model))


def sgd(
    model: nn.Module,
    *,
    lr: NotNegativeFloat,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> Optimizer:
    """SGD with momentum and decay groups (`decay_groups`)."""
    return SGD(
        decay_groups(model, weight_decay),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        fused=_fused(model),
    )


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

    def __call__(self, step: int) -> float:
        """The multiplier for the update number `step` (from 0)."""
        del step
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


def _warmup_steps(steps_per_epoch: int, total_steps: int, warmup_epochs: float) -> int:
    # A quick look (`trainer.epochs=2`) with a recipe's five warmup epochs would otherwise never reach its
    # learning rate: warmup takes at most a fifth of the run.
    return min(round(warmup_epochs * steps_per_epoch), total_steps // 5)


class Cosine(Schedule):
    """Linear warmup from 0, then half a cosine down to `final_factor` at the last step.

    Args:
        steps_per_epoch: optimizer steps in one epoch.
        total_steps: the budget the schedule spans.
        warmup_epochs: length of the warmup; at most a fifth of the run is used.
        final_factor: multiplier at the end (0.01 ends at a hundredth of the base rate).
    """

    def __init__(
        self,
        steps_per_epoch: int,
        total_steps: int,
        *,
        warmup_epochs: NotNegativeFloat = 0.0,
        final_factor: float = 0.01,
    ) -> None:
        super().__init__(steps_per_epoch, total_steps)
        if not 0 <= final_factor <= 1:
            raise ValueError(f"final_factor must lie between 0 and 1, not {final_factor}")
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
        steps_per_epoch: optimizer steps in one epoch.
        total_steps: the budget the schedule spans.
        milestones: fractions of the whole run, ascending (0.5 is half of it), so that the schedule spans
            whatever budget it is given.
        factor: what the rate is multiplied by at each milestone.
        warmup_epochs: length of the warmup; at most a fifth of the run is used.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        total_steps: int,
        *,
        milestones: tuple[float, ...] = (0.6, 0.85),
        factor: float = 0.1,
        warmup_epochs: NotNegativeFloat = 0.0,
    ) -> None:
        super().__init__(steps_per_epoch, total_steps)
        if list(milestones) != sorted(milestones) or any(not 0 < m < 1 for m in milestones):
            raise ValueError(
                f"milestones are ascending fractions of the run between 0 and 1, not {milestones}"
            )
        self.warmup_steps = _warmup_steps(steps_per_epoch, total_steps, warmup_epochs)
        self.milestones = tuple(round(m * total_steps) for m in milestones)
        self.factor = factor

    def __call__(self, step: int) -> float:
        """Warmup multiplier times `factor` to the number of milestones passed."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warmup * self.factor ** sum(step >= milestone for milestone in self.milestones)


class ReduceOnPlateau(Schedule):
    """Times `factor` when the monitored metric has not improved for more than `patience` epochs.

    The rule of torch.optim.lr_scheduler.ReduceLROnPlateau (relative threshold 1e-4), as a multiplier.

    Args:
        steps_per_epoch: optimizer steps in one epoch.
        total_steps: the budget (the rule does not depend on it).
        monitor: a metric of the epoch, such as train/loss, val/loss or val/top1.
        mode: whether a smaller ("min") or larger ("max") value is better.
        factor: what the rate is multiplied by.
        patience: epochs without improvement that are tolerated.
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
        factor: float = 0.5,
        patience: int = 5,
        min_factor: float = 0.01,
    ) -> None:
        super().__init__(steps_per_epoch, total_steps)
        self.monitor, self.mode = monitor, mode
        self.factor, self.patience, self.min_factor = factor, patience, min_factor
        self.multiplier = 1.0
        self.best: float | None = None
        self.bad_epochs = 0

    def __call__(self, step: int) -> float:
        """The multiplier the epochs observed so far have led to."""
        del step
        return self.multiplier

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Counts the epoch as good or bad. The monitored metric must be among those given."""
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
        """Multiplier, best value and the count of epochs since."""
        return {"multiplier": self.multiplier, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.multiplier, self.best, self.bad_epochs = state["multiplier"], state["best"], state["bad_epochs"]


def set_lr(optimizer: Optimizer, multiplier: float) -> float:
    """Sets every group's rate to its own base rate times the multiplier; returns the first group's."""
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * multiplier
    return float(optimizer.param_groups[0]["lr"])


def named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer tensors as `<parameter name>/<slot>`; hyperparameters stay in the configuration."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def load_named_state(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restores `named_state`, whatever the order of the parameters now is.

    Raises:
        ValueError: a tensor belongs to no parameter, or a parameter's shape differs.
    """
    parameters = dict(model.named_parameters())
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"optimizer state {key!r} belongs to no parameter of this model")
        if tensor.ndim and tensor.shape != parameters[name].shape:
            expected = tuple(parameters[name].shape)
            raise ValueError(f"optimizer state {key!r} has shape {tuple(tensor.shape)}, not {expected}")
        slots.setdefault(name, {})[slot] = tensor
    names = {id(parameter): name for name, parameter in parameters.items()}
    current = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: slots[names[id(p)]] for i, p in enumerate(order) if names[id(p)] in slots}
    # torch's own loader moves each slot to where this optimizer wants it (a fused step counts on the device)
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
