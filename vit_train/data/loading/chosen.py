"""The images of one or several splits one after another, as evaluation sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vit_train.data.batch import Batch
from vit_train.data.contract import DataModule, Split


class Chosen:
    """Every image of the splits, which are all present, once; `index` is its position among all of them."""

    def __init__(self, data: DataModule, splits: Sequence[Split]) -> None:
        self.data, self.splits = data, splits
        self._places = [(split, index) for split in splits for index in range(data.sizes[split])]

    def __len__(self) -> int:
        """Batches."""
        return sum(len(self.data.eval_loader(split)) for split in self.splits)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches; raises what a `Loader` does."""
        before = 0
        for split in self.splits:
            for batch in self.data.eval_loader(split):
                yield batch._replace(index=batch.index + before)
            before += self.data.sizes[split]

    def source(self, position: int) -> str:
        """File path or name of an image."""
        return self.data.source(*self._places[position])

    def images(self, positions: Sequence[int]) -> Tensor:
        """These images, uint8 (B, C, H, W).

        Raises:
            DataError: one cannot be read; the line names it.
        """
        places = (self._places[position] for position in positions)
        return torch.cat([self.data.pick(split, [index]).images for split, index in places])
