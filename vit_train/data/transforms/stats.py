"""Mean and standard deviation of a dataset's pixels: what `data.mean` and `data.std` take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vit_train.data.contract import DataModule, Split

_CONSTANT_LEVELS = 2  # between the darkest and the brightest pixel
_TIMES = 100


@dataclass(frozen=True)
class ChannelStats:
    """Statistics of all pixels of a split.

    Attributes:
        num_images: how many images they are of.
        mean, std: per channel, on the 0 to 1 scale.
        levels: (n, 3) least, largest and mean level of each image, see `unusual`.
    """

    num_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    levels: NDArray[np.float32]


def unusual(levels: NDArray[np.float32]) -> Iterator[tuple[str, list[int]]]:
    """What may be wrong with the brightness of pictures, and with which.

    `levels` (n, 3) are the least, largest and mean of each picture; NaN where it is not known.
    """
    low, high, mean = levels.T
    constant = high - low <= _CONSTANT_LEVELS
    if constant.any():
        yield f"nearly constant, within {_CONSTANT_LEVELS} levels", np.flatnonzero(constant).tolist()
    median = np.nanmedian(mean[~constant]) if not np.isnan(mean[~constant]).all() else 0
    apart = ~constant & (np.maximum(mean, median) > _TIMES * np.minimum(mean, median))
    if median and apart.any():
        yield f"{_TIMES} times darker or brighter than the median", np.flatnonzero(apart).tolist()


def channel_stats(
    data: DataModule, split: Split, *, progress: Callable[[int], object] = lambda _: None
) -> ChannelStats:
    """Looks once at every image of a split, as training sees them without augmentation.

    The sums are whole numbers: exact, whatever the number of images and workers. `progress` is called with
    the number of images done since the last call.

    Raises:
        DataError: an image cannot be read, the line names it; or there is no such split.
        WorkerLostError: a worker process died.
    """
    num_images = num_pixels = 0
    total = torch.zeros(data.in_channels, dtype=torch.int64)
    squares = torch.zeros_like(total)
    levels = []
    for batch in data.eval_loader(split):
        pixels = batch.images.transpose(0, 1).flatten(1).to(torch.int32)  # (C, B * H * W)
        total += pixels.sum(1)  # in int64
        squares += pixels.square_().sum(1)
        flat = batch.images.flatten(1)
        levels.append(torch.stack([flat.amin(1), flat.amax(1), flat.float().mean(1)], dim=1).numpy())
        num_images += len(batch.images)
        num_pixels += pixels.shape[1]
        progress(len(batch.images))
    mean = tuple(each / num_pixels / 255 for each in total.tolist())
    # n * sum(x^2) - sum(x)^2 in whole numbers: as floats their difference would lose its digits
    std = tuple(
        math.sqrt(num_pixels * square - each**2) / num_pixels / 255
        for each, square in zip(total.tolist(), squares.tolist())
    )
    return ChannelStats(num_images, mean, std, np.concatenate(levels))
