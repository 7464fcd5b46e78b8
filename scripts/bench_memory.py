"""What keeping freed memory saves of a training step on the CPU.

    python scripts/bench_memory.py [--rounds 8] [key=value ...]

Two processes build the run `vit-train key=value ...` would build, as bench_loop.py does; one of them gives
freed memory back to the system, as the C library does by default. They take steps in turn. Prints the median
seconds of a step of each, the median ratio of neighbouring rounds, page faults of a step, and the largest
resident size.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import resource
import statistics
import subprocess
import sys
import time

from vit_train.system import memory

sys.path.insert(0, __file__.rpartition("/")[0])
STEPS = 2  # in a round


def work(kept: bool, overrides: list[str]) -> None:
    """One of the processes: a round for each line of stdin."""
    if not kept:
        memory.keep_freed = lambda: None
    from bench_loop import built, random_batch

    out = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()), built(overrides) as trainer:
        step = functools.partial(trainer.train_step, random_batch(trainer), 0)
        step()
        print("ready", file=out, flush=True)
        for _ in sys.stdin:
            faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds = (time.perf_counter() - began) / STEPS
            usage = resource.getrusage(resource.RUSAGE_SELF)
            figures = [seconds, (usage.ru_minflt - faults) / STEPS, usage.ru_maxrss / 1024]
            print(json.dumps(figures), file=out, flush=True)


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--worker", choices=("kept", "given_back"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker == "kept", arguments.overrides)
        return
    found: dict[str, list[list[float]]] = {"given_back": [], "kept": []}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in found:
            command = [sys.executable, __file__, "--worker", name, *arguments.overrides]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            workers[name] = stack.enter_context(subprocess.Popen(command, **pipes))
            workers[name].stdout.readline()
        for number in range(arguments.rounds):
            for name in sorted(found, reverse=bool(number % 2)):
                print(file=workers[name].stdin, flush=True)
                found[name].append(json.loads(workers[name].stdout.readline()))
        for worker in workers.values():
            worker.stdin.close()
    ratios = [kept[0] / back[0] for kept, back in zip(found["kept"], found["given_back"], strict=True)]
    about = {}
    for name, rounds in found.items():
        seconds, faults, resident = (statistics.median(column) for column in zip(*rounds, strict=True))
        about[name] = {"seconds": round(seconds, 3), "page_faults": faults, "largest_mib": round(resident)}
    print(json.dumps({**about, "ratio": round(statistics.median(ratios), 3)}, indent=1))


if __name__ == "__main__":
    main()
