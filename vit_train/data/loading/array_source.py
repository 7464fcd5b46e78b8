"""Images that are in memory from the start."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image


@dataclass
class ArraySource:
    """Images held in memory.

    Args:
        images: uint8 (n, C, H, W); a tensor, because torch shares it with spawned workers.
        targets: (n,) class ids.
        label: the dataset and its file, for messages.
        ids: (n,) position of each image in that file.
    """

    images: Tensor
    targets: NDArray[np.int64]
    label: str
    ids: NDArray[np.int64]

    def read(self, index: int) -> Image.Image:
        return to_pil_image(self.images[index])

    def name(self, index: int) -> str:
        return f"{self.label} image {self.ids[index]}"

    def keys(self) -> Iterator[str]:
        return map(str, self.ids.tolist())

    def select(self, indices: NDArray[np.int64]) -> ArraySource:
        images = self.images[torch.from_numpy(indices)]
        return ArraySource(images, self.targets[indices], self.label, self.ids[indices])

    def update(self, digest: hashlib._Hash) -> None:
        digest.update(self.targets.tobytes())
        digest.update(self.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
