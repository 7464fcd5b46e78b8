"""Charts of an evaluation: confusion matrix and reliability diagram. Pictures are uint8 (height, width, 3).

Shades of one blue and one orange, which all kinds of colour vision tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vit_train.report.evaluation_figures import NUM_BINS, Calibration
from vit_train.report.fonts import fonts_for, shown_names
from vit_train.text import printable, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, INK, PALE = "#2166ac", "#d95f0e", "#24292f", "#d0d7de"
_DPI = 160
_LABELS = 50  # at most this many class names along a side, once there are more than 100
_LONGEST = 22  # characters of a name


def confusion_chart(counts: NDArray[np.int64], class_names: Sequence[str]) -> NDArray[np.uint8]:
    """Shades are shares of the true class, which is the row of the counts (K, K), written where they fit.

    The names may be in any script; numbers are shown where no installed font has the glyphs.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure

    number = len(class_names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # nothing at all is white, and a single mistake among a thousand images can still be seen
    blues = colormaps["Blues"](np.linspace(0.12 if number <= 100 else 0.4, 1, 256))
    colors, norm = ListedColormap(blues, "blues").with_extremes(bad="white"), PowerNorm(0.5, 0, 1)
    side = _side(number)
    figure = Figure(figsize=(side, side), dpi=_DPI)
    axes: Any = figure.add_axes((0, 0, 1, 1))  # all of it: room around them is made when it is drawn
    axes.imshow(np.ma.masked_equal(shares, 0), cmap=colors, norm=norm, interpolation="nearest", aspect="auto")
    cell = 72 * side / number  # points
    every = 1 if number <= 100 else -(-number // _LABELS)
    large = side > 8
    fontsize = min(0.75 * every * cell, 11 if large else 10)
    labels = shown_names([short(printable(name).replace("\n", " "), _LONGEST) for name in class_names])
    families = fonts_for(labels)
    ticks = np.arange(0, number, every)
    # a name along the top is turned where it does not fit above its column
    longest = max(len(label) for label in labels)
    upright = longest * 0.62 * fontsize > 0.95 * cell
    for ticker in (axes.set_xticks, axes.set_yticks):
        ticker(ticks, [labels[i] for i in ticks], fontsize=fontsize, family=families, parse_math=False)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(axis="both", length=2 if number > 30 else 0, color=PALE, labelcolor=INK)
    if upright:
        for text in axes.get_xticklabels():
            text.set(rotation=90, va="bottom", ha="center")
    if number <= 30:
        _write_counts(axes, counts, shares, norm, cell)
    if number <= 100:
        lines = np.arange(number + 1) - 0.5
        axes.set_xticks(lines, minor=True)
        axes.set_yticks(lines, minor=True)
        axes.grid(which="minor", color=PALE, linewidth=0.5 if number <= 30 else 0.25)
        axes.tick_params(which="minor", length=0)
    axes.spines[:].set_color(PALE)
    heading = 18 if large else 11
    axes.set_ylabel("true class", fontsize=heading, color=INK)
    axes.set_xlabel("predicted class", fontsize=heading, color=INK)
    axes.xaxis.set_label_position("top")
    bar_axes = axes.inset_axes((1.03, 0, 0.16 / side + 0.01, 1))
    bar = figure.colorbar(ScalarMappable(norm, colors), cax=bar_axes, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1%", "5%", "20%", "50%", "100%"], fontsize=14 if large else 8, color=INK)
    bar.ax.tick_params(color=PALE)
    bar.outline.set_edgecolor(PALE)
    bar.set_label("share of the true class", fontsize=14 if large else 8, color=INK)
    return _drawn(figure)


def _side(number: int) -> float:
    """Inches of a matrix of so many classes; whole pixels per cell where cells are small."""
    if number <= 12:
        return max(2.4, 0.62 * number)
    if number <= 30:
        return 0.42 * number
    if number <= 100:
        return 12.6
    return number * max(2, 2000 // number) / _DPI


def _write_counts(
    axes: Any, counts: NDArray[np.int64], shares: NDArray[np.float64], norm: Any, cell: float
) -> None:
    """Counts, and in large cells the share below. Nothing where it is 0 or does not fit."""
    fontsize = min(10.0, 0.3 * cell)
    for row, column in np.argwhere(counts):
        text = f"{counts[row, column]:,}"
        if len(text) * 0.64 * fontsize > 0.96 * cell:
            continue
        color = "white" if norm(shares[row, column]) > 0.5 else INK
        large = cell > 40
        axes.text(column, row - (0.12 if large else 0), text, ha="center", va="center", fontsize=fontsize,
                  color=color)  # fmt: skip
        if large:
            axes.text(column, row + 0.24, f"{shares[row, column]:.1%}", ha="center", va="center",
                      fontsize=0.68 * fontsize, color=color)  # fmt: skip


def reliability_chart(found: Calibration) -> NDArray[np.uint8]:
    """Accuracy against confidence in 15 bins, and below how many images each holds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5.4, 5.6), dpi=_DPI)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1), "hspace": 0.1})
    width = 1 / NUM_BINS
    filled = np.flatnonzero(found.images)
    middles = (filled + 0.5) * width
    accuracy, confidence = found.accuracy[filled], found.confidence[filled]
    above.bar(middles, accuracy, width * 0.92, color=BLUE, label="accuracy")
    # from what was reached to what was promised
    above.bar(
        middles,
        confidence - accuracy,
        width * 0.92,
        bottom=accuracy,
        facecolor="none",
        edgecolor=ORANGE,
        hatch="////",
        linewidth=1,
        label="gap to confidence",
    )
    above.plot((0, 1), (0, 1), "--", color=INK, linewidth=1, label="perfectly calibrated")
    above.set(xlim=(0, 1), ylim=(0, 1))
    above.set_ylabel("accuracy", color=INK)
    above.legend(fontsize=8, loc="upper left", edgecolor="none")  # a bar may stand behind it
    mean = np.nansum(found.confidence * found.images) / found.images.sum()
    right = np.nansum(found.accuracy * found.images) / found.images.sum()
    above.set_title(
        f"ECE {found.ece:.1%}: on average {mean:.1%} confident and {right:.1%} right",
        fontsize=10,
        color=INK,
    )
    below.bar(
        (np.arange(NUM_BINS) + 0.5) * width, found.images / found.images.sum(), width * 0.92, color="#8c959f"
    )
    below.set_ylabel("images", color=INK)
    below.set_xlabel("confidence", color=INK)
    for axes in (above, below):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.tick_params(labelsize=8, color=PALE, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(PALE)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
    figure.align_ylabels()
    return _drawn(figure)


def _drawn(figure: Figure) -> NDArray[np.uint8]:
    file = io.BytesIO()
    figure.savefig(
        file,
        format="png",
        dpi=_DPI,
        bbox_inches="tight",
        pad_inches=0.15,
        pil_kwargs={"compress_level": 0},  # read again at once
    )
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
