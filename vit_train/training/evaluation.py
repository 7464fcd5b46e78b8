"""Evaluation: one function, used by the trainer and by vit-eval.

Everything is a sum over samples (loss, hits, a confusion matrix) and is divided once at the end, so each
sample counts once whatever the batch size and number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vit_train.data import Batch
from vit_train.system.precision import Precision, autocast
from vit_train.training.strategy import SingleDevice

TOP_K = 5


@dataclass(frozen=True)
class Evaluation:
    """Figures of one split.

    Attributes:
        loss: mean unsmoothed cross entropy.
        top1: fraction of images whose highest logit is the target.
        top5: fraction whose target is among the five highest; None with fewer than six classes, where it
            would say nothing.
        confusion: (K, K) counts, rows are targets, columns are predictions.
        images: how many images were counted.
    """

    loss: float
    top1: float
    top5: float | None
    confusion: Tensor
    images: int

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/loss`, `<prefix>/top1`, `<prefix>/macro_top1` (the mean over the classes, however many
        images each has: balanced accuracy) and, where it means something, `<prefix>/top5`; only finite ones.

        JSON has no NaN, and a schedule or a search for the best epoch can make nothing of it.
        """
        recalls = [recall for recall in self.per_class() if recall is not None]
        values = {
            "loss": self.loss,
            "top1": self.top1,
            "macro_top1": sum(recalls) / len(recalls),
            "top5": self.top5,
        }
        return {
            f"{prefix}/{name}": value
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }

    def per_class(self) -> list[float | None]:
        """Fraction of each class's images that were recognised (recall); None where there was no image."""
        totals = self.confusion.sum(1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals)]


@dataclass(frozen=True)
class Predictions:
    """What a model said of each of n images, in the order they were read.

    Attributes:
        index: (n,) int64 ids within the split.
        targets: (n,) int64, the true classes.
        predicted: (n,) int64, the classes with the highest logit.
        confidence: (n,) float64, the softmax probability of the predicted class.
        loss: (n,) float64.
        images_per_second: after the first batch (which starts workers and warms up), reading included; over
            everything where there was one batch only.
    """

    index: NDArray[np.int64]
    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    images_per_second: float


class Collector:
    """Keeps what a model says of each image while `evaluate` runs, O(images): its `collect` argument."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []
        self._since = self._after_first = time.perf_counter()

    def __call__(self, index: Tensor, targets: Tensor, logits: Tensor, losses: Tensor) -> None:
        """Keeps one batch, on its device: sample ids (B,), class ids (B,), logits (B, K), losses (B,)."""
        predicted = logits.argmax(1)  # not softmax's: rounding makes ties of what differs
        confidence = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
        self._batches.append((index, targets, predicted, confidence, losses))
        if len(self._batches) == 1:
            losses.cpu()  # waits until the device is done with it
            self._after_first = time.perf_counter()

    def finish(self) -> Predictions:
        """Everything that was kept."""
        index, targets, predicted, confidence, losses = (
            torch.cat([tensor.cpu() for tensor in tensors]).numpy() for tensors in zip(*self._batches)
        )
        done = time.perf_counter()
        first = len(self._batches[0][0])
        if len(self._batches) > 1:
            rate = (len(index) - first) / (done - self._after_first)
        else:
            rate = first / (done - self._since)
        return Predictions(
            index=index,
            targets=targets,
            predicted=predicted,
            # where an answer is not a number there is no confidence in it
            confidence=np.nan_to_num(confidence.astype(np.float64), nan=0.0),
            loss=losses.astype(np.float64),
            images_per_second=rate,
        )


class MirrorMean(nn.Module):
    """Test-time augmentation: the mean probability of an image and of its mirror image, as its logarithm.

    The softmax of the answer is that mean, so it is used like the logits of any model; at twice the cost.

    Args:
        model: images (B, C, H, W) -> logits (B, K).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> log probabilities (B, K), float32."""
        straight, mirrored = (self.model(view).float().log_softmax(1) for view in (images, images.flip(-1)))
        return torch.logaddexp(straight, mirrored) - math.log(2)


def train_means(sums: Tensor, num_classes: int, parts: Sequence[str]) -> dict[str, float]:
    """`train/loss`, `train/top1` and, where it means something, `train/top5`; then the `parts` of the loss.

    Only finite ones, of the sums of loss, top-1 hits, top-5 hits, images, and of each part.
    """
    loss, top1, top5, images, *rest = sums.tolist()
    images = images or math.nan  # of an epoch whose every step was left out
    values = {"loss": loss / images, "top1": top1 / images}
    if num_classes > TOP_K:
        values["top5"] = top5 / images
    values |= {name: part / images for name, part in zip(parts, rest)}
    return {f"train/{name}": value for name, value in values.items() if math.isfinite(value)}


def wide(device: torch.device, values: list[float]) -> Tensor:
    """Sums in float64, which JSON keeps exactly; in float32 on mps, which has no float64."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(values, device=device, dtype=dtype)


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch of top-1 and top-5 hits, as a tensor of 2 on the device.

    Args:
        logits: (B, K) float.
        targets: (B,) class ids, or (B, K) probabilities (the likeliest class counts).
    """
    if targets.ndim == 2:
        targets = targets.argmax(1)
    # Equal logits rank as argmax has them, which the confusion matrix counts: the first class first. topk
    # takes any of them, others on each device, and misses the top-1 hits of a head that starts at zero.
    wanted = logits.gather(1, targets[:, None])
    comes_first = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    above = torch.where(comes_first, ~(logits < wanted), ~(logits <= wanted))
    return torch.stack(((logits.argmax(1) == targets).sum(), (above.sum(1) < TOP_K).sum()))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    objective: Any,
    transform: Callable[[Batch, int, int], tuple[Tensor, Tensor]],
    strategy: SingleDevice,
    precision: Precision,
    num_classes: int,
    class_map: Tensor | None = None,
    collect: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Runs the model over every batch, in evaluation mode.

    Args:
        model: its mode is restored afterwards.
        batches: this rank's share of the split.
        objective: its `per_sample` is the loss.
        transform: uint8 batch -> (float images, targets).
        strategy: moves batches and sums over ranks.
        precision: of the forward pass; sums are float64 (float32 on mps, which has no float64).
        num_classes: K.
        class_map: (K',) the model's class id of each of the data's class ids, where they differ.
        collect: gets sample ids, targets, logits and losses of each batch, on the device; see `Collector`.
        should_stop: asked before each batch.

    Returns:
        The figures, or None where `should_stop` ended it early.

    Raises:
        ValueError: there was no image.
    """
    device = strategy.device
    forward = strategy.wrap(model)
    sums = wide(device, [0.0] * 4)  # loss, top-1 hits, top-5 hits, images
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if should_stop():
                return None
            images, targets = transform(strategy.to_device(batch), 0, 0)
            if class_map is not None:
                targets = class_map[targets]
            with autocast(precision, device):
                logits = forward(images)
            logits = logits.float()
            losses = objective.per_sample(logits, targets)
            sums[0] += losses.sum()
            sums[1:3] += hits(logits, targets)
            sums[3] += len(targets)
            cells = targets * num_classes + logits.argmax(1)
            confusion += torch.bincount(cells, minlength=num_classes * num_classes)
            if collect is not None:
                collect(batch.index, targets, logits, losses)
        if should_stop():  # a loader that waited for its workers may have ended early
            return None
    finally:
        model.train(was_training)
    loss, top1, top5, images_seen = strategy.sum(sums).tolist()
    if not images_seen:
        raise ValueError("there is no image to evaluate")
    return Evaluation(
        loss=loss / images_seen,
        top1=top1 / images_seen,
        top5=top5 / images_seen if num_classes > TOP_K else None,
        confusion=strategy.sum(confusion).reshape(num_classes, num_classes).cpu(),
        images=int(images_seen),
    )
