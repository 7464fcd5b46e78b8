"""Photographs in a folder, read, cut, scaled and batched: vit-train beside torchvision.

    apt-get download mate-backgrounds && dpkg -x mate-backgrounds_*.deb photos
    python scripts/bench_decode.py loader photos [--rounds 5] [--batch-size 64] [--num-workers 2]
    python scripts/bench_decode.py parts photos
    python scripts/bench_decode.py quality photos

Any folder with a dozen large JPEG photographs below it will do. Prints one JSON object.

loader: the photographs are brought to 500 x 375, 1024 x 768 and 4000 x 3000 pixels (JPEG quality 90, with
some grain where that enlarges them) in a temporary folder; for each size, in one process and in turn,

    peer    torchvision.datasets.ImageFolder with its own loader, v2.RandomResizedCrop(224) of scale 0.35 to
            1, v2.RandomHorizontalFlip, ToImage, ToDtype, Normalize; DataLoader with its own collate
    ours    vit_train's ImageFolder with resized_crop of that scale, then flip and normalisation of the batch

go once through the files, with the same workers (persistent, started before), batches and interpolation
(bicubic; `--interpolation bilinear` gives the peer torchvision's default and leaves ours as it is). Medians
over the rounds in images per second, and the median of the ratios of neighbouring rounds.

parts: milliseconds of processor time for each step of one image, on one thread, the least of the rounds.

quality: what the model sees of a photograph that was decoded at a reduced size, against one that was not, at
the worst size: `gap` pixels for each that the model's image has, and one more, so that no side divides. As a
yardstick, the same for a bilinear filter instead of the bicubic one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vit_train.data import ImageFolder
from vit_train.data.transforms.batch_transforms import Augment
from vit_train.data.transforms.decode import decode
from vit_train.data.transforms.sample_transforms import plain, resized_crop, shorter_side

SIZES = {(500, 375): 1024, (1024, 768): 512, (4000, 3000): 128}  # and how many files of that size
IMG_SIZE = 224
SCALE, RATIO = (0.35, 1.0), (0.75, 1.3333)
MOST_PHOTOS = 16
Pixels: TypeAlias = NDArray[np.float64]
NUM_CLASSES = 4


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def opened(photos: Sequence[Path]) -> Iterator[Image.Image]:
    for photo in photos:
        with Image.open(photo) as image:
            yield image.convert("RGB")


def brought_to(photos: Sequence[Path], size: tuple[int, int]) -> list[bytes]:
    """The photographs as JPEG files of that size; where that enlarges them, with the grain of a sensor."""
    grain = np.random.default_rng(0).normal(0, 3, (size[1], size[0], 1))
    files = []
    for image in opened(photos):
        pixels = np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
        if size > image.size:
            pixels = (pixels + grain).clip(0, 255).astype(np.uint8)
        files.append(jpeg(Image.fromarray(pixels)))
    return files


# ------------------------------------------------------------------------------------------------ loader
def write_photos(files: Sequence[bytes], root: Path, count: int) -> None:
    """`count` files in root/train/<class>/: the photographs in turn."""
    for c in range(NUM_CLASSES):
        (root / "train" / f"class_{c}").mkdir(parents=True)
    for i in range(count):
        (root / "train" / f"class_{i % NUM_CLASSES}" / f"{i:05d}.jpg").write_bytes(files[i % len(files)])


def peer(root: Path, arguments: argparse.Namespace) -> Callable[[], int]:
    """One pass over the files; returns how many images came."""
    crop = v2.RandomResizedCrop(
        IMG_SIZE,
        scale=SCALE,
        ratio=RATIO,
        interpolation=v2.InterpolationMode(arguments.interpolation),
        antialias=True,
    )
    convert = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    normalize = v2.Normalize(ImageFolder.default_mean, ImageFolder.default_std)
    loader = DataLoader(
        TorchvisionFolder(
            str(root / "train"), v2.Compose([crop, v2.RandomHorizontalFlip(), *convert, normalize])
        ),
        batch_size=arguments.batch_size,
        shuffle=True,
        num_workers=arguments.num_workers,
        persistent_workers=arguments.num_workers > 0,
        drop_last=True,
    )
    return lambda: sum(len(images) for images, _ in loader)


def ours(root: Path, arguments: argparse.Namespace) -> Callable[[], int]:
    """One pass over the files; returns how many images came."""
    data = ImageFolder(
        root=str(root),
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        img_size=IMG_SIZE,
        val_fraction=0.0,
        cache="none",
        sample_transform=partial(resized_crop, scale=SCALE, ratio=RATIO),
    )
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    transform = Augment(data.mean, data.std, seed=0, num_classes=data.num_classes, hflip_prob=0.5)
    loader = data.loader("train")
    return lambda: sum(len(transform(batch, 0, 0)[0]) for batch in loader)


def images_per_second(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def bench_loader(photos: list[Path], arguments: argparse.Namespace) -> dict[str, object]:
    """Images per second of both, and their ratio, for files of each size."""
    result: dict[str, object] = {
        "batch_size": arguments.batch_size,
        "num_workers": arguments.num_workers,
        "peer_interpolation": arguments.interpolation,
    }
    for size, count in SIZES.items():
        with tempfile.TemporaryDirectory() as temporary:
            write_photos(brought_to(photos, size), Path(temporary), count)
            both = peer(Path(temporary), arguments), ours(Path(temporary), arguments)
            for work in both:
                work()  # starts the workers and fills the page cache
            rounds = [tuple(images_per_second(work) for work in both) for _ in range(arguments.rounds)]
        result[f"{size[0]} x {size[1]}"] = {
            "files": count,
            "torchvision_images_per_second": round(statistics.median(p for p, _ in rounds), 1),
            "ours_images_per_second": round(statistics.median(o for _, o in rounds), 1),
            "ours_over_torchvision": round(statistics.median(o / p for p, o in rounds), 2),
            "rounds": [[round(p, 1), round(o, 1)] for p, o in rounds],
        }
    return result


# ------------------------------------------------------------------------------------------------ parts
def milliseconds(work: Callable[[Any], object], inputs: Sequence[Any], rounds: int) -> float:
    """Processor time per input, the least of the rounds."""

    def once() -> float:
        start = time.process_time()
        for value in inputs:
            work(value)
        return (time.process_time() - start) / len(inputs)

    return round(1000 * min(once() for _ in range(rounds)), 3)


def bench_parts(photos: list[Path], arguments: argparse.Namespace) -> dict[str, object]:
    """Milliseconds per image and step, for files of each size."""
    torch.set_num_threads(1)
    result: dict[str, object] = {}
    transform = plain(IMG_SIZE, resize="crop")
    resize = v2.Resize(shorter_side(IMG_SIZE), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    crop = resized_crop(IMG_SIZE, scale=SCALE, ratio=RATIO)
    pillow_crop = v2.RandomResizedCrop(
        IMG_SIZE, scale=SCALE, ratio=RATIO, interpolation=v2.InterpolationMode.BICUBIC
    )
    floats = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)]
    )
    for size in SIZES:
        files = brought_to(photos, size)
        images = [decode(file) for file in files]
        tensors = [F.pil_to_tensor(image) for image in images]
        steps: dict[str, tuple[Callable[[Any], object], Sequence[Any]]] = {
            "decode": (decode, files),
            "decode, least_side of plain": (partial(decode, least_side=transform.least_side), files),
            "decode, least_side of resized_crop": (partial(decode, least_side=crop.least_side), files),
            "torchvision's decode_jpeg": (
                lambda file: decode_jpeg(
                    torch.frombuffer(bytearray(file), dtype=torch.uint8), mode=ImageReadMode.RGB
                ),
                files,
            ),
            "PIL image to tensor": (F.pil_to_tensor, images),
            "resize, tensor": (resize, tensors),
            "resize, Pillow": (resize, images),
            "random resized crop to a tensor, ours": (crop, images),
            "random resized crop to a PIL image, Pillow": (pillow_crop, images),
            "224 x 224 to float and normalised": (floats, [pillow_crop(image) for image in images]),
        }
        result[f"{size[0]} x {size[1]}"] = {
            name: milliseconds(work, inputs, arguments.rounds) for name, (work, inputs) in steps.items()
        }
    return result


# ------------------------------------------------------------------------------------------------ quality
def bench_quality(photos: list[Path], _: argparse.Namespace) -> dict[str, object]:
    """Differences in levels (of 255) and PSNR in dB, for each gap and reduction."""
    transform = plain(IMG_SIZE, resize="crop")

    def seen(file: bytes, least_side: int | None) -> Pixels:
        pixels: Pixels = transform(decode(file, least_side=least_side)).double().numpy()
        return pixels

    result: dict[str, object] = {}
    for gap in (1, 1.5, 2, 3):
        least_side = int(gap * shorter_side(IMG_SIZE))
        for reduction in (2, 4, 8):
            differences = {}
            for photo, image in zip(photos, opened(photos), strict=True):
                scale = reduction * least_side / min(image.size)
                if scale > 1:
                    continue  # enlarged, it would have nothing fine to lose
                # neither side divides: the reduced picture ends with a fraction of a pixel
                worst = [reduction * round(side * scale / reduction) + 1 for side in image.size]
                file = jpeg(image.resize(worst, Image.Resampling.LANCZOS))
                differences[photo.name] = np.abs(seen(file, least_side) - seen(file, None))
            if differences:
                result[f"gap {gap}, 1/{reduction}"] = compared(differences)
    tensors = {
        photo.name: F.pil_to_tensor(image) for photo, image in zip(photos, opened(photos), strict=True)
    }
    shorter = shorter_side(IMG_SIZE)
    bilinear, bicubic = (
        v2.Compose([v2.Resize(shorter, interpolation=kind, antialias=True), v2.CenterCrop(IMG_SIZE)])
        for kind in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)
    )
    result["bilinear"] = compared(
        {
            name: np.abs(bilinear(tensor).double().numpy() - bicubic(tensor).double().numpy())
            for name, tensor in tensors.items()
        }
    )
    return result


def compared(differences: dict[str, Pixels]) -> dict[str, object]:
    """Differences in levels and PSNR in dB over the photographs, which are the keys."""
    psnr = {name: 10 * math.log10(255**2 / (d**2).mean()) for name, d in differences.items()}
    least = min(psnr, key=psnr.__getitem__)
    return {
        "photographs": len(psnr),
        "mean_difference": round(statistics.mean(float(d.mean()) for d in differences.values()), 2),
        "largest_difference": int(max(d.max() for d in differences.values())),
        "psnr_median": round(statistics.median(psnr.values()), 1),
        "psnr_least": [round(psnr[least], 1), least],
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("loader", "parts", "quality"))
    parser.add_argument("photos", type=Path, help="a folder with JPEG photographs anywhere below it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    arguments = parser.parse_args()
    photos = sorted(p for p in arguments.photos.rglob("*.jpg") if p.is_file() and not p.is_symlink())
    if not photos:
        parser.error(f"{arguments.photos} holds no .jpg")
    work = {"loader": bench_loader, "parts": bench_parts, "quality": bench_quality}[arguments.what]
    print(json.dumps(work(photos[:MOST_PHOTOS], arguments), indent=1))


if __name__ == "__main__":
    main()
