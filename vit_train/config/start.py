"""Where a run begins: anew, from a run that is stored, or from one that a full command finds in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vit_train.config.check import (
    CHOSEN,
    Launch,
    check_config,
    check_values,
    is_typed,
    plain,
    read_class_weights,
)
from vit_train.construct import foreign_code, with_defaults
from vit_train.errors import ConfigError
from vit_train.runs.resume import check_continuation, flat, grown
from vit_train.runs.run_dir import check_free, choose_run_dir, find_run, holds_run
from vit_train.runs.stored import Packages, allowed, read_config, trusted
from vit_train.system.places import expanded

# What may be left open in a command and is known once a run exists
_RESOLVED_KEYS = (
    "data.num_classes",
    "data.img_size",
    "data.in_channels",
    "data.mean",
    "data.std",
    "data.value_range",
    "trainer.precision",
    "optimizer.lr",
    "augment.batch.crop_scale",
    "schedule.warmup_epochs",
    "objective.teacher_sha256",
)
# Where a constructor's own defaults fill in what a config, or an older version, leaves out
_WITH_DEFAULTS = ("data", "trainer", "optimizer", "tracker")
_NOT_IN_STORE = ("resume", "run_dir", "summary", "trust")


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        run_dir: its directory.
        trust: packages whose code a stored configuration may name, as typed.
        stored: the configuration of the run that goes on; nothing for a new one.
        allow: the code each group may name, where the configuration is a stored one; None is the user's own.
        named: the checkpoint that was named.
        force: whether the data may have changed.
        is_finished: the run was trained to its end, and nothing was typed that makes it longer.
        notes: things to tell the user.
    """

    run_dir: Path
    trust: Packages
    stored: dict[str, Any] = field(default_factory=dict)
    allow: Mapping[str, Packages] | None = None
    named: Path | None = None
    force: bool = False
    is_finished: bool = False
    notes: list[str] = field(default_factory=list)


def find_start(cfg: DictConfig, launch: Launch) -> tuple[DictConfig, Start]:
    """The whole configuration of the run, which is checked, and where it begins.

    1. `resume=RUN`: what is stored, with what was typed beside it.
    2. A full command whose run directory holds a run: what was typed, which must be what is stored; what was
       left to the data or to `auto` is as it was then.
    3. A new run.

    Raises:
        ConfigError, CheckpointError: see the messages.
    """
    cfg, start = _from_stored(cfg, launch) if cfg.resume is not None else _from_command(cfg, launch)
    from vit_train.weights.source import absolute_source  # here: torch, which --help can do without

    stored = start.stored
    cfg.init_from = absolute_source(cfg.init_from)
    cfg.augment = {"repeats": 1, **cfg.augment}  # which a config of the user's own may leave out
    check_free(start.run_dir)
    for group in _WITH_DEFAULTS:  # what a user's own config leaves out
        defaults = with_defaults(plain(cfg)[group], inherited=group == "trainer")  # which is read here
        cfg[group] = {**defaults, **cfg[group]}
        if stored and stored[group].get("_target_") == defaults["_target_"]:  # by an older version
            stored[group] = {**defaults, **stored[group]}
    check_values(cfg)
    if stored:
        _adopt(cfg, stored, launch.overrides)
        check_config(cfg)  # what was adopted as well
        check_values(cfg)
        start.notes += check_continuation(stored, plain(cfg), start.run_dir)
        ended = (start.run_dir / "result.json").is_file()
        start.is_finished = ended and not grown(stored, plain(cfg)) and start.named is None
    return cfg, start


def _from_stored(cfg: DictConfig, launch: Launch) -> tuple[DictConfig, Start]:
    trust = trusted(cfg.trust, hydra=True)
    run_dir, named = find_run(str(cfg.resume), None if cfg.run_dir is None else str(cfg.run_dir))
    stored, notes = read_config(run_dir)
    stored.pop("trust", None)  # it is typed
    allow = allowed(stored, trust, run_dir)
    stored |= {key: with_defaults(stored[key], inherited=key == "trainer") for key in _WITH_DEFAULTS}
    start = Start(run_dir, trust, stored, allow, named, force=cfg.resume == "force", notes=notes)
    cfg = _with_overrides(stored, launch.overrides)
    if is_typed("objective.class_weights", launch.overrides):  # what is stored names no file to read
        read_class_weights(cfg)
    check_config(cfg)
    return cfg, start


def _from_command(cfg: DictConfig, launch: Launch) -> tuple[DictConfig, Start]:
    read_class_weights(cfg)
    check_config(cfg)
    trust = trusted(cfg.trust, hydra=True)
    if cfg.name is None:
        cfg.name = "-".join(launch.choices.get(group, group) for group in ("model", "data"))
    typed = None if cfg.run_dir is None else str(cfg.run_dir)
    start = Start(choose_run_dir(typed, str(cfg.name), launch.job_dir), trust)
    if holds_run(start.run_dir):
        start.stored, start.notes = read_config(start.run_dir)
        start.stored.pop("trust", None)
    return cfg, start


def _with_overrides(stored: dict[str, Any], overrides: list[str]) -> DictConfig:
    """The stored configuration with what the user typed beside resume=.

    Raises:
        ConfigError: a group choice.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    cfg = OmegaConf.create(stored)
    # limits of the part that ended; the continuation has its own
    if not isinstance(cfg.get("trainer"), DictConfig):
        raise ConfigError("the stored configuration is damaged: it has no trainer")
    cfg.trainer.stop_at_step = cfg.trainer.stop_after_minutes = None
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key in _NOT_IN_STORE:
            continue
        added = override.is_add() and not override.is_force_add()  # the command forces, see cli/train.py
        if key in CHOSEN or added or override.is_delete():
            typed = str(override.input_line).removeprefix("++")
            raise ConfigError(
                f"{typed}: resume= continues with the stored configuration; only single values such as "
                "trainer.epochs=50 can be given beside it"
            )
        OmegaConf.update(cfg, key, override.value(), force_add=True)  # what it is not is said by the check
    return cfg


def _adopt(cfg: DictConfig, stored: Mapping[str, Any], overrides: list[str]) -> None:
    """What was left to the data, to `auto` or to pretrained weights is as in the run that is continued."""
    known = flat(stored)
    for key in _RESOLVED_KEYS:
        nothing = None if key.startswith(("data.", "schedule.", "objective.")) else "auto"
        left_open = OmegaConf.select(cfg, key, default="(absent)") == nothing
        # not a node: it would be built, and the user did not name it
        if left_open and key in known and not foreign_code(known[key], ()):
            OmegaConf.update(cfg, key, known[key])
    teacher, typed = known.get("objective.teacher"), cfg.objective.get("teacher")
    # of the run that was typed, the checkpoint that was its best by then
    if (
        isinstance(teacher, str)
        and typed
        and Path(teacher).parent == expanded(typed).resolve() / "checkpoints"
    ):
        cfg.objective.teacher = teacher
    masks = stored["model"].get("mask_padding")
    # a node would be built, as above
    if cfg.init_from is not None and type(masks) is bool and not is_typed("model.mask_padding", overrides):
        cfg.model.mask_padding = masks
    if cfg.trainer.auto_batch and stored["trainer"].get("auto_batch"):
        cfg.trainer.grad_accum_steps = stored["trainer"]["grad_accum_steps"]
