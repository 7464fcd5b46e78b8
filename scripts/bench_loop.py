"""What the training loop costs over a bare forward, backward and optimizer step on the same tensors.

    python scripts/bench_loop.py [--rounds 12] [--steps 6] [key=value ...]

Builds the run `vit-train key=value ...` would build (vit_cifar on CIFAR-10-sized images of random pixels by
default, with its own recipe: clipping, averaged weights, bf16 where that is faster), takes batches that
are in memory already, and alternates short rounds of

    bare   autocast forward, cross entropy, backward, fused AdamW step, zero_grad
    loop   Trainer.train_step: normalisation, learning rate, seeding, micro-batches, gradient norm and
           clipping, the one host read, optimizer, average, running figures

in one process. Both start from the same weights. Prints the median time of a step, the median ratio of
neighbouring rounds, and how much of the difference the averaged weights and clipping are, which a bare loop
that had them would pay as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from vit_train.config.build import build_run
from vit_train.config.check import Launch, config_dir
from vit_train.data import Batch
from vit_train.report.console import Console
from vit_train.system.precision import autocast
from vit_train.training.guard import Guard, Signals
from vit_train.training.optimizers import adamw
from vit_train.training.tracker import NullTracker
from vit_train.training.trainer import Trainer


def make_folder(root: Path, size: int = 32, classes: int = 10, images: int = 16) -> None:
    """An image folder of random pixels, so that a real run can be built."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(classes):
            folder = root / split / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6, help="steps per round")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with built(arguments.overrides) as trainer:
        print(json.dumps(measure(trainer, arguments.rounds, arguments.steps), indent=1))


@contextmanager
def built(typed: list[str]) -> Iterator[Trainer]:
    """The trainer of the run that `vit-train` with these arguments would build."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "images")
        defaults = ["model=vit_cifar", "trainer=cifar", "data=imagefolder", "data.batch_size=128"]
        overrides = [
            *defaults,
            f"data.root={folder}/images",
            "data.num_workers=0",
            f"run_dir={folder}/run",
            *typed,
        ]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            run = build_run(compose("train", overrides=overrides), Launch(overrides=overrides), Console())
        run.trainer.tracker = NullTracker()
        run.trainer.guard = Guard(run.trainer.strategy, Signals())
        yield run.trainer


def random_batch(trainer: Trainer) -> Batch:
    """One of the size that training has, in memory."""
    device, data = trainer.strategy.device, trainer.parts.data
    size = min(trainer.parts.about["config"]["data"]["batch_size"], data.sizes["train"])
    generator = torch.Generator().manual_seed(0)
    shape = (size, data.in_channels, data.img_size, data.img_size)
    return Batch(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device),
        torch.randint(0, data.num_classes, (size,), generator=generator).to(device),
        torch.arange(size).to(device),
        torch.zeros(size, dtype=torch.int64).to(device),
    )


def measure(trainer: Trainer, rounds: int, steps: int) -> dict[str, object]:
    """Medians over alternating rounds."""
    device, batch = trainer.strategy.device, random_batch(trainer)
    size = len(batch.targets)
    images, targets = trainer.parts.train_transform(batch, 0, 0)
    model = copy.deepcopy(trainer.model)
    optimizer = adamw(model, lr=1e-3)

    def bare() -> None:
        with autocast(trainer.precision, device):
            loss = torch.nn.functional.cross_entropy(model(images).float(), targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def extras() -> None:
        trainer.strategy.clip_grad_norm(trainer.model, trainer.grad_clip_norm)
        if trainer.ema is not None:
            trainer.ema.update(trainer.model, 100)

    loop = lambda: trainer.train_step(batch, 0)  # noqa: E731
    for warm_up in (bare, loop):
        timed(warm_up, 3, device)
    times: dict[str, list[float]] = {"bare": [], "loop": []}
    for i in range(rounds):  # in turn, and the first of a pair takes turns as well
        pair = (("bare", bare), ("loop", loop))
        for name, step in pair if i % 2 else reversed(pair):
            times[name].append(timed(step, steps, device))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
    extra = timed(extras, 20, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [loop / bare for bare, loop in zip(times["bare"], times["loop"])]
    return {
        "device": trainer.strategy.describe(),
        "precision": trainer.precision,
        "batch": size,
        "rounds": rounds,
        "steps_per_round": steps,
        "bare_ms_per_step": round(1e3 * medians["bare"], 3),
        "loop_ms_per_step": round(1e3 * medians["loop"], 3),
        "images_per_second": round(size / medians["loop"], 1),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min_max": [round(min(ratios), 4), round(max(ratios), 4)],
        "of_which_clipping_and_average_ms": round(1e3 * extra, 3),
    }


def timed(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds per call."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
