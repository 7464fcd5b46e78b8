"""Prediction: what a trained model says of images that belong to no dataset.

Images are read and fed as evaluation reads and feeds them; one that cannot be read is told apart and the rest
goes on. Answers come in the order of the names, as batches finish, and nothing is kept of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from vit_train.data.batch import Failure, Sample
from vit_train.data.folder.file_names import Names
from vit_train.data.folder.image_folder import FileSource
from vit_train.data.loading.loaders import EvalBatches, SampleLoader, Samples
from vit_train.inference.download import download, is_url
from vit_train.inference.trained import Trained
from vit_train.system.precision import autocast

NOT_FINITE = "the model predicts NaN for this image; its output is not finite in this precision"


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        file: path or URL, as given.
        classes: the likeliest first: (name, probability); empty where there is an error.
        error: why there is no answer: one line that names the file; or None.
    """

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


class Pictures(FileSource):
    """Files and URLs for a model, each by its own name, without targets (they are all 0)."""

    def __init__(self, names: list[str], trained: Trained) -> None:
        nothing, least_side = np.zeros(len(names), dtype=np.int64), trained.sample_transform().least_side
        shown = trained.background, least_side, trained.value_range
        super().__init__("", Names.of(names), nothing, nothing, *shown)

    def name(self, index: int) -> str:
        return self.names[index]

    def content(self, index: int) -> str | bytes:
        return fetched(self.names[index])


def fetched(name: str) -> str | bytes:
    """What `decode` takes: a path as it is, what a URL answers.

    Raises:
        DataError: it does not.
    """
    return download(name) if is_url(name) else name


class Read(NamedTuple):
    """A batch of which some images may be missing.

    Attributes:
        pixels: uint8 (B, C, H, W) of those that could be read, in order; None where there is none.
        errors: for each image of the batch the reason why it could not be read, or None.
    """

    pixels: Tensor | None
    errors: list[str | None]


def keep_good(samples: Sequence[Sample | Failure]) -> Read:
    """Stacks the images that could be read, and keeps the reasons of the others."""
    good = [sample[0] for sample in samples if not isinstance(sample, Failure)]
    errors = [sample.line if isinstance(sample, Failure) else None for sample in samples]
    return Read(torch.stack(good) if good else None, errors)


@torch.inference_mode()
def predict(
    trained: Trained, names: list[str], *, top_k: int, batch_size: int, num_workers: int
) -> Generator[list[Prediction]]:
    """The likeliest classes of each image, a list for each batch.

    Args:
        trained: the model.
        names: paths and http or https URLs.
        top_k: classes per image; no more than there are.
        batch_size: images per forward pass.
        num_workers: processes that read images; 0 reads in this one.

    Raises:
        WorkerLostError: one of them died or hangs.
    """
    device = next(trained.model.parameters()).device
    precision, normalize = trained.precision(), trained.batch_transform().normalize
    samples = Samples(
        Pictures(names, trained),
        trained.sample_transform(),
        seed=None,
        in_channels=trained.in_channels,
        img_size=trained.img_size,
    )
    loader = SampleLoader(
        samples,
        EvalBatches(len(names), batch_size=batch_size, rank=0, world_size=1),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent=False,
        collate=keep_good,
    )
    done = 0
    try:
        for pixels, errors in cast("Iterator[Read]", iter(loader)):  # what keep_good returns
            answers: Iterator[Any] = iter(())
            if pixels is not None:
                images = normalize(pixels.to(device, non_blocking=True))
                with autocast(precision, device):
                    logits = trained.model(images)
                answers = iter(_likeliest(logits, trained.class_names, top_k))
            files = names[done : done + len(errors)]
            done += len(errors)
            yield [
                _prediction(file, next(answers)) if error is None else Prediction(file, [], error)
                for file, error in zip(files, errors, strict=True)
            ]
    finally:
        loader.close()


def _likeliest(logits: Tensor, class_names: list[str], top_k: int) -> list[list[tuple[str, float]]]:
    """For each row of logits (B, K) the `top_k` likeliest classes with their probabilities."""
    top = logits.float().softmax(1).topk(min(top_k, len(class_names)), dim=1)
    return [
        [(class_names[i], p) for i, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _prediction(file: str, classes: list[tuple[str, float]]) -> Prediction:
    if all(p == p for _, p in classes):
        return Prediction(file, classes)
    return Prediction(file, [], f"{file}: {NOT_FINITE}")
