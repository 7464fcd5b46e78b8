"""From a composed configuration to a run.

Once `check.check_config` has nothing to say and `start.find_start` knows where the run begins, the data is
set up, what only the data knows (class count, image size) is written into the configuration, and the rest is
built. Nothing is written to disk before all of it succeeded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vit_train import checkpoint
from vit_train.config.check import Launch, as_pretrained, check_launch, config_dir, is_typed, plain
from vit_train.config.origins import origins
from vit_train.config.parts import doubts, make_part, outline, resolve_auto
from vit_train.config.start import Start, find_start
from vit_train.config.teacher import find_teacher, make_teacher, measure
from vit_train.construct import as_config_error, make
from vit_train.errors import CheckpointError, ConfigError, DataError, blame
from vit_train.runs.resume import (
    check_budget,
    check_data,
    check_machine,
    checkpoint_to_continue,
    grown,
    rate_jump,
)
from vit_train.system.places import as_typed, expanded

if TYPE_CHECKING:
    from torch import nn

    from vit_train.training.guard import Signals
    from vit_train.training.state import Parts
    from vit_train.training.strategy import SingleDevice
    from vit_train.training.trainer import Trainer

_RATE_FROM_SCRATCH = (
    "optimizer.lr={:g} is made for training from scratch; to keep more of what the weights know, type "
    "optimizer.lr=1e-4 optimizer.layer_decay=0.75"
)


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


def build_run(cfg: DictConfig, launch: Launch, console: Any, signals: Signals | None = None) -> Run | Path:
    """Builds everything a run needs, with a tracker that speaks through `console`. Writes nothing.

    Returns the run, or the directory of a run that is finished already.

    Raises:
        ConfigError, DataError, CheckpointError: see the messages.
    """
    from vit_train.training.guard import Signals

    check_launch(launch, cfg)
    build = partial(_build, cfg, launch, console, signals or Signals())
    if cfg.resume is None:
        return build()
    # whatever goes wrong while a stored configuration is built is a mistake in it, whoever wrote it
    with blame(CheckpointError, f"resume={cfg.resume}: the stored configuration does not describe a run"):
        return build()


def _build(cfg: DictConfig, launch: Launch, console: Any, signals: Signals) -> Run | Path:
    cfg, start = find_start(cfg, launch)
    if start.is_finished:
        return start.run_dir
    from vit_train.rng import seed_device
    from vit_train.runs.record import read_facts
    from vit_train.weights import load_pretrained, read_pretrained

    strategy = _start_strategy(cfg, start)
    pretrained = None
    if cfg.init_from is not None and not start.stored:
        pretrained = read_pretrained(cfg.init_from)
        start.notes += as_pretrained(cfg, pretrained, launch.overrides)
    data = _set_up_data(cfg, start, strategy, signals)
    fixed_rate = cfg.optimizer.get("lr") != "auto" and not is_typed("optimizer.lr", launch.overrides)
    found, problems, multiply_adds = _find_checkpoint(cfg, start, launch)
    taught = find_teacher(cfg, start.trust, download=not start.stored)
    config = plain(cfg)
    seed_device(strategy.device, cfg.seed, "init")
    model, weights = _make_model(config, start, found)
    if found is None and cfg.init_from is not None:
        pretrained = pretrained or read_pretrained(cfg.init_from)
        report = load_pretrained(model, pretrained, strict=cfg.init_strict, class_names=data.class_names)
        weights = str(report)
        if fixed_rate and "experiment" not in launch.choices:
            start.notes.append(_RATE_FROM_SCRATCH.format(cfg.optimizer.lr))
    fingerprint = data.fingerprint()
    if found is not None:
        start.notes += check_data(found, data, fingerprint, start.run_dir, force=start.force)
    start.notes += check_machine(start.run_dir, strategy.describe())
    teacher = None if taught is None else make_teacher(taught, cfg, data, strategy.device)
    if taught is not None and Path(taught.source).is_relative_to(str(cfg.init_from)):
        start.notes.append("the student starts from the weights of its own teacher")
    parts = _make_parts(
        config,
        start,
        model=model,
        data=data,
        strategy=strategy,
        teacher=teacher,
        fingerprint=fingerprint,
        console=console,
        signals=signals,
    )
    trainer = _make_trainer(parts, start, found, launch)
    if trainer is None:
        return start.run_dir
    config_dirs = [*launch.user_config_dirs, config_dir()]
    facts = read_facts(start.run_dir).get("teacher")
    return Run(
        trainer=trainer,
        console=console,
        run_dir=start.run_dir,
        config=config,
        origins=origins(launch.overrides, launch.choices, config_dirs, stored=start.allow is not None),
        notes=[*start.notes, *data.notes, *(f"checkpoint skipped: {problem}" for problem in problems)],
        weights=weights,
        multiply_adds=multiply_adds,
        teacher=None if teacher is None else measure(teacher, parts, facts),
    )


def _start_strategy(cfg: DictConfig, start: Start) -> SingleDevice:
    """The devices, ready.

    Raises:
        ConfigError: they are not there, or cannot do what is asked of them.
    """
    from vit_train.training.strategy import SingleDevice

    strategy: SingleDevice = make_part(plain(cfg), "strategy", start.allow, SingleDevice)
    if cfg.trainer.compile and not strategy.supports_compile:
        raise ConfigError("trainer.compile=true does not work with data_parallel; type strategy=single")
    strategy.start()
    return strategy


def _set_up_data(cfg: DictConfig, start: Start, strategy: SingleDevice, signals: Signals) -> Any:
    """The data module, once it has found its data; what it alone knows goes into the configuration.

    So does the precision, which was asked for or left to `auto`.

    Raises:
        ConfigError: it is not a data module, or refuses its arguments.
        DataError: there is nothing to learn from.
    """
    from vit_train.system.precision import resolve_precision

    data = make_part(plain(cfg), "data", start.allow)
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
    if cfg.data.get("sampler") == "balanced" and cfg.objective.get("class_weights") is not None:
        start.notes.append(
            "data.sampler=balanced and objective.class_weights both correct for unbalanced classes: "
            "leave one of them out"
        )
    with as_config_error("trainer.precision"):
        cfg.trainer.precision = resolve_precision(cfg.trainer.precision, strategy.device)
    start.notes += doubts(cfg.trainer.precision, strategy.device)
    return data


def _find_checkpoint(
    cfg: DictConfig, start: Start, launch: Launch
) -> tuple[checkpoint.Checkpoint | None, list[str], int]:
    """The checkpoint the run goes on from; what was left to `auto` becomes numbers in the configuration.

    Returns:
        It, a line about each one that cannot be used, and the model's multiply-adds of one image.

    Raises:
        ConfigError, CheckpointError: see the messages.
    """
    config, run_dir = plain(cfg), start.run_dir
    outlined = cache(lambda: outline(config, start.allow))

    def fits(path: Path, _: Any, shapes: checkpoint.Shapes) -> None:
        checkpoint.check_shapes(path, shapes, outlined()[0], ema=config["trainer"]["ema_decay"] is not None)

    found, problems = checkpoint_to_continue(run_dir, start.named, fits)
    if found is None and (run_dir / "result.json").is_file():
        raise CheckpointError(
            f"{run_dir} was trained to its end, but its checkpoints are gone; restore them, or start a new "
            "run with another run_dir"
        )
    if found is None and start.stored:
        start.notes.append("no checkpoint was written yet: it starts from step 0")
    model, multiply_adds = outlined()
    start.notes += resolve_auto(cfg, launch.overrides, model)
    return found, problems, multiply_adds


def _make_model(
    config: Mapping[str, Any], start: Start, found: checkpoint.Checkpoint | None
) -> tuple[nn.Module, str]:
    """The model before any weights are loaded, and in words where it starts from.

    Raises:
        ConfigError: it cannot be built.
        CheckpointError: what is stored would start a download or name a file.
    """
    from vit_train.inference.trained import without_download

    offline = without_download(config["model"])
    if start.allow is not None:
        if found is None and (offline != config["model"] or config["init_from"] is not None):
            full = as_typed("run_dir", start.run_dir)
            raise CheckpointError(
                f"{start.run_dir} was meant to start from pretrained weights and has no checkpoint yet; "
                f"type the full command with {full}: a stored configuration may not start a download or "
                "name a file"
            )
        model = make(offline, key="model", allow=start.allow["model"])
    else:
        model = make(config["model"], key="model")
    if found is not None:
        return model, f"from {found.path.name} of this run"
    return model, "from scratch" if offline == config["model"] else "pretrained parts, the rest from scratch"


def _make_parts(
    config: dict[str, Any],
    start: Start,
    *,
    model: nn.Module,
    data: Any,
    strategy: SingleDevice,
    teacher: nn.Module | None,
    fingerprint: str,
    console: Any,
    signals: Signals,
) -> Parts:
    """What the trainer is made of; the plain data among it is stored with every checkpoint."""
    import torch

    from vit_train.data.transforms.batch_transforms import Normalize
    from vit_train.training.schedules import Schedule
    from vit_train.training.state import Parts
    from vit_train.training.tracker import NullTracker

    part = partial(make_part, config, allow=start.allow)
    objective = part("objective", kind=torch.nn.Module)
    train_transform = part("augment.batch", kind=torch.nn.Module)
    taught = [] if teacher is None else [strategy.wrap(teacher)]
    inference = {
        "class_names": data.class_names,
        "mean": list(data.mean),
        "std": list(data.std),
        "img_size": data.img_size,
        "in_channels": data.in_channels,
    }
    return Parts(
        model=model,
        data=data,
        objective=objective(data.class_names, data.class_counts, *taught),
        make_optimizer=part("optimizer", kind=torch.optim.Optimizer),
        make_schedule=part("schedule", kind=Schedule),
        train_transform=train_transform(data.mean, data.std).to(strategy.device),
        eval_transform=Normalize(data.mean, data.std).to(strategy.device),
        strategy=strategy,
        tracker=part("tracker", kind=NullTracker)(start.run_dir, console),
        checkpointer=checkpoint.Checkpointer(start.run_dir),
        seed=config["seed"],
        signals=signals,
        about={"config": config, "inference": inference, "dataset_fingerprint": fingerprint},
    )


def _make_trainer(
    parts: Parts, start: Start, found: checkpoint.Checkpoint | None, launch: Launch
) -> Trainer | None:
    """The trainer, where its checkpoint stood; None where the run it continues is finished.

    Raises:
        ConfigError, CheckpointError: see the messages.
    """
    from vit_train.training.memory import fit_micro_batch
    from vit_train.training.trainer import Trainer

    config = parts.about["config"]
    trainer: Trainer = make_part(config, "trainer", start.allow, Trainer)(parts)
    before = check_budget(start.stored["trainer"], trainer) if start.stored else 0
    if found is not None:
        start.notes += _put_back(trainer, found, config, before)
        ended = (start.run_dir / "result.json").is_file()
        if ended and trainer.is_done() and start.named is None:
            max_steps = config["trainer"]["max_steps"]
            if trainer.state.step == max_steps and is_typed("trainer.epochs", launch.overrides):
                raise ConfigError(
                    f"{start.run_dir} ended at trainer.max_steps={max_steps}, "
                    "whatever trainer.epochs is: type a larger number, or trainer.max_steps=null as well"
                )
            return None
    elif trainer.auto_batch:
        pieces = fit_micro_batch(trainer, config["data"]["batch_size"] // parts.strategy.world_size)
        trainer.grad_accum_steps = config["trainer"]["grad_accum_steps"] = pieces
    return trainer


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
