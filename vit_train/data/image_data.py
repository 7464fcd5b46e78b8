"""What all data modules of ours share: splits, limit, loaders, fingerprint.

A dataset of your own is a subclass of `ImageData` with a `load` method, named in `data._target_`.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar
from unicodedata import normalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_train.construct import Few, Fraction, Positive, PositiveFloat, Seconds, Seed, Share, Side, Workers
from vit_train.data.batch import Batch, Failure, collate
from vit_train.data.contract import SPLITS, DataModule, Flag, Loader, Readable, Source, Split
from vit_train.data.folder.bad_files import unreadable
from vit_train.data.loading.array_source import ArraySource
from vit_train.data.loading.cache import Cache, CachedLoader, Filling, Untransformed, choose_place
from vit_train.data.loading.epoch_order import Sampling
from vit_train.data.loading.loaders import (
    Batches,
    EvalBatches,
    SampleLoader,
    Samples,
    TrainSteps,
)
from vit_train.data.loading.splits import hold_out, keep, keep_share
from vit_train.data.loading.workers import worker_lost
from vit_train.data.transforms.sample_transforms import SampleTransform, plain
from vit_train.errors import DataError, WorkerLostError
from vit_train.text import some

S = TypeVar("S", bound=Samples)


@dataclass
class Found:
    """What `ImageData.load` found.

    Args:
        name: the dataset, for messages.
        class_names: in the order of the ids, spelled as they were found.
        sources: train, and those of val and test that exist; train may be missing where only evaluation
            follows (`ImageData.setup`).
        img_size: side of the images in pixels: exact for arrays, a proposal for files.
    """

    name: str
    class_names: list[str]
    sources: dict[Split, Source]
    img_size: int


class ImageData(DataModule, abc.ABC):
    """Everything a data module does once its images are found.

    Validation images come from a split of that name, else `val_fraction` of train is held out. Then
    `train_fraction` and `limit` cut, and `class_counts` counts what is left of train.

    Args:
        batch_size: images per optimizer step over all processes; evaluation uses the same.
        num_workers: worker processes per loader; None takes the CPU cores, at most the class's `max_workers`.
        worker_timeout_seconds: a run ends when its workers bring no batch for this long.
        img_size: side in pixels; None takes what the data has.
        in_channels: 1 (grey) or 3 (RGB); images are converted.
        val_fraction: share of train held out, stratified, the same images for every seed; 0 holds out none.
        train_fraction: share of the training images to keep, stratified: learning from less.
        limit: images of each split to keep, stratified, for a quick look; None keeps all.
        sampler: "uniform", or "balanced": every class equally often.
        repeats: how often an epoch shows an image in a row, each time augmented anew (and 1 of so many
            images); see `epoch_order`.
        cache: where decoded images are kept: "none", "ram", "device", or "auto", which takes what they fit
            into a quarter of.
        seed: decides order and augmentation.
        mean, std: normalisation per channel on the 0 to 1 scale; None takes the dataset's constants.
        num_classes: how many classes are expected; None takes what is there.
        sample_transform: augmentation; called with the image size it returns PIL image -> PIL image or uint8
            tensor. None trains on the images as evaluation sees them.

    Raises:
        ValueError: a mean or std that does not fit the channels, or a cache that cannot be.
    """

    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]
    default_num_classes: ClassVar[int | None] = None  # where they are known before the images are
    max_workers: ClassVar[int] = 8

    def __init__(
        self,
        *,
        batch_size: Positive = 64,
        num_workers: Workers | None = None,
        worker_timeout_seconds: Seconds = 600.0,
        img_size: Side | None = None,
        in_channels: Literal[1, 3] = 3,
        val_fraction: Fraction = 0.1,
        train_fraction: Share = 1.0,
        limit: Positive | None = None,
        sampler: Sampling = "uniform",
        repeats: Few = 1,
        cache: Cache = "auto",
        seed: Seed = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[PositiveFloat, ...] | None = None,
        num_classes: Positive | None = None,
        sample_transform: Callable[..., Any] | None = None,
    ) -> None:
        if cache == "device" and sample_transform is not None:
            raise ValueError(
                "cache=device holds finished images, and augment.sample makes each image anew: type "
                "data.cache=ram, or an augment without it (augment=light)"
            )
        self.batch_size = batch_size
        self.num_workers = min(num_cores(), self.max_workers) if num_workers is None else num_workers
        self.worker_timeout_seconds = worker_timeout_seconds
        self.in_channels = in_channels
        self.val_fraction = val_fraction
        self.train_fraction = train_fraction
        self.limit = limit
        self.sampler: Sampling = sampler
        self.repeats = repeats
        self.cache: Cache = cache
        self.seed = seed
        self.mean = _per_channel("mean", mean, self.default_mean, in_channels)
        self.std = _per_channel("std", std, self.default_std, in_channels)
        self.sample_transform = sample_transform
        self._wanted_img_size = img_size
        self._wanted_num_classes = num_classes
        self.sizes, self.notes = {}, []
        self.sources: dict[Split, Source] = {}
        self._listed: dict[Split, Source] = {}  # before unusable images were left out of train
        self.holds_out = False
        self._loaders: dict[tuple[Split, bool], Loader] = {}  # of a split, for training or to evaluate
        self._finished: dict[Split, Tensor] = {}
        self._decoded: Readable | None = None
        self._should_stop: Flag = lambda: False
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

    def setup(
        self,
        *,
        device: torch.device,
        rank: int,
        world_size: int,
        training: bool = True,
        should_stop: Flag = lambda: False,
    ) -> None:
        """Finds the data, splits it and fills the cache; see `DataModule`.

        Args:
            device: where batches will go.
            rank, world_size: which share of how many.
            training: False where only evaluation follows, once: a folder may then do without training images,
                and nothing is cached.
            should_stop: asked while the cache is filled; it then stays empty.

        Raises:
            ValueError: `world_size` does not divide `batch_size`.
            DataError: the data is missing, unreadable or does not fit what was asked for.
            WorkerLostError: a worker process died while the cache was filled.
        """
        if self.batch_size % world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is not divisible by the {world_size} processes: "
                f"type data.batch_size={-(-self.batch_size // world_size) * world_size}"
            )
        self.close()
        self.notes, self._training, self._should_stop = [], training, should_stop
        found = self.load()
        self._spelled = found.class_names
        self.class_names = [normalize("NFC", name) for name in found.class_names]
        self.num_classes = len(found.class_names)
        if self._wanted_num_classes not in (None, self.num_classes):
            raise DataError(
                f"data.num_classes={self._wanted_num_classes}, but {found.name} has {self.num_classes}: "
                "type that or leave it null"
            )
        self.img_size = found.img_size if self._wanted_img_size is None else self._wanted_img_size
        self._listed = self._split(found.sources)
        self.sources = self.usable(self._listed) if training else self._listed
        self.sizes = {**dict.fromkeys(SPLITS, 0), **{k: len(v.targets) for k, v in self.sources.items()}}
        self.class_counts = self._count("train").tolist() if "train" in self.sources else []
        self._rank, self._world_size = rank, world_size
        if training:
            self._add_notes()
        self._plain = self.plain_transform(found)
        self._pin_memory = device.type == "cuda"
        self._finished, self._decoded = {}, None
        if training and self.cache != "none":
            self._fill_cache(device)

    def loader(self, split: Split) -> Loader:
        return self._loader(split, train=split == "train")

    def eval_loader(self, split: Split) -> Loader:
        return self._loader(split, train=False)

    def _loader(self, split: Split, *, train: bool) -> Loader:
        if split not in self.sources:
            raise DataError(f"this dataset has no {split} split: use one of {', '.join(self.sources)}")
        if (split, train) not in self._loaders:
            self._loaders[split, train] = self._make_loader(split, train=train)
        return self._loaders[split, train]

    def examples(self, split: Split, count: int) -> Batch:
        size = self.sizes[split]
        count = min(count, size)
        return self.pick(split, [i * size // count for i in range(count)])

    def pick(self, split: Split, indices: Sequence[int]) -> Batch:
        samples = self._samples(Samples, split)
        batch = collate([samples[0, index, 0] for index in indices])
        if isinstance(batch, Failure):
            raise DataError(batch.line)
        return batch

    def source(self, split: Split, index: int) -> str:
        return self.sources[split].name(index)

    def fingerprint(self) -> str:
        """SHA-256 over class names and, per split, the samples (names and file sizes, or pixels)."""
        digest = hashlib.sha256(json.dumps(self._spelled).encode())
        for split, source in self._listed.items():
            digest.update(f"\0{split}\0".encode())
            source.update(digest)
        return digest.hexdigest()

    def worker_lost(self, error: BaseException) -> WorkerLostError | None:
        """See `DataModule`: names the file the worker was reading, where that is known."""
        reading = [loader.read_by(error) for loader in self._loaders.values()]
        return worker_lost(error, next(filter(None, reading), ""))

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
        self._loaders = {}

    def _split(self, sources: dict[Split, Source]) -> dict[Split, Source]:
        """Holds out validation images where there is no split of that name, then applies the limit."""
        if "train" not in sources:
            return sources
        train, val = sources["train"], sources.get("val")
        self.holds_out = val is None
        if val is None and self.val_fraction > 0:
            stays, held = hold_out(train.targets, train.keys(), self.val_fraction)
            if len(held):
                train, val = train.select(stays), train.select(held)
        if self.limit is not None and self.limit < self.num_classes:
            raise DataError(
                f"data.limit={self.limit} cannot hold one image of each of {self.num_classes} classes: "
                f"type data.limit={self.num_classes} or more"
            )
        if self.train_fraction < 1:
            train = train.select(keep_share(train.targets, train.keys(), self.train_fraction))
        found: dict[Split, Source | None] = {"train": train, "val": val, "test": sources.get("test")}
        return {split: self._limited(source) for split, source in found.items() if source is not None}

    def _limited(self, source: Source) -> Source:
        if self.limit is None or self.limit >= len(source.targets):
            return source
        return source.select(keep(source.targets, source.keys(), self.limit))

    def _count(self, split: Split) -> NDArray[np.int64]:
        return np.bincount(self.sources[split].targets, minlength=self.num_classes)

    def _add_notes(self) -> None:
        num_train = self.sizes["train"]
        if self.limit is not None and self.limit > num_train:
            self.notes.append(f"data.limit={self.limit} keeps all training images: there are {num_train}")
        if self.train_fraction < 1:
            self.notes.append(f"data.train_fraction={self.train_fraction:g}: {num_train:,} training images")
        every_image_once = self.sampler == "uniform" and self.repeats == 1
        if num_train < self.batch_size and every_image_once:
            self.notes.append(
                f"{num_train} training images do not fill data.batch_size={self.batch_size}: "
                "an epoch is one step with all of them"
            )
        elif every_image_once and 10 * (left_out := num_train % self.batch_size) >= num_train:
            note = f"each epoch leaves out {left_out:,} of {num_train:,} training images, "
            note += "different ones each time"
            sizes = range(self.batch_size, self.batch_size // 2, -self._world_size)
            better = min(sizes, key=lambda size: num_train % size)
            if num_train % better < left_out:
                note += f": data.batch_size={better} leaves out {num_train % better or 'none'}"
            self.notes.append(note)
        if "val" not in self.sources:
            self.notes.append("there is no validation split: the run trains without validation")
        else:
            unseen = [name for name, n in zip(self.class_names, self._count("val")) if n == 0]
            if unseen:
                self.notes.append(f"no validation image of {some(unseen)}: validation says nothing about it")
        if "test" not in self.sources:
            self.notes.append("there is no test split: the run ends without a test result")

    def usable(self, sources: dict[Split, Source]) -> dict[Split, Source]:
        """The sources less the training images that cannot be used, where that was asked for.

        After the splits are made, so that these do not depend on it.

        Raises:
            DataError: there are too many, or others.
        """
        return sources

    def unreadable_in(self, source: Source) -> list[str]:  # noqa: ARG002
        """A line about each image of a source that cannot be read."""
        return []

    def bad_images(self, lines: list[str]) -> str:
        """What to say of images that cannot be read, of which `lines` are those that were met."""
        return unreadable(lines)

    def sized(self, source: Readable, transform: SampleTransform | None) -> Readable:  # noqa: ARG002
        """The source to read from for this transform: it may read less of an image than all of it."""
        return source

    def decoded_pixels(self, source: Readable) -> int:  # noqa: ARG002
        """How many pixels a decoded image of a source has, about."""
        return self.img_size**2

    def _fill_cache(self, device: torch.device) -> None:
        """Decodes train and val, which are read again and again, if they fit; says what was decided.

        Test is read once, at the end: it is looked at, and used where it is in memory already.

        Raises:
            DataError: images cannot be read, and the message names all of them; or the cache does not fit.
        """
        finished = self.sample_transform is None
        size = sum(self._decoded_bytes(split, random=not finished) for split in ("train", "val"))
        place, note = choose_place(self.cache, size, device, finished=finished)
        if place == "none":
            self.notes.append(note)
            return
        filling = Filling(self.num_workers, self.worker_timeout_seconds, self._should_stop)
        where = device if place == "device" else torch.device("cpu")
        for split, source in self.sources.items():
            augmented = split == "train" and self.sample_transform is not None
            if type(source) is ArraySource and not augmented and self._is_finished(source):
                self._finished[split] = source.images.to(where)
            elif split == "test":  # or the run would end after all its epochs
                filling.bad.extend(self.unreadable_in(source))
            elif augmented and isinstance(source, ArraySource):
                continue
            elif augmented:
                samples = self._samples(Untransformed, split, augmented=True)
                self._decoded = filling.decoded(
                    samples,
                    split=split,
                    bytes_each=self._decoded_bytes(split, random=True) // self.sizes[split],
                )
            else:
                pixels = filling.finished(self._samples(Samples, split), where, split=split)
                if pixels is not None:
                    self._finished[split] = pixels
            if self._should_stop():
                break
        if filling.bad:
            raise DataError(self.bad_images(filling.bad))
        self.notes.append("data.cache: not filled: a signal arrived" if self._should_stop() else note)

    def _decoded_bytes(self, split: Split, *, random: bool) -> int:
        if split not in self.sources:
            return 0
        pixels, source = self.img_size**2, self.sources[split]
        if split == "train" and random and isinstance(source, ArraySource):
            return 0  # in memory already
        if split == "train" and random:
            pixels = self.decoded_pixels(self._samples(Samples, split, augmented=True).source)
        return self.sizes[split] * self.in_channels * pixels

    def _is_finished(self, source: ArraySource) -> bool:
        return self._plain is None and source.images.shape[1] == self.in_channels

    def _make_loader(self, split: Split, *, train: bool) -> Loader:
        size, share = self.sizes[split], self.batch_size // self._world_size
        rank, world_size = self._rank, self._world_size
        batches: Batches
        if train:
            batches = TrainSteps(
                self.sources[split].targets,
                batch_size=self.batch_size,
                seed=self.seed,
                rank=rank,
                world_size=world_size,
                sampler=self.sampler,
                repeats=self.repeats,
            )
        else:
            batches = EvalBatches(size, batch_size=share, rank=rank, world_size=world_size)
        if split in self._finished:
            targets = self.sources[split].targets
            return CachedLoader(self._finished[split], targets, batches, pin_memory=self._pin_memory)
        return SampleLoader(
            self._samples(Samples, split, augmented=train),
            batches,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
            persistent=split != "test",  # test runs once: no idle workers afterwards
            worker_timeout_seconds=self.worker_timeout_seconds,
            explain=lambda line: self.bad_images([line]),
        )

    def _samples(self, kind: type[S], split: Split, *, augmented: bool = False) -> S:
        source: Readable = self.sources[split]
        transform, seed = self._plain, None
        if augmented and self.sample_transform is not None:
            transform, seed = self.sample_transform(self.img_size), self.seed
            source = self._decoded or source
        return kind(
            self.sized(source, transform),
            transform,
            seed=seed,
            in_channels=self.in_channels,
            img_size=self.img_size,
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
