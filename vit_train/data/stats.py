"""Mean and standard deviation of a dataset's pixels: what `data.mean` and `data.std` take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vit_train.data.base import DataModule, Split


@dataclass(frozen=True)
class ChannelStats:
    """Statistics of all pixels of a split.

    Attributes:
        num_images: how many images they are of.
        mean, std: per channel, on the 0 to 1 scale.
    """

    num_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def channel_stats(
    data: DataModule, split: Split, *, progress: Callable[[int], None] = lambda _: None
) -> ChannelStats:
    """Looks once at every image of a split, as training sees them without augmentation.

    The sums are whole numbers: exact, whatever the number of images and workers.

    Args:
        data: set up.
        split: one that it has.
        progress: called with the number of images done since the last call.

    Raises:
        DataError: an image cannot be read, the line names it; or there is no such split.
        WorkerLostError: a worker process died.
    """
    num_images = num_pixels = 0
    total = torch.zeros(data.in_channels, dtype=torch.int64)
    squares = torch.zeros_like(total)
    for batch in data.eval_loader(split):
        pixels = batch.images.transpose(0, 1).flatten(1).to(torch.int32)  # (C, B * H * W)
        total += pixels.sum(1)  # in int64
        squares += pixels.square_().sum(1)
        num_images += len(batch.images)
        num_pixels += pixels.shape[1]
        progress(len(batch.images))
    mean = tuple(each / num_pixels / 255 for each in total.tolist())
    # n * sum(x^2) - sum(x)^2 in whole numbers: as floats their difference would lose its digits
    std = tuple(
        math.sqrt(num_pixels * square - each**2) / num_pixels / 255
        for each, square in zip(total.tolist(), squares.tolist())
    )
    return ChannelStats(num_images, mean, std)
