"""The loss to minimise: a module that runs the model and returns (scalar loss, logits, *parts of the loss).

The loss is a plain mean over the samples of per-sample values, so the mean over micro-batches, weighted by
their size, is the mean over the batch: accumulation and device splits change nothing but rounding. That is
why the mean is not divided by the batch's sum of class weights, as torch's own mean over class ids is.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.construct import Fraction, PositiveFloat, Probability

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

    def forward(self, model: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Runs the model and averages over its heads.

        Args:
            model: images -> logits (B, K), or a pair of them from a model with two heads in training.
            images: (B, C, H, W) float.
            targets: (B,) class ids or (B, K) probabilities.

        Returns:
            The mean loss, a scalar, and the logits (B, K), averaged over heads, detached.
        """
        heads = _heads(model(images))
        losses = [self._on_labels(head, targets) for head in heads]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        return loss, _answer(heads)

    def _on_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        weight, smoothing = self.weight, self.label_smoothing
        return F.cross_entropy(logits, targets, weight, label_smoothing=smoothing, reduction="none").mean()

    def per_sample(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Unsmoothed, unweighted cross entropy (B,): the validation loss."""
        return F.cross_entropy(logits.float(), targets, reduction="none")


MIN_DEVIATION = 0.01  # of logits


class Distill(CrossEntropy):
    """Learns from the labels and from a teacher: (1 - alpha) * cross entropy + alpha * lesson.

    The cross entropy is that of `CrossEntropy`, smoothed and weighted. z are logits, T the temperature:

    soft: lesson = T^2 * KL(softmax(z_teacher / T) || softmax(z / T)), a mean over the samples (Hinton et al.
        2015, arXiv 1503.02531; T^2 keeps the size of its gradient when T changes).
    hard: lesson = cross entropy with the teacher's likeliest class (Touvron et al. 2021, arXiv 2012.12877).
    zscore: as soft, of logits that were standardised for each sample first, less their mean and over their
        deviation (Sun et al., CVPR 2024, arXiv 2403.01427): the student need not match the teacher's scale.

    A model with two heads learns the labels with the first; with one head it learns both with that one.

    Args:
        class_names, class_counts: as for `CrossEntropy`.
        teach: images (B, C, H, W), as the student sees them -> logits (B, K); see `teacher.Teacher`.
        teacher: where it comes from: a run or checkpoint, a file of weights, torchvision:NAME, timm:NAME.
        teacher_model: of a file of weights, the model: torchvision:NAME, timm:NAME or a config of ours.
        teacher_min_top1: fraction of the validation images the teacher must know.
        teacher_sha256: of the teacher; null takes the one that is there, and the run stores its own.
        kind: soft, hard or zscore.
        temperature: T; null is 2.
        alpha: share of the lesson; null is .5 for hard, else .9.
        heads: of a model with two, the teacher teaches the second (distill) or both.
        square_temperature: whether the factor T^2 stands before the divergence.
        mean_over_classes: whether the divergence is divided by K as well, which is torch's default.
        options: as for `CrossEntropy`.

    Raises:
        ValueError: kind=hard with a temperature; kind=zscore with two classes.
    """

    part_names = ("loss_labels", "loss_teacher", "agreement")

    def __init__(
        self,
        class_names: list[str],
        class_counts: list[int],
        teach: Forward,
        *,
        teacher: str | None = None,  # noqa: ARG002 - config/teacher.py reads these four
        teacher_model: str | None = None,  # noqa: ARG002
        teacher_min_top1: Probability | None = None,  # noqa: ARG002
        teacher_sha256: str | None = None,  # noqa: ARG002
        kind: Literal["soft", "hard", "zscore"] = "soft",
        temperature: PositiveFloat | None = None,
        alpha: Probability | None = None,
        heads: Literal["distill", "both"] = "distill",
        square_temperature: bool = True,
        mean_over_classes: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(class_names, class_counts, **options)
        if kind == "hard" and temperature is not None:
            raise ValueError(f"kind=hard has no temperature, got {temperature:g}; leave it out")
        if kind == "zscore" and len(class_names) < 3:
            raise ValueError("with two classes, kind=zscore keeps only their order; type objective.kind=soft")
        self.teach, self.kind, self.heads = teach, kind, heads
        self.temperature = 2.0 if temperature is None else temperature
        self.alpha = (0.5 if kind == "hard" else 0.9) if alpha is None else alpha
        self.factor = self.temperature**2 if square_temperature else 1.0
        self.mean_over_classes = mean_over_classes

    def forward(self, model: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """As `CrossEntropy.forward`, with the parts behind the logits.

        Returns:
            The loss, the logits (B, K), and detached: the loss on the labels, the lesson, and the fraction of
            the images whose likeliest class is the teacher's.
        """
        wanted = self.teach(images)
        assert isinstance(wanted, Tensor)
        heads = _heads(model(images))
        labels = self._on_labels(heads[0], targets)
        taught = heads if self.heads == "both" else heads[-1:]
        lesson = torch.stack([self._lesson(head, wanted) for head in taught]).mean()
        answer = _answer(heads)
        agreement = (answer.argmax(1) == wanted.argmax(1)).float().mean()
        loss = (1 - self.alpha) * labels + self.alpha * lesson
        return loss, answer, labels.detach(), lesson.detach(), agreement

    def extra_repr(self) -> str:
        """Kind, T and alpha, as they apply."""
        T = "" if self.kind == "hard" else f", T {self.temperature:g}"
        return f"{self.kind}{T}, alpha {self.alpha:g}"

    def _lesson(self, logits: Tensor, wanted: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(logits, wanted.argmax(1))
        if self.kind == "zscore":
            logits, wanted = _standardised(logits), _standardised(wanted)
        ours, theirs = ((z / self.temperature).log_softmax(1) for z in (logits, wanted))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.factor * divergence / (logits.shape[1] if self.mean_over_classes else 1)


def _heads(outputs: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    """The logits of each head, in float32 at least."""
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    return [head if head.dtype == torch.float64 else head.float() for head in heads]


def _answer(heads: list[Tensor]) -> Tensor:
    return heads[0].detach() if len(heads) == 1 else torch.stack([head.detach() for head in heads]).mean(0)


def _standardised(logits: Tensor) -> Tensor:
    """Logits (B, K) less their mean and over their deviation (torch's `std`), for each sample.

    The paper's code adds 1e-7 to the deviation: logits that are still equal, as those of a new head on
    pretrained features, would get gradients of millions.
    """
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(MIN_DEVIATION)


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
