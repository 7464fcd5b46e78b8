"""The rate of every step, as it stands in the optimizer's groups, against torch's own schedulers.

The base rates are those of layer decay, so that no two layers have the same; numbers of steps are odd.
"""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from vit_train.config.build import build_run
from vit_train.config.check import Launch, config_dir
from vit_train.layers import PatchEmbed
from vit_train.models import ViT
from vit_train.report.console import Console
from vit_train.training.optimizers import adamw, set_lr
from vit_train.training.schedules import Constant, Cosine, MultiStep, ReduceOnPlateau
from vit_train.training.state import TrainState
from vit_train.training.tracker import NullTracker

LR, LAYER_DECAY, DEPTH = 0.003, 0.7, 2
BASES = [LR * LAYER_DECAY**n for n in range(DEPTH + 2)]  # head, the two blocks, patches


def optimizer():
    """Eight groups: four rates, each with and without weight decay."""
    patch_embed = PatchEmbed(img_size=8, patch_size=4, in_channels=1, embed_dim=4)
    model = ViT(patch_embed=patch_embed, embed_dim=4, depth=DEPTH, num_heads=2, num_classes=3)
    return adamw(model, lr=LR, layer_decay=LAYER_DECAY)


def applied(schedule, steps):
    """The rates of all groups at each step: one row a step, groups of the same layer side by side."""
    ours = optimizer()
    assert [group["lr"] for group in ours.param_groups] == pytest.approx([b for b in BASES for _ in "dn"])
    rates = []
    for step in range(steps):
        set_lr(ours, schedule(step))
        rates.append([group["lr"] for group in ours.param_groups])
    return torch.tensor(rates, dtype=torch.float64)


def reference(make, steps):
    """Those of torch's scheduler, one optimizer for each base rate; `make`: (optimizer, base) -> scheduler."""
    rates = []
    for base in BASES:
        theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
        scheduler = make(theirs, base)
        column = []
        for _ in range(steps):
            column.append(theirs.param_groups[0]["lr"])
            theirs.step()
            scheduler.step()
        rates += [column, column]
    return torch.tensor(rates, dtype=torch.float64).T


def warmup_of(warmup_epochs, steps_per_epoch, total):
    if warmup_epochs is None:
        return min(2 * steps_per_epoch, total // 5)
    return round(warmup_epochs * steps_per_epoch)


def linear(theirs, warmup):
    """From 1 / (warmup + 1) of the rate, in equal steps up to all of it."""
    return lr_scheduler.LinearLR(theirs, start_factor=1 / (warmup + 1), total_iters=warmup)


LENGTHS = {
    "steps_per_epoch": st.integers(1, 23),
    "total": st.integers(1, 90),
    "warmup_epochs": st.sampled_from([None, 0, 0.4, 1, 1.7, 3, 5]),
}


def longer_than_the_run(kind, steps_per_epoch, total, warmup_epochs):
    """Then it is refused, with both lengths."""
    warmup = warmup_of(warmup_epochs, steps_per_epoch, total)
    if warmup <= total:
        return False
    with pytest.raises(ValueError, match=rf"\({warmup} steps\) is longer than the run of {total} steps"):
        kind(steps_per_epoch, total, warmup_epochs=warmup_epochs)
    return True


@settings(max_examples=30)
@given(**LENGTHS, final_factor=st.sampled_from([0.0, 0.01, 0.3, 1.0]))
def test_cosine_is_linear_then_cosine_annealing(steps_per_epoch, total, warmup_epochs, final_factor) -> None:
    if longer_than_the_run(Cosine, steps_per_epoch, total, warmup_epochs):
        return
    warmup = warmup_of(warmup_epochs, steps_per_epoch, total)
    schedule = Cosine(steps_per_epoch, total, warmup_epochs=warmup_epochs, final_factor=final_factor)

    def make(theirs, base):
        annealing = lr_scheduler.CosineAnnealingLR(
            theirs, T_max=max(1, total - 1 - warmup), eta_min=final_factor * base
        )
        if not warmup:
            return annealing
        return lr_scheduler.SequentialLR(theirs, [linear(theirs, warmup), annealing], [warmup])

    torch.testing.assert_close(applied(schedule, total), reference(make, total), rtol=1e-9, atol=1e-15)


@settings(max_examples=30)
@given(
    **LENGTHS,
    milestones=st.lists(st.floats(0.01, 0.99), max_size=4).map(sorted).map(tuple),
    factor=st.sampled_from([0.1, 0.5, 0.94]),
)
def test_multistep_is_linear_times_torchs(steps_per_epoch, total, warmup_epochs, milestones, factor) -> None:
    if longer_than_the_run(MultiStep, steps_per_epoch, total, warmup_epochs):
        return
    warmup = warmup_of(warmup_epochs, steps_per_epoch, total)
    schedule = MultiStep(
        steps_per_epoch, total, milestones=milestones, factor=factor, warmup_epochs=warmup_epochs
    )

    def make(theirs, base):
        del base
        falls = lr_scheduler.MultiStepLR(theirs, [round(m * total) for m in milestones], gamma=factor)
        return lr_scheduler.ChainedScheduler([linear(theirs, warmup), falls]) if warmup else falls

    torch.testing.assert_close(applied(schedule, total), reference(make, total), rtol=1e-9, atol=0)


@given(steps_per_epoch=st.integers(1, 9), total=st.integers(1, 40))
def test_constant_is_the_base_rate(steps_per_epoch, total) -> None:
    expected = reference(lambda theirs, _: lr_scheduler.ConstantLR(theirs, factor=1.0), total)
    torch.testing.assert_close(applied(Constant(steps_per_epoch, total), total), expected, rtol=0, atol=0)


# Ties, differences within and beyond the relative threshold of 1e-4, zero, and both signs
LEVELS = [-2.0, -1.0, -1.00005, -1.0002, 0.0, 1e-9, 0.5, 0.50004, 0.49996, 0.5001, 0.4999, 3.0]


@given(
    values=st.lists(st.sampled_from(LEVELS), min_size=1, max_size=40),
    eval_every=st.integers(1, 3),
    steps_per_epoch=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
    factor=st.sampled_from([0.3, 0.5, 0.94]),
    patience=st.integers(0, 3),
    min_factor=st.sampled_from([0.0, 0.01, 0.4]),
)
def test_plateau_is_torchs(values, eval_every, steps_per_epoch, mode, factor, patience, min_factor) -> None:
    """Values are of epochs; the metric is there in every `eval_every`th alone. Patience counts those."""
    steps = steps_per_epoch * len(values)
    ours = ReduceOnPlateau(
        steps_per_epoch,
        steps,
        monitor="val/loss",
        mode=mode,
        factor=factor,
        patience=patience,
        min_factor=min_factor,
    )
    group = optimizer()
    theirs = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base) for base in BASES]
    schedulers = [
        lr_scheduler.ReduceLROnPlateau(
            o, mode=mode, factor=factor, patience=patience, min_lr=min_factor * b, eps=0
        )
        for o, b in zip(theirs, BASES)
    ]
    for step in range(steps):
        set_lr(group, ours(step))
        expected = [o.param_groups[0]["lr"] for o in theirs for _ in "dn"]
        assert [g["lr"] for g in group.param_groups] == pytest.approx(expected, rel=1e-12, abs=0)
        epoch = step // steps_per_epoch
        if (step + 1) % steps_per_epoch == 0 and (epoch + 1) % eval_every == 0:
            ours.observe({"val/loss": values[epoch], "train/loss": math.nan})
            ours.load_state_dict(json.loads(json.dumps(ours.state_dict())))  # as a resume does
            for scheduler in schedulers:
                scheduler.step(values[epoch])


@given(evaluations=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=25))
def test_early_stopping_counts_since_the_last_strictly_better_top1(evaluations) -> None:
    """Evaluations are (top-1 in quarters, loss): ties in one, in both, in none."""
    state = TrainState()
    for n, (quarters, loss) in enumerate(evaluations, start=1):
        is_best = state.judge({"val/top1": quarters / 4, "val/loss": float(loss)}, epoch=n - 1)
        tops = [top for top, _ in evaluations[:n]]
        assert state.evaluations_since_best == n - 1 - tops.index(max(tops))
        ranks = [(top, -other) for top, other in evaluations[:n]]
        assert is_best == (ranks.index(max(ranks)) == n - 1)
        assert (state.best["val/top1"], -state.best["val/loss"]) == (max(ranks)[0] / 4, max(ranks)[1])


# ------------------------------------------------------------------------------------------------- real runs
class Rates(NullTracker):
    """Remembers the rates of all groups at each step, and the metrics of each epoch."""

    def __init__(self) -> None:
        self.rates, self.epochs = [], []

    def after_step(self, *arguments) -> None:
        optimizer = next(a for a in arguments if isinstance(a, torch.optim.Optimizer))
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def after_epoch(self, step, epoch, metrics) -> None:
        del step, epoch
        self.epochs.append(metrics)


def run(folder, *settings):
    """7 epochs of 3 steps (the last of one step), with layer decay."""
    settings = (
        "data.limit=40",
        "data.batch_size=13",
        "model.depth=2",
        "model.embed_dim=16",
        "model.num_heads=2",
        "optimizer.lr=0.003",
        "optimizer.layer_decay=0.7",
        "trainer.max_steps=19",
        "trainer.save_every_epochs=9",
        f"run_dir={folder}",
        *settings,
    )
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(settings))
    trainer = build_run(cfg, Launch(overrides=list(settings), choices={}), Console()).trainer
    trainer.tracker = Rates()
    bases = [group["lr"] for group in trainer.optimizer.param_groups]
    assert bases == pytest.approx([base for base in BASES for _ in "dn"])
    trainer.fit()
    return trainer.tracker


@pytest.mark.parametrize(
    ("schedule", "multiplier"),
    [
        ("constant", lambda step: 1.0),
        (
            "cosine",  # null: 6 steps of warmup are more than a fifth of 19, which is 3
            lambda step: (
                (step + 1) / 4 if step < 3 else 0.01 + 0.495 * (1 + math.cos(math.pi * (step - 3) / 15))
            ),
        ),
        ("multistep", lambda step: min(1, (step + 1) / 4) * 0.1 ** ((step >= 11) + (step >= 16))),
    ],
)
def test_a_run_applies_it_to_all_groups(tmp_path, schedule, multiplier) -> None:
    rates = run(tmp_path / "run", f"schedule={schedule}").rates
    expected = [[base * multiplier(step) for base in BASES for _ in "dn"] for step in range(19)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=1e-6, atol=0)


def test_a_run_steps_the_plateau_where_it_evaluates(tmp_path) -> None:
    """Epochs 2, 4, 6 and the last: the same as torch's scheduler that sees those metrics alone."""
    listening = ("schedule=plateau", "schedule.patience=0", "schedule.mode=max", "schedule.min_factor=0.3")
    tracker = run(tmp_path / "run", *listening, "trainer.eval_every_epochs=2")
    assert [n for n, metrics in enumerate(tracker.epochs, 1) if "val/loss" in metrics] == [2, 4, 6, 7]
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(theirs, mode="max", factor=0.5, patience=0, min_lr=0.3, eps=0)
    expected = []
    for metrics in tracker.epochs:
        expected += [[base * theirs.param_groups[0]["lr"] for base in BASES for _ in "dn"]] * 3
        if "val/loss" in metrics:
            scheduler.step(metrics["val/loss"])
    torch.testing.assert_close(torch.tensor(tracker.rates), torch.tensor(expected[:19]), rtol=1e-6, atol=0)
    assert any(a != b for a, b in itertools.pairwise(tracker.rates)), "it never acted"
