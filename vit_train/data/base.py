"""The contract of a data module, and what all of ours share: splits, limit, loaders, fingerprint.

A dataset of your own is a subclass of `ImageData` with a `load` method, named in `data._target_`.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vit_train.data.batch import Batch, Failure, collate
from vit_train.data.loaders import EvalBatches, Loader, Samples, Source, TrainSteps, worker_lost
from vit_train.data.sample_transforms import SampleTransform, plain
from vit_train.data.splits import hold_out, keep
from vit_train.errors import DataError, WorkerLostError

Split: TypeAlias = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class DataModule(Protocol):
    """What the trainer and the commands know about data. The attributes hold from `setup` on.

    Attributes:
        num_classes, class_names: the classes, in the order of their ids.
        class_counts: training images of each class.
        img_size, in_channels: shape of the images.
        mean, std: normalisation per channel, on the 0 to 1 scale.
        sizes: images per split, 0 where a split is absent.
        notes: things to tell the user.
    """

    num_classes: int
    class_names: list[str]
    class_counts: list[int]
    img_size: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: dict[str, int]
    notes: list[str]

    def setup(self, *, device: torch.device, rank: int, world_size: int) -> None:
        """Finds the data (lists a folder, loads arrays, may download)."""
        ...

    def loader(self, split: Split) -> Loader:
        """The loader of one split, the same one at every call."""
        ...

    def eval_loader(self, split: Split) -> Loader:
        """Every image of a split once and in order, as evaluation sees them: also of train."""
        ...

    def examples(self, split: Split, count: int) -> Batch:
        """Up to `count` samples spread evenly over a split, as evaluation sees them."""
        ...

    def source(self, split: Split, index: int) -> str:
        """File path or name of a sample, for messages."""
        ...

    def fingerprint(self) -> str:
        """Hash of classes, splits and samples: equal for equal data."""
        ...

    def worker_lost(self, error: BaseException) -> WorkerLostError | None:
        """The one line for an exception that means a worker process died, None for any other."""
        ...

    def close(self) -> None:
        """Ends worker processes."""
        ...


@dataclass
class ArraySource:
    """Images held in memory.

    Args:
        images: uint8 (n, H, W) or (n, H, W, 3); a tensor, because torch shares it with spawned workers.
        targets: (n,) class ids.
        label: the dataset and its file, for messages.
        ids: (n,) position of each image in that file.
    """

    images: Tensor
    targets: NDArray[np.int64]
    label: str
    ids: NDArray[np.int64]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index].numpy())

    def name(self, index: int) -> str:
        return f"{self.label} image {self.ids[index]}"

    def select(self, indices: NDArray[np.int64]) -> ArraySource:
        images = self.images[torch.from_numpy(indices)]
        return ArraySource(images, self.targets[indices], self.label, self.ids[indices])

    def update(self, digest: hashlib._Hash) -> None:
        digest.update(self.targets.tobytes())
        digest.update(self.images.numpy().tobytes())


@dataclass
class Found:
    """What `ImageData.load` found.

    Args:
        name: the dataset, for messages.
        class_names: in the order of the ids.
        sources: train, and those of val and test that exist; train may be missing where only evaluation
            follows (`ImageData.setup`).
        img_size: side of the images in pixels: exact for arrays, a proposal for files.
    """

    name: str
    class_names: list[str]
    sources: dict[Split, Source]
    img_size: int


class ImageData(abc.ABC):
    """Everything a data module does once its images are found.

    Validation images come from a split of that name, else `val_fraction` of train is held out. Then `limit`
    cuts train, and `class_counts` counts what is left.

    Args:
        batch_size: images per optimizer step over all processes; evaluation uses the same.
        num_workers: worker processes per loader; None takes the CPU cores, at most the class's `max_workers`.
        worker_timeout_seconds: a run ends when its workers bring no batch for this long.
        img_size: side in pixels; None takes what the data has.
        in_channels: 1 (grey) or 3 (RGB); images are converted.
        val_fraction: share of train held out, stratified, the same images for every seed; 0 holds out none.
        limit: training images to keep, stratified; None keeps all.
        seed: decides order and augmentation.
        mean, std: normalisation per channel on the 0 to 1 scale; None takes the dataset's constants.
        num_classes: how many classes are expected; None takes what is there.
        sample_transform: augmentation; called with the image size it returns PIL image -> PIL image or uint8
            tensor. None trains on the images as evaluation sees them.

    Raises:
        ValueError: a value out of range, or a mean or std that does not fit the channels.
    """

    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]
    default_num_classes: ClassVar[int | None] = None  # where they are known before the images are
    max_workers: ClassVar[int] = 8

    num_classes: int
    img_size: int
    class_names: list[str]
    class_counts: list[int]

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int | None,
        worker_timeout_seconds: float = 600.0,
        img_size: int | None,
        in_channels: Literal[1, 3],
        val_fraction: float,
        limit: int | None,
        seed: int,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        num_classes: int | None,
        sample_transform: Callable[..., Any] | None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("img_size", img_size, 1),
            ("limit", limit, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
        self.batch_size = batch_size
        self.num_workers = min(num_cores(), self.max_workers) if num_workers is None else num_workers
        self.worker_timeout_seconds = worker_timeout_seconds
        self.in_channels: int = in_channels
        self.val_fraction = val_fraction
        self.limit = limit
        self.seed = seed
        self.mean = _per_channel("mean", mean, self.default_mean, in_channels)
        self.std = _per_channel("std", std, self.default_std, in_channels)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        self.sample_transform = sample_transform
        self._wanted_img_size = img_size
        self._wanted_num_classes = num_classes
        self.sizes: dict[str, int] = {}
        self.notes: list[str] = []
        self.sources: dict[Split, Source] = {}
        self.holds_out = False  # whether val is a part of train that was held out
        self._loaders: dict[str, Loader] = {}
        self._training = True

    @abc.abstractmethod
    def load(self) -> Found:
        """Finds the images; may append to `self.notes`.

        Raises:
            DataError: they are missing or not as expected.
        """

    def plain_transform(self, found: Found) -> SampleTransform | None:
        """What evaluation does to an image: nothing at its own size, else a resize."""
        return None if self.img_size == found.img_size else plain(self.img_size, resize="squash")

    def setup(self, *, device: torch.device, rank: int, world_size: int, training: bool = True) -> None:
        """Finds the data and splits it; see `DataModule`.

        Args:
            device: where batches will go.
            rank, world_size: which share of how many.
            training: False where only evaluation follows: a folder may then do without training images.

        Raises:
            ValueError: `world_size` does not divide `batch_size`.
            DataError: the data is missing, unreadable or does not fit what was asked for.
        """
        if self.batch_size % world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is not divisible by the {world_size} processes: "
                f"type data.batch_size={-(-self.batch_size // world_size) * world_size}"
            )
        self.close()
        self.notes, self._training = [], training
        found = self.load()
        self.class_names = found.class_names
        self.num_classes = len(found.class_names)
        if self._wanted_num_classes not in (None, self.num_classes):
            raise DataError(
                f"data.num_classes={self._wanted_num_classes}, but {found.name} has {self.num_classes}: "
                "type that or leave it null"
            )
        self.img_size = found.img_size if self._wanted_img_size is None else self._wanted_img_size
        self.sources = self._split(found.sources)
        self.sizes = {**dict.fromkeys(SPLITS, 0), **{k: len(v.targets) for k, v in self.sources.items()}}
        self.class_counts = self._count("train").tolist() if "train" in self.sources else []
        if training:
            self._add_notes()
        self._plain = self.plain_transform(found)
        self._pin_memory = device.type == "cuda"
        self._rank, self._world_size = rank, world_size

    def loader(self, split: Split) -> Loader:
        """The loader of one split; see `DataModule`.

        Raises:
            DataError: the data has no such split.
        """
        if split not in self.sources:
            raise DataError(f"this dataset has no {split} split: use one of {', '.join(self.sources)}")
        if split not in self._loaders:
            self._loaders[split] = self._make_loader(split)
        return self._loaders[split]

    def eval_loader(self, split: Split) -> Loader:
        """Every image of a split once and in order, without augmentation; see `DataModule`.

        Raises:
            DataError: the data has no such split.
        """
        if split != "train" or split not in self.sources:
            return self.loader(split)
        if "train, evaluated" not in self._loaders:
            self._loaders["train, evaluated"] = self._make_loader(split, augmented=False)
        return self._loaders["train, evaluated"]

    def examples(self, split: Split, count: int) -> Batch:
        """Up to `count` samples spread evenly over a split, as evaluation sees them.

        Raises:
            DataError: a sample cannot be read; the line names it.
        """
        size = self.sizes[split]
        count = min(count, size)
        return self.pick(split, [i * size // count for i in range(count)])

    def pick(self, split: Split, indices: Sequence[int]) -> Batch:
        """These samples of a split, as evaluation sees them.

        Raises:
            DataError: a sample cannot be read; the line names it.
        """
        samples = self._samples(split, augmented=False)
        batch = collate([samples[0, index, 0] for index in indices])
        if isinstance(batch, Failure):
            raise DataError(batch.line)
        return batch

    def source(self, split: Split, index: int) -> str:
        """File path or name of a sample."""
        return self.sources[split].name(index)

    def fingerprint(self) -> str:
        """SHA-256 over class names and, per split, the samples (names and file sizes, or pixels)."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for split, source in self.sources.items():
            digest.update(f"\0{split}\0".encode())
            source.update(digest)
        return digest.hexdigest()

    def worker_lost(self, error: BaseException) -> WorkerLostError | None:
        """See `DataModule`: names the file the worker was reading, where that is known."""
        reading = [loader.read_by(error) for loader in self._loaders.values()]
        return worker_lost(error, next(filter(None, reading), ""))

    def close(self) -> None:
        """Ends the worker processes of all loaders."""
        for loader in self._loaders.values():
            loader.close()
        self._loaders = {}

    def _split(self, sources: dict[Split, Source]) -> dict[Split, Source]:
        """Holds out validation images where there is no split of that name, then applies the limit."""
        if "train" not in sources:
            return sources
        train, val = sources["train"], sources.get("val")
        self.holds_out = val is None
        if val is None:
            stays, held = hold_out(train.targets, self.val_fraction)
            if len(held):
                train, val = train.select(stays), train.select(held)
        if self.limit is not None and self.limit < self.num_classes:
            raise DataError(
                f"data.limit={self.limit} cannot hold one image of each of {self.num_classes} classes: "
                f"type data.limit={self.num_classes} or more"
            )
        if self.limit is not None and self.limit < len(train.targets):
            train = train.select(keep(train.targets, self.limit))
        chosen: dict[Split, Source | None] = {"train": train, "val": val, "test": sources.get("test")}
        return {split: source for split, source in chosen.items() if source is not None}

    def _count(self, split: Split) -> NDArray[np.int64]:
        return np.bincount(self.sources[split].targets, minlength=self.num_classes)

    def _add_notes(self) -> None:
        num_train = self.sizes["train"]
        if self.limit is not None and self.limit > num_train:
            self.notes.append(f"data.limit={self.limit} keeps all training images: there are {num_train}")
        if num_train < self.batch_size:
            self.notes.append(
                f"{num_train} training images do not fill data.batch_size={self.batch_size}: "
                "an epoch is one step with all of them"
            )
        if "val" not in self.sources:
            self.notes.append("no validation split: nothing is measured while training")
        else:
            unseen = [name for name, n in zip(self.class_names, self._count("val")) if n == 0]
            if unseen:
                shown = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
                self.notes.append(f"no validation image of {shown}: validation says nothing about it")
        if "test" not in self.sources:
            self.notes.append("no test split: there is no test figure at the end")

    def _make_loader(self, split: Split, *, augmented: bool = True) -> Loader:
        train = split == "train" and augmented
        size, share = self.sizes[split], self.batch_size // self._world_size
        rank, world_size = self._rank, self._world_size
        samples = self._samples(split, augmented=train)
        batches: TrainSteps | EvalBatches
        if train:
            batches = TrainSteps(
                size, batch_size=self.batch_size, seed=self.seed, rank=rank, world_size=world_size
            )
        else:
            batches = EvalBatches(size, batch_size=share, rank=rank, world_size=world_size)
        return Loader(
            samples,
            batches,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
            persistent=split != "test",  # test runs once: no idle workers afterwards
            worker_timeout_seconds=self.worker_timeout_seconds,
        )

    def _samples(self, split: Split, *, augmented: bool) -> Samples:
        transform, seed = self._plain, None
        if augmented and self.sample_transform is not None:
            transform, seed = self.sample_transform(self.img_size), self.seed
        return Samples(
            self.sources[split], transform, seed=seed, in_channels=self.in_channels, img_size=self.img_size
        )


def num_cores() -> int:
    """CPU cores this process may use, which in a container or a job are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _per_channel(
    name: str, given: tuple[float, ...] | None, default: tuple[float, ...], in_channels: int
) -> tuple[float, ...]:
    """One value per channel; a dataset's constants are averaged for grey images, repeated for RGB."""
    if given is not None:
        if len(given) != in_channels:
            raise ValueError(f"{name} needs one value per channel: in_channels is {in_channels}, got {given}")
        return given
    if len(default) == in_channels:
        return default
    return (sum(default) / len(default),) * in_channels
