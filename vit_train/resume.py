"""Continuing a run: what it was, and what a continuation may change.

A stored configuration comes from a file that someone else may have written: it is read as plain data, of a
bounded size, without references to anything outside it, and names vit-train's own code, or that of packages
the user trusts. Trust is typed with each command, never stored and never read from a run.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from unicodedata import normalize

import yaml

from vit_train import checkpoint
from vit_train.construct import foreign_code
from vit_train.errors import UNFIT, CheckpointError, ConfigError, DataError, ran_out
from vit_train.run_dir import CONFIG, check_entries
from vit_train.system import durable, places

_MAX_CONFIG_BYTES = 2**20
_MAX_CONFIG_VALUES = 100_000  # aliases let a few bytes of YAML stand for billions
_MAX_CONFIG_DEPTH = 30
_MAX_STRING = 10_000  # characters
_NODES = ("model", "data", "objective", "optimizer", "schedule", "strategy", "trainer", "tracker")


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
                f"type {places.as_typed('resume', run_dir)}, or copy the run without what came later"
            )
        return found, []
    newest_valid, problems = checkpoint.newest_valid(run_dir, fits)
    if newest_valid is None and problems:
        raise CheckpointError(f"{run_dir} holds no valid checkpoint: {'; '.join(problems)}")
    return newest_valid, problems


def read_config(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """The stored configuration of a run: config.yaml, or where that is damaged the newest checkpoint's copy.

    Returns:
        The configuration, and a line where config.yaml could not be used.

    Raises:
        CheckpointError: there is neither, or it is not plain data.
    """
    check_entries(run_dir)
    path = run_dir / CONFIG
    try:
        return _parse_config(path), []
    except CheckpointError as error:
        for folder in checkpoint.checkpoint_directories(run_dir / "checkpoints"):
            try:
                stored = checkpoint.load_state(folder)[0].get("config")
                check_stored(stored, folder)
            except CheckpointError:
                continue
            return stored, [f"{error}: the configuration comes from {folder}"]  # type: ignore[return-value]
        raise


@checkpoint.must_be_readable()
def _parse_config(path: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load(durable.read(path, _MAX_CONFIG_BYTES))
    except (yaml.YAMLError, *UNFIT) as error:  # a tag may not fit what follows it, a date may not exist
        if ran_out(error):
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    check_stored(stored, path)
    return stored


def check_stored(stored: Any, path: Path) -> None:
    """A stored configuration is plain data with everything a run consists of.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} is damaged: expected keys and values")
    check_plain(stored, path)
    for group in _NODES:
        node = stored.get(group)
        if not isinstance(node, dict) or "_target_" not in node:
            raise CheckpointError(f"{path} is damaged: it does not say what the {group} is")
    trainer = stored["trainer"]
    for key in ("epochs", "max_steps", "grad_accum_steps"):
        if type(trainer.get(key)) not in (int, type(None)):
            raise CheckpointError(f"{path} is damaged: trainer.{key} is {trainer[key]!r}")


def check_plain(stored: Mapping[str, Any], path: Path) -> None:
    """A stored configuration is plain data: every value was resolved before it was written.

    Raises:
        CheckpointError: it refers to something (`${...}`), holds something else than plain values, or is far
            larger than any configuration.
    """
    left, waiting = _MAX_CONFIG_VALUES, [(0, stored)]
    while waiting:
        depth, value = waiting.pop()
        inside: list[Any] = []
        if isinstance(value, dict):
            inside = [*value.keys(), *value.values()]
        elif isinstance(value, list):
            inside = value
        elif isinstance(value, str) and "${" in value:
            raise CheckpointError(f"{path} holds the reference {value!r}; a stored configuration has none")
        elif not isinstance(value, str | int | float | None):
            raise CheckpointError(f"{path} holds a {type(value).__name__}; a stored configuration does not")
        left -= len(inside)
        endless = isinstance(value, str) and len(value) > _MAX_STRING
        if endless or left < 0 or depth > _MAX_CONFIG_DEPTH:
            raise CheckpointError(f"{path} cannot be read: it is too large for a configuration")
        waiting += [(depth + 1, one) for one in inside]


# ---------------------------------------------------------------------------------- which code it may name
Packages: TypeAlias = tuple[str, ...]
# The code each group may name; of the data not what fetches URLs and starts processes
STORED_CODE: Mapping[str, Packages] = {
    "model": ("vit_train.models", "vit_train.layers"),
    "data": tuple(f"vit_train.data.{m}" for m in ("cifar", "digits", "imagefolder", "sample_transforms")),
    "augment": ("vit_train.data.sample_transforms", "vit_train.data.batch_transforms"),
    "objective": ("vit_train.objective",),
    "optimizer": ("vit_train.optim",),
    "schedule": ("vit_train.optim",),
    "strategy": ("vit_train.strategy",),
    "trainer": ("vit_train.trainer",),
    "tracker": ("vit_train.report.tracker",),
}


def trusted(typed: Any, *, hydra: bool = False) -> Packages:
    """The packages that were typed (none, one or a sequence of them), imported.

    Raises:
        ConfigError: one cannot be imported.
    """
    several = isinstance(typed, Sequence) and not isinstance(typed, str)
    packages = tuple(map(str, typed if several else [typed] if typed else ()))
    for package in packages:
        try:
            importlib.import_module(package)
        except (Exception, SystemExit) as error:  # whatever its own code raises
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{trust_options([package], hydra=hydra).strip()} cannot be imported ({reason}): it must be "
                "installed, or the folder that holds it be on PYTHONPATH"
            ) from error
    return packages


def trust_options(packages: Sequence[str], *, hydra: bool = False) -> str:
    """The options to type behind a command: ` --trust a --trust b`, or ` 'trust=[a,b]'` for Hydra."""
    if hydra and len(packages) > 1:
        return f" 'trust=[{','.join(packages)}]'"
    return "".join(f" {'trust=' if hydra else '--trust '}{package}" for package in packages)


def allowed(
    nodes: Mapping[str, Any], trust: Packages, run_dir: Path | None = None, *, hydra: bool = False
) -> dict[str, Packages]:
    """The code each group of stored `nodes` may name; `run_dir` is that of `resume=`. Imports no other.

    Raises:
        CheckpointError: a node names other code.
    """
    allow = {group: (*code, *trust) for group, code in STORED_CODE.items()}
    if foreign := _foreign(nodes, allow):
        named = "; ".join(f"{key}: {path}" for key, path in foreign)
        new = sorted({path.partition(".")[0] for _, path in foreign})
        # What this program itself uses, loaded here, is an attacker's choice (torch.load), or of no use
        for module in ("sklearn.datasets", *(each for code in STORED_CODE.values() for each in code)):
            importlib.import_module(module)
        never = {*sys.stdlib_module_names, *(name.partition(".")[0] for name in sys.modules)}
        sensible = all(package.isidentifier() and package not in never for package in new)
        where, option = ("the checkpoint", hydra) if run_dir is None else (run_dir / CONFIG, True)
        offer = f"; type{trust_options([*trust, *new], hydra=option)} if the code is yours"
        raise CheckpointError(
            f"{where} names code that is not vit-train's{''.join(f', nor of {p}' for p in trust)} ({named})"
            f"{offer if sensible else ''}"
        )
    return allow


def packages_of(config: Mapping[str, Any]) -> list[str]:
    """The packages beside vit-train whose code a configuration names."""
    return sorted({path.partition(".")[0] for _, path in _foreign(config, STORED_CODE)})


def _foreign(nodes: Mapping[str, Any], allow: Mapping[str, Packages]) -> list[tuple[str, str]]:
    return [pair for group, node in nodes.items() for pair in foreign_code(node, allow.get(group, ()), group)]


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
    before = _budget(stored, trainer.steps_per_epoch)
    if trainer.total_steps < before:
        epochs = -(-before // trainer.steps_per_epoch)
        raise ConfigError(
            f"{trainer.total_steps} steps are fewer than the {before} the run was started with; "
            f"type trainer.epochs={epochs} or more (trainer.max_steps=null), or start a new run"
        )
    return before


def _budget(trainer: Mapping[str, Any], steps_per_epoch: int) -> int:
    return int(trainer.get("max_steps") or (trainer.get("epochs") or 0) * steps_per_epoch)


def rate_jump(before: int, trainer: Any) -> list[str]:
    """A note where a larger budget than `before` (steps) changes the rate at the last step done."""
    step, make, budgets = trainer.state.step - 1, trainer.parts.make_schedule, (before, trainer.total_steps)
    old, new = (make(trainer.steps_per_epoch, budget)(step) for budget in budgets)
    if step < 0 or old == new:
        return []
    lr, factor = trainer.optimizer.param_groups[0]["lr"], f" ({new / old:.3g} x)" if old else ""
    return [f"with the larger budget the rate goes from {lr * old:.1e} to {lr * new:.1e}{factor}"]


def check_machine(run_dir: Path, device: str) -> list[str]:
    """One warning where a run goes on elsewhere: it is no longer promised to be bit for bit the same."""
    from vit_train.report.record import package_versions, read_facts

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
            f"the data is not what {run_dir} was trained on (classes or files differ); restore it, start a "
            f"new run with another run_dir, or type {insist} to go on all the same"
        )
    if not isinstance(names, list) or [normalize("NFC", str(name)) for name in names] != data.class_names:
        raise DataError(f"the data has other classes than {run_dir} was trained on; start a new run")
    now = len(data.loader("train"))
    if steps != now:
        raise DataError(
            f"the changed data makes epochs of {now} steps instead of {steps}, so the place where {run_dir} "
            "stopped does not exist any more; start a new run"
        )
    return ["the data has changed since the run was started (resume=force): the continuation is not exact"]
