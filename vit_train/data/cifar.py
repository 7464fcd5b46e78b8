"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 pixels, RGB.

Source: A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images. torchvision fetches the
files, checks their MD5 and reads them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from vit_train.construct import Positive, Side
from vit_train.data.contract import Split
from vit_train.data.image_data import Found, ImageData
from vit_train.data.loading.array_source import ArraySource
from vit_train.errors import DataError, ran_out
from vit_train.system.places import expanded


class Cifar10(ImageData):
    """CIFAR-10, downloaded into `root` when it is not there. Other arguments as for `ImageData`.

    Validation is held out of train (5,000 images by default): the test images choose nothing.
    """

    dataset_class: ClassVar[type[CIFAR10]] = CIFAR10
    name: ClassVar[str] = "cifar10"
    # Per-channel statistics of the 50,000 training images.
    default_mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    default_std: ClassVar[tuple[float, ...]] = (0.2470, 0.2435, 0.2616)
    default_num_classes: ClassVar[int | None] = 10

    def __init__(
        self, *, root: str = "data", batch_size: Positive = 128, img_size: Side | None = 32, **options: Any
    ) -> None:
        super().__init__(batch_size=batch_size, img_size=img_size, **options)
        self.root = expanded(root)

    def load(self) -> Found:
        """The arrays of train and test.

        Raises:
            DataError: the files are missing or damaged and the download fails.
        """
        sources: dict[Split, ArraySource] = {}
        class_names: list[str] = []
        for split in ("train", "test"):
            dataset = self._open(train=split == "train")
            targets = np.asarray(dataset.targets, dtype=np.int64)
            pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            sources[split] = ArraySource(pixels, targets, f"{self.name} {split}", np.arange(len(targets)))
            class_names = list(dataset.classes)
        return Found(self.name, class_names, {**sources}, img_size=sources["train"].images.shape[1])

    def _open(self, *, train: bool) -> Any:
        dataset = self.dataset_class
        folder = self.root / dataset.base_folder
        try:
            return dataset(self.root, train=train, download=True)
        except (OSError, RuntimeError) as error:  # no network, no disk; a checksum that does not match
            if ran_out(error):
                raise
            missing = f"{self.name} is not in {self.root}"
            state = f"the files in {folder} are damaged" if folder.exists() else missing
            reason = " ".join(str(error).split())
            raise DataError(
                f"{state} and the download failed ({reason}): fetch {dataset.url}, "
                f"put it at {self.root / dataset.filename}, or type data.root=/folder/that/holds/it"
            ) from error


class Cifar100(Cifar10):
    """CIFAR-100 with its 100 fine classes; otherwise as `Cifar10`."""

    dataset_class: ClassVar[type[CIFAR10]] = CIFAR100
    name: ClassVar[str] = "cifar100"
    default_mean: ClassVar[tuple[float, ...]] = (0.5071, 0.4865, 0.4409)
    default_std: ClassVar[tuple[float, ...]] = (0.2673, 0.2564, 0.2762)
    default_num_classes: ClassVar[int | None] = 100
