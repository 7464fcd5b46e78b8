"""Initial weights of the transformer parts.

Linear layers are Xavier uniform with zero bias, as in the ViT paper's own code (google-research/
vision_transformer). The fixed deviation of 0.02 that DeiT and timm use is Xavier's for a width of 2,500; at a
width of 64 it is a sixth of it, and a narrow model trained from scratch hardly starts to learn. Patch
projections are a linear map of a whole patch and follow JAX's default, LeCun normal: deviation
1 / sqrt(fan_in), so that tokens start with the variance of the pixels. Positions start as the sines and
cosines of the grid and are learned from there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TOKEN_STD = 0.02  # of class tokens and relative position bias, truncated at +-2: DeiT, Swin, timm
_WAVELENGTHS = 10_000.0


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: initialises nn.Linear, leaves everything else (norms start as 1 and 0)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_projection(conv: nn.Conv2d) -> None:
    """LeCun normal weight, zero bias."""
    fan_in = conv.in_channels * math.prod(conv.kernel_size)
    nn.init.trunc_normal_(conv.weight, std=math.sqrt(1 / fan_in))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def sincos_positions(h: int, w: int, dim: int) -> Tensor:
    """Sines and cosines of column and row at dim / 4 wavelengths each: (h * w, dim).

    Two-dimensional form of Vaswani et al. 2017, as MoCo v3 and "Better plain ViT baselines for ImageNet-1k"
    (Beyer et al. 2022) use it. What `dim` has beyond a multiple of 4 stays zero.
    """
    quarter = dim // 4
    frequency = _WAVELENGTHS ** (-torch.arange(quarter) / max(1, quarter))
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequency for axis in (column, row)], dim=1)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(waves, (0, dim - waves.shape[1]))
