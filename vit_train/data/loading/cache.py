"""Decoded images held in memory or on the device: only the first pass over a dataset reads files.

A cache moves storage, never pixels: what it holds precedes all randomness, so a batch is the same with every
kind of cache and with none. Two kinds, by what follows:

    finished images   nothing random happens to single images on the CPU: uint8 (n, C, S, S), from which a
                      batch is one gather, on whatever device they are
    decoded files     `augment.sample` does something random to each: the whole picture, in memory, which
                      the workers transform as they would after decoding it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from vit_train.data.batch import Batch, Failure, Sample
from vit_train.data.contract import Loader, Readable
from vit_train.data.loading.loaders import Batches, EvalBatches, SampleLoader, Samples
from vit_train.data.transforms.decode import EXTENT
from vit_train.errors import DataError
from vit_train.system.memory import available_memory

Cache: TypeAlias = Literal["auto", "none", "ram", "device"]

# Images on their way from a worker at a time. They go through /dev/shm, of which a container may have 64 MiB,
# and each worker has two batches there.
_FILL_BATCH = 64
_FILL_BYTES = 32 * 2**20
_SHARE = 0.25  # of the memory that is free: the model, its gradients and other programs want some


class CachedLoader(Loader):
    """Batches of finished images: each one gather.

    Args:
        pixels: uint8 (n, C, S, S).
        targets: (n,) class ids.
        batches: which samples make up each batch.
        pin_memory: whether batches come in page-locked memory.
    """

    def __init__(
        self, pixels: Tensor, targets: NDArray[np.int64], batches: Batches, *, pin_memory: bool
    ) -> None:
        self.should_stop = lambda: False  # it never waits
        self._pixels, self._batches, self._pin_memory = pixels, batches, pin_memory
        self._targets = torch.from_numpy(targets).to(pixels.device)

    def __len__(self) -> int:
        return len(self._batches)

    def set_position(self, epoch: int, step: int) -> None:
        self._batches.set_position(epoch, step)

    def __iter__(self) -> Iterator[Batch]:
        device = self._pixels.device
        for order in self._batches.share():
            # from page-locked memory the copy waits for nothing
            index, draw = (self._ready(ids).to(device, non_blocking=True) for ids in order)
            images, targets = self._pixels.index_select(0, index), self._targets.index_select(0, index)
            yield Batch(*map(self._ready, (images, targets, index, draw)))

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin_memory and tensor.device.type == "cpu" else tensor

    def read_by(self, error: BaseException) -> str:  # noqa: ARG002
        return ""

    def close(self) -> None:
        pass


class DecodedSource:
    """The files of another source, decoded: uint8 (C, H, W) of any size; and the extent, see `decode`."""

    def __init__(self, source: Readable, images: Sequence[tuple[Tensor, Any]]) -> None:
        self.source, self.images = source, images

    @property
    def targets(self) -> NDArray[np.int64]:
        return self.source.targets

    def read(self, index: int) -> Image.Image:
        pixels, extent = self.images[index]
        image: Image.Image = to_pil_image(pixels)
        image.info = {EXTENT: extent}
        return image

    def name(self, index: int) -> str:
        return self.source.name(index)


@dataclass
class Filling:
    """How a cache is filled.

    Args:
        num_workers: processes that read; 0 reads in this one.
        worker_timeout_seconds: see `SampleLoader`.
        should_stop: asked after each batch.
        bad: a line about each image that could not be read.
    """

    num_workers: int
    worker_timeout_seconds: float
    should_stop: Callable[[], bool]
    bad: list[str] = field(default_factory=list)

    def finished(self, samples: Samples, device: torch.device, *, split: str) -> Tensor | None:
        """Every sample as its transform, which is not random, leaves it; the split is for the progress bar.

        Returns:
            uint8 (n, C, S, S), or None where it was stopped. Of what could not be read there are no pixels.

        Raises:
            WorkerLostError: a worker process died.
        """
        pixels = torch.empty(len(samples), *samples.shape, dtype=torch.uint8, device=device)
        for good in self._read(samples, split, math.prod(samples.shape)):
            images, _, index, _ = zip(*good)
            pixels[torch.tensor(index, device=device)] = torch.stack(images).to(device)
        return None if self.should_stop() else pixels

    def decoded(self, samples: Untransformed, *, split: str, bytes_each: int) -> DecodedSource | None:
        """Every file of a split, of about so many bytes once it is decoded; otherwise as `finished`."""
        images: list[tuple[Tensor, Any]] = []
        for good in self._read(samples, split, bytes_each):
            # out of the workers' shared memory
            images.extend((pixels.clone(), extent) for pixels, extent, _, _ in good)
        return None if self.should_stop() else DecodedSource(samples.source, images)

    def _read(self, samples: Samples, split: str, bytes_each: int) -> Iterator[list[Sample]]:
        """Its samples, a batch at a time and as long as all could be read; ends early where it is stopped."""
        fitting = _FILL_BYTES // (2 * max(self.num_workers, 1) * max(bytes_each, 1))
        loader = SampleLoader(
            samples,
            EvalBatches(len(samples), batch_size=max(1, min(_FILL_BATCH, fitting)), rank=0, world_size=1),
            num_workers=self.num_workers,
            pin_memory=False,
            persistent=False,
            collate=list,
            worker_timeout_seconds=self.worker_timeout_seconds,
        )
        loader.should_stop = self.should_stop
        with tqdm(
            total=len(samples), desc=f"decoding {split}", unit="image", leave=False, delay=1, disable=None
        ) as bar:
            for read in cast("Iterator[list[Sample | Failure]]", iter(loader)):
                good = [sample for sample in read if not isinstance(sample, Failure)]
                self.bad.extend(sample.line for sample in read if isinstance(sample, Failure))
                if good and not self.bad:
                    yield good
                bar.update(len(read))
                if self.should_stop():  # which also ends a loader that waits
                    return


class Untransformed(Samples):
    """As they are in their files, in the mode training converts them to, of any size; extents for targets."""

    def _sample(self, epoch: int, index: int, draw: int) -> Sample:  # noqa: ARG002
        image = self.picture(index)
        extent: Any = image.info.get(EXTENT, image.size)
        return pil_to_tensor(image), extent, index, draw


def choose_place(
    wanted: Cache, size: int, device: torch.device, *, finished: bool
) -> tuple[Literal["none", "ram", "device"], str]:
    """Where `size` bytes of decoded images will be, and what to tell the user.

    As it was typed, or where they fit into a quarter of what is free. Only finished images (see above) can be
    on the device, where batches will go.

    Raises:
        DataError: they do not fit where it was asked for.
    """
    needed = f"{size / 2**20:,.1f} MiB of decoded images"
    places: list[tuple[Literal["ram", "device"], torch.device]] = [("ram", torch.device("cpu"))]
    if device.type != "cpu" and finished:
        places.insert(0, ("device", device))
    for place, memory in places:
        free = available_memory(memory)
        if wanted == place and size > free:
            raise DataError(
                f"data.cache={place}: {needed} do not fit into the {free / 2**20:,.0f} MiB that are free "
                "there; type data.cache=auto"
            )
        if wanted == place or (wanted == "auto" and size <= free * _SHARE):
            return place, f"data.cache={place}: {needed}"
    if wanted == "device":  # there is none but the CPU
        return "ram", f"data.cache=ram, because the device is the CPU: {needed}"
    return "none", (
        f"data.cache=none: {needed} take more than {_SHARE:.0%} of the free memory "
        "(type data.cache=ram to cache them anyway)"
    )
