"""Exponential moving average of the weights (Polyak and Juditsky 1992), evaluated beside the raw ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A second copy of the model that follows the trained one.

    The effective decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage:
    a young average would otherwise be the random initialisation for thousands of steps. It is a function of
    the step, so nothing but the averaged weights has to be saved.

    Args:
        model: copied at once; keep it on its final device.
        decay: share of the old average kept per step, in [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._averaged: list[Tensor] = list(self.module.parameters())
        self._copied: list[Tensor] = list(self.module.buffers())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the model after update number `step` (from 0).

        Buffers (BatchNorm statistics) are averages already and are copied.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, list(model.parameters()), 1 - decay)
        for target, source in zip(self._copied, model.buffers()):
            target.copy_(source)
