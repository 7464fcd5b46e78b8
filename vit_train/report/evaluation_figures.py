"""What vit-eval found out: figures per class, calibration, mistakes; as tables, JSON and CSV.

The figures come from scikit-learn and the list of what was predicted. Fractions, not percent, but for tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_fscore_support

from vit_train.report.predictions import csv_text
from vit_train.text import percent, printable
from vit_train.training.evaluation import Evaluation, Predictions

NUM_BINS = 15
_NUM_MISTAKES = 25
_ALL_SHOWN, _WORST, _BEST = 30, 15, 5  # classes in the console's table


@dataclass(frozen=True)
class ClassFigures:
    """One class.

    Attributes:
        name: of the class.
        images: how many are of this class.
        precision, recall, f1: None where there is no image of the class; a class that was never predicted
            has precision 0.
        mistaken_for: the class its images are most often taken for, and how often; None where all are right.
    """

    name: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None
    mistaken_for: tuple[str, int] | None


@dataclass(frozen=True)
class Calibration:
    """Whether confidence is accuracy (C. Guo et al. 2017, On Calibration of Modern Neural Networks).

    Attributes:
        ece: expected calibration error: the mean distance between confidence and accuracy over 15 equally
            wide bins of confidence, weighted by their images.
        images: (15,) per bin.
        confidence, accuracy: (15,) means per bin; nan where a bin is empty.
    """

    ece: float
    images: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluated:
    """All figures of one evaluation.

    Attributes:
        about: what was evaluated on what: split, checkpoint, step, weights, tta, data ...; plain data.
        evaluation: the sums.
        predictions: per image.
        files: (n,) name of each image, in the same order.
        classes: K, in the order of the model.
        macro: mean precision, recall and F1 of the classes that have images.
        calibration: of the confidences.
        mistakes: positions of the 25 most confident wrong answers, the worst first.
    """

    about: dict[str, Any]
    evaluation: Evaluation
    predictions: Predictions
    files: list[str]
    classes: list[ClassFigures]
    macro: tuple[float, float, float]
    calibration: Calibration
    mistakes: list[int]

    @property
    def class_names(self) -> list[str]:
        """K names."""
        return [entry.name for entry in self.classes]


def evaluated(
    evaluation: Evaluation,
    predictions: Predictions,
    *,
    class_names: Sequence[str],
    files: list[str],
    about: dict[str, Any],
) -> Evaluated:
    """Works the figures out; see `Evaluated`."""
    wrong = np.flatnonzero(predictions.predicted != predictions.targets)
    order = np.argsort(-predictions.confidence[wrong], kind="stable")
    present = np.unique(predictions.targets)
    macro = precision_recall_fscore_support(
        predictions.targets, predictions.predicted, labels=present, average="macro", zero_division=0
    )
    return Evaluated(
        about=about,
        evaluation=evaluation,
        predictions=predictions,
        files=files,
        classes=_per_class(evaluation, predictions, class_names),
        macro=(float(macro[0]), float(macro[1]), float(macro[2])),
        calibration=calibration(predictions.confidence, predictions.predicted == predictions.targets),
        mistakes=wrong[order][:_NUM_MISTAKES].tolist(),
    )


def _per_class(
    evaluation: Evaluation, predictions: Predictions, class_names: Sequence[str]
) -> list[ClassFigures]:
    precision, recall, f1, images = precision_recall_fscore_support(
        predictions.targets,
        predictions.predicted,
        labels=np.arange(len(class_names)),
        average=None,
        zero_division=0,
    )
    mistakes = evaluation.confusion.clone()
    mistakes.fill_diagonal_(0)
    times, others = (tensor.tolist() for tensor in mistakes.max(1))
    return [
        ClassFigures(
            name=name,
            images=int(images[i]),
            precision=float(precision[i]) if images[i] else None,
            recall=float(recall[i]) if images[i] else None,
            f1=float(f1[i]) if images[i] else None,
            mistaken_for=(class_names[others[i]], times[i]) if times[i] else None,
        )
        for i, name in enumerate(class_names)
    ]


def calibration(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Calibration:
    """Bins the confidences (n,) and whether each answer was right; see `Calibration`."""
    confidence = confidence.clip(0, 1)  # rounding may bring it above
    # bins as calibration_curve has them, which leaves out the empty ones
    bins = np.searchsorted(np.linspace(0, 1, NUM_BINS + 1)[1:-1], confidence)
    images = np.bincount(bins, minlength=NUM_BINS)
    accuracies, confidences = np.full(NUM_BINS, np.nan), np.full(NUM_BINS, np.nan)
    accuracies[images > 0], confidences[images > 0] = calibration_curve(
        right, confidence, pos_label=True, n_bins=NUM_BINS, strategy="uniform"
    )
    ece = np.nansum(np.abs(accuracies - confidences) * images) / images.sum()
    return Calibration(float(ece), images, confidences, accuracies)


# ------------------------------------------------------------------------------------------------- plain data
def evaluation_json(report: Evaluated) -> dict[str, Any]:
    """report.json: null where a class has no image, top-5 says nothing or a loss is not finite."""
    evaluation, predictions, found = report.evaluation, report.predictions, report.calibration
    names = report.class_names
    return {
        **report.about,
        "images": evaluation.images,
        "loss": _finite(evaluation.loss),
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "macro": dict(zip(("precision", "recall", "f1"), report.macro)),
        "ece": found.ece,
        "images_per_second": predictions.images_per_second,
        "per_class": {
            entry.name: {
                "images": entry.images,
                "top1": entry.recall,
                "precision": entry.precision,
                "recall": entry.recall,
                "f1": entry.f1,
            }
            for entry in report.classes
        },
        "confusion": {
            "rows": "true class",
            "columns": "predicted class",
            "counts": evaluation.confusion.tolist(),
        },
        "calibration": [
            {
                "from": i / NUM_BINS,
                "to": (i + 1) / NUM_BINS,
                "images": int(found.images[i]),
                "confidence": _finite(found.confidence[i]),
                "accuracy": _finite(found.accuracy[i]),
            }
            for i in range(NUM_BINS)
        ],
        "mistakes": [
            {
                "file": report.files[i],
                "true": names[predictions.targets[i]],
                "predicted": names[predictions.predicted[i]],
                "confidence": float(predictions.confidence[i]),
            }
            for i in report.mistakes
        ],
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def confusion_csv(report: Evaluated) -> str:
    """Counts: a row for each true class, a column for each predicted one."""
    names = report.class_names
    rows = zip(names, report.evaluation.confusion.tolist())
    return csv_text([["true class", *names], *([name, *counts] for name, counts in rows)])


def predictions_csv(report: Evaluated) -> str:
    """A row for each image."""
    names, found = report.class_names, report.predictions
    columns = (x.tolist() for x in (found.targets, found.predicted, found.confidence, found.loss))
    rows = (
        [file, names[target], names[predicted], f"{confidence:.6f}", f"{loss:.6g}"]
        for file, target, predicted, confidence, loss in zip(report.files, *columns)
    )
    return csv_text([["file", "true", "predicted", "confidence", "loss"], *rows])


# ----------------------------------------------------------------------------------------------------- tables
def worst_first(report: Evaluated) -> list[ClassFigures]:
    """Classes by recall, then F1; those without images last."""
    return sorted(report.classes, key=lambda c: (c.recall is None, c.recall or 0.0, c.f1 or 0.0))


def evaluation_tables(report: Evaluated) -> list[Table]:
    """The figures of the split, then those of the classes: of more than 30 the worst 15 and the best 5."""
    about, evaluation = report.about, report.evaluation
    caption = "macro F1: mean of the classes that have images"
    overall = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    cells = {
        "split": str(about["split"]),
        "images": f"{evaluation.images:,}",
        "loss": f"{evaluation.loss:.4f}",
        "top-1 %": percent(evaluation.top1),
        "top-5 %": percent(evaluation.top5),
        "macro F1 %": percent(report.macro[2]),
        "ECE %": percent(report.calibration.ece),
        "weights": str(about["weights"]),
        "tta": about["tta"] or "-",
        "step": f"{about['step']:,}",
        "images/s": f"{report.predictions.images_per_second:,.0f}",
    }
    for heading in cells:
        overall.add_column(heading, justify="left" if heading in ("split", "weights", "tta") else "right")
    overall.add_row(*cells.values())

    classes = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for heading in ("class", "images", "top-1 %", "precision %", "F1 %", "most often taken for"):
        classes.add_column(heading, justify="left" if heading.startswith(("class", "most")) else "right")

    def add(entries: Sequence[ClassFigures]) -> None:
        for entry in entries:
            other = "" if entry.mistaken_for is None else f"{entry.mistaken_for[0]} ({entry.mistaken_for[1]})"
            figures = (percent(value) for value in (entry.recall, entry.precision, entry.f1))
            classes.add_row(printable(entry.name), f"{entry.images:,}", *figures, printable(other))

    if len(report.classes) <= _ALL_SHOWN:
        add(report.classes)
    else:
        ordered = [entry for entry in worst_first(report) if entry.images]
        add(ordered[:_WORST])
        rest = ordered[_WORST:]
        if len(rest) > _BEST:
            classes.add_row("...")
        add(rest[-_BEST:])
        without = len(report.classes) - len(ordered)
        classes.caption = f"the worst {_WORST} and the best {_BEST} of {len(report.classes)} classes" + (
            f", {without} of them without images" if without else ""
        )
    return [overall, classes]
