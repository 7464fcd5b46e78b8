"""How long a save holds training up: the copy alone, a save in the background, a save in the foreground.

    python scripts/bench_save.py [model=vit_small ...]

Rounds in turn on one machine, medians. `save` is what the loop calls; in the background it should cost what
`snapshot` costs (the copy of weights, average and optimizer state) and no more. `written` is how long the
checkpoint takes to be durable on disk; `pause` the longest time meanwhile that the main thread could not run
(the writing thread held Python's lock).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from hydra import compose, initialize_config_dir

from vit_train.checkpoint.saver import Saver
from vit_train.config.build import build_run
from vit_train.config.check import Launch, config_dir
from vit_train.report.console import Console
from vit_train.training.guard import Guard, Signals
from vit_train.training.tracker import NullTracker

DEFAULTS = ["model=vit_small", "trainer=cifar", "data=digits", "data.img_size=224", "data.batch_size=2"]


def main() -> None:
    """Prints the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*DEFAULTS, "data.num_workers=0", f"run_dir={folder}/run", *arguments.overrides]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            run = build_run(compose("train", overrides=overrides), Launch(overrides=overrides), Console())
        trainer = run.trainer
        trainer.tracker = NullTracker()
        trainer.guard, trainer.started = Guard(trainer.strategy, Signals()), time.monotonic()
        trainer.train_loader.set_position(0, 0)
        trainer.train_step(next(iter(trainer.train_loader)), 0)  # the optimizer has its state from here on
        times: dict[str, list[float]] = {name: [] for name in ("snapshot", "background", "foreground")}
        written, pauses = [], []
        for _ in range(arguments.rounds):
            state = (trainer.model, trainer.ema, trainer.optimizer)
            times["snapshot"].append(seconds(lambda: trainer.strategy.snapshot(*state)))  # noqa: B023
            for name in ("background", "foreground"):
                trainer.saver.background = name == "background"
                start = time.perf_counter()
                times[name].append(seconds(lambda: trainer.save(best=False)))
                if name == "background":
                    pauses.append(longest_pause(trainer.saver))
                    written.append(time.perf_counter() - start)
                trainer.saver.finish()
        size = sum(t.nbytes for t in trainer.strategy.snapshot(*state).values())
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    print(
        json.dumps(
            {
                "device": trainer.strategy.describe(),
                "megabytes": round(size / 1e6, 1),
                "rounds": arguments.rounds,
                "seconds": {
                    **medians,
                    "written": round(statistics.median(written), 4),
                    "pause": round(statistics.median(pauses), 4),
                },
                "background_over_snapshot": round(medians["background"] / medians["snapshot"], 3),
                "foreground_over_background": round(medians["foreground"] / medians["background"], 2),
            },
            indent=1,
        )
    )


def longest_pause(saver: Saver) -> float:
    """Seconds between two turns of the main thread, at worst, until the save is over."""
    longest, last = 0.0, time.perf_counter()
    while saver._thread is not None and saver._thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        time.sleep(0.001)
    return longest


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
