"""From samples to batches: which samples, in which order, read by whom.

The order is a function of (seed, epoch), a sample's augmentation of (seed, epoch, index, draw). Neither knows
how many workers there are, so workers 0..N give identical batches; and starting in the middle of an epoch is
arithmetic in the main process: no skipped image is read.
"""

from __future__ import annotations

import abc
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor

from vit_train import rng
from vit_train.data.batch import Batch, Failure, Sample, collate
from vit_train.data.contract import Loader, Readable
from vit_train.data.loading.epoch_order import Order, Sampling, epoch_order
from vit_train.data.loading.workers import (
    DIED,
    SHORT,
    START_METHOD,
    detach_worker,
    end_if_short,
    is_broken,
    named_death,
    worker_lost,
)
from vit_train.data.transforms.sample_transforms import SampleTransform
from vit_train.errors import DataError, WorkerLostError, ran_out

Key: TypeAlias = tuple[int, int, int]  # (epoch, index, draw)

_POLL_SECONDS = 1  # how soon a signal is noticed while all workers are stuck
_MAX_WORKERS = 1024


class Samples(Dataset[Sample | Failure]):
    """Reads, converts and transforms one sample at a time.

    Args:
        source: the split.
        transform: PIL image in, PIL image or uint8 tensor out; None leaves the image as it is.
        seed: the run's seed, where `transform` is random; None draws nothing.
        in_channels: 1 (grey) or 3 (RGB); images are converted.
        img_size: side in pixels that every result must have.
    """

    def __init__(
        self,
        source: Readable,
        transform: SampleTransform | None,
        *,
        seed: int | None,
        in_channels: int,
        img_size: int,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.mode = "L" if in_channels == 1 else "RGB"
        self.shape = (in_channels, img_size, img_size)
        # What each worker is reading just now, or -1: names the file where one dies or hangs
        self.reading = torch.full((_MAX_WORKERS,), -1)

    def __len__(self) -> int:
        return len(self.source.targets)

    def __getitem__(self, key: Key) -> Sample | Failure:
        index, worker = key[1], get_worker_info()
        if worker is not None:
            self.reading[worker.id] = index
        try:
            return self._sample(*key)
        except DataError as error:
            return Failure(str(error))
        except (Exception, SystemExit) as error:  # no traceback of the user's code tells which sample it was
            if ran_out(error):
                if worker is not None and isinstance(error, OSError):  # which torch would rob of its number
                    end_if_short(error)
                    raise MemoryError(str(error)) from error
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(str(error).split())
            return Failure(
                f"{self.source.name(index)} cannot be used: {type(error).__name__}: {reason} "
                f"({Path(where.filename).name}, line {where.lineno})"
            )
        finally:
            if worker is not None:
                self.reading[worker.id] = -1

    def picture(self, index: int) -> Image.Image:
        """The decoded image, in the mode of its channels."""
        image = self.source.read(index)
        return image if image.mode == self.mode else image.convert(self.mode)

    def _sample(self, epoch: int, index: int, draw: int) -> Sample:
        image = self.picture(index)
        if self.seed is not None:
            rng.seed_cpu(self.seed, "sample", epoch, index, draw)
        result = image if self.transform is None else self.transform(image)
        pixels = result if isinstance(result, Tensor) else pil_to_tensor(result)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != self.shape:
            raise ValueError(
                f"the sample transform must return uint8 of shape {self.shape}, "
                f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
            )
        return pixels, int(self.source.targets[index]), index, draw

    def being_read(self, worker: int | None = None) -> str:
        """` while reading FILES`: what one worker, or any of them, is at just now; or nothing."""
        numbers = self.reading.tolist() if worker is None else [int(self.reading[worker])]
        names = [self.source.name(index) for index in numbers if index >= 0]
        return f" while reading {', '.join(names)}" if names else ""


class Batches(Sampler[list[Key]]):
    """Which samples make up each batch of one rank.

    The DataLoader takes them as lists of keys, a cache as tensors.

    Attributes:
        epoch: in which `share` is drawn.
    """

    epoch = 0

    def set_position(self, epoch: int, step: int) -> None:  # noqa: ARG002
        """Makes the next iteration run from `step` to the end of `epoch`.

        Without a call the same epoch is iterated again, from the same step.

        Raises:
            ValueError: a negative epoch, or a step outside the epoch.
        """
        raise AssertionError("only a training loader has a position")

    @abc.abstractmethod
    def __len__(self) -> int:
        """Batches of a whole epoch."""

    @abc.abstractmethod
    def share(self) -> Iterator[Order]:
        """The samples of each batch that is to come: (b,) index and (b,) draw."""

    def __iter__(self) -> Iterator[list[Key]]:
        for index, draw in self.share():
            yield [(self.epoch, i, d) for i, d in zip(index.tolist(), draw.tolist())]


class TrainSteps(Batches):
    """One rank's share of every optimizer step of an epoch, from a position on.

    Step s is slice s of an order that (seed, epoch) decides, cut into equal parts by rank. The tail that
    does not fill a step is dropped, unless there are fewer samples than one batch: then the one step holds
    them all (but for a remainder that ranks cannot share equally).

    Args:
        targets: (n,) class ids of the split.
        batch_size: samples per optimizer step over all ranks.
        seed: the run's seed.
        rank, world_size: which share of how many.
        sampler, repeats: see `epoch_order`.

    Raises:
        DataError: fewer samples than ranks.
    """

    def __init__(
        self,
        targets: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        sampler: Sampling = "uniform",
        repeats: int = 1,
    ) -> None:
        if len(targets) < world_size:
            raise DataError(f"{len(targets)} training images cannot be shared by {world_size} processes")
        self.targets = targets
        self.batch_size = min(batch_size, len(targets))
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.sampler, self.repeats = sampler, repeats
        self.step = 0

    def __len__(self) -> int:
        return len(self.targets) // self.batch_size

    def set_position(self, epoch: int, step: int) -> None:
        if epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"epoch {epoch}, step {step} is outside an epoch of {len(self)} steps")
        self.epoch, self.step = epoch, step

    def share(self) -> Iterator[Order]:
        order = epoch_order(
            self.targets, sampler=self.sampler, repeats=self.repeats, seed=self.seed, epoch=self.epoch
        )
        share = self.batch_size // self.world_size
        for step in range(self.step, len(self)):
            start = step * self.batch_size + self.rank * share
            yield Order(*(ids[start : start + share] for ids in order))


class EvalBatches(Batches):
    """One rank's share of a split, in order, every sample once over all ranks.

    Args:
        num_samples: size of the split.
        batch_size: samples per batch of this rank; the last may be smaller.
        rank, world_size: which share of how many.
    """

    def __init__(self, num_samples: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, num_samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def share(self) -> Iterator[Order]:
        for start in range(0, len(self.indices), self.batch_size):
            part = self.indices[start : start + self.batch_size]
            index = torch.arange(part.start, part.stop, part.step)
            yield Order(index, torch.zeros_like(index))


class SampleLoader(Loader):
    """Reads and transforms samples one by one, in worker processes or in this one.

    Args:
        samples: what to read.
        batches: which samples make up each batch.
        num_workers: worker processes; 0 reads in this one.
        pin_memory: whether batches come in page-locked memory.
        persistent: whether the workers stay between iterations, until `close`.
        collate: makes a batch of what `samples` returns; a Failure it returns ends the iteration.
        worker_timeout_seconds: how long to wait for a batch before the workers count as lost.
        explain: makes the message about a sample that cannot be read out of its line.
    """

    def __init__(
        self,
        samples: Samples,
        batches: Batches,
        *,
        num_workers: int,
        pin_memory: bool,
        persistent: bool,
        collate: Callable[[Sequence[Sample | Failure]], object] = collate,
        worker_timeout_seconds: float = 600,
        explain: Callable[[str], str] = str,
    ) -> None:
        self.should_stop = lambda: False
        self._samples, self._batches = samples, batches
        self._timeout = worker_timeout_seconds
        self._persistent, self._explain = persistent, explain
        self._iterator: Any = None
        self._loader: DataLoader[Sample | Failure] = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            worker_init_fn=detach_worker,
            multiprocessing_context=START_METHOD if num_workers > 0 else None,
            persistent_workers=persistent and num_workers > 0,
            timeout=_POLL_SECONDS if num_workers > 0 else 0,
            # The DataLoader draws a seed for its workers. Nothing uses it; keep it off the global stream.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def set_position(self, epoch: int, step: int) -> None:
        self._batches.set_position(epoch, step)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches.

        Raises:
            DataError: a sample cannot be read; the line names it.
            WorkerLostError: a worker process died, or could not be started.
        """
        try:
            if self._loader.num_workers > 0:
                self._samples.reading.share_memory_()
            self._iterator = iter(self._loader)
            while (batch := self._next()) is not None:
                if isinstance(batch, Failure):
                    self.close()
                    raise DataError(self._explain(batch.line))
                yield batch
        except (RuntimeError, EOFError, OSError) as error:
            lost = self._lost(error)
            if lost is None:
                raise
            raise lost from error
        finally:
            if not self._persistent:
                self.close()

    def _lost(self, error: BaseException) -> WorkerLostError | None:
        """The line for a worker that died, and the end of the others.

        torch tells of a death from a signal handler, once, and that may be only now.
        """
        if self._loader.num_workers == 0:
            return None
        try:
            lost = worker_lost(error, self.read_by(error))
            codes = {worker.exitcode for worker in getattr(self._iterator, "_workers", [])}
            if lost is not None and (short := next(iter(codes & SHORT.keys()), None)) is not None:
                lost = worker_lost(OSError(short, ""))  # the batch it was sending broke off first
            self.close()
        except RuntimeError as death:
            if not str(death).startswith(DIED):
                raise
            return self._lost(death)
        return lost

    def _next(self) -> Batch | Failure | None:
        """The next batch; None at the end, or where the wait was given up because the run is to stop."""
        since = time.monotonic()
        while True:
            try:
                return next(self._iterator, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if self.should_stop():
                self.close(stuck=True)
                return None
            if time.monotonic() - since >= self._timeout:
                reading = self._samples.being_read()
                self.close(stuck=True)
                raise WorkerLostError(
                    f"no data worker has answered for {self._timeout:g} s{reading}",
                    advice="look at that file and its disk, or type a larger data.worker_timeout_seconds",
                )

    def read_by(self, error: BaseException) -> str:
        """What the worker that `error` names was reading; or the one whose connection broke."""
        workers = getattr(self._iterator, "_workers", [])
        named = [int(pid) for pid in re.findall(r"\d+", str(named_death(error)).partition("\n")[0])]
        if workers and is_broken(error):
            try:
                gone = wait([worker.sentinel for worker in workers], timeout=_POLL_SECONDS)
                for worker in workers:
                    if worker.sentinel in gone:
                        named.append(worker.pid)
                        worker.join(_POLL_SECONDS)
            except RuntimeError as death:  # torch's signal handler was faster
                return self.read_by(death)
        known = [i for i, worker in enumerate(workers) if worker.pid in named]
        return self._samples.being_read(known[0]) if known else ""

    def close(self, *, stuck: bool = False) -> None:
        """Ends the workers. A later iteration starts new ones.

        Those that are not `stuck` end in peace first, for which torch waits five seconds each.
        """
        # torch ends workers when their iterator is collected, which a traceback may put off.
        workers = getattr(self._iterator, "_workers", [])
        if stuck:
            for worker in workers:
                worker.terminate()
        try:
            if workers:
                self._iterator._shutdown_workers()
        except RuntimeError as error:
            if not str(error).startswith(DIED):  # one that was not needed any more
                raise
        for worker in workers:
            if worker.is_alive():  # inside a decoder that never comes back to Python
                worker.kill()
        self._iterator = self._loader._iterator = None
