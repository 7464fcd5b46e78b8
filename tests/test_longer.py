"""A run that `trainer.max_steps` cut inside an epoch and that is made longer equals one that had the larger budget.

The epochs that such a run closes early are opened again: nothing that closing them changed may be left.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil

import pytest
from conftest import TINY, compose, vit_train_here

from vit_train.checkpoint import Checkpointer, Snapshot, checkpoint_directories, load, resolve_link
from vit_train.cli import train
from vit_train.config.build import build_run
from vit_train.config.check import Launch
from vit_train.report.console import Console
from vit_train.training.state import TrainState
from vit_train.training.trainer import Trainer

STEPS = 5  # an epoch of TINY
PLATEAU = (
    *TINY,
    "schedule=plateau",
    "schedule.monitor=train/loss",
    "schedule.mode=max",  # the loss falls, which then counts as bad: the plateau acts after each epoch
    "schedule.patience=0",
    "schedule.factor=0.7",
    "trainer.early_stop_patience=9",
    "tracker.progress=false",
)
# Where validation stands after each step. Epoch 1 stays the best of the whole epochs; a cut may be better
TOP1 = {5: 0.7, 10: 0.5, 15: 0.5, 20: 0.6, 25: 0.4}
CUT_TOP1 = {3: 0.9, 8: 0.9, 12: 0.9, 18: 0.3, 22: 0.9}


class Scripted(Trainer):
    """Measures on the validation split what stands above; the other figures are its own."""

    def evaluate_split(self, split):
        measured = super().evaluate_split(split)
        scripted = {"val/top1": (TOP1 | CUT_TOP1)[self.state.step]} if split == "val" else {}
        return measured | scripted


SCRIPTED = (*PLATEAU, "trainer._target_=test_longer.Scripted")


def go(*settings, folder):
    """`vit-train` with these settings and run_dir=FOLDER, less the curves it draws at the end."""
    settings = (*settings, f"run_dir={folder}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_draw", lambda _: None)
        train.execute(build_run(compose(*settings), Launch(overrides=list(settings), choices={}), Console()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What stands at the end of the run that had the larger budget from the start, made once for each command."""

    @functools.cache
    def run(settings, budget):
        folder = tmp_path_factory.mktemp("whole")
        go(*settings, budget, folder=folder / "run")
        return standing(folder / "run")

    return run


def standing(run_dir):
    """All that two equal runs have in common: tensors and state of each link, checkpoints, epochs, result."""
    found = {"checkpoints": [path.name for path in checkpoint_directories(run_dir / "checkpoints")]}
    for link in ("last", "best"):
        path = resolve_link(run_dir / "checkpoints" / link)
        checkpoint = load(path) if path is not None else None
        found[link] = path and path.name
        for name, tensor in checkpoint.tensors.items() if checkpoint else ():
            found[f"{link}/{name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        if checkpoint:
            found[f"{link}/state"] = without_clock(checkpoint.state["train"])
            found[f"{link}/best"] = checkpoint.state["best"]
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["events"] = [event for event in events if event["event"] != "step"]
    if (run_dir / "result.json").exists():
        result = json.loads((run_dir / "result.json").read_text())
        found["result"] = {k: v for k, v in result.items() if k not in ("seconds", "images_per_second")}
    return found


def without_clock(state):
    before = state.get("before_cut")
    return {**state, "seconds": 0, "before_cut": None if before is None else without_clock(before)}


def different(one, other):
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def left(cut, budget):
    """Where the run ends in the epoch of the cut, the checkpoint of the cut is one of the newest two."""
    return {"checkpoints"} if budget - cut < STEPS else set()


@pytest.mark.parametrize(("cut", "every"), [(2, 1), (6, 2), (8, 1), (14, 2)])
def test_a_cut_run_made_longer_equals_one_that_had_the_budget(whole, tmp_path, cut, every) -> None:
    settings = (*PLATEAU, f"trainer.save_every_epochs={every}", "trainer.keep_checkpoints=2")
    go(*settings, f"trainer.max_steps={cut}", folder=tmp_path / "run")
    part = standing(tmp_path / "run")
    assert part["last/state"]["closed_epochs"] == math.ceil(cut / STEPS)
    assert vit_train_here("resume=run", "trainer.max_steps=20", cwd=tmp_path).code == 0
    expected = whole(settings, "trainer.max_steps=20")
    assert expected["last/state"]["schedule"]["multiplier"] == pytest.approx(0.7**3), (
        "the plateau never acted"
    )
    assert different(standing(tmp_path / "run"), expected) == set()


@pytest.mark.parametrize(("cut", "every"), [(3, 2), (8, 1), (12, 1), (12, 2), (18, 1), (22, 2)])
def test_the_best_is_what_it_was_before_the_cut(whole, tmp_path, cut, every) -> None:
    """Also where the cut epoch was the best, and the earlier best is older than what is kept."""
    settings = (*SCRIPTED, f"trainer.save_every_epochs={every}", "trainer.keep_checkpoints=2")
    go(*settings, f"trainer.max_steps={cut}", folder=tmp_path / "run")
    part = standing(tmp_path / "run")
    assert (part["best"] == part["last"]) == (CUT_TOP1[cut] == 0.9)
    go(*settings, "trainer.max_steps=25", folder=tmp_path / "run")
    expected = whole(settings, "trainer.max_steps=25")
    assert (expected["best"], expected["last/state"]["evaluations_since_best"]) == ("step_00000005", 4)
    assert different(standing(tmp_path / "run"), expected) <= left(cut, 25)


@pytest.mark.parametrize("cut", [3, 12, 22])
def test_one_step_after_the_cut_everything_stands_as_if_it_was_none(tmp_path, cut) -> None:
    """Against a run that had the larger budget and was stopped at the same steps."""
    part, stopped = tmp_path / "run", tmp_path / "stopped"
    go(*SCRIPTED, f"trainer.max_steps={cut}", folder=part)
    go(*SCRIPTED, "trainer.max_steps=25", f"trainer.stop_at_step={cut}", folder=stopped)
    for folder in (part, stopped):
        go(*SCRIPTED, "trainer.max_steps=25", f"trainer.stop_at_step={cut + 1}", folder=folder)
    assert different(standing(part), standing(stopped)) == set()
    assert standing(part)["best"] == (None if cut < STEPS else "step_00000005")


def test_a_cut_epoch_that_ended_the_run_early_is_opened_again(whole, tmp_path) -> None:
    """At step 18 for the third time no better validation; at the end of that epoch there is a better one."""
    settings = (*SCRIPTED, "trainer.early_stop_patience=3")
    go(*settings, "trainer.max_steps=18", folder=tmp_path / "run")
    assert standing(tmp_path / "run")["last/state"]["stopped_early"]
    go(*settings, "trainer.max_steps=20", folder=tmp_path / "run")
    after, expected = standing(tmp_path / "run"), whole(settings, "trainer.max_steps=20")
    assert different(after, expected) <= left(18, 20)
    assert (after["last/state"]["evaluations_since_best"], after["last/state"]["step"]) == (3, 20)


def test_a_run_may_be_cut_twice_in_one_epoch(whole, tmp_path) -> None:
    go(*PLATEAU, "trainer.max_steps=7", folder=tmp_path / "run")
    for budget in (8, 9, 14):
        go(*PLATEAU, f"trainer.max_steps={budget}", folder=tmp_path / "run")
        expected = whole(PLATEAU, f"trainer.max_steps={budget}")
        assert different(standing(tmp_path / "run"), expected) <= {"checkpoints"}
        assert expected["last/state"]["before_cut"] is not None


def test_without_a_validation_split_the_newest_is_the_best_again(whole, tmp_path) -> None:
    settings = (*PLATEAU, "trainer.early_stop_patience=null", "data.val_fraction=0")
    go(*settings, "trainer.max_steps=12", folder=tmp_path / "run")
    go(*settings, "trainer.max_steps=20", folder=tmp_path / "run")
    assert different(standing(tmp_path / "run"), whole(settings, "trainer.max_steps=20")) == set()


def test_the_train_figures_of_a_reopened_epoch_are_means_over_all_its_images(tmp_path) -> None:
    """Steps of 16 images each: the figure of the epoch is the mean of what was logged of its steps."""
    logged = (*PLATEAU, "tracker.log_every_steps=1")
    go(*logged, "trainer.max_steps=3", folder=tmp_path / "run")
    go(*logged, "trainer.max_steps=4", folder=tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    epochs = [event for event in events if event["event"] == "epoch"]
    assert (list(steps), len(epochs), epochs[0]["step"]) == ([1, 2, 3, 4], 1, 4)
    assert epochs[0]["train/loss"] == pytest.approx(sum(steps.values()) / 4)


# Each of them is one that closing the epoch changed
LONGER = ("trainer.max_steps=25", "trainer.stop_at_step=19")
PIECES = ("sums", "best", "evaluations_since_best", "anchor", "last", "schedule")


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run cut at step 18, and what stands where it was made longer and stopped one step later."""
    folder = tmp_path_factory.mktemp("cut")
    go(*SCRIPTED, "trainer.max_steps=18", folder=folder / "run")
    shutil.copytree(folder / "run", folder / "longer", symlinks=True)
    go(*SCRIPTED, *LONGER, folder=folder / "longer")
    return folder


@pytest.mark.parametrize("piece", [None, *PIECES])
def test_a_piece_that_is_not_taken_back_is_noticed(cut, tmp_path, piece) -> None:
    """The negative control: where a piece stays as closing the epoch left it, the comparison fails."""
    shutil.copytree(cut / "run", tmp_path / "run", symlinks=True)
    checkpoint = load(resolve_link(tmp_path / "run/checkpoints/last"))
    state = json.loads(json.dumps(checkpoint.state))
    train = state["train"]
    if piece is not None:
        assert train["before_cut"][piece] != (None if piece == "best" else train[piece])
        train["before_cut"][piece] = None if piece == "best" else train[piece]
    state.pop("format")
    Checkpointer(tmp_path / "run").save(Snapshot(checkpoint.tensors, state, step=18, best=False, keep=9))
    go(*SCRIPTED, *LONGER, folder=tmp_path / "run")
    same = different(standing(tmp_path / "run"), standing(cut / "longer")) == set()
    assert same == (piece is None)


def test_a_cut_run_of_an_older_version_is_made_longer_as_before(tmp_path) -> None:
    """Its state.json does not say what closing the epoch replaced: the epoch is opened all the same."""
    go(*PLATEAU, "trainer.max_steps=8", folder=tmp_path / "run")
    checkpoint = load(resolve_link(tmp_path / "run/checkpoints/last"))
    state = json.loads(json.dumps(checkpoint.state))
    del state["train"]["before_cut"], state["format"]
    Checkpointer(tmp_path / "run").save(Snapshot(checkpoint.tensors, state, step=8, best=False, keep=9))
    go(*PLATEAU, "trainer.max_steps=15", folder=tmp_path / "run")
    epochs = [e for e in standing(tmp_path / "run")["events"] if e["event"] == "epoch"]
    assert [(e["epoch"], e["step"]) for e in epochs] == [(1, 5), (2, 10), (3, 15)]


@pytest.mark.parametrize("before", [7, [], {"step": "8"}, {"unknown": 1}, {"sums": [1.0]}, {"before_cut": 1}])
def test_what_cannot_have_been_before_a_cut_is_refused(before) -> None:
    with pytest.raises((ValueError, TypeError)):
        TrainState.from_json({"step": 8, "before_cut": before})
    assert TrainState.from_json({"step": 8, "before_cut": {"step": 8}}).before_cut == {"step": 8}


# ---------------------------------------------------------------------------------------- the jump of the rate
def notes(*settings, folder):
    settings = (*settings, f"run_dir={folder}")
    return build_run(compose(*settings), Launch(overrides=list(settings), choices={}), Console()).notes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 15 steps at 0.002, with half a cosine down to a hundredth and no warmup."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    go(*COSINE, folder=folder)
    return folder


COSINE = (*TINY, "schedule.warmup_epochs=0", "optimizer.lr=0.002")
SPANS = "the schedule now spans the new budget"


def test_the_note_of_a_longer_run_says_by_how_much_the_rate_jumps(finished) -> None:
    """At step 14 (from 0) of 15 the multiplier is 0.01, of 30 half a cosine after 14 / 29 of the way."""
    new = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 14 / 29))
    jump = f"from 2.0e-05 to {0.002 * new:.1e} ({100 * new:.3g} x)"
    line = f"with the larger budget the learning rate jumps {jump}"
    assert line in notes(*COSINE, "trainer.epochs=6", folder=finished)
    assert line in notes(*COSINE, "trainer.max_steps=30", folder=finished)
    assert (f"{0.002 * new:.1e}", f"{100 * new:.3g}") == ("1.1e-03", "53.2")


def test_a_rate_that_was_zero_has_no_factor(tmp_path) -> None:
    settings = (*COSINE, "schedule.final_factor=0", "trainer.epochs=1")
    go(*settings, folder=tmp_path / "run")
    found = notes(*settings, "trainer.epochs=2", folder=tmp_path / "run")
    new = 0.5 * (1 + math.cos(math.pi * 4 / 9))
    assert f"with the larger budget the learning rate jumps from 0.0e+00 to {0.002 * new:.1e}" in found


def test_a_rate_that_does_not_jump_is_not_said(tmp_path) -> None:
    go(*PLATEAU, "trainer.max_steps=12", folder=tmp_path / "run")
    assert standing(tmp_path / "run")["last/state"]["schedule"]["multiplier"] < 1
    found = notes(*PLATEAU, "trainer.max_steps=20", folder=tmp_path / "run")
    assert f"trainer.max_steps: 12 -> 20: {SPANS}" in found
