"""A stem of 2x2 filters and groups of two convolutions that each halve the map.

Source: "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, arXiv 2404.00498), whose code is
KellerJordan/cifar10-airbench; written anew from the paper. It has no skip connections: convolutions begin as
the identity instead. The stem differs: its filters are learned, and start from how natural images are in
general, not from the training images.

Shapes: (B, C, H, W) -> (B, D, h, w); 32 pixels give maps of 33, 16, 8 and 4, there 31, 15, 7 and 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.construct import Dim, Side

from .init import init_whitening
from .patch_embed import GridEmbed


class ConvGroup(nn.Module):
    """Convolution, max pooling, norm, GELU; convolution, norm, GELU: (B, C, H, W) -> (B, C', H / 2, W / 2).

    Filter i of a convolution starts as a copy of channel i (Zagoruyko and Komodakis 2017, "DiracNets"), those
    beyond the channels of the input as torch's default.
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


class ConvTrunk(nn.Module):
    """The stem, and a group for each of `widths`: (B, C, H, W) -> (B, widths[-1], h, w).

    Args:
        in_channels: image channels C; the stem has eight filters for each.
        widths: channels of each group.

    Raises:
        ValueError: in forward, images so small that nothing is left of them.
    """

    def __init__(self, *, in_channels: Dim, widths: tuple[Dim, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8 * in_channels, kernel_size=2, padding=1)
        init_whitening(self.stem)
        inputs = (self.stem.out_channels, *widths[:-1])
        self.groups = nn.Sequential(*(ConvGroup(i, o) for i, o in zip(inputs, widths)))
        self.embed_dim = widths[-1]

    def forward_features(self, images: Tensor) -> Tensor:
        """The map of the last group, (B, C, H, W) -> (B, D, h, w)."""
        require_side(images.shape[-2], images.shape[-1], len(self.groups))
        # The order in memory in which convolutions of the CPU are faster, by half
        return self.groups(F.gelu(self.stem(images.contiguous(memory_format=torch.channels_last))))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)


def require_side(h: int, w: int, num_groups: int) -> None:
    """Raises ValueError where nothing would be left of images this small."""
    smallest = 2**num_groups - 1
    if min(h, w) < smallest:
        small = f"images of {h}x{w} are too small for {num_groups} groups"
        raise ValueError(f"{small}; type data.img_size={smallest} or more")


class TrunkEmbed(GridEmbed):
    """A `ConvTrunk` in place of a patch embedding: its last map are the tokens.

    Args:
        img_size: height and width of the images in pixels.
        in_channels: image channels C.
        widths: channels of each group; the last is the width D of the tokens.

    Raises:
        ValueError: nothing would be left of images this small; in forward, images of another size.
    """

    def __init__(self, *, img_size: Side, in_channels: Dim, widths: tuple[Dim, ...]) -> None:
        require_side(img_size, img_size, len(widths))
        side = (img_size + 1) >> len(widths)
        super().__init__(
            img_size=img_size, patch_size=2 ** len(widths), embed_dim=widths[-1], grid_size=(side, side)
        )
        self.trunk = ConvTrunk(in_channels=in_channels, widths=widths)

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return self.trunk(images).permute(0, 2, 3, 1).contiguous()
