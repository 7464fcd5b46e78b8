"""Where figures go: metrics.jsonl over an interruption, the estimate, and nothing at all."""

from __future__ import annotations

import json
import time

import pytest
import torch
from conftest import TINY, build
from torch import nn

from vit_train.report.console import Console
from vit_train.report.history import read_events
from vit_train.report.tracker import Tracker
from vit_train.text import duration
from vit_train.training.tracker import NullTracker, Plan


def plan(first_step=0, total_steps=100) -> Plan:
    return Plan(
        first_step=first_step,
        closed_epochs=first_step // 10,
        total_steps=total_steps,
        steps_per_epoch=10,
        batch_size=16,
        eval_images_per_epoch=30,
        mean=(0.5,),
        std=(0.5,),
    )


def tracker(folder, **settings) -> Tracker:
    return Tracker(folder, Console(), **{"tensorboard": False, "log_every_steps": 10, **settings})


def drive(it, plan, steps, seconds=0.0):
    """`steps` steps of 16 images, each at loss 2 with a quarter of the images right."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25)
    it.start(plan)
    sums = torch.zeros(4, dtype=torch.float64)
    it.begin_epoch(0, plan.first_step, plan.steps_per_epoch, sums.tolist())
    for step in range(plan.first_step + 1, plan.first_step + steps + 1):
        time.sleep(seconds)
        sums += torch.tensor([32.0, 4.0, 8.0, 16.0])
        it.after_step(step, optimizer, sums, torch.tensor(1.5))
    it.close()


def test_metrics_are_cut_back_to_the_step_a_run_continues_from(tmp_path) -> None:
    events = [{"event": "step", "step": step, "loss": step / 3} for step in range(1, 13)]
    events.insert(10, {"event": "epoch", "step": 10, "epoch": 1, "train/loss": 0.1})
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"event": "step", "st')
    it = tracker(tmp_path)
    it.start(plan(first_step=10))
    it.after_epoch(20, 1, {"train/loss": 0.05, "train/top1": 0.5})
    it.close()
    assert read_events(file) == [
        *events[:11],
        {"event": "epoch", "step": 20, "epoch": 2, "train/loss": 0.05, "train/top1": 0.5},
    ]
    assert file.read_text().endswith("}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_with_an_empty_file(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    it = tracker(tmp_path)
    it.start(plan())
    it.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_running_figures_are_of_their_window(tmp_path) -> None:
    drive(tracker(tmp_path), plan(), 25, seconds=0.002)
    events = read_events(tmp_path / "metrics.jsonl")
    assert [event["step"] for event in events] == [1, 10, 20]
    for event in events:
        assert (event["event"], event["loss"], event["lr"], event["grad_norm"]) == ("step", 2.0, 0.25, 1.5)
        assert event["epoch_float"] == event["step"] / 10
        assert 0 < event["images_per_second"] < 16 / 0.002


def test_a_long_run_is_estimated_once_and_told_how_to_be_short(tmp_path, capsys) -> None:
    drive(tracker(tmp_path), plan(total_steps=10**9), 40, seconds=0.001)
    lines = [line for line in capsys.readouterr().out.splitlines() if "to go" in line]
    assert len(lines) == 1
    assert lines[0].startswith("about ")
    assert "; for a quick look type data.limit=5000, fewer trainer.epochs or a smaller model" in lines[0]


def test_a_short_run_is_estimated_without_advice(tmp_path, capsys) -> None:
    drive(tracker(tmp_path), plan(total_steps=1000), 40, seconds=0.001)
    lines = [line for line in capsys.readouterr().out.splitlines() if "to go" in line]
    assert len(lines) == 1
    assert "data.limit" not in lines[0]


def test_the_estimate_counts_what_is_left(tmp_path, capsys) -> None:
    """980 steps of 16 images and 98 evaluations of 30, which cost a third each."""
    drive(tracker(tmp_path), plan(total_steps=1000), 20, seconds=0.002)
    rate = read_events(tmp_path / "metrics.jsonl")[-1]["images_per_second"]
    expected = duration((980 * 16 + 98 * 30 / 3) / rate)
    assert f"about {expected} to go, at {rate:,.0f} images/s\n" in capsys.readouterr().out


def test_an_epoch_is_one_line(tmp_path, capsys) -> None:
    it = tracker(tmp_path)
    it.start(plan())
    figures = {"train/loss": 1.23456, "train/top1": 0.5, "val/loss": 1.0, "val/top1": 0.75}
    it.after_epoch(20, 1, {**figures, "val_raw/loss": 2.0, "val_raw/top1": 0.25})
    it.close()
    assert capsys.readouterr().out.startswith(
        "epoch  2/10 | train loss 1.2346 top-1 50.00% | val loss 1.0000 top-1 75.00% "
        "| val (raw weights) loss 2.0000 top-1 25.00% | "
    )


def test_without_a_bar_batches_pass_as_they_are(tmp_path) -> None:
    batches = [1, 2, 3]
    assert tracker(tmp_path).progress(batches, "val") is batches
    assert list(tracker(tmp_path, progress=True).progress(batches, "val")) == batches


def test_the_null_tracker_writes_nothing(in_tmp, capsys) -> None:
    run = build(*TINY, "run_dir=run", "trainer.epochs=1")
    assert type(run.trainer.tracker) is NullTracker
    run.trainer.fit()
    null = run.trainer.tracker
    null.start(plan())
    null.text("config", "a: 1")
    null.picture("predictions", lambda: pytest.fail("drawn for nobody"), 1)
    null.hparams({"lr": 0.1}, {"top1": 0.5})
    null.test(5, {"test/top1": 0.5})
    null.close()
    assert [path.name for path in (in_tmp / "run").iterdir()] == ["checkpoints"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-0.0, "0.0s"),
        (-0.04, "0.0s"),
        (0.04, "0.0s"),
        (59.9, "59.9s"),
        (60, "1m00s"),
        (184, "3m04s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
    ],
)
def test_durations(seconds, words) -> None:
    assert duration(seconds) == words
