"""A composed configuration, before anything is built from it: what is wrong with it, where configs are found.

`check_config` reports every error at once, with its full key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit_train.construct import Few, Seed, check, is_node
from vit_train.errors import UNFIT, ConfigError, blame
from vit_train.system.places import WEIGHT_FILES, expanded, open_plain
from vit_train.text import suggest

if TYPE_CHECKING:
    from vit_train.weights import Pretrained

GROUPS = ("model", "data", "augment", "objective", "optimizer", "schedule", "strategy", "trainer", "tracker")
CHOSEN = (*GROUPS, "experiment")  # by name: group=choice
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def config_dir() -> Path:
    """The folder of configs: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"vit-train is installed without its configs: neither in {here} nor beside it")


@dataclass(frozen=True)
class Launch:
    """How the command was typed, as Hydra tells it."""

    overrides: list[str] = field(default_factory=list)  # `key=value`
    choices: dict[str, str] = field(default_factory=dict)  # the config of each group
    job_dir: Path | None = None  # of this job of a sweep
    user_config_dirs: list[Path] = field(default_factory=list)  # --config-dir


@dataclass(frozen=True)
class Root:
    """The schema of the whole configuration: its root keys. The groups are nodes of their own."""

    model: Any
    data: Any
    augment: Any
    objective: Any
    optimizer: Any
    schedule: Any
    strategy: Any
    trainer: Any
    tracker: Any
    seed: Seed
    name: str | int | None = None
    init_from: str | None = None
    init_strict: bool = True
    run_dir: str | int | None = None
    resume: str | int | None = None
    summary: bool = False
    trust: str | tuple[str, ...] = ()


ROOT = tuple(field.name for field in fields(Root))


@dataclass(frozen=True)
class Augmentation:
    """The schema of `augment`, which holds nodes and is not one."""

    batch: Any = None
    sample: Callable[..., Any] | None = None
    repeats: Few = 1


def check_config(cfg: DictConfig) -> None:
    """Every error of a composed configuration at once, without building or touching anything.

    Raises:
        ConfigError: one line per error, each with its full key; alone, a secret that would be stored.
    """
    _refuse_secrets(cfg)  # first: the rest repeats the values it does not like
    broken = _broken_interpolations(cfg)
    sound = cfg.copy() if broken else cfg
    for key in broken:
        OmegaConf.update(sound, key, None)
    tree, copies = plain(sound), _copies(sound)
    pending = {key for key in copies if OmegaConf.select(sound, key) is None} | broken.keys()
    errors = [*broken.values(), *_unknown(tree)]
    root = {name: value for name, value in tree.items() if name in ROOT}
    if isinstance(augment := tree.get("augment"), dict):
        root["augment"] = {"_target_": "vit_train.config.check.Augmentation", **augment}
    errors += check({"_target_": "vit_train.config.check.Root", **root}, pending=frozenset(pending))
    folder = r"\1; type data=imagefolder as well, for a folder of images"
    errors = [re.sub(r"^(data\.root: \w+ has no such key).*", folder, error) for error in errors]
    keys = {error.partition(": ")[0] for error in errors}
    for copy, origin in copies.items():  # an error is said once, where the value was typed
        repeated = tuple(f"{copy}{key[len(origin) :]}: " for key in keys if key.startswith(origin))
        errors = [error for error in errors if not error.startswith(repeated)]
    nodes = {**tree, "augment": augment.get("batch") if isinstance(augment, dict) else None}
    for group in GROUPS:
        if not is_node(nodes.get(group)):
            key = "augment.batch" if group == "augment" else group
            errors.append(f"{key}: needs a `_target_`; choose one with {group}=...")
    if len(errors) > 1:
        lines = [f"{len(errors)} errors in the configuration:", *map(_with_choice, errors)]
        raise ConfigError("\n  ".join(lines))
    if errors:
        raise ConfigError(_with_choice(errors[0]))


def _unknown(tree: dict[str, Any]) -> list[str]:
    """A line for each key at the root that is not one: `lr` means `optimizer.lr`, `optimzer.lr` as well."""
    lines, it_has = [], f" (it has: {', '.join(ROOT)})"
    for key in sorted(tree.keys() - {*ROOT}):
        owners = [f"{group}.{key}" for group in GROUPS if key in (tree.get(group) or ())]
        guess = f"; did you mean {' or '.join(map(repr, owners))}?" if owners else suggest(key, ROOT)
        lines.append(f"{key}: the configuration has no such key{guess or it_has}")
    return lines


def _with_choice(line: str) -> str:
    """The same line, with the config of its group that has the key: `objective=distill has it`."""
    key, _, said = line.partition(": ")
    group, _, name = key.partition(".")
    if " has no such key (" not in said or group not in GROUPS:
        return line
    files = sorted((config_dir() / group).glob("*.yaml"))
    choices = [file.stem for file in files if name in yaml.safe_load(file.read_text(encoding="utf-8"))]
    return f"{line}; {group}={choices[0]} has it" if choices else line


def check_launch(launch: Launch, cfg: DictConfig) -> None:
    """What Hydra would accept silently and the user did not mean.

    Raises:
        ConfigError: a list of choices for one group, an empty mapping for a node, which would change nothing,
            or a user's config hidden by a built-in one.
    """
    groups = "|".join(CHOSEN)
    for override in launch.overrides:
        match = re.match(rf"^({groups})=\[(.*)\]$", override)
        if match:
            group, wanted = match.groups()
            first = wanted.split(",")[0].strip() or "NAME"
            raise ConfigError(
                f"{override}: one {group} per run; type {group}={first}, or -m {group}={wanted} for a sweep"
            )
        empty = re.fullmatch(r"\+*([\w.]+)=\{\s*\}", override)
        if empty and isinstance(found := OmegaConf.select(cfg, empty[1]), DictConfig) and found:
            raise ConfigError(f"{empty[1]}={{}}: an empty mapping changes nothing; leave it out")
    for folder in launch.user_config_dirs:
        for group, choice in launch.choices.items():
            name = f"{group}/{choice}.yaml"
            if (folder / name).is_file() and (config_dir() / name).is_file():
                raise ConfigError(f"{folder / name} has the name of a built-in config, which wins; rename it")


def _broken_interpolations(cfg: DictConfig, prefix: str = "") -> dict[str, str]:
    """Full key -> line, of each value that refers to nothing."""
    errors: dict[str, str] = {}
    keys = cfg.keys() if isinstance(cfg, DictConfig) else range(len(cfg))
    for key in keys:
        full = f"{prefix}.{key!s}" if prefix else str(key)
        try:
            value = cfg[key]
        except OmegaConfBaseException as error:
            errors[full] = f"{full}: {str(error).splitlines()[0]}"
            continue
        if OmegaConf.is_config(value):
            errors |= _broken_interpolations(value, full)
    return errors


def _refuse_secrets(cfg: DictConfig) -> None:
    """What a configuration holds is written into the run directory, for anyone to read.

    Raises:
        ConfigError: a value is taken from an environment variable whose name says that it is a secret.
    """
    text = OmegaConf.to_yaml(cfg, resolve=False)
    for name in re.findall(r"\$\{oc\.env:\s*([^},\s]+)", text):
        if _SECRET.search(name):
            raise ConfigError(
                f"${{oc.env:{name}}} would be written into the run directory, where others read it; let your "
                f"class take {name} from the environment itself"
            )


def _copies(cfg: DictConfig, prefix: str = "") -> dict[str, str]:
    """Keys whose value is that of another key, with that key; null where only the data will know it."""
    found: dict[str, str] = {}
    for key, written in OmegaConf.to_container(cfg, resolve=False).items():  # type: ignore[union-attr]
        full = f"{prefix}.{key!s}" if prefix else str(key)
        # ${data.img_size} ${oc.select:seed,0}; or one of several values, [32, ${model.embed_dim}]
        values = written if isinstance(written, list) else [written]
        if copied := [value for value in values if isinstance(value, str) and value.startswith("${")]:
            found[full] = re.sub(r".*[{:]([\w.]+)[},].*", r"\1", copied[0])
        elif isinstance(cfg[key], DictConfig):
            found |= _copies(cfg[key], full)
    return found


def plain(cfg: DictConfig) -> dict[str, Any]:
    """All of it that a run stores: Hydra's own settings and what is trusted are not part of it."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in ("hydra", "trust")}


def as_pretrained(cfg: DictConfig, weights: Pretrained, overrides: list[str]) -> list[str]:
    """How pretrained weights were trained goes into the configuration where nothing else was asked for.

    Returns:
        A line for each key that was set, and for each damaged checkpoint that was passed over.
    """
    notes = [f"init_from, checkpoint skipped: {line}" for line in weights.skipped]
    masks = cfg.model.get("mask_padding")
    if weights.mask_padding is not None and masks is not None and masks != weights.mask_padding:
        was = f"model.mask_padding={str(weights.mask_padding).lower()}"
        if is_typed("model.mask_padding", overrides):
            notes.append(f"the weights were trained with {was}, not with the value you typed")
        else:
            cfg.model.mask_padding = weights.mask_padding
            notes.append(f"{was}, as the weights were trained")
    known = [len(values) for values in (weights.mean, weights.std) if values is not None]
    left_open = [key for key in ("mean", "std") if cfg.data.get(key, ()) is None]
    if left_open == ["mean", "std"] and known == [cfg.data.get("in_channels")] * 2:
        cfg.data.mean, cfg.data.std = list(weights.mean or ()), list(weights.std or ())
        notes.append("data.mean and data.std are those the weights were trained with")
    return notes


def read_class_weights(cfg: DictConfig) -> None:
    """A file of class weights becomes the mapping it holds; the run keeps that, and never reads it again.

    Every class is read as text: `true`, `1e3` and `null` are names there.

    Raises:
        ConfigError: it cannot be read, or a weight is not a number.
    """
    path = OmegaConf.select(cfg, "objective.class_weights", throw_on_resolution_failure=False)
    if not isinstance(path, str) or not path.endswith(WEIGHT_FILES):
        return
    what = f"objective.class_weights={path} is not a file of `class: weight`"
    with blame(ConfigError, what, (OSError, yaml.YAMLError, *UNFIT)), open_plain(expanded(path)) as file:
        # BaseLoader makes nothing but text
        written = json.load(file) if path.endswith(".json") else yaml.load(file, yaml.BaseLoader)
        if not isinstance(written, dict) or any(isinstance(w, dict | list) for w in written.values()):
            raise ValueError("expected one `name: weight` a line")
        weights = {name: float(weight) for name, weight in written.items()}
    cfg.objective.class_weights = weights


def is_typed(key: str, overrides: list[str]) -> bool:
    """Whether the command line itself sets the key."""
    return any(override.lstrip("+").startswith(f"{key}=") for override in overrides)


def check_values(cfg: DictConfig) -> None:
    if cfg.objective.get("teacher", "") is None:
        raise ConfigError(
            "objective.teacher: missing; type objective.teacher=RUN (a run or checkpoint), torchvision:NAME "
            "or timm:NAME"
        )
    batch, pieces = cfg.data.get("batch_size"), cfg.trainer.grad_accum_steps
    if not isinstance(batch, int):
        raise ConfigError("data.batch_size: missing; name it in your own data config, or type it")
    if batch % pieces:
        raise ConfigError(
            f"data.batch_size={batch} is not divisible by trainer.grad_accum_steps={pieces}; "
            f"type data.batch_size={-(-batch // pieces) * pieces}"
        )
