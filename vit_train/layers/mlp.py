"""The two-layer perceptron of a transformer block: Vaswani et al. 2017, with GELU for ReLU as in ViT.

Shapes: (..., C) -> (..., C).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .init import init_linear


class Mlp(nn.Module):
    """Linear, GELU, dropout, Linear, dropout on the last dimension.

    Args:
        dim: width in and out.
        hidden_dim: width between the two layers.
        drop: dropout probability after each layer.
    """

    def __init__(self, dim: int, *, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.fc1(x)))
        return self.drop(self.fc2(x))
