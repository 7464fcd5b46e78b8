"""What a taught step costs over a step alone and a forward pass of the teacher, measured apart.

    python scripts/bench_distill.py [--rounds 9] [--steps 2] [--teachers vit_cifar resnet_cifar]
        [--batches 64 128] [--precisions fp32 bf16] [key=value ...]

Builds two runs that `vit-train key=value ...` would build (vit_cifar at 32 pixels by default), one with a
teacher and one without, for each teacher, precision and batch, and alternates short rounds of

    taught    Trainer.train_step with objective=distill
    alone     the same without a teacher
    teacher   the teacher's forward pass on the images of the step

in one process, on one batch in memory. Prints the median time of each, and the median over the rounds of
taught / (alone + teacher). On a CPU the times are those of the processor, which other work on the machine
disturbs less than the clock. The teachers are shipped models with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from vit_train.config.build import build_run
from vit_train.config.check import Launch, config_dir
from vit_train.report.console import Console
from vit_train.training.guard import Guard, Signals
from vit_train.training.tracker import NullTracker

DEFAULTS = ["data=digits", "data.img_size=32", "data.in_channels=3", "data.val_fraction=0", "trainer=cifar"]
HEAD = ("teacher", "precision", "batch", "taught ms", "alone ms", "teacher ms", "ratio", "min max")
ROW = "{:14} {:>9} {:>5} {:>10} {:>10} {:>10} {:>7}  {}"


def main() -> None:
    """Prints a table, one row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--teachers", nargs="+", default=["vit_cifar", "resnet_cifar"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    chosen = parser.parse_args()
    print(ROW.format(*HEAD))
    with tempfile.TemporaryDirectory() as folder:
        typed = [*DEFAULTS, f"run_dir={folder}/run", "data.num_workers=0", *chosen.overrides]
        for name in chosen.teachers:
            file = Path(folder) / f"{name}.pth"
            torch.save(build([*typed, f"model={name}"]).model.state_dict(), file)
            taught = ["objective=distill", f"objective.teacher={file}", f"objective.teacher_model={name}"]
            for precision in chosen.precisions:
                for batch in chosen.batches:
                    also = ["model=vit_cifar", f"trainer.precision={precision}", f"data.batch_size={batch}"]
                    pair = build([*typed, *also, *taught]), build([*typed, *also])
                    figures = measure(*pair, chosen.rounds, chosen.steps)
                    print(ROW.format(name, precision, batch, *figures), flush=True)


def build(overrides: list[str]) -> Any:
    """The trainer of a run, ready for its first step."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        trainer = build_run(
            compose("train", overrides=overrides), Launch(overrides=overrides), Console()
        ).trainer
    trainer.tracker, trainer.guard = NullTracker(), Guard(trainer.strategy, Signals())
    return trainer


def measure(taught: Any, alone: Any, rounds: int, steps: int) -> list[str]:
    """Medians over rounds, in turn and every other one backwards."""
    device, data = taught.strategy.device, taught.parts.data
    batch = taught.strategy.to_device(next(iter(taught.train_loader)))
    assert len(batch[0]) == taught.parts.about["config"]["data"]["batch_size"] <= data.sizes["train"]
    images, _ = taught.parts.train_transform(batch, 0, 0)
    calls: dict[str, Callable[[], object]] = {
        "taught": lambda: taught.train_step(batch, 0),
        "alone": lambda: alone.train_step(batch, 0),
        "teacher": lambda: taught.objective.teach(images),
    }
    times: dict[str, list[float]] = {name: [timed(call, 2, device)] for name, call in calls.items()}
    for number in range(rounds):
        for name in calls if number % 2 else reversed(calls):
            times[name].append(timed(calls[name], steps, device))
    kept = {name: values[1:] for name, values in times.items()}  # less the warm-up
    ratios = [a / (b + c) for a, b, c in zip(*kept.values())]
    medians = [f"{1e3 * statistics.median(values):.1f}" for values in kept.values()]
    return [*medians, f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} {max(ratios):.3f}"]


def timed(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds per call."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    synchronize()
    start = clock()
    for _ in range(count):
        call()
    synchronize()
    return (clock() - start) / count


if __name__ == "__main__":
    main()
