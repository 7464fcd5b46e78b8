"""What is minimised: a module that runs the model and returns (scalar loss, logits).

The loss is a plain mean over the samples of per-sample values, so the mean over micro-batches, weighted by
their size, is the mean over the batch: accumulation and device splits change nothing but rounding. That is
why the mean is not divided by the batch's sum of class weights, as torch's own mean over class ids is.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.construct import Fraction, PositiveFloat

Forward = Callable[[Tensor], "Tensor | tuple[Tensor, Tensor]"]


class CrossEntropy(nn.Module):
    """Softmax cross entropy with label smoothing and class weights.

    The loss of a sample is the sum over the classes of weight * target * -log p: a class id is a target of 1,
    a mixture has several classes, and label smoothing (Szegedy et al. 2016, arXiv 1512.00567, equation 7)
    comes before the weights.

    Args:
        class_names: K names, the model's own order.
        class_counts: training images per class.
        label_smoothing: share of the target spread evenly over all classes.
        class_weights: null; "auto" (n / (K * count), so the mean weight over the training set is 1); or a
            weight by class name, 1 for those not named.

    Raises:
        ValueError: a weight names a class the data does not have, or auto meets a class without images.
    """

    weight: Tensor | None

    def __init__(
        self,
        class_names: list[str],
        class_counts: list[int],
        *,
        label_smoothing: Fraction = 0.0,
        class_weights: Literal["auto"] | dict[str | int, PositiveFloat] | None = None,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        weights = _class_weights(class_names, class_counts, class_weights)
        self.register_buffer("weight", None if weights is None else torch.tensor(weights), persistent=False)

    def forward(self, model: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the model and averages over its heads.

        Args:
            model: images -> logits (B, K), or a pair of them from a model with two heads in training.
            images: (B, C, H, W) float.
            targets: (B,) class ids or (B, K) probabilities.

        Returns:
            The mean loss, a scalar, and the logits (B, K), averaged over heads, detached.
        """
        outputs = model(images)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [self._training_losses(head.float(), targets).mean() for head in heads]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        logits = heads[0].detach() if len(heads) == 1 else torch.stack([h.detach() for h in heads]).mean(0)
        return loss, logits.float()

    def _training_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        weight, smoothing = self.weight, self.label_smoothing
        return F.cross_entropy(logits, targets, weight, label_smoothing=smoothing, reduction="none")

    def per_sample(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Unsmoothed, unweighted cross entropy (B,): the validation loss."""
        return F.cross_entropy(logits.float(), targets, reduction="none")


def _class_weights(
    names: list[str], counts: list[int], weights: Literal["auto"] | dict[str | int, float] | None
) -> list[float] | None:
    if weights is None:
        return None
    if weights == "auto":
        empty = [name for name, count in zip(names, counts) if count == 0]
        if empty:
            raise ValueError(f"class_weights=auto needs training images of every class; none of {empty[0]!r}")
        return [sum(counts) / (len(counts) * count) for count in counts]
    # YAML reads a class named 3 as a number
    weights = {normalize("NFC", str(name)): weight for name, weight in weights.items()}
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise ValueError(
            f"class_weights names {unknown[0]!r}, which is not a class; classes: {', '.join(names)}; "
            "names that cannot be typed go into a file, one `name: weight` a line: "
            "objective.class_weights=FILE.yaml"
        )
    return [float(weights.get(name, 1.0)) for name in names]
