"""Two 3x3 convolutions that begin as the identity, with max pooling.

Source: "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, arXiv 2404.00498). It has no skip
connections: the start takes their place.

Shapes: (B, C, H, W) -> (B, C', H // 2, W // 2).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ConvGroup(nn.Module):
    """Convolution, max pooling, norm, GELU; convolution, norm, GELU.

    Filter i of a convolution starts as a copy of channel i (Zagoruyko and Komodakis 2017, "DiracNets"), those
    beyond the channels of the input as torch's default.

    Args:
        in_channels: channels C of the input.
        channels: channels C' of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.detach()[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))
