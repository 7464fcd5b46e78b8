"""report.html of vit-eval: one file with everything in it, to be opened anywhere or mailed.

No scripts and nothing from elsewhere: pictures are data URIs. Where the run and the images lie on this
machine is not said: paths start at the run directory and inside the folder of images. Names from files are
escaped for terminals first (control and direction characters), then for HTML.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vit_train.errors import printable
from vit_train.report.evaluation_figures import ClassFigures, Evaluated, worst_first
from vit_train.report.summary import percent
from vit_train.system.places import expanded

_CONFUSIONS = 20  # most frequent ones listed
_OPEN_CLASSES, _WORST = 30, 15  # of more classes than this the worst are shown, and all folded up


def evaluation_page(report: Evaluated, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        report: the figures.
        pictures: PNG files: `confusion.png`, `reliability.png` and, where there are mistakes, `mistakes.png`.
    """
    about = report.about
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    title = f"{about['split']} images of {_data_name(about)}"
    tta = ", mean over each image and its mirror image (tta: hflip)" if about["tta"] == "hflip" else ""
    subtitle = f"{_checkpoint_name(about)}, step {about['step']:,}, {about['weights']} weights{tta}"
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(subtitle)}</p>',
        _tiles(report),
        *(f'<p class="note">{_text(_without_place(note, about))}</p>' for note in about["notes"]),
        _classes(report),
        _confusion(report, pictures["confusion.png"]),
        _reliability(report, pictures["reliability.png"]),
        _mistakes(report, pictures.get("mistakes.png")),
        _facts(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _tiles(report: Evaluated) -> str:
    evaluation = report.evaluation
    tiles = {
        "top-1": f"{percent(evaluation.top1)}%",
        **({} if evaluation.top5 is None else {"top-5": f"{percent(evaluation.top5)}%"}),
        "macro F1": f"{percent(report.macro[2])}%",
        "loss": f"{evaluation.loss:.4f}",
        "calibration error": f"{percent(report.calibration.ece)}%",
        "images": f"{evaluation.images:,}",
    }
    cells = (
        f'<div class="tile"><strong>{value}</strong><span>{name}</span></div>'
        for name, value in tiles.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _classes(report: Evaluated) -> str:
    rows = []
    for entry in worst_first(report):
        other = "" if entry.mistaken_for is None else f"{entry.mistaken_for[0]} ({entry.mistaken_for[1]:,})"
        rows.append(
            f'<tr><td class="text">{_text(entry.name)}</td><td>{entry.images:,}</td>{_recall(entry)}'
            f"<td>{percent(entry.precision)}</td><td>{percent(entry.f1)}</td>"
            f'<td class="text">{_text(other)}</td></tr>'
        )
    precision, recall, f1 = map(percent, report.macro)
    rows.append(
        '<tr><th class="text">mean of the classes that have images</th>'
        f"<th>{report.evaluation.images:,}</th><th>{recall}</th><th>{precision}</th><th>{f1}</th><th></th></tr>"
    )
    headings = ("class", "images", "top-1 %", "precision %", "F1 %", "most often taken for")
    table = _table(headings, rows, text=("class", "most often taken for"))
    number = len(report.classes)
    if number > _OPEN_CLASSES:
        worst = _table(headings, rows[:_WORST], text=("class", "most often taken for"))
        table = f"{worst}<details><summary>All {number:,} classes</summary>{table}</details>"
    return (
        f'<h2>Classes, the worst first</h2>\n<p class="soft">Top-1 is the share of a class that was '
        f"recognised (recall); precision is the share of its predictions that are right.</p>\n{table}"
    )


def _recall(entry: ClassFigures) -> str:
    if entry.recall is None:
        return "<td>-</td>"
    return f'<td class="share" style="--to: {100 * entry.recall:.1f}%">{percent(entry.recall)}</td>'


def _confusion(report: Evaluated, picture: bytes) -> str:
    names, counts = report.class_names, report.evaluation.confusion
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    most = wrong.flatten().topk(min(_CONFUSIONS, wrong.numel()))
    rows = []
    for times, cell in zip(most.values.tolist(), most.indices.tolist()):
        true, predicted = divmod(cell, len(names))
        if times:
            share = percent(times / int(counts[true].sum()))
            rows.append(
                f'<tr><td class="text">{_text(names[true])}</td>'
                f'<td class="text">{_text(names[predicted])}</td>'
                f"<td>{times:,}</td><td>{share}</td></tr>"
            )
    table = ""
    if rows:
        headings = ("true class", "taken for", "images", "% of the class")
        table = (
            f"<details><summary>The {len(rows)} most frequent confusions</summary>"
            f"{_table(headings, rows, text=headings[:2])}</details>"
        )
    return f"<h2>Confusion matrix</h2>\n{_picture(picture, 'Confusion matrix')}\n{table}"


def _reliability(report: Evaluated, picture: bytes) -> str:
    return (
        "<h2>Is it right as often as it is sure?</h2>\n"
        '<p class="soft">Of the images that the model is 80% sure of, 80% should be right. '
        f"Expected calibration error over 15 bins: {percent(report.calibration.ece)}%.</p>\n"
        f"{_picture(picture, 'Reliability diagram')}"
    )


def _mistakes(report: Evaluated, picture: bytes | None) -> str:
    heading = "<h2>The most confident mistakes</h2>"
    if picture is None:
        return f"{heading}\n<p>There are none: every image was recognised.</p>"
    found, names, rows = report.predictions, report.class_names, []
    root = f"{expanded(report.about['data'])}/"
    for number, i in enumerate(report.mistakes, start=1):
        rows.append(
            f'<tr><td>{number}</td><td class="text file">{_text(report.files[i].removeprefix(root))}</td>'
            f'<td class="text">{_text(names[found.targets[i]])}</td>'
            f'<td class="text">{_text(names[found.predicted[i]])}</td>'
            f"<td>{percent(float(found.confidence[i]))}</td></tr>"
        )
    headings = ("", "file", "true class", "predicted", "confidence %")
    return (
        f'{heading}\n<p class="soft">Where the model is sure and wrong, look at the label first.</p>\n'
        f"{_picture(picture, 'The most confident mistakes')}\n"
        f"{_table(headings, rows, text=('file', 'true class', 'predicted'))}"
    )


def _facts(report: Evaluated) -> str:
    about = report.about
    facts = {
        "checkpoint": _checkpoint_name(about),
        "step": f"{about['step']:,}",
        "weights": about["weights"],
        "tta": about["tta"] or "none",
        "data": _data_name(about),
        "split": about["split"],
        "overrides": _without_place(" ".join(about["overrides"]), about) or "none",
        "data fingerprint": about["dataset_fingerprint"],
        "device": about["device"],
        "images/s": f"{report.predictions.images_per_second:,.0f}, after the first batch, reading included",
        "evaluated": about["time"],
    }
    rows = "".join(f"<tr><th>{name}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    return f'<h2>What was evaluated</h2>\n<table class="facts">{rows}</table>'


def _checkpoint_name(about: Mapping[str, Any]) -> str:
    """`run/checkpoints/step_x` of a run, `step_x` of a checkpoint that lies elsewhere."""
    *_, run, folder, step = "", "", *Path(about["checkpoint"]).absolute().parts
    return f"{run}/{folder}/{step}" if folder == "checkpoints" else step


def _data_name(about: Mapping[str, Any]) -> str:
    return Path(about["data"]).name or str(about["data"])


def _without_place(text: str, about: Mapping[str, Any]) -> str:
    return text.replace(about["data"], _data_name(about))


def _table(headings: Iterable[str], rows: Iterable[str], *, text: Iterable[str]) -> str:
    texts = set(text)
    head = "".join(f"<th{' class=text' if name in texts else ''}>{name}</th>" for name in headings)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _picture(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(value: str) -> str:
    return html.escape(printable(value))
