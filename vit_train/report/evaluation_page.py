"""report.html of vit-eval: one file with everything in it, to be opened anywhere or mailed.

No scripts and nothing from elsewhere: pictures are data URIs. Where the run and the images lie on this
machine is not said: paths start at the run directory and inside the folder of images. Names from files are
escaped for terminals first (control and direction characters), then for HTML.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vit_train.report.evaluation_figures import Evaluated, worst_first
from vit_train.system.places import expanded
from vit_train.text import percent, printable

_CONFUSIONS = 20  # most frequent ones listed
_OPEN_CLASSES, _WORST = 30, 15  # of more classes than this the worst are shown, and all folded up


def evaluation_page(report: Evaluated, pictures: Mapping[str, bytes]) -> str:
    """The page, with the PNG files `confusion.png`, `reliability.png` and perhaps `mistakes.png`."""
    here = Path(__file__)
    pages = Environment(loader=FileSystemLoader(here.parent), autoescape=True, undefined=StrictUndefined)
    pages.filters.update(shown=printable, percent=percent, number="{:,}".format)
    about, evaluation = report.about, report.evaluation
    tta = ", mean over each image and its mirror image (tta: hflip)" if about["tta"] == "hflip" else ""
    return pages.get_template(here.with_suffix(".html").name).render(
        style=here.with_suffix(".css").read_text(encoding="utf-8"),
        title=f"{about['split']} images of {_data_name(about)}",
        subtitle=f"{_checkpoint_name(about)}, step {about['step']:,}, {about['weights']} weights{tta}",
        tiles={
            "top-1": f"{percent(evaluation.top1)}%",
            **({} if evaluation.top5 is None else {"top-5": f"{percent(evaluation.top5)}%"}),
            "macro F1": f"{percent(report.macro[2])}%",
            "loss": f"{evaluation.loss:.4f}",
            "calibration error": f"{percent(report.calibration.ece)}%",
            "images": f"{evaluation.images:,}",
        },
        notes=[_without_place(note, about) for note in about["notes"]],
        classes=worst_first(report),
        open_classes=_OPEN_CLASSES,
        worst=_WORST,
        macro=report.macro,
        evaluation=evaluation,
        calibration=report.calibration,
        confusions=[*_confusions(report)],
        mistakes=[*_mistakes(report)] if "mistakes.png" in pictures else [],
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        facts=_facts(report),
    )


def _confusions(report: Evaluated) -> Iterator[tuple[str, str, int, float]]:
    """True class, what it was taken for, how often, and which share of the class that is."""
    names, counts = report.class_names, report.evaluation.confusion
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    most = wrong.flatten().topk(min(_CONFUSIONS, wrong.numel()))
    for times, cell in zip(most.values.tolist(), most.indices.tolist()):
        true, predicted = divmod(cell, len(names))
        if times:
            yield names[true], names[predicted], times, times / int(counts[true].sum())


def _mistakes(report: Evaluated) -> Iterator[tuple[str, str, str, float]]:
    """File, true class, predicted class and confidence."""
    found, names = report.predictions, report.class_names
    root = f"{expanded(report.about['data'])}/"
    for i in report.mistakes:
        file = report.files[i].removeprefix(root)
        yield file, names[found.targets[i]], names[found.predicted[i]], float(found.confidence[i])


def _facts(report: Evaluated) -> dict[str, str]:
    about = report.about
    return {
        "checkpoint": _checkpoint_name(about),
        "step": f"{about['step']:,}",
        "weights": about["weights"],
        "tta": about["tta"] or "none",
        "data": _data_name(about),
        "split": about["split"],
        "overrides": _without_place(" ".join(about["overrides"]), about) or "none",
        "data fingerprint": about["dataset_fingerprint"],
        "device": f"{about['device']}, {about['precision']}",
        "images/s": f"{report.predictions.images_per_second:,.0f}, after the first batch, reading included",
        "evaluated": about["time"],
    }


def _checkpoint_name(about: Mapping[str, Any]) -> str:
    """`run/checkpoints/step_x` of a run, `step_x` of a checkpoint that lies elsewhere."""
    *_, run, folder, step = "", "", *Path(about["checkpoint"]).absolute().parts
    return f"{run}/{folder}/{step}" if folder == "checkpoints" else step


def _data_name(about: Mapping[str, Any]) -> str:
    return Path(about["data"]).name or str(about["data"])


def _without_place(text: str, about: Mapping[str, Any]) -> str:
    return text.replace(about["data"], _data_name(about))
