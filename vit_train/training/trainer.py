"""The training loop, top to bottom: fit -> train_epoch -> train_step, then close_epoch.

One step: batch to the device -> transform (uint8 -> float, targets) -> cut into micro-batches -> forward,
backward -> one host read (`Guard.answer`) -> optimizer, schedule, EMA. An epoch is *closed* once it was
evaluated, the schedule and early stopping have seen it and its checkpoint is written; a run continues from
(step, closed_epochs) alone, because every random draw is a function of its position (rng.py).
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Literal

import torch
from torch import nn

from vit_train.checkpoint import Checkpoint, Snapshot, fits_model
from vit_train.checkpoint.saver import Saver
from vit_train.construct import Fraction, NotNegative, NotNegativeFloat, Positive, PositiveFloat, TwoOrMore
from vit_train.data import Batch
from vit_train.errors import ConfigError
from vit_train.rng import seed_device, use_deterministic_operators
from vit_train.system.precision import Precision, autocast, grad_scaler
from vit_train.training.ema import Ema
from vit_train.training.evaluation import evaluate, hits, train_means, wide
from vit_train.training.guard import Guard, Stop
from vit_train.training.nonfinite import NonFinite, OnNonFinite
from vit_train.training.optimizers import freeze_parts, set_lr
from vit_train.training.state import Parts, TrainState, check_listeners

_FIRST_PART = 4  # of the sums: behind loss, top-1 hits, top-5 hits and images


class Trainer:
    """Trains one model on one dataset.

    Args:
        parts: the objects it works with.
        epochs: passes over the training split; the schedule spans them.
        max_steps: the budget in optimizer steps instead of epochs.
        stop_at_step: stop for now once this many steps are done; the schedule does not change.
        stop_after_minutes: stop for now after this much wall time.
        precision: fp32, bf16, fp16 or auto (bf16 where that is faster).
        grad_accum_steps: micro-batches one batch is cut into; must divide data.batch_size.
        grad_clip_norm: gradients are scaled down to this total norm.
        ema_decay: of the averaged weights that are evaluated and saved beside the raw ones; null for none.
        freeze: modules or parameters that keep their weights, such as [patch_embed, blocks.0-5].
        compile: torch.compile the model (costs a minute at the start; gains on a GPU).
        eval_every_epochs: how often the validation split is evaluated; the last epoch always is.
        early_stop_patience: stop after this many evaluations in a row without a better validation top-1.
        save_every_epochs: how often a checkpoint is written at the end of an epoch; the last always is.
        save_every_steps: how often one is written inside an epoch.
        keep_checkpoints: how many of the newest stay on disk beside the best.
        async_save: checkpoints are written while training goes on.
        on_nonfinite: abort, skip (leave the step out) or rollback (and take the last checkpoint's weights)
            where the loss or a gradient is NaN or infinite; see nonfinite.py.
        deterministic: an operator without a deterministic implementation is an error.
        auto_batch: before step 1, halve the micro-batch until it fits in the device's memory.

    Raises:
        ValueError: two settings contradict each other, with both values.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        epochs: Positive,
        max_steps: Positive | None = None,
        stop_at_step: NotNegative | None = None,
        stop_after_minutes: NotNegativeFloat | None = None,
        precision: Precision = "auto",
        grad_accum_steps: Positive = 1,
        grad_clip_norm: PositiveFloat | None = None,
        ema_decay: Fraction | None = None,
        freeze: tuple[str, ...] = (),
        compile: bool = False,  # noqa: A002 - the key users type
        eval_every_epochs: Positive = 1,
        early_stop_patience: Positive | None = None,
        save_every_epochs: Positive = 1,
        save_every_steps: Positive | None = None,
        keep_checkpoints: TwoOrMore = 2,
        async_save: bool = True,
        on_nonfinite: OnNonFinite = "abort",
        deterministic: bool = False,
        auto_batch: bool = False,
    ) -> None:
        assert precision != "auto", "config/build.py resolves it"
        use_deterministic_operators(deterministic)
        self.parts = parts
        self.strategy = parts.strategy
        self.tracker = parts.tracker
        self.precision = precision
        self.grad_accum_steps = grad_accum_steps
        self.grad_clip_norm = grad_clip_norm
        self.eval_every_epochs = eval_every_epochs
        self.early_stop_patience = early_stop_patience
        self.save_every_epochs = save_every_epochs
        self.save_every_steps = save_every_steps
        self.keep_checkpoints = keep_checkpoints
        self.auto_batch = auto_batch
        self.guard = Guard(parts.strategy, parts.signals, stop_at_step, stop_after_minutes)
        self.started = time.monotonic()  # less the seconds of the parts before
        self.saver = Saver(parts.checkpointer, background=async_save, say=lambda text: self.tracker.say(text))
        self.train_loader = parts.data.loader("train")
        self.steps_per_epoch = len(self.train_loader)
        self.total_steps = epochs * self.steps_per_epoch if max_steps is None else max_steps
        self.total_epochs = math.ceil(self.total_steps / self.steps_per_epoch)

        self.model = freeze_parts(parts.model.to(self.strategy.device).train(), freeze)
        self.ema = Ema(self.model, decay=ema_decay) if ema_decay is not None else None
        if compile:
            self.model.compile()  # in place: parameter names stay clean
        self.forward = self.strategy.wrap(self.model)
        self.objective = parts.objective.to(self.strategy.device)
        self.loss_parts = getattr(self.objective, "part_names", ())  # an objective of yours may have none
        self.optimizer = parts.make_optimizer(self.model)
        self.schedule = parts.make_schedule(self.steps_per_epoch, self.total_steps)
        check_listeners(self.schedule, early_stop_patience, parts.data.sizes, ema=self.ema is not None)
        self.scaler = grad_scaler(precision, self.strategy.device)
        self.nonfinite = NonFinite(
            on_nonfinite, self.strategy, self.model, self.ema, self.optimizer, self.saver, parts.data.source
        )
        self.state = TrainState(sums=self._no_sums())
        self.sums = wide(self.strategy.device, self.state.sums)
        self.norm = torch.zeros((), device=self.strategy.device)  # of the gradient of the last step
        self.reopened = False  # whether a smaller budget had cut the open epoch short

    # ------------------------------------------------------------------------------------------- the run
    def fit(self) -> Stop | dict[str, float]:
        """Trains to the end, or until it is asked to stop. Either way everything is saved on return.

        After the end the model holds the weights a user would load: those of the best checkpoint.

        Returns:
            Why it stopped, or the test metrics (empty without a test split).

        Raises:
            NonFiniteError: the loss or a gradient became NaN or infinite; nothing was updated.
            SaveError: a checkpoint could not be written.
        """
        self.guard.start()
        self.train_loader.should_stop = self.guard.stop_waiting
        self.started = time.monotonic() - self.state.seconds
        try:
            if self.reopened:
                self.parts.checkpointer.put_best_back((self.state.best or {}).get("step"))
            stop = self.train()
            self.saver.finish()
            if stop:
                return stop
            best = self.saver.best(fits_model(self.model, ema=self.ema is not None))
            self.strategy.restore(best.tensors, self.model, self.ema, None)
            return self.test()
        finally:
            self.saver.close()

    def train(self) -> Stop | None:
        """All epochs that are left, or those until it is asked to stop."""
        stop = self.guard.asked(self.state.step)
        if (stop and self.state.step == 0) or (self.nonfinite.goes_back and self.state.anchor is None):
            self.save(best=False)  # so that there is something to continue from, or to go back to
        while not stop and not self.is_done():
            epoch = self.state.closed_epochs
            stop = self.train_epoch(epoch) or self.close_epoch(epoch)
        return stop

    def is_done(self) -> bool:
        """Whether the budget is spent, or early stopping ended the run."""
        return self.state.closed_epochs >= self.total_epochs or self.state.stopped_early

    def judge_patience(self) -> None:
        """Whether early stopping ends the run: after an evaluation, or because a continuation changed it."""
        patience = math.inf if self.early_stop_patience is None else self.early_stop_patience
        self.state.stopped_early = self.state.evaluations_since_best >= patience

    def train_epoch(self, epoch: int) -> Stop | None:
        """The remaining steps of one epoch; saves and returns the reason where it was asked to stop."""
        first = epoch * self.steps_per_epoch
        last = min(first + self.steps_per_epoch, self.total_steps)
        if self.state.step == last:  # interrupted while the epoch was being closed
            return None
        self.train_loader.set_position(epoch, self.state.step - first)
        self.tracker.begin_epoch(epoch, self.state.step - first, last - first, self.state.sums)
        for batch in self.train_loader:
            stop = self.train_step(batch, epoch)
            self.tracker.after_step(self.state.step, self.optimizer, self.sums, self.norm)
            if self.state.step == last:
                return None  # close_epoch asks again
            due = self.save_every_steps is not None and self.state.step % self.save_every_steps == 0
            if stop is not None or due:
                self.save(best=False, due=due)
            if stop is not None:
                return stop
        self.save(best=False, due=False)
        return self.guard.asked(self.state.step)  # nothing else ends the loader early

    def train_step(self, batch: Batch, epoch: int) -> Stop | None:
        """One optimizer step on one batch, however many micro-batches it is cut into."""
        step, strategy = self.state.step, self.strategy
        set_lr(self.optimizer, self.schedule(step))
        images, targets = self.parts.train_transform(strategy.to_device(batch), epoch, step)
        if step == 0:
            self.tracker.first_batch(self.model, images)
        sums = torch.zeros_like(self.sums)
        self.nonfinite.before_step()
        pieces = min(self.grad_accum_steps, len(images))  # a tiny set may be one batch smaller than that
        micro_batches = list(zip(images.tensor_split(pieces), targets.tensor_split(pieces)))
        for i, (x, y) in enumerate(micro_batches):
            seed_device(strategy.device, self.parts.seed, "step", step, i, strategy.rank)
            with strategy.grad_sync(self.model, i == len(micro_batches) - 1):
                with autocast(self.precision, strategy.device):
                    loss, logits, *parts = self.objective(self.forward, x, y)
                # weighted by size, so that the sum over micro-batches is the mean over the batch
                self.scaler.scale(loss * (len(x) / len(images))).backward()
            sums[0] += loss.detach() * len(x)
            sums[1:3] += hits(logits, y)
            if len(parts) != len(self.loss_parts):
                raise ConfigError(
                    f"objective: {len(parts)} parts of the loss, and part_names is {self.loss_parts}"
                )
            if parts:
                sums[_FIRST_PART:] += torch.stack(parts) * len(x)
        sums[3] += len(images)

        self.scaler.unscale_(self.optimizer)
        self.norm = strategy.clip_grad_norm(self.model, self.grad_clip_norm)
        # under loss scaling an infinite gradient is routine: the scaler skips the update and scales less
        infinite = ~self.norm.isfinite()
        skipped = infinite & self.scaler.is_enabled()
        answer = self.guard.answer(
            ~sums[0].isfinite() | (infinite & ~skipped), skipped=skipped, step=step + 1
        )
        if answer.nonfinite or answer.skipped:
            loss_seen = float(sums[0]) / len(images)
            scaling = not answer.nonfinite
            self.nonfinite.bad_step(self.state, batch, loss_seen, float(self.norm), scaling=scaling)
        else:
            self.nonfinite.good_step(self.state)
            self.scaler.step(self.optimizer)
            if self.ema is not None:
                self.ema.update(self.model, step)
            self.sums += sums
        self.scaler.update()
        self.optimizer.zero_grad()
        self.state.step += 1
        return answer.stop

    def close_epoch(self, epoch: int) -> Stop | None:
        """Evaluates, lets schedule and early stopping see it, saves; the run may then be at its end."""
        state = self.state
        last_epoch = epoch + 1 == self.total_epochs
        self.nonfinite.check(self.state)
        metrics = train_means(self.strategy.sum(self.sums), self.parts.data.num_classes, self.loss_parts)
        if state.step % self.steps_per_epoch:  # the budget ends here; a larger one opens the epoch again
            state.before_cut = {**self.stored_state(), "before_cut": None}
        is_best = False
        if (last_epoch or (epoch + 1) % self.eval_every_epochs == 0) and self.parts.data.sizes["val"]:
            measured = self.evaluate_split("val")
            if measured is None:  # asked to stop: evaluated again by the continuation
                self.save(best=False, due=False)
                return self.guard.asked(self.state.step)
            metrics |= measured
            is_best = state.judge(metrics, epoch)
        if self.schedule.monitor in metrics:
            self.schedule.observe(metrics)
        state.last = metrics
        state.sums = self._no_sums()
        state.closed_epochs = epoch + 1
        self.sums = wide(self.strategy.device, state.sums)
        self.judge_patience()
        stop = None if self.is_done() else self.guard.asked(self.state.step)
        self.tracker.after_epoch(state.step, epoch, metrics)
        due = last_epoch or is_best or (epoch + 1) % self.save_every_epochs == 0
        if due or stop or state.stopped_early:  # with more patience this would be an epoch like any other
            self.save(best=is_best or not self.parts.data.sizes["val"], due=due)
        return stop

    def test(self) -> Stop | dict[str, float]:
        """Test metrics of the weights at hand; empty without a test split."""
        if not self.parts.data.sizes["test"]:
            return {}
        metrics = self.evaluate_split("test")
        # stopped by a signal: everything was saved before, the continuation tests again
        return self.guard.asked(self.state.step) or {} if metrics is None else metrics

    # --------------------------------------------------------------------------------------- the services
    def evaluate_split(self, split: Literal["val", "test"]) -> dict[str, float] | None:
        """Metrics of a split as `<split>/...`: of the averaged weights where there are any, and in
        validation then also of the raw ones as `val_raw/...`. None where a signal ended it."""
        models: dict[str, nn.Module] = {split: self.model if self.ema is None else self.ema.module}
        if self.ema is not None and split == "val":
            models["val_raw"] = self.model
        metrics: dict[str, float] = {}
        loader = self.parts.data.loader(split)
        loader.should_stop = self.guard.stop_waiting
        for prefix, model in models.items():
            result = evaluate(
                model,
                self.tracker.progress(loader, prefix),
                objective=self.objective,
                transform=self.parts.eval_transform,
                strategy=self.strategy,
                precision=self.precision,
                num_classes=self.parts.data.num_classes,
                should_stop=self.parts.signals.arrived,
            )
            if result is None:
                return None
            metrics |= result.metrics(prefix)
        return metrics

    def save(self, *, best: bool, due: bool = True) -> None:
        """Hands a snapshot of this very moment to the saver; `due` unless an interruption asked for it."""
        self.nonfinite.check(self.state)
        state = self.state
        state.anchor = state.step if due else state.anchor
        self.tracker.flush()  # what is logged up to here is on disk before the step counts as done
        tensors = self.strategy.snapshot(self.model, self.ema, self.optimizer)
        about = {**self.parts.about, "train": self.stored_state()}
        kept = state.kept_steps()
        self.saver.save(Snapshot(tensors, about, state.step, best, self.keep_checkpoints, kept))

    def _no_sums(self) -> list[float]:
        return [0.0] * (_FIRST_PART + len(self.loss_parts))

    def stored_state(self) -> dict[str, Any]:
        """The state as plain data, brought up to date."""
        state = self.state
        state.steps_per_epoch = self.steps_per_epoch
        state.seconds = time.monotonic() - self.started
        state.sums = self.sums.tolist()
        state.schedule = self.schedule.state_dict()
        state.scaler = self.scaler.state_dict()
        return dataclasses.asdict(state)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint instead of from the start.

        Raises:
            RuntimeError, ValueError, TypeError: it does not fit this model or this version.
        """
        self.strategy.restore(checkpoint.tensors, self.model, self.ema, self.optimizer)
        self.state = TrainState.from_json(checkpoint.state["train"])
        if self.state.step < self.total_steps:
            if self.state.before_cut is not None:
                self.state = TrainState.from_json(self.state.before_cut)
                self.reopened = True
            # all that can be taken back in a checkpoint of an older version
            self.state.closed_epochs = min(self.state.closed_epochs, self.state.step // self.steps_per_epoch)
        if len(self.state.sums) != len(self._no_sums()):
            raise ValueError(
                f"{len(self.state.sums)} running sums, the objective needs {len(self._no_sums())}"
            )
        self.sums = wide(self.strategy.device, self.state.sums)
        self.schedule.load_state_dict(self.state.schedule)
        self.scaler.load_state_dict(self.state.scaler)
