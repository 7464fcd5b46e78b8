"""A small convolutional network for small images, accurate after few epochs.

Source: "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, arXiv 2404.00498), whose code is
KellerJordan/cifar10-airbench; written anew from the paper. The stem differs: its filters are learned, and
start from how natural images are in general, not from the training images. 32 pixels give maps of 33, 16,
8 and 4; there 31, 15, 7 and 3.

Shapes: B batch, C H W image, D width of the last group, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.construct import Dim, Positive
from vit_train.layers import ConvGroup, init_linear

NEIGHBOURS = 0.9  # correlation of neighbouring pixels, and of colours; of CIFAR's 0.91, and 0.80 to 0.92
LOGIT_SCALE = 1 / 9  # the paper's: the head then bears the rate of the convolutions


class ResNet(nn.Module):
    """A stem of 2x2 filters, groups of two convolutions that each halve the map, the maximum, a linear head.

    Args:
        in_channels: image channels C; the stem has eight filters for each.
        widths: channels of each group.
        num_classes: K.

    Raises:
        ValueError: in forward, images so small that nothing is left of them.
    """

    def __init__(self, *, in_channels: Dim, widths: tuple[Dim, ...], num_classes: Positive) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_channels, 8 * in_channels, kernel_size=2, padding=1)
        init_whitening(self.stem)
        inputs = (self.stem.out_channels, *widths[:-1])
        self.groups = nn.Sequential(*(ConvGroup(i, o) for i, o in zip(inputs, widths)))
        self.embed_dim = widths[-1]
        self.head = nn.Linear(self.embed_dim, num_classes)
        init_linear(self.head)

    def forward_features(self, images: Tensor) -> Tensor:
        """The map of the last group, (B, C, H, W) -> (B, D, h, w)."""
        smallest = 2 ** len(self.groups) - 1
        if min(images.shape[-2:]) < smallest:
            small = (
                f"images of {images.shape[-2]}x{images.shape[-1]} are too small for {len(self.groups)} groups"
            )
            raise ValueError(f"{small}; type data.img_size={smallest} or more")
        # The order in memory in which convolutions of the CPU are faster, by half
        return self.groups(F.gelu(self.stem(images.contiguous(memory_format=torch.channels_last))))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits, (B, D, h, w) -> (B, K)."""
        return self.head(features.amax(dim=(2, 3))) * LOGIT_SCALE

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def init_whitening(conv: nn.Conv2d) -> None:
    """Filters (8 C, C, 2, 2) whose outputs on natural images are nearly uncorrelated and of like size.

    The principal components of patches in which neighbouring pixels and colours correlate by `NEIGHBOURS`,
    over their deviation: sums and differences along each axis (Haar's wavelets) of the mean colour and of
    cosines over the colours. Each has both signs, of which GELU passes one.
    """
    colours, r = torch.arange(conv.in_channels), NEIGHBOURS
    axis = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / torch.tensor([[2 * (1 + r)], [2 * (1 - r)]]).sqrt()
    waves = torch.cos(math.pi * (colours + 0.5) * colours[:, None] / len(colours))
    variances = torch.where(colours == 0, 1 + (len(colours) - 1) * r, 1 - r)
    waves = waves / (waves.norm(dim=1) * variances.sqrt())[:, None]
    filters = torch.einsum("dc,ei,fj->defcij", waves, axis, axis).flatten(0, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.cat([filters, -filters]))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
