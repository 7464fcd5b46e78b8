"""The files of an evaluation: a directory that appears whole, and a run of its own in TensorBoard."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vit_train.errors import ConfigError
from vit_train.report.evaluation_charts import confusion_chart, reliability_chart
from vit_train.report.evaluation_figures import Evaluated, confusion_csv, evaluation_json, predictions_csv
from vit_train.report.evaluation_page import evaluation_page
from vit_train.report.overlay import png
from vit_train.report.pictures import mistake_sheet
from vit_train.system import durable

if TYPE_CHECKING:
    from torch import Tensor

FILES = (
    "report.json",
    "report.html",
    "confusion.png",
    "confusion.csv",
    "reliability.png",
    "mistakes.png",
    "predictions.csv",
)
Picture = NDArray[np.uint8]


def draw(report: Evaluated, mistakes: Tensor | None) -> dict[str, Picture]:
    """`confusion`, `reliability` and, where there are mistakes, `mistakes`.

    The images of `report.mistakes` are uint8 (B, C, H, W); None where there are none.
    """
    pictures = {
        "confusion": confusion_chart(report.evaluation.confusion.numpy(), report.class_names),
        "reliability": reliability_chart(report.calibration),
    }
    if mistakes is not None:
        found, chosen = report.predictions, report.mistakes
        pictures["mistakes"] = mistake_sheet(
            mistakes,
            found.targets[chosen].tolist(),
            found.predicted[chosen].tolist(),
            found.confidence[chosen].tolist(),
            report.class_names,
        )
    return pictures


def check_place(folder: Path) -> None:
    """That `folder` can become a report: it is not there yet, or is an earlier report.

    Raises:
        ConfigError: it cannot be made, or holds something else, which replacing it would destroy.
    """
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{folder} cannot be made in {above}: name another directory with --out")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is not a directory: name one for the report with --out")
    try:
        others = sorted({path.name for path in folder.iterdir()} - {*FILES}) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed ({error.strerror}): name another with --out") from error
    if others:
        raise ConfigError(
            f"{folder} holds {others[0]}, which is not part of a report: name a directory that does not "
            "exist yet with --out"
        )


def write_report(folder: Path, report: Evaluated, pictures: Mapping[str, Picture]) -> None:
    """Writes all files aside, then puts them in the place of `folder`; an earlier report is replaced.

    Raises:
        OSError: the operating system refused; an earlier report is as before.
        ConfigError: see `check_place`.
    """
    check_place(folder)
    images = {f"{name}.png": png(picture) for name, picture in pictures.items()}
    texts = {
        "report.json": json_text(report),
        "report.html": evaluation_page(report, images),
        "confusion.csv": confusion_csv(report),
        "predictions.csv": predictions_csv(report),
    }
    # a name in a file may hold half a surrogate pair
    files = images | {name: text.encode(errors="backslashreplace") for name, text in texts.items()}
    durable.make_directory(folder.parent)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=folder.parent))
    aside, earlier = workplace / "new", workplace / "earlier"
    try:
        aside.mkdir()
        for name, content in files.items():
            durable.write(aside / name, content)
        if folder.exists():
            folder.rename(earlier)
        aside.rename(folder)
        durable.sync_directory(folder.parent)
    except OSError:
        if earlier.is_dir() and not folder.exists():
            earlier.rename(folder)
        raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def json_text(report: Evaluated) -> str:
    """The content of report.json."""
    return json.dumps(evaluation_json(report), indent=1, ensure_ascii=False)


def log_to_tensorboard(folder: Path, report: Evaluated, pictures: Mapping[str, Picture]) -> None:
    """Scalars and pictures at the step of the checkpoint, in a directory of their own.

    TensorBoard shows it as a run beside the one that was evaluated, whose own files are not touched. What an
    earlier evaluation wrote there is replaced.

    Raises:
        OSError: the operating system refused.
    """
    from torch.utils.tensorboard import SummaryWriter

    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)
    evaluation, step = report.evaluation, report.about["step"]
    scalars = {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "loss": evaluation.loss,
        "macro_f1": report.macro[2],
        "ece": report.calibration.ece,
    }
    with SummaryWriter(str(folder)) as writer:
        for name, value in scalars.items():
            if value is not None and math.isfinite(value):
                writer.add_scalar(f"eval/{name}", value, step)
        for name, picture in pictures.items():
            writer.add_image(f"eval/{name}", picture, step, dataformats="HWC")
