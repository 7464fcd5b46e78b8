"""history.png: loss, accuracy and learning rate over the epochs, drawn from metrics.jsonl."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from vit_train.system import durable

_LARGEST = 2**63
_MAX_BYTES = 2**30  # ten million steps that log every tenth make 150 MB


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; a line cut off by a crash, or that is not an event, is left out.

    Raises:
        OSError: it cannot be read, or is not a plain file.
    """
    events = []
    if path.exists():
        for line in durable.read(path, _MAX_BYTES).decode(errors="replace").splitlines():
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_event(event):
                events.append(event)
    return events


def _is_event(event: Any) -> bool:
    """Its kind, its step, and figures (None where one was not finite)."""
    if not isinstance(event, dict) or not isinstance(kind := event.get("event"), str):
        return False
    figures = all(_is_figure(value) for name, value in event.items() if name != "event")
    numbered = ("step", "epoch") if kind == "epoch" else ("step",)
    return figures and all(event.get(name) is not None for name in numbered)


def _is_figure(value: Any) -> bool:
    """Whether it can be drawn and logged: a hostile file may hold whole numbers of any size."""
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)


def draw_history(run_dir: Path) -> Path | None:
    """Draws history.png of a run, under its name; None before the first epoch is closed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from vit_train.report.fonts import fonts_for, with_glyphs

    events = read_events(run_dir / "metrics.jsonl")
    epochs = [event for event in events if event["event"] == "epoch"]
    steps = [
        event
        for event in events
        if event["event"] == "step" and None not in (event.get("epoch_float"), event.get("lr"))
    ]
    if not epochs:
        return None
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
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
    tests = [event for event in events if event["event"] == "test" and event.get("test/top1") is not None]
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
    shown = with_glyphs(str(run_dir))
    figure.suptitle(shown, fontsize=10, family=fonts_for([shown]), parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    durable.replace(run_dir / "history.png", picture.getvalue())
    return run_dir / "history.png"
