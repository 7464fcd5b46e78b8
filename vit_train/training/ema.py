"""Exponential moving average of the weights (Polyak and Juditsky 1992), evaluated beside the raw ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


class Ema:
    """A second copy of the model that follows the trained one.

    The effective decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage:
    a young average would otherwise be the random initialisation for thousands of steps. It is a function of
    the step, so nothing but the averaged weights has to be saved.

    Running statistics of batch norms are averaged as the weights are: they belong to the networks the average
    is made of.

    Args:
        model: copied at once; keep it on its final device.
        decay: share of the old average kept per step, in [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._averaged, self._copied = _parts(self.module)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the model after update number `step` (from 0).

        Buffers other than running statistics are copied.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, copied = _parts(model)
        torch._foreach_lerp_(self._averaged, averaged, 1 - decay)
        for target, source in zip(self._copied, copied):
            target.copy_(source)


def _parts(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What is averaged, and what is copied: counters, and constants, which may be infinite (masks)."""
    averaged: list[Tensor] = list(model.parameters())
    copied: list[Tensor] = []
    for name, buffer in model.named_buffers():
        (averaged if name.endswith(_STATISTICS) else copied).append(buffer)
    return averaged, copied
