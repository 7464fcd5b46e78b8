"""Which samples an epoch trains on, in which order: a function of (seed, epoch)."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_train import rng

Sampling: TypeAlias = Literal["uniform", "balanced"]


class Order(NamedTuple):
    """The samples of one epoch.

    Attributes:
        index: (n,) int64, sample ids.
        draw: (n,) int64, which repeat of the sample in this epoch: each is augmented differently.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing calls
    draw: Tensor


def epoch_order(
    targets: NDArray[np.int64], *, sampler: Sampling, repeats: int, seed: int, epoch: int
) -> Order:
    """As many samples as there are `targets`, (n,) class ids; shuffled.

    "uniform" takes every sample once. "balanced" takes every class equally often: of a large class a part,
    different in every epoch; of a small class every sample, again and again.

    With repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335; DeiT's `RASampler`) a sample comes
    `repeats` times in a row, so that a batch holds several views of an image, and fewer samples come. The
    last sample of an epoch, or of each class where they are balanced, may come less often.
    """
    num = len(targets)
    generator = torch.Generator().manual_seed(rng.mix(seed, "order", epoch))
    order = torch.randperm(num, generator=generator)
    if sampler == "uniform":
        return _views(order, num, repeats)
    by_class = order[torch.from_numpy(targets)[order].argsort(stable=True)]
    classes = by_class.split([count for count in np.bincount(targets).tolist() if count])
    # what does not divide goes to the classes in turn, so that over epochs they come equally often
    share, left = divmod(num, len(classes))
    views = [
        _views(ids, share + ((i - epoch * left) % len(classes) < left), repeats)
        for i, ids in enumerate(classes)
    ]
    index, draw = (torch.cat(parts) for parts in zip(*views))
    row = (draw % repeats == 0).cumsum(0) - 1  # views in a row stay together
    place = torch.randperm(int(row[-1]) + 1, generator=generator)[row].argsort(stable=True)
    return Order(index[place], draw[place])


def _views(ids: Tensor, num: int, repeats: int) -> Order:
    """`num` views: each sample `repeats` times in a row, from the front again where there are too few."""
    view = torch.arange(num)
    row = view // repeats
    return Order(ids[row % len(ids)], row // len(ids) * repeats + view % repeats)
