"""Where a run lives: which directory a command means, and whether it can be used."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

from vit_train.checkpoint import checkpoint_directories, must_be_readable
from vit_train.errors import CheckpointError, ConfigError
from vit_train.system.places import as_typed

CONFIG = "config.yaml"
# Beside its checkpoints
OWN_FILES = (CONFIG, "run.json", "metrics.jsonl", "result.json", "train.log", "history.png")


def choose_run_dir(run_dir: str | None, name: str, job_dir: Path | None) -> Path:
    """`run_dir`, else the sweep's job directory, else one keyed by the scheduler's job, else by the time.

    A requeued job has the id it had before, so the same command finds its run again.
    """
    if run_dir is not None:
        return Path(run_dir)
    if job_dir is not None:
        return job_dir
    home = Path("runs") / name
    array = [os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK")]
    job = "_".join(part for part in array if part) if all(array) else os.environ.get("SLURM_JOB_ID")
    job = job or os.environ.get("TORCHELASTIC_RUN_ID")
    if job and job != "none":
        return home / f"job_{re.sub(r'[^A-Za-z0-9._-]', '_', job)}"
    return home / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")


@must_be_readable()
def holds_run(folder: Path) -> bool:
    """Whether a directory is that of a run: it has a configuration, or checkpoints, which hold one."""
    return (folder / CONFIG).is_file() or bool(checkpoint_directories(folder / "checkpoints"))


@must_be_readable()
def find_run(resume: str, run_dir: str | None) -> tuple[Path, Path | None]:
    """What `resume=` means.

    Args:
        resume: a run directory, one of its checkpoints, `latest`, or `force` (the run at `run_dir`).
        run_dir: what the command says.

    Returns:
        The run directory, and the checkpoint where one was named.

    Raises:
        CheckpointError: there is none.
        ConfigError: `force` without `run_dir`, or another one.
    """
    if resume == "force":
        if run_dir is None:
            raise ConfigError("resume=force needs the run: type resume=force run_dir=PATH/TO/RUN")
        resume = run_dir
    if not resume:
        raise ConfigError("resume= is empty; type resume=PATH/TO/RUN, or latest")
    if resume == "latest":
        runs = [
            path.parent
            for pattern in ("runs/*/*", "sweeps/*/*")
            for path in Path().glob(f"{pattern}/{CONFIG}")
        ]
        if not runs:
            raise CheckpointError("resume=latest finds no run under ./runs; type resume=PATH/TO/RUN")
        resume = str(max(runs, key=lambda run: (run / CONFIG).stat().st_mtime))
    run, named = Path(resume), None
    if not holds_run(run):
        if run.absolute().parent.name != "checkpoints" or not holds_run(run.absolute().parent.parent):
            raise CheckpointError(
                f"resume={resume}: no run there (neither {CONFIG} nor checkpoints); type its directory, or "
                "latest"
            )
        run, named = Path(os.path.normpath(run / ".." / "..")), run  # which may be typed from within
    if run_dir is not None and Path(run_dir).resolve() != run.resolve():
        raise ConfigError(
            f"run_dir={run_dir}: resume= goes on in {run}; leave run_dir out, or type "
            f"{as_typed('init_from', run)} instead of resume= for a new run with its weights"
        )
    return run, named


def check_free(run_dir: Path) -> None:
    """A run directory is new, empty, or holds a run; and it can be written.

    Raises:
        ConfigError, CheckpointError: it cannot be used.
    """
    existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"run_dir={run_dir} cannot be made: {existing} is a file")
    if run_dir.is_dir():
        check_entries(run_dir)
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"run_dir={run_dir} cannot be written: no permission to write in {existing}")
    # what a crash leaves behind before config.yaml is in place: its log and hidden files
    begun = run_dir.is_dir() and not holds_run(run_dir)
    if begun and any(p.name[0] != "." and p.name != "train.log" for p in run_dir.iterdir()):
        raise ConfigError(f"run_dir={run_dir} holds files that are not a run; name a new or empty directory")


@must_be_readable()
def check_entries(run_dir: Path) -> None:
    """A run directory holds files and folders. A run writes into them: a link would lead it elsewhere.

    Raises:
        CheckpointError: it holds something else.
    """
    for entry in run_dir.iterdir():
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise CheckpointError(
                f"{entry} is a link or not a plain file, and a run would write to it; replace a link "
                "with the file or folder it points to"
            )
