"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, 10 classes, part of the package.

Source: E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI. Needs no network.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch

from vit_train.construct import Side
from vit_train.data.image_data import Found, ImageData
from vit_train.data.loading.array_source import ArraySource

_NUM_TEST = 360
_MAX_VALUE = 16  # scikit-learn's pixels count ink from 0 to 16


class Digits(ImageData):
    """The demo's data. Arguments as for `ImageData`; by default no worker processes, reading costs nothing.

    Test is the same 360 images for everyone:
    `train_test_split(arange(1797), test_size=360, stratify=target, random_state=0)`.
    """

    # Mean and std of all pixels / 16.
    default_mean: ClassVar[tuple[float, ...]] = (0.3053,)
    default_std: ClassVar[tuple[float, ...]] = (0.3760,)
    default_num_classes: ClassVar[int | None] = 10
    max_workers: ClassVar[int] = 0

    def __init__(self, *, img_size: Side | None = 8, in_channels: Literal[1, 3] = 1, **options: Any) -> None:
        super().__init__(img_size=img_size, in_channels=in_channels, **options)

    def load(self) -> Found:
        """The embedded images as train and test."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = torch.from_numpy((digits.images * 255 / _MAX_VALUE).round().astype(np.uint8))[:, None]
        ids = np.arange(len(pixels))
        everything = ArraySource(pixels, digits.target.astype(np.int64), "digits", ids)
        train, test = train_test_split(ids, test_size=_NUM_TEST, stratify=digits.target, random_state=0)
        return Found(
            name="digits",
            class_names=[str(name) for name in digits.target_names],
            sources={"train": everything.select(np.sort(train)), "test": everything.select(np.sort(test))},
            img_size=pixels.shape[-1],
        )
