"""history.png: loss, accuracy and learning rate over the epochs, drawn from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line cut off by a crash is left out."""
    events = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


def draw_history(run_dir: Path, title: str) -> Path | None:
    """Draws `run_dir`/history.png; None before the first epoch is closed.

    Args:
        run_dir: holds metrics.jsonl.
        title: what stands above the curves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    events = read_events(run_dir / "metrics.jsonl")
    epochs = [event for event in events if event["event"] == "epoch"]
    steps = [event for event in events if event["event"] == "step"]
    if not epochs:
        return None
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "o" if len(epochs) < 40 else None

    def curve(axis: Any, key: str, label: str, scale: float = 1.0, style: str = "-") -> None:
        points = [(e["epoch"], scale * e[key]) for e in epochs if e.get(key) is not None]
        if points:
            axis.plot(*zip(*points), style, label=label, marker=marker, markersize=3, linewidth=1.4)

    curve(loss, "train/loss", "train")
    curve(loss, "val/loss", "val")
    curve(loss, "val_raw/loss", "val, raw weights", style=":")
    loss.set_title("loss")
    curve(accuracy, "train/top1", "train", 100)
    curve(accuracy, "val/top1", "val", 100)
    curve(accuracy, "val_raw/top1", "val, raw weights", 100, ":")
    tests = [event for event in events if event["event"] == "test" and "test/top1" in event]
    if tests:
        top1 = 100 * tests[-1]["test/top1"]
        accuracy.axhline(top1, color="grey", linewidth=0.8, linestyle="--", label=f"test {top1:.1f}")
    accuracy.set_title("top-1 accuracy, percent")
    if steps:
        rate.plot([s["epoch_float"] for s in steps], [s["lr"] for s in steps], linewidth=1.4)
    rate.set_title("learning rate")
    for axis in (loss, accuracy, rate):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (loss, accuracy):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path = run_dir / "history.png"
    aside = run_dir / ".history.png"
    figure.savefig(aside, format="png")
    aside.replace(path)
    return path
