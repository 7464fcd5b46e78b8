"""Continuing a run: from which checkpoint, and what a continuation may change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unicodedata import normalize

from vit_train import checkpoint
from vit_train.errors import CheckpointError, ConfigError, DataError
from vit_train.runs.record import package_versions, read_facts
from vit_train.system import places


def checkpoint_to_continue(
    run_dir: Path, named: Path | None, fits: checkpoint.Fits
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint named, which nothing stands in for; else the newest one of the run that verifies.

    Returns:
        It (None before the first save), and a line about each newer one that cannot be used.

    Raises:
        CheckpointError: there are some, and none can be used.
        ConfigError: the one named is not the newest.
    """
    if named is not None:
        found = checkpoint.load(named, fits)
        newest = checkpoint.checkpoint_directories(run_dir / "checkpoints")[0]
        if found.path.resolve() != newest.resolve():
            raise ConfigError(
                f"{named} is not the newest checkpoint of the run: {newest.name} is. A run has one history; "
                f"type {places.as_typed('resume', run_dir)}, or copy the run and leave out the later "
                "checkpoints"
            )
        return found, []
    newest_valid, problems = checkpoint.newest_valid(run_dir, fits)
    if newest_valid is None and problems:
        raise CheckpointError(f"{run_dir} holds no valid checkpoint: {'; '.join(problems)}")
    return newest_valid, problems


# ----------------------------------------------------------------------------------------- what may change
# How a key of the configuration may differ between a run and its continuation. A prefix covers what is
# below it; whatever is not listed is identity: it must be equal.
_FREE = (
    "run_dir",
    "resume",
    "summary",
    "name",
    "tracker",
    "objective.teacher",  # a moved one is still the same: its SHA-256 says so
    "objective.teacher_min_top1",
    "data.root",  # a moved folder is still the same data: the fingerprint says so
    "data.patch_size",  # is the model's; the size it led to is stored
    "data.num_workers",
    "data.worker_timeout_seconds",
    "data.cache",
    "trainer.stop_at_step",
    "trainer.stop_after_minutes",
    "trainer.save_every_steps",
    "trainer.save_every_epochs",
    "trainer.keep_checkpoints",
    "trainer.async_save",
    "trainer.on_nonfinite",
    "trainer.auto_batch",  # what it found is in grad_accum_steps
)
_BUDGET = ("trainer.epochs", "trainer.max_steps")
_GROWABLE = (*_BUDGET, "trainer.early_stop_patience")
_HARDWARE = ("strategy",)
_CADENCE = ("trainer.eval_every_epochs",)


def compare(
    stored: Mapping[str, Any], new: Mapping[str, Any], *, cadence_matters: bool
) -> dict[str, list[str]]:
    """Sorts every difference of two resolved configurations by what it means for an exact continuation.

    Returns lines `key: stored -> new` under `identity`, `grown` and `hardware`; what is free is left out. The
    cadence matters where the schedule or early stopping listens to the evaluations.
    """
    free = _FREE if cadence_matters else _FREE + _CADENCE
    before, after = flat(stored), flat(new)
    lines: dict[str, list[str]] = {"identity": [], "grown": [], "hardware": []}
    for key in sorted({*before, *after}):
        old, now = before.get(key, "(absent)"), after.get(key, "(absent)")
        if old == now or _covered(key, free):
            continue
        kind = "grown" if key in _GROWABLE else "hardware" if _covered(key, _HARDWARE) else "identity"
        lines[kind].append(f"{key}: {_typed(old)} -> {_typed(now)}")
    return lines


def _typed(value: Any) -> str:
    """A value as it is typed: null, true, 0.1, [1, 2]."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _covered(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Full key -> value, of a tree of plain data."""
    if isinstance(tree, Mapping) and tree:
        values: dict[str, Any] = {}
        for name, value in tree.items():
            values |= flat(value, f"{prefix}.{name}" if prefix else str(name))
        return values
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def check_continuation(stored: Mapping[str, Any], config: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Sorts the differences; returns what to tell the user.

    Raises:
        ConfigError: keys differ that decide what the run is.
    """
    schedule, trainer = config["schedule"], config["trainer"]
    listens = schedule.get("monitor") is not None or trainer["early_stop_patience"] is not None
    identity, budget, hardware = compare(stored, config, cadence_matters=listens).values()
    if identity:
        raise ConfigError(
            f"{run_dir} holds a run with another configuration ({'; '.join(identity)}); "
            "choose another run_dir, or type the values it has"
        )
    notes = [
        f"{line}: the schedule now spans the new budget" if line.startswith(_BUDGET) else line
        for line in budget
    ]
    if hardware:
        notes.append(f"{'; '.join(hardware)}: results may differ in the last bits from here on")
    return notes


def grown(stored: Mapping[str, Any], new: Mapping[str, Any], *, patience: bool = True) -> bool:
    """Whether a continuation has another budget than the run, or (where asked) another patience."""
    keys = _GROWABLE if patience else _BUDGET
    return any(flat(stored).get(key) != flat(new).get(key) for key in keys)


def check_budget(stored: Mapping[str, Any], trainer: Any) -> int:
    """A run can grow but not shrink: its schedule has been spanning the old budget, which is returned."""
    before = int(stored.get("max_steps") or (stored.get("epochs") or 0) * trainer.steps_per_epoch)
    if trainer.total_steps < before:
        epochs = -(-before // trainer.steps_per_epoch)
        raise ConfigError(
            f"{trainer.total_steps} steps are fewer than the {before} of the run; "
            f"type trainer.epochs={epochs} or more (trainer.max_steps=null), or start a new run"
        )
    return before


def rate_jump(before: int, trainer: Any) -> list[str]:
    """A note where a larger budget than `before` (steps) changes the rate at the last step done."""
    step, make, budgets = trainer.state.step - 1, trainer.parts.make_schedule, (before, trainer.total_steps)
    old, new = (make(trainer.steps_per_epoch, budget)(step) for budget in budgets)
    if step < 0 or old == new:
        return []
    lr, factor = trainer.optimizer.param_groups[0]["lr"], f" ({new / old:.3g} x)" if old else ""
    return [f"with the larger budget the learning rate jumps from {lr * old:.1e} to {lr * new:.1e}{factor}"]


def check_machine(run_dir: Path, device: str) -> list[str]:
    """One warning where a run goes on elsewhere: it is no longer promised to be bit for bit the same."""
    facts = read_facts(run_dir)
    if not facts:
        return []
    now = {"device": device, **package_versions()}
    then = {"device": facts.get("device"), **facts.get("versions", {})}
    changed = [f"{key} {then.get(key)} -> {value}" for key, value in now.items() if then.get(key) != value]
    return [f"{', '.join(changed)}: results may differ in the last bits from here on"] if changed else []


def check_data(
    found: checkpoint.Checkpoint, data: Any, fingerprint: str, run_dir: Path, *, force: bool
) -> list[str]:
    """The data, which is set up, is that of the run, or the user insists (`force`) that it may have changed.

    Returns what to tell the user.

    Raises:
        DataError: it differs, or differs more than can be continued.
    """
    if found.state.get("dataset_fingerprint") == fingerprint:
        return []
    inference, train = found.state.get("inference"), found.state.get("train")
    names = inference.get("class_names") if isinstance(inference, dict) else None
    steps = train.get("steps_per_epoch") if isinstance(train, dict) else None
    if not force:
        insist = f"resume=force {places.as_typed('run_dir', run_dir)}"
        raise DataError(
            f"the data differs from the data that {run_dir} was trained on (classes or files); restore it, "
            f"start a new run with another run_dir, or type {insist} to continue anyway"
        )
    if not isinstance(names, list) or [normalize("NFC", str(name)) for name in names] != data.class_names:
        raise DataError(f"the data has other classes than {run_dir} was trained on; start a new run")
    now = len(data.loader("train"))
    if steps != now:
        raise DataError(
            f"with the changed data an epoch has {now} steps instead of {steps}, so {run_dir} cannot "
            "continue where it stopped; start a new run"
        )
    return ["the data has changed since the run was started (resume=force): the continuation is not exact"]
