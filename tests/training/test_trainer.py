"""The loop: accumulation, non-finite steps, budgets, early stopping, what is tested and saved."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import PATCHES, TINY, build, checkpoint_hashes, load_trained, vit_train_here, with_trained_head
from torch import nn

from vit_train.checkpoint import load, resolve_link
from vit_train.errors import ConfigError, NonFiniteError
from vit_train.report.history import read_events
from vit_train.runs.record import open_run_dir
from vit_train.training.evaluation import evaluate
from vit_train.training.guard import Guard, Signals, Stop
from vit_train.training.objective import CrossEntropy
from vit_train.training.state import TrainState
from vit_train.training.tracker import NullTracker

# Nothing draws but the data's own augmentation, and the update is linear in the gradient
PLAIN = (
    *PATCHES,
    "model.drop_rate=0",
    "model.attn_drop_rate=0",
    "model.drop_path_rate=0",
    "trainer.precision=fp32",
    "trainer.ema_decay=null",
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "schedule=constant",
)


class Diary(NullTracker):
    """Remembers the metrics of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict] = []

    def after_epoch(self, step, epoch, metrics) -> None:
        self.epochs.append({"step": step, "epoch": epoch + 1, **metrics})


def ready(*overrides):
    """A trainer whose run directory can be continued, with a diary."""
    run = build(*overrides)
    open_run_dir(run.run_dir, run.config)
    run.trainer.tracker = Diary()
    return run.trainer


def last_state(run_dir):
    return load(resolve_link(run_dir / "checkpoints/last")).state["train"]


# ---------------------------------------------------------------------------------------------- accumulation
@pytest.mark.parametrize("limit", [80, 11])
def test_accumulation_changes_no_weight(in_tmp, limit) -> None:
    """11 images are one batch that 2 or 4 do not divide: the pieces weigh what they hold."""
    weights = []
    for pieces in (1, 2, 4):
        trainer = ready(
            *TINY,
            *PLAIN,
            f"data.limit={limit}",
            f"trainer.grad_accum_steps={pieces}",
            f"run_dir=run_{pieces}",
            "trainer.max_steps=4",
        )
        start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.fit()
        assert trainer.state.step == 4
        weights.append(trainer.model.state_dict())
    assert any(not torch.allclose(weights[0][name], start[name], rtol=1e-3) for name in start)
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_training_metrics_of_an_epoch_are_means_over_its_images(in_tmp) -> None:
    """With a learning rate of 0 the epoch is one pass over the images, in any cut."""
    metrics = []
    for pieces in (1, 4):
        trainer = ready(
            *TINY,
            *PLAIN,
            "augment=none",
            "optimizer.lr=1e-30",
            "trainer.epochs=1",
            f"trainer.grad_accum_steps={pieces}",
            f"run_dir=run_{pieces}",
        )
        torch.manual_seed(0)
        with_trained_head(trainer.model)
        trainer.fit()
        metrics.append(trainer.tracker.epochs[-1])
    batch = trainer.parts.data.examples("train", 80)
    images, targets = trainer.parts.eval_transform(batch, 0, 0)
    with torch.no_grad():
        logits = trainer.model.eval()(images)
    assert len(targets) == 80
    loss = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).item()
    for epoch in metrics:
        assert epoch["train/loss"] == pytest.approx(loss, rel=1e-5)
        assert epoch["train/top1"] == (logits.argmax(1) == targets).double().mean().item()


class InParts(CrossEntropy):
    """Cross entropy that says which part of it smoothing is, and how many classes a batch has."""

    part_names = ("smoothing", "classes")

    def forward(self, model, images, targets):
        loss, logits = super().forward(model, images, targets)
        plain = self.per_sample(logits, targets).mean()
        return loss, logits, loss.detach() - plain, torch.tensor(float(targets.unique().numel()))


def test_the_parts_of_a_loss_are_logged_and_survive_an_interruption(in_tmp) -> None:
    typed = (
        *TINY,
        "objective._target_=test_trainer.InParts",
        "trainer.precision=fp32",
        "tracker.log_every_steps=1",
    )
    vit_train_here(*typed, "run_dir=whole", cwd=in_tmp)
    vit_train_here(*typed, "run_dir=cut", "trainer.stop_at_step=7", cwd=in_tmp)
    vit_train_here("resume=cut", "trust=test_trainer", cwd=in_tmp)
    whole, cut = (read_events(in_tmp / run / "metrics.jsonl") for run in ("whole", "cut"))
    timeless = [{k: v for k, v in event.items() if k != "images_per_second"} for event in whole]
    assert timeless == [{k: v for k, v in event.items() if k != "images_per_second"} for event in cut]
    steps, epochs = ([e for e in whole if e["event"] == kind] for kind in ("step", "epoch"))
    assert [step["step"] for step in steps] == list(range(1, 16))
    for epoch in epochs:
        own = [step for step in steps if 5 * epoch["epoch"] - 5 < step["step"] <= 5 * epoch["epoch"]]
        for name in InParts.part_names:
            assert epoch[f"train/{name}"] == pytest.approx(sum(step[name] for step in own) / 5)
        assert 0 < abs(epoch["train/smoothing"]) < epoch["train/loss"]
        assert 2 < epoch["train/classes"] <= 8  # of the 8 images of a micro-batch


class Unnamed(InParts):
    """Names one part of two."""

    part_names = ("smoothing",)


def test_parts_without_a_name_are_refused(in_tmp) -> None:
    done = vit_train_here(*TINY, "objective._target_=test_trainer.Unnamed", "run_dir=run", cwd=in_tmp)
    assert done.code == 2
    assert "objective: 2 parts of the loss, and part_names is ('smoothing',)" in done.err


# -------------------------------------------------------------------------------------------- non-finite steps
class Poisoned(CrossEntropy):
    """Cross entropy whose loss or gradient breaks once `poison` is set."""

    poison = ""

    def forward(self, model, images, targets):
        loss, logits = super().forward(model, images, targets)
        if self.poison == "loss":
            return loss * math.nan, logits
        if self.poison == "gradient":  # of 1e30 in every logit, while the loss stays what it is
            outputs = model(images)
            return loss + 1e30 * (outputs - outputs.detach()).sum(), logits
        return loss, logits


@pytest.mark.parametrize(
    ("poison", "what"),
    [
        ("loss", "the loss is nan"),
        ("gradient", "the gradient norm is inf"),
        ("weight", "the loss is nan"),
    ],
)
def test_a_nonfinite_step_changes_nothing(in_tmp, poison, what) -> None:
    trainer = ready(*TINY, "objective._target_=test_trainer.Poisoned", "run_dir=run")
    trainer.train_loader.set_position(0, 0)
    batches = list(trainer.train_loader)

    def everything():
        snapshot = trainer.strategy.snapshot(trainer.model, trainer.ema, trainer.optimizer)
        state = {name: tensor.numpy().tobytes() for name, tensor in snapshot.items()}
        return state, trainer.state.step, trainer.sums.tolist()

    trainer.guard = Guard(trainer.strategy, Signals())
    first = everything()
    for batch in batches[:2]:
        trainer.train_step(batch, 0)
    trainer.objective.poison = poison
    if poison == "weight":
        with torch.no_grad():
            next(trainer.model.parameters())[0] = math.nan
    before = everything()
    assert {name.split("/")[0] for name in before[0]} == {"model", "ema", "optimizer"}
    assert before[0] != first[0]
    with pytest.raises(NonFiniteError) as caught:
        trainer.train_step(batches[2], 0)
    after = everything()
    assert after[0].keys() == before[0].keys()
    assert [name for name, data in before[0].items() if after[0][name] != data] == []
    assert after[1:] == before[1:]
    message, index = str(caught.value), batches[2].index.tolist()
    assert message.startswith(f"{what} at step 3; the update was not made.")
    sources = [trainer.parts.data.source("train", i) for i in index]
    assert sources[0].startswith("digits image ")
    assert message.endswith(f"The batch held {', '.join(sources[:3])} and 13 more")


def test_the_same_steps_without_poison_go_through(in_tmp) -> None:
    """The control: the objective above is no error by itself."""
    trainer = ready(*TINY, "objective._target_=test_trainer.Poisoned", "run_dir=run", "trainer.epochs=1")
    trainer.fit()
    assert trainer.state.step == 5


def test_a_nonfinite_run_ends_with_what_it_saved_before(in_tmp) -> None:
    trainer = ready(*TINY, "objective._target_=test_trainer.Poisoned", "run_dir=run")

    class Trap(Diary):
        def after_epoch(self, step, epoch, metrics) -> None:
            trainer.objective.poison = "loss"

    trainer.tracker = Trap()
    with pytest.raises(NonFiniteError, match="at step 6;"):
        trainer.fit()
    assert last_state(in_tmp / "run")["step"] == 5


# ------------------------------------------------------------------------------------- evaluation and its ears
def test_early_stopping_counts_evaluations(in_tmp) -> None:
    """With a learning rate of 0 the first evaluation stays the best."""
    settings = ("optimizer.lr=1e-30", "trainer.epochs=20", "trainer.early_stop_patience=2", "run_dir=run")
    trainer = ready(*TINY, *PATCHES, *settings, "trainer.eval_every_epochs=2")
    trainer.fit()
    assert [epoch["epoch"] for epoch in trainer.tracker.epochs if "val/top1" in epoch] == [2, 4, 6]
    assert (trainer.state.closed_epochs, trainer.state.stopped_early) == (6, True)
    state = last_state(in_tmp / "run")
    assert (state["step"], state["stopped_early"], state["best"]["epoch"]) == (30, True, 2)


def test_early_stopping_waits_while_it_gets_better(in_tmp) -> None:
    trainer = ready(
        *TINY, "trainer.early_stop_patience=1", "run_dir=run", "trainer.epochs=4", "optimizer.lr=0.001"
    )
    trainer.fit()
    tops = [epoch["val/top1"] for epoch in trainer.tracker.epochs]
    better = [after > before for before, after in itertools.pairwise(tops)]
    assert len(tops) == (better.index(False) + 2 if False in better else 4)


def test_a_tie_with_a_lower_loss_is_the_best_but_no_improvement() -> None:
    state = TrainState()
    for top1, loss in ((0.5, 1.0), (0.5, 0.9), (0.5, 0.8), (0.4, 0.1)):
        state.judge({"val/top1": top1, "val/loss": loss}, epoch=0)
    assert (state.best["val/loss"], state.evaluations_since_best) == (0.8, 3)
    assert state.judge({"val/top1": 0.51, "val/loss": 2.0}, epoch=4)
    assert state.evaluations_since_best == 0


@pytest.mark.parametrize(("every", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_eval_every_epochs(in_tmp, every, evaluated) -> None:
    """The last epoch is always evaluated; the others are closed without."""
    trainer = ready(*TINY, f"trainer.eval_every_epochs={every}", "trainer.epochs=5", "run_dir=run")
    trainer.fit()
    assert [epoch["epoch"] for epoch in trainer.tracker.epochs if "val/top1" in epoch] == evaluated
    assert [epoch["epoch"] for epoch in trainer.tracker.epochs if "train/top1" in epoch] == [1, 2, 3, 4, 5]


def test_without_a_validation_split_the_best_is_the_last(in_tmp) -> None:
    trainer = ready(*TINY, "data.val_fraction=0", "run_dir=run")
    test = trainer.fit()
    links = [resolve_link(in_tmp / "run/checkpoints" / name) for name in ("best", "last")]
    assert links[0] == links[1] == in_tmp / "run/checkpoints/step_00000015"
    assert trainer.state.best is None
    assert set(test) == {"test/loss", "test/top1", "test/macro_top1", "test/top5"}
    assert not any(name.startswith("val") for epoch in trainer.tracker.epochs for name in epoch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.early_stop_patience=2", "data.val_fraction=0"], r"trainer\.early_stop_patience needs a validation split; set data\.val_fraction"),
        (["schedule=plateau", "schedule.monitor=val/los"], r"schedule\.monitor=val/los is not measured here; choose train/loss, train/top1, val/loss, val/top1, val_raw/loss, val_raw/top1"),
        (["schedule=plateau", "schedule.monitor=val_raw/loss", "trainer.ema_decay=null"], r"val_raw/loss is not measured here; choose train/loss, train/top1, val/loss, val/top1$"),
        (["schedule=plateau", "data.val_fraction=0"], r"schedule\.monitor=val/loss is not measured here; choose train/loss, train/top1$"),
    ],
)  # fmt: skip
def test_nobody_listens_to_what_is_not_measured(in_tmp, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*TINY, *overrides)


@pytest.mark.parametrize("monitor", ["train/loss", "train/top1", "val/loss", "val/top1", "val_raw/top1"])
def test_a_schedule_may_listen_to_what_is_measured(in_tmp, monitor) -> None:
    trainer = ready(
        *TINY, "schedule=plateau", f"schedule.monitor={monitor}", "trainer.epochs=1", "run_dir=run"
    )
    trainer.fit()
    assert trainer.schedule.best == trainer.tracker.epochs[0][monitor]


class Turncoat(CrossEntropy):
    """Learns for the 5 steps of the first epoch and then unlearns."""

    calls = 0

    def forward(self, model, images, targets):
        self.calls += 1
        loss, logits = super().forward(model, images, targets)
        return (loss if self.calls <= 5 else -3 * loss), logits


def test_what_is_tested_is_the_best_checkpoint(in_tmp) -> None:
    settings = ("objective._target_=test_trainer.Turncoat", "trainer.grad_accum_steps=1", "run_dir=run")
    trainer = ready(*TINY, *PLAIN, *settings, "optimizer.momentum=0", "optimizer.lr=1.0")
    tested = trainer.fit()
    state = last_state(in_tmp / "run")
    assert (state["best"]["epoch"], state["step"]) == (1, 15)
    assert state["best"]["val/loss"] < state["last"]["val/loss"]

    def test_metrics(checkpoint):
        return evaluate(
            load_trained(checkpoint, device=torch.device("cpu")).model,
            trainer.parts.data.loader("test"),
            objective=trainer.objective,
            transform=trainer.parts.eval_transform,
            strategy=trainer.strategy,
            precision="fp32",
            num_classes=10,
        ).metrics("test")

    assert test_metrics(in_tmp / "run") == tested
    assert test_metrics(in_tmp / "run/checkpoints/best") == tested
    assert test_metrics(in_tmp / "run/checkpoints/last")["test/loss"] > tested["test/loss"]


def test_the_average_is_another_model_and_is_saved(in_tmp) -> None:
    trainer = ready(*TINY, "run_dir=run", "trainer.max_steps=3", "data.val_fraction=0")
    trainer.fit()
    saved = load(resolve_link(in_tmp / "run/checkpoints/last")).tensors
    raw, average = trainer.model.state_dict(), trainer.ema.module.state_dict()
    assert set(raw) == set(average)
    for name, tensor in raw.items():
        assert torch.equal(saved[f"model/{name}"], tensor)
        assert torch.equal(saved[f"ema/{name}"], average[name])
    assert any(not torch.equal(tensor, average[name]) for name, tensor in raw.items())


def test_without_an_average_only_raw_weights_are_measured(in_tmp) -> None:
    trainer = ready(*TINY, "run_dir=run", "trainer.ema_decay=null", "trainer.epochs=1")
    trainer.fit()
    assert "val/top1" in trainer.tracker.epochs[0]
    assert not any(name.startswith("val_raw") for name in trainer.tracker.epochs[0])
    saved = load(resolve_link(in_tmp / "run/checkpoints/last")).tensors
    assert not any(name.startswith("ema/") for name in saved)


# ----------------------------------------------------------------------------------------- budgets and limits
def test_a_budget_in_steps_ends_in_the_middle_of_an_epoch_and_can_grow(in_tmp) -> None:
    settings = (*TINY, "schedule=constant", "data.val_fraction=0")
    whole = ready(*settings, "run_dir=whole", "trainer.max_steps=12")
    whole.fit()
    assert (whole.total_epochs, whole.state.step, whole.state.closed_epochs) == (3, 12, 3)
    part = ready(*settings, "run_dir=parts", "trainer.max_steps=7")
    part.fit()
    assert (part.state.step, part.state.closed_epochs) == (7, 2)
    grown = ready(*settings, "run_dir=parts", "trainer.max_steps=12")
    assert (grown.state.step, grown.state.closed_epochs) == (7, 1)
    grown.fit()
    assert [epoch["step"] for epoch in grown.tracker.epochs] == [10, 12]
    assert checkpoint_hashes(in_tmp / "parts") == checkpoint_hashes(in_tmp / "whole")


def test_a_budget_that_ended_within_an_epoch_is_at_its_end(in_tmp) -> None:
    """Interrupted while it was tested: everything is saved, and the same command tests again."""
    settings = (*TINY, "run_dir=run", "trainer.max_steps=7")
    tested = ready(*settings).fit()
    again = ready(*settings)
    assert (again.state.step, again.state.closed_epochs) == (7, 2)
    assert again.fit() == tested
    assert again.tracker.epochs == []


def test_a_step_to_stop_at_leaves_the_schedule_alone(in_tmp) -> None:
    trainer = ready(*TINY, "run_dir=run", "trainer.stop_at_step=4")
    assert trainer.total_steps == 15
    assert trainer.fit() == Stop("stopped at step 4 (trainer.stop_at_step)")
    assert last_state(in_tmp / "run")["step"] == 4
    again = ready(*TINY, "run_dir=run", "trainer.stop_at_step=4")
    assert again.fit() == Stop("stopped at step 4 (trainer.stop_at_step)")
    assert again.state.step == 4


def test_a_deadline_that_is_over_saves_the_start(in_tmp) -> None:
    trainer = ready(*TINY, "run_dir=run", "trainer.stop_after_minutes=0")
    assert trainer.fit().reason == "stopped after 0 minutes (trainer.stop_after_minutes)"
    assert last_state(in_tmp / "run")["step"] == 0


def test_a_deadline_ends_a_run_on_the_way(in_tmp) -> None:
    trainer = ready(*TINY, "run_dir=run", "trainer.stop_after_minutes=0.01", "trainer.epochs=100000")
    stop = trainer.fit()
    assert stop == Stop("stopped after 0.01 minutes (trainer.stop_after_minutes)")
    assert 0 < trainer.state.step < trainer.total_steps
    assert last_state(in_tmp / "run")["step"] == trainer.state.step
    assert trainer.state.seconds >= 0.6


def test_fewer_images_than_a_batch_are_one_step_an_epoch(in_tmp) -> None:
    trainer = ready(*TINY, "data.limit=10", "data.batch_size=64", "run_dir=run")
    assert (trainer.steps_per_epoch, trainer.total_steps) == (1, 3)
    trainer.fit()
    assert trainer.state.step == 3


# --------------------------------------------------------------------------------------------------- families
@pytest.mark.parametrize(
    "model",
    [
        ("model=deit_cifar", "model.depth=1", "model.embed_dim=24"),
        ("model=swin_cifar", "model.depths=[1,1]", "model.num_heads=[2,2]", "model.embed_dim=16"),
        ("model=hybrid_cifar", "model.depth=1", "model.embed_dim=24"),
        ("model=resnet_cifar", "model.widths=[8,16]"),
    ],
    ids=["deit", "swin", "hybrid", "resnet"],
)
def test_every_family_trains(in_tmp, model) -> None:
    settings = (
        "data.limit=40",
        "data.batch_size=16",
        "data.num_workers=0",
        "trainer.max_steps=2",
        "run_dir=run",
    )
    trainer = ready(*model, *settings, "trainer.ema_decay=0.9")
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    metrics = trainer.fit()
    assert 0 <= metrics["test/top1"] <= 1
    assert math.isfinite(metrics["test/loss"])
    frozen = [n for n, p in trainer.model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert frozen == [], "parameters that never moved"
    assert checkpoint_hashes(in_tmp / "run")
