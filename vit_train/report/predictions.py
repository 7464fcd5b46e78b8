"""How predictions are written: a table for people, JSON Lines and CSV for programs.

Each format has a `head`, written once, and `text`, called with the predictions of one batch after another: a
million of them take no more memory than one.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO

import rich.console
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vit_train.inference.prediction import Prediction
from vit_train.text import one_line, printable

_PLAIN_WIDTH = 110  # columns where the output is not a terminal
_BAR_WIDTH = 12
_LONGEST_CLASS = 24  # columns; a longer name is cut


class JsonLines:
    """An object per image: file and predictions (a list of class and probability), or file and error.

    ASCII, so that no name can do anything to a terminal; a reader gets every name as it is.
    """

    def head(self) -> str:
        return ""

    def text(self, predictions: Sequence[Prediction]) -> str:
        return "".join(f"{json.dumps(self._object(prediction))}\n" for prediction in predictions)

    def _object(self, prediction: Prediction) -> dict[str, object]:
        if prediction.error is not None:
            return {"file": prediction.file, "error": prediction.error}
        classes = [{"class": name, "probability": round(p, 6)} for name, p in prediction.classes]
        return {"file": prediction.file, "predictions": classes}


class Csv:
    """One row per image: `file,class_1,probability_1,class_2,...,error`. Control characters are escaped.

    Args:
        num_classes: how many classes each row names.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def head(self) -> str:
        ranks = range(1, self.num_classes + 1)
        pairs = [name for rank in ranks for name in (f"class_{rank}", f"probability_{rank}")]
        return csv_text([["file", *pairs, "error"]])

    def text(self, predictions: Sequence[Prediction]) -> str:
        return csv_text(map(self._row, predictions))

    def _row(self, prediction: Prediction) -> list[str]:
        pairs = [text for name, p in prediction.classes for text in (printable(name), f"{p:.6f}")]
        pairs += [""] * (2 * self.num_classes - len(pairs))
        return [printable(prediction.file), *pairs, prediction.error or ""]


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as lines of CSV, in which no name is a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_plain, row) for row in rows)
    return text.getvalue()


def _plain(cell: object) -> str:
    """A quote before what a spreadsheet would compute or skip: file and class names can be anybody's."""
    text = str(cell)
    if text and (text[0] in "=+-@" or not text[0].isprintable()):
        with suppress(ValueError):
            float(text)
            return text
        return f"'{text}"
    return text


class PredictionTable:
    """A row per image: file, likeliest class with its probability as number and bar, the next classes.

    The widths are known before the first row, so that rows can be written as batches finish.

    Args:
        file: where it will be written: its width, and whether it has colours.
        names: all files, for the width of their column.
        class_names: likewise.
    """

    def __init__(self, file: IO[str], names: Sequence[str], class_names: Sequence[str]) -> None:
        width = None if file.isatty() else _PLAIN_WIDTH
        self._console = rich.console.Console(file=file, width=width, highlight=False, emoji=False)
        longest = max(len(name if name.isprintable() else one_line(name)) for name in names)
        self._file_width = max(len("file"), min(longest, self._console.width * 2 // 5))
        self._class_width = min(
            max(len(one_line(name)) for name in (*class_names, "not read")), _LONGEST_CLASS
        )

    def head(self) -> str:
        return self._rendered([], show_header=True).rstrip("\n") + "\n"

    def text(self, predictions: Sequence[Prediction]) -> str:
        return self._rendered(predictions, show_header=False)

    def _rendered(self, predictions: Sequence[Prediction], *, show_header: bool) -> str:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=show_header, show_edge=False, expand=True)
        table.add_column("file", width=self._file_width, no_wrap=True)
        table.add_column("class", width=self._class_width, no_wrap=True)
        table.add_column("%", width=len("100.0"), justify="right", no_wrap=True)
        table.add_column("", width=_BAR_WIDTH)
        table.add_column("then", ratio=1, no_wrap=True)
        for prediction in predictions:
            table.add_row(*self._row(prediction))
        with self._console.capture() as captured:
            self._console.print(table)
        return captured.get()

    def _row(self, prediction: Prediction) -> list[Text | Bar | str]:
        file = Text(_end_of(one_line(prediction.file), self._file_width))
        if prediction.error is not None:
            return [file, Text("not read", style="red"), "", "", ""]
        (name, p), *others = prediction.classes
        then = ", ".join(f"{one_line(other)} {100 * q:.1f}" for other, q in others)
        bar = Bar(1, 0, p, width=_BAR_WIDTH, color="cyan")
        return [file, Text(one_line(name), style="bold"), f"{100 * p:.1f}", bar, Text(then, style="dim")]


def _end_of(name: str, width: int) -> str:
    """The end of a path tells more than its beginning."""
    return name if len(name) <= width else f"...{name[len(name) - width + 3 :]}"
