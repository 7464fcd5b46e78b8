"""What a stored configuration may say.

It comes from a file that someone else may have written: it is read as plain data, of a bounded size, without
references to anything outside it, and names vit-train's own code, or that of packages the user trusts. Trust
is typed with each command, never stored and never read from a run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from vit_train import checkpoint
from vit_train.construct import TARGET, foreign_code
from vit_train.errors import UNFIT, CheckpointError, ConfigError, blame
from vit_train.runs.run_dir import CONFIG, check_entries
from vit_train.system import durable

_MAX_CONFIG_BYTES = 2**20
_MAX_CONFIG_VALUES = 100_000  # aliases let a few bytes of YAML stand for billions
_MAX_CONFIG_DEPTH = 30
_MAX_STRING = 10_000  # characters
_NODES = ("model", "data", "objective", "optimizer", "schedule", "strategy", "trainer", "tracker")


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
        return current(_parse_config(path)), []
    except CheckpointError as error:
        for folder in checkpoint.checkpoint_directories(run_dir / "checkpoints"):
            try:
                stored = checkpoint.load_state(folder)[0].get("config")
                check_stored(stored, folder)
            except CheckpointError:
                continue
            return current(stored), [f"{error}: the configuration comes from {folder}"]
        raise


@checkpoint.must_be_readable()
def _parse_config(path: Path) -> dict[str, Any]:
    # beyond syntax, a tag may not fit what follows it, a date may not exist
    with blame(CheckpointError, f"{path} cannot be read", (yaml.YAMLError, *UNFIT)):
        stored = yaml.safe_load(durable.read(path, _MAX_CONFIG_BYTES))
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
    "data": tuple(
        f"vit_train.data.{module}"
        for module in ("cifar", "digits", "folder.image_folder", "transforms.sample_transforms")
    ),
    "augment": ("vit_train.data.transforms.sample_transforms", "vit_train.data.transforms.batch_transforms"),
    "objective": ("vit_train.training.objective",),
    "optimizer": ("vit_train.training.optimizers",),
    "schedule": ("vit_train.training.schedules",),
    "strategy": ("vit_train.training.strategy",),
    "trainer": ("vit_train.training.trainer",),
    "tracker": ("vit_train.report.tracker",),
}
# Where older versions had this code: a class, or all of a module
_MOVED = {
    "vit_train.data.batch_transforms": "vit_train.data.transforms.batch_transforms",
    "vit_train.data.sample_transforms": "vit_train.data.transforms.sample_transforms",
    "vit_train.objective": "vit_train.training.objective",
    "vit_train.optim": "vit_train.training.optimizers",
    **{
        f"vit_train.optim.{name}": f"vit_train.training.schedules.{name}"
        for name in ("Constant", "Cosine", "MultiStep", "ReduceOnPlateau")
    },
    "vit_train.strategy": "vit_train.training.strategy",
    "vit_train.trainer": "vit_train.training.trainer",
    "vit_train.tracker": "vit_train.report.tracker",
}


def current(stored: Any) -> Any:
    """A stored configuration with its code where this version has it."""
    if not isinstance(stored, dict):
        return stored
    node = {key: current(value) for key, value in stored.items()}
    if isinstance(path := node.get(TARGET), str):
        module, _, name = path.rpartition(".")
        node[TARGET] = _MOVED.get(path) or (f"{_MOVED[module]}.{name}" if module in _MOVED else path)
    return node


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
