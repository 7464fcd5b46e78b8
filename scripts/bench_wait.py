"""How much of a training step is spent waiting for data.

    python scripts/bench_wait.py [--rounds 5] [--steps 20] [key=value ...]

Builds the run `vit-train key=value ...` would build (swin_cifar with CIFAR's recipe on the embedded digits at
32 x 32 x 3 by default, so that no file is needed) and alternates

    loader   steps on what the training loader yields, as `train_epoch` takes them
    fixed    as many steps on one of those batches, on the device already: nothing to wait for

Prints the median milliseconds of a step and the median of 1 - fixed / loader over the rounds: the share of
the step that data costs, its transfer included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from vit_train.config.build import build_run
from vit_train.config.check import Launch, config_dir
from vit_train.report.console import Console
from vit_train.training.guard import Guard, Signals
from vit_train.training.tracker import NullTracker

DEFAULTS = ["model=swin_cifar", "data.img_size=32", "data.in_channels=3", "augment=light"]
DEFAULTS += ["trainer=cifar", "optimizer=adamw", "strategy=auto", "data.batch_size=128"]


def forever(trainer: Any) -> Iterator[tuple[Any, int]]:
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        trainer.train_loader.set_position(epoch, 0)
        for batch in trainer.train_loader:
            yield batch, epoch


def timed(trainer: Any, batches: Iterator[tuple[Any, int]], steps: int) -> float:
    """Seconds a step."""
    if trainer.strategy.device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    for batch, epoch in itertools.islice(batches, steps):
        trainer.train_step(batch, epoch)
    if trainer.strategy.device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*DEFAULTS, f"run_dir={folder}/run", *arguments.overrides]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            run = build_run(compose("train", overrides=overrides), Launch(overrides=overrides), Console())
        trainer = run.trainer
        trainer.tracker = NullTracker()
        trainer.guard = Guard(trainer.strategy, Signals())
        trainer.model.train()
        loaded = forever(trainer)
        batch = trainer.strategy.to_device(next(loaded)[0])
        fixed = itertools.repeat((batch, 0))
        timed(trainer, loaded, 3), timed(trainer, fixed, 3)
        rounds = []
        for i in range(arguments.rounds):  # the first of a pair takes turns as well
            pair = {"loader": loaded, "fixed": fixed}
            times = {
                name: timed(trainer, pair[name], arguments.steps)
                for name in (sorted(pair, reverse=bool(i % 2)))
            }
            rounds.append(times)
        trainer.parts.data.close()
    print(
        json.dumps(
            {
                "device": trainer.strategy.describe(),
                "precision": trainer.precision,
                "notes": [note for note in run.notes if note.startswith("data.cache")],
                "batch": len(batch.targets),
                "loader_ms": round(1e3 * statistics.median(r["loader"] for r in rounds), 3),
                "fixed_ms": round(1e3 * statistics.median(r["fixed"] for r in rounds), 3),
                "share_of_waiting": round(statistics.median(1 - r["fixed"] / r["loader"] for r in rounds), 4),
                "rounds": [[round(1e3 * r["loader"], 3), round(1e3 * r["fixed"], 3)] for r in rounds],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
