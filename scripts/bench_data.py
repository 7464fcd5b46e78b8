"""How fast batches come, beside torchvision's datasets and torch's DataLoader: the same images and workers.

    python scripts/bench_data.py [arrays] [folder] [--rounds 5] [--num-workers 2] [--batch-size 128]
                                 [--cifar FOLDER]

    arrays    50,000 images of 32 pixels as CIFAR-10's files hold them: shifted by up to 4 pixels, mirrored,
              normalised. Ours cached in memory; torchvision's CIFAR10 with v2 transforms and a DataLoader
    folder    a folder of 32-pixel JPEG files (FOLDER/train/<class>/, such as CIFAR-10 as JPEG; without
              --cifar 10,000 smooth random ones), augmented alike; ours from the second epoch on

Both yield float batches ready for the model. Rounds alternate; prints images per second of every round,
medians, and the median of the ratios of neighbouring rounds, as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.transforms import v2

from vit_train.data import Cifar10, ImageFolder
from vit_train.data.transforms.batch_transforms import Augment

MEAN, STD = Cifar10.default_mean, Cifar10.default_std
_PART = 10_000  # images in each of CIFAR-10's files
_SECONDS = 3  # the least that a round takes


def write_cifar(root: Path) -> type[CIFAR10]:
    """Random pixels in the format of CIFAR-10, and torchvision's class that accepts them."""
    generator = np.random.default_rng(0)
    sums: dict[str, str] = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        content: dict[str, Any] = {
            "data": generator.integers(0, 256, (_PART, 3072), dtype=np.uint8),
            "labels": generator.integers(0, 10, _PART).tolist(),
        }
        if name == "batches.meta":
            content = {"label_names": [f"class {i}" for i in range(10)]}
        file = root / CIFAR10.base_folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5(file.read_bytes()).hexdigest()

    class RandomCifar(CIFAR10):
        train_list = [  # noqa: RUF012 - as torchvision's
            [f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)
        ]
        test_list = [["test_batch", sums["test_batch"]]]  # noqa: RUF012
        meta = {**CIFAR10.meta, "md5": sums["batches.meta"]}  # noqa: RUF012

    return RandomCifar


def write_folder(root: Path, images: int) -> None:
    """Smooth random JPEG files of 32 pixels in root/train/<class>/."""
    generator = np.random.default_rng(0)
    for c in range(10):
        folder = root / "train" / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(images // 10):
            coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
            image.save(folder / f"{i:05d}.jpg", quality=95)


def peer_transform() -> v2.Compose:
    """What `augment=light` does, as torchvision's users write it."""
    return v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def ours(data: Any) -> Callable[[int], Iterable[Any]]:
    """Epochs of a data module, augmented and normalised."""
    data.setup(device=torch.device("cpu"), rank=0, world_size=1, should_stop=lambda: False)
    augment = Augment(MEAN, STD, seed=0, num_classes=10, max_shift=0.125, hflip_prob=0.5)
    loader = data.loader("train")

    def epoch(number: int) -> Iterable[Any]:
        loader.set_position(number, 0)
        return (augment(batch, number, step) for step, batch in enumerate(loader))

    return epoch


def images_per_second(epoch: Callable[[int], Iterable[Any]], images: int) -> float:
    """Whole epochs for some seconds, after the first batch, which starts workers."""
    count = number = 0
    start = time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        for batch_images, _ in epoch(number):
            count += len(batch_images)
        number += 1
    assert count > images // 2
    return count / (time.perf_counter() - start)


def compare(
    own: Callable[[int], Iterable[Any]], peer: Callable[[int], Iterable[Any]], images: int, rounds: int
) -> dict[str, Any]:
    """Both in turn."""
    images_per_second(own, images), images_per_second(peer, images)  # files into the page cache
    measured = [(images_per_second(own, images), images_per_second(peer, images)) for _ in range(rounds)]
    return {
        "images": images,
        "ours_images_per_second": round(statistics.median(a for a, _ in measured)),
        "peer_images_per_second": round(statistics.median(b for _, b in measured)),
        "ratio": round(statistics.median(a / b for a, b in measured), 2),
        "rounds": [[round(a), round(b)] for a, b in measured],
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="arrays, folder; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--cifar", type=Path)
    arguments = parser.parse_args()
    loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}

    def peer(dataset: Any) -> Callable[[int], Iterable[Any]]:
        loader = DataLoader(dataset, shuffle=True, drop_last=True, persistent_workers=True, **loading)
        return lambda _: loader

    report: dict[str, Any] = {"threads": torch.get_num_threads(), **loading}
    with tempfile.TemporaryDirectory() as temporary:
        if "arrays" in (arguments.rows or ["arrays"]):
            files = write_cifar(Path(temporary))
            dataset = files(temporary, transform=peer_transform())
            own_class = type("RandomCifar10", (Cifar10,), {"dataset_class": files})
            own = own_class(root=temporary, val_fraction=0.0, cache="ram", **loading)
            report["arrays"] = compare(ours(own), peer(dataset), len(dataset), arguments.rounds)
        if "folder" in (arguments.rows or ["folder"]):
            root = arguments.cifar or Path(temporary) / "folder"
            if arguments.cifar is None:
                write_folder(root, 10_000)
            dataset = TorchvisionFolder(root / "train", transform=peer_transform())
            own = ImageFolder(root=str(root), img_size=32, val_fraction=0.0, cache="ram", **loading)
            report["folder"] = compare(ours(own), peer(dataset), len(dataset), arguments.rounds)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
