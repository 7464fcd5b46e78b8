"""One batch of samples: what a loader yields and what a device transform takes.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Samples side by side.

    Attributes:
        images: uint8 (B, C, H, W).
        targets: int64 (B,) class ids.
        index: int64 (B,) sample ids within the split.
        draw: int64 (B,) which repeat of the sample this is (0 where every sample comes once).
    """

    images: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing calls
    draw: Tensor


# One decoded and transformed sample: image uint8 (C, H, W), target, index, draw.
Sample: TypeAlias = tuple[Tensor, int, int, int]


@dataclass(frozen=True)
class Failure:
    """What a worker hands back in place of a sample it cannot read: one line for the user.

    A value rather than an exception, because torch wraps a worker's exception in the worker's traceback.
    """

    line: str


def collate(samples: Sequence[Sample | Failure]) -> Batch | Failure:
    """Stacks samples into a batch; the first failure, if there is one, stands for the whole batch."""
    good = []
    for sample in samples:
        if isinstance(sample, Failure):
            return sample
        good.append(sample)
    images, targets, index, draw = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(index), torch.tensor(draw))
