"""Stochastic depth per sample: "Deep Networks with Stochastic Depth" (Huang et al. 2016), as in DeiT, Swin.

Shapes: (B, ...) -> (B, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_train.construct import Few


class DropPath(nn.Module):
    """In training, zeroes a residual branch for a random part of the samples and scales up the others.

    The expectation is unchanged; in evaluation, or at rate 0, it is the identity and draws nothing.

    Args:
        rate: probability that a sample loses the branch, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        # Drawn in fp32: bernoulli in bf16 rounds the probability to three digits.
        scale = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device).bernoulli_(keep).div_(keep)
        return x * scale.to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def drop_path_schedule(rate: float, depth: Few) -> list[float]:
    """Rates growing linearly from 0 in the first block to `rate` in the last, as in DeiT and Swin."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
