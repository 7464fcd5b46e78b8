"""The arithmetic of a forward pass."""

from __future__ import annotations

import copy

import torch
from torch import nn


def multiply_adds(model: nn.Module, *, in_channels: int, img_size: int) -> int:
    """Multiply-adds of one forward pass of one image, attention included.

    Half of what torch's FLOP counter says. Papers print this number as "FLOPs" (17.6 G for ViT-B/16).

    Args:
        model: left as it is; a copy without weights is counted, which computes nothing.
        in_channels: of the image.
        img_size: side in pixels.

    Raises:
        ValueError: the model does not take such images.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # on the meta device, whatever the model's: the counter does not know the fused attention of a CPU
    counted = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(torch.empty(1, in_channels, img_size, img_size, device="meta"))
    return int(counter.get_total_flops()) // 2
