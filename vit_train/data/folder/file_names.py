"""A million file names without a million objects.

A Python list of names costs every forked worker its own copy, because reading a name counts its references,
which writes to its page; and every spawned worker a pickle of it. Three tensors are neither written to by
reading nor copied: forked workers see the pages of the main process, spawned ones map shared memory.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 65_536  # names at a time while iterating


@dataclass(frozen=True)
class Names:
    """File names in a fixed order. They need not be text: see `os.fsencode`.

    Args:
        buffer: (bytes,) uint8, all names one after another.
        offsets: (m + 1,) int64, where in it each begins, and the end of the last.
        rows: (n,) int64, which of the m names these are.
    """

    buffer: Tensor
    offsets: Tensor
    rows: Tensor

    @staticmethod
    def of(names: Iterable[str]) -> Names:
        """These names; keeps none of the strings."""
        encoded, ends = bytearray(), array("q", [0])
        for name in names:
            encoded += os.fsencode(name)
            ends.append(len(encoded))
        buffer = torch.from_numpy(np.frombuffer(encoded, dtype=np.uint8))
        return Names(buffer, torch.from_numpy(np.asarray(ends, dtype=np.int64)), torch.arange(len(ends) - 1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        row = int(self.rows[index])
        start, end = self.offsets[row : row + 2].tolist()
        return os.fsdecode(self.buffer[start:end].numpy().tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded())

    def encoded(self) -> Iterator[bytes]:
        """The names in bytes, in order."""
        view = self.buffer.numpy().data
        for rows in self.rows.split(_CHUNK):
            starts, ends = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
            for start, end in zip(starts, ends, strict=True):
                yield bytes(view[start:end])

    def select(self, indices: NDArray[np.int64]) -> Names:
        """The names at `indices`, in that order; the buffer stays as it is and is shared."""
        return Names(self.buffer, self.offsets, self.rows[torch.from_numpy(indices)])
