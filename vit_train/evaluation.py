"""Evaluation: one function, used by the trainer and by vit-eval.

Everything is a sum over samples (loss, hits, a confusion matrix) and is divided once at the end, so each
sample counts once whatever the batch size and number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_train.data import Batch
from vit_train.precision import Precision, autocast
from vit_train.strategy import SingleDevice

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
        """`<prefix>/loss`, `<prefix>/top1` and, where it means something, `<prefix>/top5`; only finite ones.

        JSON has no NaN, and a schedule or a search for the best epoch can make nothing of it.
        """
        values = {f"{prefix}/loss": self.loss, f"{prefix}/top1": self.top1, f"{prefix}/top5": self.top5}
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def per_class(self) -> list[float | None]:
        """Fraction of each class's images that were recognised (recall); None where there was no image."""
        totals = self.confusion.sum(1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals)]


def means(prefix: str, sums: Tensor, num_classes: int) -> dict[str, float]:
    """`<prefix>/loss`, `<prefix>/top1` and, where it means something, `<prefix>/top5`; only finite ones.

    Args:
        prefix: the split.
        sums: loss, top-1 hits, top-5 hits, images.
        num_classes: K.
    """
    loss, top1, top5, images = sums.tolist()
    images = images or math.nan  # of an epoch whose every step was left out
    values = {"loss": loss / images, "top1": top1 / images}
    if num_classes > TOP_K:
        values["top5"] = top5 / images
    return {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}


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
    top = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices == targets[:, None]
    # argmax and topk may break a tie differently, and the confusion matrix counts argmax
    return torch.stack(((logits.argmax(1) == targets).sum(), top.sum()))


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
            sums[0] += objective.per_sample(logits, targets).sum()
            sums[1:3] += hits(logits, targets)
            sums[3] += len(targets)
            cells = targets * num_classes + logits.argmax(1)
            confusion += torch.bincount(cells, minlength=num_classes * num_classes)
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
