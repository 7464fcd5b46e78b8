"""A folder of a million images: how long until the first batch, and what its names cost each worker.

    python scripts/bench_folder.py [--files 1000000] [--root FOLDER] [--workers 4]

Makes the folder first (100 classes; hard links to a few small JPEGs, so that it takes no space), or uses
FOLDER where it is there already and keeps it. Then, each in new processes:

    start     a Python process that imports vit_train, sets the data module up and takes the first training
              batch with two workers, three times
    memory    of the main process and its workers after they have read 64,000 images, with `--workers` workers
              and with one; a page that several of them share counts once, and programs and libraries on disk,
              which other processes share as well, do not count. As a control the same with the names in a
              Python list

Prints one JSON object. Memory is read from /proc: Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_CLASSES = 100
LINKS_PER_FILE = 50_000  # ext4 allows 65,000
IMAGES_READ = 64_000  # touches nearly every page that a list of a million names has
BATCH_SIZE = 64


def make_folder(root: Path, num_files: int) -> None:
    """Random JPEGs of 32 pixels, the same ones again and again."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for c in range(NUM_CLASSES):
        folder = root / "train" / f"class_{c:03d}"
        folder.mkdir(parents=True)
        for i in range(num_files // NUM_CLASSES):
            path = folder / f"image_{c:03d}_{i:07d}.jpg"
            if i % LINKS_PER_FILE == 0:
                original = path
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            else:
                path.hardlink_to(original)


def set_up(root: Path, num_workers: int):
    """The data module as training would have it."""
    import torch

    from vit_train.data import ImageFolder

    data = ImageFolder(
        root=str(root), num_workers=num_workers, batch_size=BATCH_SIZE, val_fraction=0.01, cache="none"
    )
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    return data


def start(root: Path) -> None:
    """What is measured from outside: a new process takes its first batch."""
    data = set_up(root, num_workers=2)
    next(iter(data.loader("train")))
    print(json.dumps(data.sizes), flush=True)
    data.close()


def memory(root: Path, num_workers: int, *, as_list: bool) -> None:
    """Prints MiB of this process and its workers after they have read."""
    data = set_up(root, num_workers)
    if as_list:
        data.sources["train"].names = [*data.sources["train"].names]
    batches = iter(data.loader("train"))
    for _ in range(min(IMAGES_READ // BATCH_SIZE, len(data.loader("train")) - 1)):
        next(batches)
    main = os.getpid()
    workers = [int(pid) for pid in Path(f"/proc/{main}/task/{main}/children").read_text().split()]
    print(
        json.dumps(
            {
                "all": sum(mib(pid, "Pss_Anon") + mib(pid, "Pss_Shmem") for pid in (main, *workers)),
                "private_per_worker": sum(mib(pid, "Private_Dirty") for pid in workers) / len(workers),
            }
        ),
        flush=True,
    )
    data.close()


def mib(pid: int, kind: str) -> float:
    """One line of a process's memory, in MiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup says nothing of {kind}")


def asked(*arguments: object) -> tuple[float, object]:
    """Seconds until a new process of this script answers, and its answer."""
    command = [sys.executable, __file__, *map(str, arguments)]
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # more workers than cores
    ) as process:
        answer = process.stdout.readline()
        seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(process.returncode)
    return seconds, json.loads(answer)


def measure(root: Path, workers: int) -> dict[str, object]:
    """All figures of one folder."""
    started = [asked("--root", root, "--do", "start")[0] for _ in range(3)]
    used = {
        (how, number): asked("--root", root, "--do", how, "--workers", number)[1]
        for how in ("names", "list")
        for number in (1, workers)
    }
    result: dict[str, object] = {"start_seconds": [round(seconds, 2) for seconds in started]}
    for how in ("names", "list"):
        one, many = used[how, 1], used[how, workers]
        result[f"memory_mib_{how}"] = {
            "1_worker": {kind: round(value) for kind, value in one.items()},
            f"{workers}_workers": {kind: round(value) for kind, value in many.items()},
            "ratio_of_all": round(many["all"] / one["all"], 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000, help="how many")
    parser.add_argument("--root", type=Path, help="kept; made if it is not there")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--do", choices=("start", "names", "list"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do == "start":
        return start(arguments.root)
    if arguments.do is not None:
        return memory(arguments.root, arguments.workers, as_list=arguments.do == "list")
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or Path(folder) / "images"
        if not root.exists():
            make_folder(root, arguments.files)
        print(json.dumps({"files": arguments.files, **measure(root, arguments.workers)}, indent=1))
    return None


if __name__ == "__main__":
    main()
