"""From a composed configuration to a run.

Once `check.check_config` has nothing to say, `build_run` decides where the run lives and what it
continues, sets the data up, writes what only the data knows (class count, image size) into the configuration,
and builds the rest. Nothing is written to disk before all of it succeeded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vit_train import checkpoint
from vit_train.config.check import (
    GROUPS,
    Launch,
    as_pretrained,
    check_config,
    check_launch,
    check_values,
    config_dir,
    is_typed,
    plain,
    read_class_weights,
)
from vit_train.config.origins import origins
from vit_train.config.teacher import find_teacher, make_teacher, measure
from vit_train.construct import as_config_error, foreign_code, make, with_defaults
from vit_train.errors import CheckpointError, ConfigError, DataError, blame
from vit_train.runs.resume import (
    check_budget,
    check_continuation,
    check_data,
    check_machine,
    checkpoint_to_continue,
    flat,
    grown,
    rate_jump,
)
from vit_train.runs.run_dir import check_free, choose_run_dir, find_run, holds_run
from vit_train.runs.stored import allowed, read_config, trusted
from vit_train.system.places import as_typed, expanded

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_train.training.guard import Signals

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
_SHIFT = "augment.batch.max_shift"
_NOT_IN_STORE = ("resume", "run_dir", "summary", "trust")


@dataclass
class Run:
    """A run that is ready to start."""

    trainer: Any
    console: Any
    run_dir: Path
    config: dict[str, Any]
    origins: dict[str, str]
    notes: list[str]
    weights: str  # where the model starts from
    multiply_adds: int
    teacher: dict[str, Any] | None  # what run.json says of it


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
        if key in (*GROUPS, "experiment") or added or override.is_delete():
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


# ------------------------------------------------------------------------------------------------- building
def build_run(cfg: DictConfig, launch: Launch, console: Any, signals: Signals | None = None) -> Run | Path:
    """Builds everything a run needs, with a tracker that speaks through `console`. Writes nothing.

    Returns the run, or the directory of a run that is finished already.

    Raises:
        ConfigError, DataError, CheckpointError: see the messages.
    """
    check_launch(launch, cfg)
    if cfg.resume is None:
        return _build_run(cfg, launch, console, signals)
    # whatever goes wrong while a stored configuration is built is a mistake in it, whoever wrote it
    with blame(CheckpointError, f"resume={cfg.resume}: what is stored does not make a run"):
        return _build_run(cfg, launch, console, signals)


def _build_run(cfg: DictConfig, launch: Launch, console: Any, signals: Signals | None) -> Run | Path:
    allow = named = None
    notes: list[str] = []
    stored: dict[str, Any] = {}
    if cfg.resume is not None:
        trust = trusted(cfg.trust, hydra=True)
        run_dir, named = find_run(str(cfg.resume), None if cfg.run_dir is None else str(cfg.run_dir))
        stored, notes = read_config(run_dir)
        stored.pop("trust", None)  # it is typed
        allow = allowed(stored, trust, run_dir)
        stored |= {key: with_defaults(stored[key], inherited=key == "trainer") for key in _WITH_DEFAULTS}
        force = cfg.resume == "force"
        cfg = _with_overrides(stored, launch.overrides)
        if is_typed("objective.class_weights", launch.overrides):  # what is stored names no file to read
            read_class_weights(cfg)
        check_config(cfg)
    else:
        force = False
        read_class_weights(cfg)
        check_config(cfg)
        trust = trusted(cfg.trust, hydra=True)
        if cfg.name is None:
            cfg.name = "-".join(launch.choices.get(group, group) for group in ("model", "data"))
        typed = None if cfg.run_dir is None else str(cfg.run_dir)
        run_dir = choose_run_dir(typed, str(cfg.name), launch.job_dir)
        if holds_run(run_dir):
            stored, notes = read_config(run_dir)
            stored.pop("trust", None)
    from vit_train.weights.source import absolute_source  # here: torch, which --help can do without

    cfg.init_from = absolute_source(cfg.init_from)
    cfg.augment = {"repeats": 1, **cfg.augment}  # which a config of the user's own may leave out
    check_free(run_dir)
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
        notes += check_continuation(stored, plain(cfg), run_dir)
        if (run_dir / "result.json").is_file() and not grown(stored, plain(cfg)) and named is None:
            return run_dir
    return _build(
        cfg,
        launch,
        console,
        run_dir,
        stored=stored,
        allow=allow,
        trust=trust,
        notes=notes,
        named=named,
        force=force,
        signals=signals,
    )


def _build(
    cfg: DictConfig,
    launch: Launch,
    console: Any,
    run_dir: Path,
    *,
    stored: Mapping[str, Any],
    allow: Mapping[str, tuple[str, ...]] | None,
    trust: tuple[str, ...],
    notes: list[str],
    named: Path | None,
    force: bool,
    signals: Signals | None,
) -> Run | Path:
    import torch

    from vit_train.data.transforms.batch_transforms import Normalize
    from vit_train.inference.trained import check_sizes
    from vit_train.precision import resolve_precision
    from vit_train.rng import seed_device
    from vit_train.runs.record import read_facts
    from vit_train.training.guard import Signals
    from vit_train.training.memory import fit_micro_batch
    from vit_train.training.schedules import Schedule
    from vit_train.training.state import Parts
    from vit_train.training.strategy import SingleDevice
    from vit_train.training.tracker import NullTracker
    from vit_train.training.trainer import Trainer
    from vit_train.weights import load_pretrained, read_pretrained

    signals = signals or Signals()
    strategy = make_part(cfg, "strategy", allow, SingleDevice)
    if cfg.trainer.compile and not strategy.supports_compile:
        raise ConfigError("trainer.compile=true does not work with data_parallel; type strategy=single")
    strategy.start()
    pretrained = None
    if cfg.init_from is not None and not stored:
        pretrained = read_pretrained(cfg.init_from)
        notes += as_pretrained(cfg, pretrained, launch.overrides)
    data = _set_up_data(cfg, allow, strategy, signals)
    if cfg.data.get("sampler") == "balanced" and cfg.objective.get("class_weights") is not None:
        notes.append(
            "data.sampler=balanced and objective.class_weights correct the same twice: leave one of them out"
        )
    with as_config_error("trainer.precision"):
        cfg.trainer.precision = resolve_precision(cfg.trainer.precision, strategy.device)
    notes += doubts(cfg.trainer.precision, strategy.device)
    config = plain(cfg)

    has_ema = config["trainer"]["ema_decay"] is not None
    outlined = cache(lambda: outline(config, allow))

    def fits(path: Path, _: Any, shapes: checkpoint.Shapes) -> None:
        if allow is not None:  # before the outline: what is stored may lie about its size
            check_sizes(config["model"], shapes, path)
        checkpoint.check_shapes(path, shapes, outlined()[0], ema=has_ema)

    found, problems = checkpoint_to_continue(run_dir, named, fits)
    if found is None and (run_dir / "result.json").is_file():
        raise CheckpointError(
            f"{run_dir} was trained to its end, but its checkpoints are gone; restore them, or start a new "
            "run with another run_dir"
        )
    if found is None and stored:
        notes.append("no checkpoint was written yet: it starts from step 0")
    fixed = cfg.optimizer.get("lr") != "auto" and not is_typed("optimizer.lr", launch.overrides)
    notes += resolve_auto(cfg, launch.overrides, outlined()[0])
    taught = find_teacher(cfg, trust, download=not stored)
    config = plain(cfg)
    seed_device(strategy.device, cfg.seed, "init")
    model, weights = _make_model(config, allow, run_dir, found)
    if found is None and cfg.init_from is not None:
        pretrained = pretrained or read_pretrained(cfg.init_from)
        report = load_pretrained(model, pretrained, strict=cfg.init_strict, class_names=data.class_names)
        weights = str(report)
        if fixed and "experiment" not in launch.choices:
            notes.append(
                f"optimizer.lr={cfg.optimizer.lr:g} is made for training from scratch; to keep more of what "
                "the weights know, type optimizer.lr=1e-4 optimizer.layer_decay=0.75"
            )
    fingerprint = data.fingerprint()
    if found is not None:
        notes += check_data(found, data, fingerprint, run_dir, force=force)
    notes += check_machine(run_dir, strategy.describe())
    objective = make_part(cfg, "objective", allow, torch.nn.Module)
    teacher = None if taught is None else make_teacher(taught, cfg, data, strategy.device)
    extra = [] if teacher is None else [strategy.wrap(teacher)]
    if taught is not None and Path(taught.source).is_relative_to(str(cfg.init_from)):
        notes.append("the student is its own teacher: it starts from the run it is to learn from")
    train_transform = make_part(cfg, "augment.batch", allow, torch.nn.Module)
    parts = Parts(
        model=model,
        data=data,
        objective=objective(data.class_names, data.class_counts, *extra),
        make_optimizer=make_part(cfg, "optimizer", allow, torch.optim.Optimizer),
        make_schedule=make_part(cfg, "schedule", allow, Schedule),
        train_transform=train_transform(data.mean, data.std).to(strategy.device),
        eval_transform=Normalize(data.mean, data.std).to(strategy.device),
        strategy=strategy,
        tracker=make_part(cfg, "tracker", allow, NullTracker)(run_dir, console),
        checkpointer=checkpoint.Checkpointer(run_dir),
        seed=cfg.seed,
        signals=signals,
        about={
            "config": config,
            "inference": {
                "class_names": data.class_names,
                "mean": list(data.mean),
                "std": list(data.std),
                "img_size": data.img_size,
                "in_channels": data.in_channels,
            },
            "dataset_fingerprint": fingerprint,
        },
    )
    trainer = make_part(cfg, "trainer", allow, Trainer)(parts)
    before = check_budget(stored["trainer"], trainer) if stored else 0
    if found is not None:
        notes += _put_back(trainer, found, config, before)
        if (run_dir / "result.json").is_file() and trainer.is_done() and named is None:
            if trainer.state.step == cfg.trainer.max_steps and is_typed("trainer.epochs", launch.overrides):
                raise ConfigError(
                    f"{run_dir} ended at trainer.max_steps={cfg.trainer.max_steps}, "
                    "whatever trainer.epochs is: type a larger number, or trainer.max_steps=null as well"
                )
            return run_dir
    elif trainer.auto_batch:
        pieces = fit_micro_batch(trainer, cfg.data.batch_size // strategy.world_size)
        trainer.grad_accum_steps = config["trainer"]["grad_accum_steps"] = pieces
    facts = read_facts(run_dir).get("teacher")
    return Run(
        trainer=trainer,
        console=console,
        run_dir=run_dir,
        config=config,
        origins=origins(
            launch.overrides,
            launch.choices,
            [*launch.user_config_dirs, config_dir()],
            stored=allow is not None,
        ),
        notes=[*notes, *data.notes, *(f"checkpoint skipped: {problem}" for problem in problems)],
        weights=weights,
        multiply_adds=outlined()[1],
        teacher=None if teacher is None else measure(teacher, parts, facts),
    )


def _set_up_data(
    cfg: DictConfig, allow: Mapping[str, tuple[str, ...]] | None, strategy: Any, signals: Signals
) -> Any:
    """The data module, once it has found its data; what it alone knows goes into the configuration.

    Raises:
        ConfigError: it is not a data module, or refuses its arguments.
        DataError: there is nothing to learn from.
    """
    data = make_part(cfg, "data", allow)
    if not hasattr(data, "setup"):
        raise ConfigError(f"data: {cfg.data['_target_']} does not make a data module")
    with as_config_error("data"):
        data.setup(
            device=strategy.device,
            rank=strategy.rank,
            world_size=strategy.world_size,
            should_stop=signals.arrived,
        )
    if data.num_classes < 2:
        raise DataError(f"there is only one class, {data.class_names[0]!r}: nothing to tell apart")
    if cfg.data.get("root") is not None:  # so that the run can be continued from any directory
        cfg.data.root = str(expanded(cfg.data.root).absolute())
    for key in ("num_classes", "img_size", "in_channels"):
        OmegaConf.update(cfg, f"data.{key}", getattr(data, key), force_add=True)
    for key in {"mean", "std"} & cfg.data.keys():  # a module of the user's may have constants
        cfg.data[key] = list(getattr(data, key))
    if cfg.data.get("value_range", 0) is None and data.value_range is not None:
        cfg.data.value_range = list(data.value_range)
    return data


def _make_model(
    config: Mapping[str, Any],
    allow: Mapping[str, tuple[str, ...]] | None,
    run_dir: Path,
    found: checkpoint.Checkpoint | None,
) -> tuple[nn.Module, str]:
    """The model before any weights are loaded, and in words where it starts from.

    Raises:
        ConfigError: it cannot be built.
        CheckpointError: what is stored would start a download or name a file.
    """
    from vit_train.inference.trained import without_download

    offline = without_download(config["model"])
    if allow is not None:
        if found is None and (offline != config["model"] or config["init_from"] is not None):
            raise CheckpointError(
                f"{run_dir} was to start from pretrained weights and has no checkpoint yet; type the full "
                f"command with {as_typed('run_dir', run_dir)}: nothing stored starts a download or names a "
                "file"
            )
        model = make(offline, key="model", allow=allow["model"])
    else:
        model = make(config["model"], key="model")
    if found is not None:
        return model, f"from {found.path.name} of this run"
    return model, "from scratch" if offline == config["model"] else "pretrained parts, the rest from scratch"


def _put_back(
    trainer: Any, found: checkpoint.Checkpoint, config: Mapping[str, Any], before: int
) -> list[str]:
    """The trainer where the checkpoint stood; a note where a budget larger than `before` changes the rate.

    Raises:
        CheckpointError: it does not fit.
    """
    with blame(CheckpointError, f"{found.path} does not fit this configuration"):
        trainer.resume(found)
        trainer.state.check_position(trainer.steps_per_epoch, trainer.total_steps)
        if trainer.state.stopped_early:
            if grown(found.state["config"], config, patience=False):  # since it was written
                trainer.state.evaluations_since_best = 0
            trainer.judge_patience()
        return rate_jump(before, trainer)


def resolve_auto(cfg: DictConfig, overrides: list[str], model: nn.Module) -> list[str]:
    """The crops and the learning rate that were left to `auto` become numbers; returns why, a line each."""
    from vit_train.data.transforms.batch_transforms import auto_crop_scale
    from vit_train.training.optimizers import auto_lr

    notes = []
    scale = OmegaConf.select(cfg, "augment.batch.crop_scale")
    shift = OmegaConf.select(cfg, "augment.batch.max_shift") if is_typed(_SHIFT, overrides) else None
    if scale == "auto":
        scale = None if shift else auto_crop_scale(cfg.data.img_size)
        reason = "a shift was typed" if shift else f"images of {cfg.data.img_size} pixels"
        cfg.augment.batch.crop_scale = scale
        notes.append(f"augment.batch.crop_scale={scale or 'null, a shift instead'} (auto): {reason}")
    elif scale is not None and shift:
        raise ConfigError(f"{_SHIFT}={shift:g}: crops stand in place of shifts; type one of the two")
    if cfg.optimizer.get("lr") == "auto":
        cfg.optimizer.lr, reason = auto_lr(model, fine_tuned=cfg.init_from is not None)
        notes.append(f"optimizer.lr={cfg.optimizer.lr:g} (auto): {reason}")
    return notes


def doubts(precision: str, device: torch.device) -> list[str]:
    """A note where bf16 was typed for a processor that is not faster in it."""
    from vit_train.precision import bf16_is_faster

    if precision != "bf16" or device.type != "cpu" or bf16_is_faster(device):
        return []
    return ["trainer.precision=bf16: fp32 is probably faster on this processor, perhaps by far"]


def make_part(
    cfg: DictConfig, key: str, allow: Mapping[str, tuple[str, ...]] | None, kind: type = object
) -> Any:
    """The object that one node of the configuration describes, or the factory of it that waits for arguments.

    Args:
        cfg: the whole configuration.
        key: of the node, such as augment.batch.
        allow: what each group may name where the configuration was stored; None allows everything.
        kind: what it must make.

    Raises:
        ConfigError: it cannot be built, or is of another kind; the factory raises it as well.
    """
    node: Any = plain(cfg)
    for part in key.split("."):
        node = node[part]
    made = make(node, key=key, allow=None if allow is None else allow[key.partition(".")[0]])

    def of_kind(made: Any, its: type) -> Any:
        if issubclass(its, kind):
            return made
        raise ConfigError(f"{key}: expected {kind.__name__}, {node['_target_']} makes {its.__name__}")

    def finish(*arguments: Any) -> Any:
        with as_config_error(key):
            finished = made(*arguments)
            return of_kind(finished, type(finished))

    if node.get("_partial_"):  # before a class of another kind meets arguments that are not meant for it
        return of_kind(finish, made.func if inspect.isclass(made.func) else kind)
    return of_kind(made, type(made))


def outline(config: Mapping[str, Any], allow: Mapping[str, tuple[str, ...]] | None) -> tuple[nn.Module, int]:
    """A copy of the model that holds no memory, and its multiply-adds per image.

    Counting them proves that the model takes such images.

    Raises:
        ConfigError: it does not, or see `without_memory`.
    """
    from vit_train.models.cost import multiply_adds

    model, data = without_memory(config, allow), config["data"]
    with as_config_error("model"):
        return model, multiply_adds(model, in_channels=data["in_channels"], img_size=data["img_size"])


def without_memory(config: Mapping[str, Any], allow: Mapping[str, tuple[str, ...]] | None) -> nn.Module:
    """The model on the meta device.

    Raises:
        ConfigError: it cannot be built, it is not a model, or it has another number of classes than the data.
    """
    import torch

    from vit_train.inference.trained import without_download

    node, data = without_download(config["model"]), config["data"]
    try:
        with torch.device("meta"):
            model = make(node, key="model", allow=None if allow is None else allow["model"])
    except ConfigError as error:
        patch, side = (node.get("patch_embed") or {}).get("patch_size"), data["img_size"]
        fitting = f", or type data.img_size={-(-side // patch) * patch}" if patch and side % patch else ""
        raise ConfigError(f"{error}{fitting}") from error
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "num_classes"):
        raise ConfigError(f"model: {node['_target_']} does not make a model")
    mixed = config["augment"]["batch"].get("num_classes", data["num_classes"])
    for key, number in (("model", model.num_classes), ("augment.batch", mixed)):
        if number != data["num_classes"]:
            raise ConfigError(
                f"{key}.num_classes={number}, but the data has {data['num_classes']} classes; "
                "leave it out: it comes from the data"
            )
    return model
