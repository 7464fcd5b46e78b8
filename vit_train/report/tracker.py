"""Where figures go while a run lasts: TensorBoard, metrics.jsonl, the console.

Everything is logged against the optimizer step, so that after a resume one cut (`purge_step`) removes what
the continuation will write again.

Tags: `train_step/{loss,lr,grad_norm,images_per_second}` while an epoch lasts; `train/...`, `val/...`,
`val_raw/...` (raw weights beside an average) and `test/...` with loss, top1, top5; `epoch`. An objective that
names the parts of its loss has them in `train_step/...` and `train/...` as well.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from vit_train.construct import Positive
from vit_train.report import pictures
from vit_train.report.console import Console
from vit_train.report.history import read_events
from vit_train.system import durable
from vit_train.text import duration
from vit_train.training.tracker import NullTracker, Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vit_train.data import Batch

_UNEVEN = 0.1  # between top-1 and the mean of the classes


class Tracker(NullTracker):
    """TensorBoard event files, metrics.jsonl, progress bars and one line an epoch.

    Args:
        run_dir: where the files go.
        console: says the lines.
        tensorboard: whether event files are written.
        log_every_steps: how often the running figures are read from the device and logged. The first value
            after a start or a continuation covers one step, the second fewer than this.
        progress: bars; null shows them where stderr is a terminal.
        attention_every_epochs: how often TensorBoard gets a picture of where the model looks, besides the one
            at the end of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        console: Console,
        *,
        tensorboard: bool = True,
        log_every_steps: Positive = 10,
        progress: bool | None = None,
        attention_every_epochs: Positive | None = None,
    ) -> None:
        self.run_dir, self.console = run_dir, console
        self.tensorboard, self.log_every_steps = tensorboard, log_every_steps
        self.attention_every_epochs = attention_every_epochs
        self.show_bars = sys.stderr.isatty() if progress is None else progress
        self.writer: Any = None
        self.bar: tqdm[Any] | None = None
        self.file: IO[str] | None = None

    def start(self, plan: Plan) -> None:
        """Opens the files; on a continuation drops what was logged after the checkpoint."""
        self.plan = plan
        self.estimated = False
        self.epoch_time = time.perf_counter()  # an epoch that was interrupted at its end is only closed
        metrics_file = self.run_dir / "metrics.jsonl"
        kept = [event for event in read_events(metrics_file) if self._stands(event)]
        durable.replace(metrics_file, "".join(json.dumps(event) + "\n" for event in kept))
        self.file = metrics_file.open("a", encoding="utf-8")
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard cuts before a step, not after: what stands of that step is written again. It takes
            # the first cut it meets for the start of the run, so a new run has one too.
            self.writer = SummaryWriter(
                str(self.run_dir / "tensorboard"), purge_step=plan.first_step, flush_secs=10
            )
            for event in kept:
                if event["step"] == plan.first_step:
                    prefix = "train_step/" if event["event"] == "step" else ""
                    figures = {k: v for k, v in event.items() if k not in ("event", "step", "epoch_float")}
                    self._scalars(plan.first_step, {f"{prefix}{name}": v for name, v in figures.items()})

    def _stands(self, event: Mapping[str, Any]) -> bool:
        """Whether the continuation will not write an event (of metrics.jsonl) again: at the step it starts
        from an epoch may be open or closed, and a test is always to come."""
        step, kind = event["step"], event["event"]
        again = kind == "test" or (kind == "epoch" and event["epoch"] > self.plan.closed_epochs)
        return step < self.plan.first_step or (step == self.plan.first_step and not again)

    def first_batch(self, model: nn.Module, images: Tensor) -> None:
        """Logs the picture of an augmented batch and the model's graph."""
        if self.writer is None:
            return
        grid = pictures.batch_grid(images, self.plan.mean, self.plan.std)
        self._board(lambda writer: writer.add_image("train_batch", grid, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns about every shape it fixes
            try:
                self.writer.add_graph(model.eval(), images[:1])
            except Exception as error:  # a picture of the model is not worth a run
                self.console.say(f"no graph in TensorBoard: {str(error).splitlines()[0]}")
            finally:
                model.train()

    def begin_epoch(self, epoch: int, done: int, steps: int, sums: list[float]) -> None:
        """Opens the bar and the first window of running figures."""
        self.epoch = epoch
        self.window_sums, self.window_time = sums, time.perf_counter()
        self.epoch_time = time.perf_counter()
        if self.show_bars:
            total = -(-self.plan.total_steps // self.plan.steps_per_epoch)
            self.bar = tqdm(
                total=steps, initial=done, desc=f"epoch {epoch + 1}/{total}", unit="step", leave=False
            )

    def after_step(self, step: int, optimizer: Optimizer, sums: Tensor, norm: Tensor) -> None:
        """Reads and logs the running figures every `log_every_steps`."""
        if self.bar is not None:
            self.bar.update(1)
        if step % self.log_every_steps and step != self.plan.first_step + 1:
            return
        values, lr = sums.tolist(), float(optimizer.param_groups[0]["lr"])
        now = time.perf_counter()
        loss, top1, _, count, *parts = (new - old for new, old in zip(values, self.window_sums))
        if not count:  # every step since was left out
            return
        rate = count / (now - self.window_time)
        self.window_sums, self.window_time = values, now
        event = {
            "loss": loss / count,
            **{name: part / count for name, part in zip(self.plan.loss_parts, parts)},
            "lr": lr,
            "grad_norm": float(norm),
            "images_per_second": rate,
        }
        self._write("step", step, {**event, "epoch_float": step / self.plan.steps_per_epoch})
        self._scalars(step, {f"train_step/{name}": value for name, value in event.items()})
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {loss / count:.3f} top-1 {top1 / count:.1%} lr {lr:.1e} {rate:,.0f} images/s",
                refresh=False,
            )
        self._estimate(step, rate)

    def _estimate(self, step: int, rate: float) -> None:
        """Says once, after the first steps, how long the run will take."""
        if self.estimated or step < self.plan.first_step + min(20, self.log_every_steps + 1):
            return
        self.estimated = True
        plan = self.plan
        left = plan.total_steps - step
        # an image costs a third in evaluation: forward only
        images = left * plan.batch_size + left / plan.steps_per_epoch * plan.eval_images_per_epoch / 3
        seconds = images / rate
        advice = ""
        if seconds > 2 * 3600:
            advice = "; for a quick look type data.limit=5000, fewer trainer.epochs or a smaller model"
        self.console.say(f"about {duration(seconds)} to go, at {rate:,.0f} images/s{advice}")

    def after_epoch(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Logs the epoch's metrics and says them in one line."""
        elapsed = time.perf_counter() - self.epoch_time
        self._close_bar()
        self._write("epoch", step, {"epoch": epoch + 1, **metrics})
        self._scalars(step, {**metrics, "epoch": epoch + 1})
        total = -(-self.plan.total_steps // self.plan.steps_per_epoch)
        parts = [f"epoch {epoch + 1:{len(str(total))}d}/{total}"]
        for split in ("train", "val", "val_raw"):
            if f"{split}/top1" in metrics:
                label = split.replace("_raw", " (raw weights)")
                value = metrics.get(f"{split}/loss", math.nan)  # only what is finite is among them
                top1, macro = metrics[f"{split}/top1"], metrics.get(f"{split}/macro_top1")
                # beside it where it tells another story, as with classes of very different sizes
                uneven = macro is not None and abs(top1 - macro) > _UNEVEN
                beside = f" (mean of the classes {macro:.2%})" if uneven else ""
                parts.append(f"{label} loss {value:.4f} top-1 {top1:.2%}{beside}")
        self.console.say(" | ".join([*parts, duration(elapsed)]))
        if self.attention_every_epochs is not None and (epoch + 1) % self.attention_every_epochs == 0:
            self.picture("attention", self.plan.draw_attention, step)

    def progress(self, batches: Iterable[Batch], label: str) -> Iterable[Batch]:
        self._close_bar()
        if not self.show_bars:
            return batches
        return tqdm(batches, desc=label.replace("_raw", " (raw weights)"), unit="batch", leave=False)

    def test(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write("test", step, metrics)
        self._scalars(step, metrics)

    def say(self, text: str) -> None:
        """Says it, and logs it in train.log."""
        self.console.say(text)

    def text(self, tag: str, content: str) -> None:
        """Logs a text as a code block."""
        block = "\n".join(f"    {line}" for line in content.splitlines())
        self._board(lambda writer: writer.add_text(tag, block, 0))

    def picture(self, tag: str, draw: Callable[[], NDArray[np.uint8] | None], step: int) -> None:
        """Logs a picture, where there is something to draw."""
        if self.writer is None:
            return
        try:
            picture = draw()
        except Exception as error:  # a picture is not worth a run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.console.say(f"no picture of {tag} in TensorBoard: {reason}")
            return
        if picture is not None:
            self._board(lambda writer: writer.add_image(tag, picture, step, dataformats="HWC"))

    def hparams(self, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Logs to this run itself; SummaryWriter.add_hparams would make a run of its own."""
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        summaries = hparams(dict(parameters), dict(metrics))
        self._board(lambda writer: [writer.file_writer.add_summary(summary) for summary in summaries])

    def flush(self) -> None:
        if self.file is not None:
            try:
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as error:
                self.console.say(f"{self.run_dir / 'metrics.jsonl'} could not be written: {error.strerror}")
        self._board(lambda writer: writer.flush())

    def close(self) -> None:
        self._close_bar()
        file, self.file = self.file, None
        if file is not None:
            file.close()
        self._board(lambda writer: writer.close())
        self.writer = None

    def _board(self, write: Callable[[Any], object]) -> None:
        """Something for TensorBoard. A full disk costs its curves, not the run."""
        if self.writer is None:
            return
        try:
            write(self.writer)
        except OSError as error:
            self.writer = None
            self.console.say(f"TensorBoard gets nothing more from this process: {error.strerror or error}")

    def _scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        self._board(lambda writer: [writer.add_scalar(name, v, step) for name, v in metrics.items()])

    def _write(self, event: str, step: int, values: Mapping[str, float]) -> None:
        if self.file is not None:
            # without the gradient norm of a step that was left out: JSON knows neither NaN nor Infinity
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            with suppress(OSError):  # it stays in the buffer, and the next flush tells
                self.file.write(json.dumps({"event": event, "step": step, **finite}) + "\n")

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
