"""What the trainer and the commands know about data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch

from vit_train.data.batch import Batch
from vit_train.errors import WorkerLostError

if TYPE_CHECKING:
    import hashlib

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Split: TypeAlias = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Flag: TypeAlias = Callable[[], bool]


class Readable(Protocol):
    """What samples are read from. Small to pickle, or held in tensors that workers share."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """(n,) class ids."""

    def read(self, index: int) -> Image.Image:
        """The decoded image; raises DataError, naming it, where that fails."""

    def name(self, index: int) -> str:
        """Where the sample comes from, for messages."""


class Source(Readable, Protocol):
    """The samples of one split, in a fixed order."""

    def keys(self) -> Iterator[str]:
        """What each sample is called within its class: decides which ones are held out."""

    def select(self, indices: NDArray[np.int64]) -> Source:
        """The samples at `indices`, in that order."""

    def update(self, digest: hashlib._Hash) -> None:
        """Adds what identifies these samples to a fingerprint."""


class Loader(Protocol):
    """Batches of one split: what `DataModule.loader` gives.

    Attributes:
        should_stop: asked where iterating may have to wait; it then ends early.
    """

    should_stop: Callable[[], bool]

    def __len__(self) -> int:
        """Optimizer steps of a whole epoch for training, whatever the position; batches otherwise."""

    def set_position(self, epoch: int, step: int) -> None:
        """See `Batches.set_position`; training only."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches."""

    def read_by(self, error: BaseException) -> str:
        """What the worker process that `error` names was reading, or nothing."""

    def close(self) -> None:
        """Ends worker processes."""


class DataModule(Protocol):
    """What the trainer and the commands know about data. The attributes hold from `setup` on.

    Attributes:
        num_classes, class_names: the classes, in the order of their ids, composed (NFC).
        class_counts: training images of each class.
        img_size, in_channels: shape of the images.
        mean, std: normalisation per channel, on the 0 to 1 scale.
        sizes: images per split, 0 where a split is absent.
        holds_out: whether val is a part of train that was held out.
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
    holds_out: bool
    notes: list[str]

    def setup(
        self, *, device: torch.device, rank: int, world_size: int, training: bool = True, should_stop: Flag
    ) -> None:
        """Finds the data; `should_stop` ends what takes long, `training` is False for evaluation alone."""

    def loader(self, split: Split) -> Loader:
        """The loader of one split, the same one at every call; raises DataError where the data lacks it."""

    def eval_loader(self, split: Split) -> Loader:
        """Every image of a split once and in order, as evaluation sees them: also of train. As `loader`."""

    def examples(self, split: Split, count: int) -> Batch:
        """Up to `count` samples spread evenly over a split; otherwise as `pick`."""

    def pick(self, split: Split, indices: Sequence[int]) -> Batch:
        """These samples, as evaluation sees them; raises DataError, which names one that cannot be read."""

    def source(self, split: Split, index: int) -> str:
        """File path or name of a sample, for messages."""

    def fingerprint(self) -> str:
        """Hash of classes, splits and samples: equal for equal data."""

    def worker_lost(self, error: BaseException) -> WorkerLostError | None:
        """The one line for an exception that means a worker process died, None for any other."""

    def close(self) -> None:
        """Ends worker processes."""
