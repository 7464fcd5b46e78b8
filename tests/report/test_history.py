"""history.png, drawn from whatever metrics.jsonl holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vit_train.report.history import draw_history, read_events

STEPS = [{"event": "step", "step": s, "loss": 2.0, "lr": 0.1 / s, "epoch_float": s / 5} for s in (1, 5, 10)]
EPOCHS = [
    {"event": "epoch", "step": 5, "epoch": 1, "train/loss": 2.0, "train/top1": 0.3},
    {"event": "epoch", "step": 10, "epoch": 2, "train/loss": 1.0, "train/top1": 0.6, "val/loss": 1.5, "val/top1": 0.5},
]  # fmt: skip


def write(folder, events, rest=""):
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(lines + rest)


def picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_the_picture_is_drawn(tmp_path) -> None:
    write(tmp_path, [*STEPS, *EPOCHS])
    path = draw_history(tmp_path)
    assert path == tmp_path / "history.png"
    pixels = picture(path)
    assert pixels.shape == (396, 1320, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "an empty picture"
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "history.png"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", ["\u5199\u771f", "\U0001f436 dogs", "cost $5 \\$ and $6$", "Bär & Söhne", "$x_y$ [b]"]
)
def test_any_run_directory_is_a_title(name, tmp_path) -> None:
    """A character that no installed font shows is a question mark, and nothing is mathematics."""
    (tmp_path / name).mkdir()
    write(tmp_path / name, [*STEPS, *EPOCHS])
    assert draw_history(tmp_path / name) is not None


def test_every_curve_is_on_it(tmp_path) -> None:
    """Each piece of the figures changes the picture."""
    test = {"event": "test", "step": 10, "test/top1": 0.4}
    raw = {**EPOCHS[1], "val_raw/loss": 3.0, "val_raw/top1": 0.1}
    variants = [
        [*STEPS, *EPOCHS],
        EPOCHS,
        [*STEPS, EPOCHS[0]],
        [*STEPS, *EPOCHS, test],
        [*STEPS, EPOCHS[0], raw],
    ]
    drawn = []
    for events in variants:
        write(tmp_path, events)
        drawn.append(picture(draw_history(tmp_path)).tobytes())
    assert len(set(drawn)) == len(variants)


@pytest.mark.parametrize("events", [[], STEPS, None])
def test_before_the_first_epoch_nothing_is_drawn(tmp_path, events) -> None:
    if events is not None:
        write(tmp_path, events)
    assert draw_history(tmp_path) is None
    assert not (tmp_path / "history.png").exists()


@pytest.mark.parametrize(
    "rest",
    [
        *('{"event": "epoch", "step": 15, "epo', "{", "\0\0\0\0", '{"event": "step"'),
        f'{{"event": "step", "step": 16, "lr": {"9" * 400}}}',
        f'{{"event": "epoch", "step": {"9" * 400}, "epoch": 4}}',
    ],
)
def test_a_cut_off_last_line_is_left_out(tmp_path, rest) -> None:
    write(tmp_path, [*STEPS, *EPOCHS])
    whole = picture(draw_history(tmp_path)).tobytes()
    write(tmp_path, [*STEPS, *EPOCHS], rest)
    assert read_events(tmp_path / "metrics.jsonl") == [*STEPS, *EPOCHS]
    assert picture(draw_history(tmp_path)).tobytes() == whole


def test_a_run_without_validation_is_drawn(tmp_path) -> None:
    write(tmp_path, EPOCHS[:1])
    assert draw_history(tmp_path) is not None


def test_a_long_run_is_drawn(tmp_path) -> None:
    write(tmp_path, [{**EPOCHS[0], "epoch": epoch} for epoch in range(1, 300)])
    assert draw_history(tmp_path) is not None
