"""Everything that needs an accelerator, in one call: tests, throughput, recipes. Writes one JSON file.

    python scripts/accelerator_report.py --out report.json
    python scripts/accelerator_report.py --out report.json --recipes "model=swin_cifar data=cifar10"

1. `pytest -m gpu`: how many passed, failed and were skipped.
2. Throughput and the cost of the loop: scripts/bench_loop.py for one model of each family.
3. How long a step of swin_cifar waits for data: scripts/bench_wait.py, cached on the device, in memory, and
   read by workers.
4. Each recipe given with --recipes is trained as a user would, and its result.json is kept. An experiment is
   a recipe too: "experiment=swin_cifar_tutorial".

The file is rewritten after every part, so a call that is cut short keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHES = {
    "vit_cifar": ["model=vit_cifar", "data.batch_size=128"],
    "deit_cifar": ["model=deit_cifar", "data.batch_size=128"],
    "swin_cifar": ["model=swin_cifar", "data.batch_size=128"],
    "swin_cifar_w4": ["model=swin_cifar_w4", "data.batch_size=128"],
    "hybrid_cifar": ["model=hybrid_cifar", "data.batch_size=128"],
    "vit_small": ["model=vit_small", "data.img_size=224", "data.batch_size=64"],
    "vit_small compiled": [
        "model=vit_small",
        "data.img_size=224",
        "data.batch_size=64",
        "trainer.compile=true",
    ],
    "swin_tiny": ["model=swin_tiny", "data.img_size=224", "data.batch_size=64"],
}


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit code and output; 124 where the time ran out."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"no end within {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr


def gpu_tests(seconds: float) -> dict[str, Any]:
    """Counts of `pytest -m gpu`, and the failures."""
    code, output = run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"], seconds)
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)
    }
    failures = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": code, **counts, "failures": failures, "tail": "" if code == 0 else output[-3000:]}


def benchmark(script: str, overrides: list[str], seconds: float) -> dict[str, Any]:
    """What a script of this folder prints."""
    path = str(ROOT / "scripts" / script)
    code, output = run([sys.executable, path, "--rounds", "10", "--steps", "10", *overrides], seconds)
    found = re.search(r"^\{.*^\}", output, flags=re.MULTILINE | re.DOTALL)
    if code or not found:
        return {"exit_code": code, "tail": output[-1500:]}
    figures: dict[str, Any] = json.loads(found.group())
    return figures


def recipe(arguments: str, seconds: float) -> dict[str, Any]:
    """result.json of `vit-train ARGUMENTS`, and the wall time of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "vit_train", *arguments.split(), f"run_dir={folder}/run"]
        code, output = run(command, seconds)
        report: dict[str, Any] = {"exit_code": code, "wall_seconds": time.perf_counter() - start}
        result = Path(folder) / "run" / "result.json"
        return {**report, **(json.loads(result.read_text()) if result.exists() else {"tail": output[-1500:]})}


def main() -> None:
    """Runs all parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=[], metavar='"key=value ..."')
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--skip", nargs="*", default=[], choices=["tests", "throughput", "waiting"])
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    report: dict[str, Any] = {
        "accelerator": str(accelerator),
        "name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "devices": torch.accelerator.device_count() if accelerator else 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

    def keep(name: str, figures: Any) -> None:
        report[name] = figures
        arguments.out.write_text(json.dumps(report, indent=1))
        print(name, json.dumps(figures)[:200], flush=True)

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    if "tests" not in arguments.skip:
        keep("tests", gpu_tests(left()))
    if "throughput" not in arguments.skip:
        for name, overrides in BENCHES.items():
            keep(f"throughput {name}", benchmark("bench_loop.py", overrides, left()))
    if "waiting" not in arguments.skip:
        for cache in ("device", "ram", "none"):
            keep(f"waiting, cache {cache}", benchmark("bench_wait.py", [f"data.cache={cache}"], left()))
    for line in arguments.recipes:
        keep(f"recipe {line}", recipe(line, left()))


if __name__ == "__main__":
    main()
