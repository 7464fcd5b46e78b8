"""The console and train.log, and the tables they show."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import TINY, build, compose
from omegaconf import OmegaConf
from rich.table import Table

from vit_train.config.build import build_run
from vit_train.config.check import Launch
from vit_train.construct import make
from vit_train.models.cost import multiply_adds
from vit_train.report.console import Console
from vit_train.report.summary import closing_table, summary
from vit_train.runs.record import open_run_dir


@pytest.fixture
def said(tmp_path, capsys):
    """What a console says, which must be what train.log gets."""

    def say(*things) -> str:
        console = Console()
        console.log_to(tmp_path / "train.log")
        for thing in things:
            console.say(thing)
        console.close()
        out = capsys.readouterr().out
        assert (tmp_path / "train.log").read_text(encoding="utf-8") == out
        (tmp_path / "train.log").unlink()
        return out

    return say


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "[bold]brackets[/bold] are [red]text[/] and [/nothing]",
        "a:key:b and :smile: are names, not pictures",
        "größe 尺寸 \\[x]",
        "x" * 500,
        "vit-train resume=" + "/".join(["folder name"] * 40),
        "two\n  lines",
        "",
    ],
)
def test_a_line_is_said_as_it_is(said, text) -> None:
    assert said(text) == f"{text}\n"


def test_a_table_goes_to_both_as_it_is(said) -> None:
    table = Table("head", box=None)
    table.add_row("[bold]cell[/bold] :key:")
    assert "[bold]cell[/bold] :key:" in said(table)


def test_train_log_is_appended_to(tmp_path, capsys) -> None:
    for line in ("first", "second"):
        console = Console()
        console.say("before the log is open")
        console.log_to(tmp_path / "train.log")
        console.say(line)
        console.close()
    assert (tmp_path / "train.log").read_text() == "first\nsecond\n"
    assert capsys.readouterr().out.count("before") == 2


def test_a_line_is_in_train_log_at_once(tmp_path) -> None:
    console = Console()
    console.log_to(tmp_path / "train.log")
    console.say("now")
    assert (tmp_path / "train.log").read_text() == "now\n"
    console.close()


def test_log_is_for_train_log_alone(tmp_path, capsys) -> None:
    console = Console()
    console.log("nowhere yet")
    console.log_to(tmp_path / "train.log")
    console.log("error: [x] " + "y" * 200)
    console.close()
    console.close()
    assert (tmp_path / "train.log").read_text() == "error: [x] " + "y" * 200 + "\n"
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ the summary
CHOICES = {
    "model": "vit_digits",
    "data": "digits",
    "augment": "shift",
    "optimizer": "adamw_digits",
    "schedule": "cosine",
    "trainer": "digits",
}


def rows_of(text):
    """First word(s) -> the rest, continuation lines joined."""
    rows, key = {}, ""
    for line in text.splitlines():
        match = re.match(r"(\S+(?: \S+)*)  +(.*)", line)
        if match:
            key, value = match.groups()
            rows[key] = value.rstrip()
        elif line.strip():
            rows[key] += " " + line.strip()
    return rows


def test_the_summary_says_what_is_about_to_happen(in_tmp, said) -> None:
    overrides = [
        *TINY,
        "strategy=single",
        "strategy.device=cpu",
        "run_dir=here/run",
        "trainer.precision=fp32",
    ]
    run = build_run(compose(*overrides), Launch(overrides=overrides, choices=CHOICES), Console())
    rows = rows_of(said(summary(run)))
    model, data = run.trainer.model, run.trainer.parts.data
    parameters = sum(p.numel() for p in model.parameters())
    assert rows["model"] == (
        f"ViT, {parameters / 1e6:.2f}M parameters, {run.multiply_adds / 1e9:.3f} GMACs an image "
        "(multiply-adds)  [model=vit_digits]"
    )
    assert rows["data"] == "train 80, val 80, test 80 images of 1 x 8 x 8  [data=digits]"
    counts = ", ".join(f"{name} {count}" for name, count in zip(data.class_names, data.class_counts))
    assert rows["classes"] == f"10: {counts}"
    assert sum(data.class_counts) == 80
    assert rows["augmentation"] == "augment=shift, brought by data=digits"
    assert re.fullmatch(r"cpu, \d+ threads?, fp32", rows["device"])
    assert rows["batch"] == "16 = 2 micro-batches of 8, 5 steps an epoch  [command line]"
    lr = run.config["optimizer"]["lr"]
    assert rows["optimizer"] == f"adamw, lr {lr:g}  [optimizer=adamw_digits, brought by data=digits]"
    assert rows["schedule"] == "schedule=cosine"
    assert rows["budget"] == "3 epochs, 15 steps  [command line]"
    assert rows["run directory"] == "here/run"
    assert "continues" not in rows
    assert not (in_tmp / "here").exists(), "a summary writes nothing"


def test_the_summary_of_a_continuation_and_its_notes(in_tmp, said) -> None:
    settings = [*TINY, "run_dir=run", "data.val_fraction=0", "trainer.grad_accum_steps=1"]
    first = build(*settings, "trainer.stop_at_step=7")
    open_run_dir(first.run_dir, first.config)
    first.trainer.fit()
    run = build(*settings)
    run.notes[:] = ["one [note]", "two"]
    rows = rows_of(said(summary(run)))
    assert rows["continues"] == "after step 7, epoch 2"
    assert rows["data"].startswith("train 80, no val, test 80 images")
    assert rows["batch"].startswith("16, 5 steps an epoch")
    assert (rows["note"], rows["note 2"]) == ("one [note]", "two")


def test_multiply_adds_of_vit_base_are_those_of_the_paper() -> None:
    config = compose("model=vit_base", "data.img_size=224", "data.in_channels=3", "data.num_classes=1000")
    with torch.device("meta"):
        model = make(OmegaConf.to_container(config.model, resolve=True))
    assert multiply_adds(model, in_channels=3, img_size=224) == pytest.approx(17.6e9, rel=0.02)
    assert sum(p.numel() for p in model.parameters()) == 86_567_656


def test_multiply_adds_of_one_linear_layer_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 7))
    assert multiply_adds(model, in_channels=3, img_size=4) == 48 * 7


def test_the_closing_table(said) -> None:
    best = {"best/val/loss": 0.5, "best/val/top1": 0.9722, "best/val/top5": 1.0, "best/epoch": 3}
    last = {"last/val/loss": None, "last/val/top1": None, "last/epoch": 4}
    test = {"test/loss": 0.25, "test/top1": 0.8, "test/top5": None}
    cost = {"epochs": 4, "steps": 1200, "seconds": 75.0, "images_per_second": 1234.5}
    text = said(closing_table({**best, **last, **test, **cost}))
    assert re.search(r"best val +0\.5000 +97\.22 +100\.00 +3 *\n", text)
    assert re.search(r"test +0\.2500 +80\.00 +- +3 *\n", text)
    assert "last val" not in text
    assert "4 epochs, 1,200 steps in 1m15s, 1,23" in text
