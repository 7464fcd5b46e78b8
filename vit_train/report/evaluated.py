"""What vit-eval says: tables for the console, and the same figures as plain data for JSON."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vit_train.errors import printable
from vit_train.evaluation import Evaluation
from vit_train.report.summary import percent
from vit_train.trained import Trained


def evaluation_json(
    evaluation: Evaluation, trained: Trained, *, split: str, fingerprint: str
) -> dict[str, Any]:
    """The report: fractions, not percent; null where a class has no image or top-5 says nothing."""
    return {
        "split": split,
        "images": evaluation.images,
        "loss": evaluation.loss,
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "per_class": {
            name: {"images": int(total), "top1": recall}
            for name, total, recall in zip(
                trained.class_names, evaluation.confusion.sum(1).tolist(), evaluation.per_class()
            )
        },
        "confusion": {
            "rows": "true class",
            "columns": "predicted class",
            "counts": evaluation.confusion.tolist(),
        },
        "checkpoint": str(trained.path),
        "step": trained.step,
        "weights": trained.weights,
        "dataset_fingerprint": fingerprint,
    }


def evaluation_tables(evaluation: Evaluation, trained: Trained, *, split: str) -> list[Table]:
    """The figures of the split, then accuracy per class with the most frequent mistake of each."""
    overall = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("split", "images", "loss", "top-1 %", "top-5 %", "weights", "step"):
        overall.add_column(heading, justify="left" if heading in ("split", "weights") else "right")
    overall.add_row(
        split,
        f"{evaluation.images:,}",
        f"{evaluation.loss:.4f}",
        percent(evaluation.top1),
        percent(evaluation.top5),
        trained.weights,
        f"{trained.step:,}",
    )
    classes = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("class", "images", "top-1 %", "most often taken for"):
        classes.add_column(heading, justify="right" if heading in ("images", "top-1 %") else "left")
    mistakes = evaluation.confusion.clone()
    mistakes.fill_diagonal_(0)
    names = [printable(name) for name in trained.class_names]
    rows = zip(names, evaluation.confusion.sum(1).tolist(), evaluation.per_class(), mistakes)
    for name, total, recall, wrong in rows:
        times, other = wrong.max(0)
        confused = f"{names[int(other)]} ({int(times)})" if int(times) else ""
        classes.add_row(name, f"{total:,}", percent(recall), confused)
    return [overall, classes]
