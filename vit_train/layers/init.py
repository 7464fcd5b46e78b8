"""Initial weights of the transformer parts.

Linear layers and tokens follow DeiT (facebookresearch/deit, and timm's ViT and Swin after it): a normal
distribution of deviation 0.02 truncated at +-2, zero bias. The ViT paper's JAX code (google-research/
vision_transformer) differs: Xavier-uniform linear layers, a zero head and a zero class token. Patch
projections are a linear map of a whole patch and follow JAX's default, LeCun normal: deviation
1 / sqrt(fan_in), so that tokens start with the variance of the pixels.
"""

from __future__ import annotations

import math

from torch import nn

TOKEN_STD = 0.02


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: initialises nn.Linear, leaves everything else (norms start as 1 and 0)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=TOKEN_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_projection(conv: nn.Conv2d) -> None:
    """LeCun normal weight, zero bias."""
    fan_in = conv.in_channels * math.prod(conv.kernel_size)
    nn.init.trunc_normal_(conv.weight, std=math.sqrt(1 / fan_in))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
