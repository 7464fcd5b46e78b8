"""The small files of a run directory: config.yaml, run.json, result.json. Each appears whole or not."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from vit_train.errors import passing_over
from vit_train.system import durable

_MAX_FACTS_BYTES = 16 * 2**20
_PACKAGES = ("vit-train", "torch", "torchvision", "numpy", "pillow", "safetensors", "hydra-core")


def open_run_dir(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Makes the run directory with its config.yaml; drops the result of a run that goes on.

    Raises:
        OSError: it cannot be written.
    """
    durable.make_directory(run_dir)
    # first of all: with the configuration of a larger budget beside it, the run would count as finished
    (run_dir / "result.json").unlink(missing_ok=True)
    durable.sync_directory(run_dir)
    durable.replace(
        run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    )


def write_facts(
    run_dir: Path,
    *,
    config: Mapping[str, Any],
    device: str,
    fingerprint: str,
    world_size: int,
    teacher: Mapping[str, Any] | None = None,
) -> None:
    """run.json: what is needed to repeat the run, with a line for each time it was started.

    Of the environment nothing is written: it may hold secrets.
    """
    import torch

    started: list[Any] = read_facts(run_dir).get("started", [])
    facts = {
        "started": [*started, {"time": datetime.now(UTC).isoformat(), "argv": sys.argv, "device": device}],
        "versions": package_versions(),
        "git": git_state(Path(__file__).resolve().parent),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device,
        "driver": driver_version(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "seed": config["seed"],
        "dataset_fingerprint": fingerprint,
        **({"teacher": teacher} if teacher is not None else {}),
        "config": config,
    }
    durable.replace(run_dir / "run.json", json.dumps(facts, indent=1))


def read_facts(run_dir: Path) -> dict[str, Any]:
    """run.json, or nothing where it is missing or damaged."""
    try:
        facts = json.loads(durable.read(run_dir / "run.json", _MAX_FACTS_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = {"started": list, "versions": dict}
    usual = isinstance(facts, dict) and all(
        isinstance(facts.get(k, kind()), kind) for k, kind in kinds.items()
    )
    return facts if usual else {}


def read_result(run_dir: Path) -> dict[str, float] | None:
    """The figures of result.json that are numbers, or None where it is missing or damaged."""
    with passing_over():
        result = json.loads(durable.read(run_dir / "result.json", _MAX_FACTS_BYTES))
        return {k: v for k, v in result.items() if isinstance(v, int | float) and isfinite(v)}
    return None


def driver_version() -> str | None:
    """CUDA as torch was built for it, and the driver's version; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        driver = done.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return f"CUDA {torch.version.cuda}, driver {driver}"


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree has changes; None outside a checkout of this package."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env=environment, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a wheel in somebody else's checkout is not in it
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str | None]:
    """Versions of what can change a bit of the result."""
    return {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def closing_figures(
    *, state: Any, test: Mapping[str, float], steps_per_epoch: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """The content of result.json: best and last validation, test, and the cost. Accuracies are fractions."""
    measured = ("loss", "top1", "macro_top1", "top5")
    val = [f"val/{name}" for name in measured]
    best, last = state.best or {}, state.last
    figures: dict[str, Any] = {f"best/{name}": best.get(name) for name in val}
    figures |= {"best/epoch": best.get("epoch")}
    figures |= {f"last/{name}": last.get(name) for name in val}
    figures |= {"last/epoch": state.closed_epochs}
    figures |= {name: test.get(name) for name in (f"test/{name}" for name in measured)}
    return figures | {
        "epochs": state.closed_epochs,
        "steps": state.step,
        "seconds": state.seconds,
        "images_per_second": state.step * batch_size / state.seconds if state.seconds else None,
        "steps_per_epoch": steps_per_epoch,
        "stopped_early": state.stopped_early,
        "seed": seed,
    }
