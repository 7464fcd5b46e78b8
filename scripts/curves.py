"""Draws a metric of several runs over each other, pass by pass.

    python scripts/curves.py PICTURE NAME=RUN_DIR [NAME=RUN_DIR ...] [--metric val/top1] [--line NAME=PERCENT]

The metric is one of TITLES, a fraction in metrics.jsonl; the picture shows percent. A line is a figure from
elsewhere to compare with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_train.report.history import read_events

TITLES = {
    "val/top1": "validation top-1, percent",
    "val_raw/top1": "validation top-1, raw weights, percent",
    "train/top1": "training top-1 (augmented), percent",
}


def run(text: str) -> tuple[str, Path]:
    """NAME=RUN_DIR; the name may contain an equals sign, the folder may not."""
    name, equals, folder = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=RUN_DIR, not {text!r}")
    if not (Path(folder) / "metrics.jsonl").exists():
        raise argparse.ArgumentTypeError(f"{folder!r} is not a run: it has no metrics.jsonl")
    return name, Path(folder)


def line(text: str) -> tuple[str, float]:
    """NAME=PERCENT."""
    name, _, percent = text.rpartition("=")
    return name, float(percent)


def points(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    """(passes, percent) after each epoch that has the metric."""
    events = read_events(run_dir / "metrics.jsonl")
    found = [
        (event["epoch"], 100 * event[metric])
        for event in events
        if event["event"] == "epoch" and event.get(metric) is not None
    ]
    if not found:
        raise SystemExit(
            f"{run_dir} has no {metric}: no epoch has ended, or it trained without validation images "
            "(data.val_fraction=0); type --metric train/top1"
        )
    return found


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", type=run, metavar="NAME=RUN_DIR")
    parser.add_argument("--metric", default="val/top1", choices=TITLES)
    parser.add_argument("--line", action="append", default=[], type=line, metavar="NAME=PERCENT")
    arguments = parser.parse_args()
    if not arguments.picture.parent.is_dir():
        parser.error(f"the folder {arguments.picture.parent} does not exist")
    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for name, run_dir in arguments.runs:
        curve = points(run_dir, arguments.metric)
        axis.plot(*zip(*curve), marker="o", markersize=4, linewidth=1.6, label=f"{name}: {curve[-1][1]:.2f}")
    for name, percent in arguments.line:
        axis.axhline(percent, color="grey", linewidth=1, linestyle="--", label=f"{name}: {percent}")
    axis.set_ylabel(TITLES[arguments.metric])
    axis.set_xlabel("passes over the training images")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
