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
    """As many samples as there are, shuffled.

    "uniform" takes every sample once. "balanced" takes every class equally often: of a large class a part,
    different in every epoch; of a small class every sample, again and again.

    With repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335; DeiT's `RASampler`) the first 1/repeats
    of those come `repeats` times in a row, so that a batch holds several views of an image.

    Args:
        targets: (n,) class ids.
        sampler: as above.
        repeats: how often a sample comes; 1 for no repetition.
        seed: the run's seed.
        epoch: from 0.
    """
    num = len(targets)
    generator = torch.Generator().manual_seed(rng.mix(seed, "order", epoch))
    if sampler == "balanced":
        index, draw = _balanced(targets, generator)
    else:
        index, draw = torch.randperm(num, generator=generator), torch.zeros(num, dtype=torch.int64)
    if repeats > 1:
        distinct = -(-num // repeats)
        index = index[:distinct].repeat_interleave(repeats)[:num]
        copies = torch.arange(repeats).repeat(distinct)[:num]
        draw = draw[:distinct].repeat_interleave(repeats)[:num] * repeats + copies
    return Order(index, draw)


def _balanced(targets: NDArray[np.int64], generator: torch.Generator) -> Order:
    num = len(targets)
    order = torch.randperm(num, generator=generator)
    by_class = order[torch.from_numpy(targets)[order].argsort(stable=True)]
    counts = [count for count in np.bincount(targets).tolist() if count]
    # what does not divide goes to classes in turn, so that over epochs they come equally often
    shares = torch.full((len(counts),), num // len(counts))
    shares[torch.randperm(len(counts), generator=generator)[: num % len(counts)]] += 1
    places, draws, first = [], [], 0
    for count, share in zip(counts, shares.tolist()):
        position = torch.arange(share)
        places.append(by_class[first + position % count])
        draws.append(position // count)
        first += count
    shuffled = torch.randperm(num, generator=generator)
    return Order(torch.cat(places)[shuffled], torch.cat(draws)[shuffled])
