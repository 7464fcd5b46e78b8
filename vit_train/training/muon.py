"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon), written anew from the post and from torch's.

torch's own always computes in bf16, which most processors only emulate: a step of `vit_cifar` on one of them
takes twice as long (docs/RECIPES.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vit_train.system.precision import bf16_is_faster

_STEPS = 5
_QUINTIC = (3.4445, -4.775, 2.0315)  # Jordan's: the steepest at 0 of those that end near 1
_TINY = 1e-7


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1 (0.7 to 1.2), by Newton-Schulz: (M, N) -> (M, N).

    In bf16 where that is faster, else in float32.
    """
    a, b, c = _QUINTIC
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = x.to(torch.bfloat16 if bf16_is_faster(matrix.device) else torch.float32)
    x = x / x.norm().clamp(min=_TINY)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if len(matrix) <= matrix.shape[1] else x.T


class Muon(Optimizer):
    """Moves each matrix by its averaged gradient, all singular values brought near 1.

    Steps are scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv
    2502.16982), so that both take the same rate and weight decay. The average is Nesterov's.

    Args:
        params: matrices, or groups of them; a group may say that each of its parameters is several
            `matrices` of equal size, one below the other, such as those of query, key and value.
        lr: learning rate.
        momentum: share of the old average that is kept.
        weight_decay: decoupled.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum, lr = self.state[weight], group["momentum"], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        weight.mul_(1 - lr * group["weight_decay"])
        directions = gradient.lerp(average, momentum).chunk(group["matrices"])
        for matrix, direction in zip(weight.chunk(group["matrices"]), directions):
            matrix.sub_(orthogonal(direction), alpha=lr * 0.2 * max(matrix.shape) ** 0.5)
