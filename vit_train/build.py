"""From a composed configuration to a run: the only room below the commands that knows Hydra.

`check_config` reports everything wrong with a configuration before a device or a file is touched.
`build_run` then decides where the run lives and what it continues, sets the data up, writes what only the
data knows (class count, image size) into the configuration, and builds the rest. Nothing is written to disk
before all of it succeeded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit_train import checkpoint
from vit_train.construct import check, foreign_code, is_node, make, with_defaults
from vit_train.errors import CheckpointError, ConfigError, DataError, suggest

_GROUPS = ("model", "data", "augment", "objective", "optimizer", "schedule", "strategy", "trainer", "tracker")
# What may be left open in a command and is known once a run exists
_RESOLVED_KEYS = (
    "data.num_classes",
    "data.img_size",
    "data.in_channels",
    "data.mean",
    "data.std",
    "trainer.precision",
)
# What a stored configuration may name; the user's own command may name anything
_STORED_CODE = tuple(
    f"vit_train.{room}"
    for room in ("models", "layers", "data", "objective", "optim", "strategy", "trainer", "tracker")
)
_NOT_IN_STORE = ("resume", "run_dir")


def config_dir() -> Path:
    """The folder of configs: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"vit-train is installed without its configs: neither in {here} nor beside it")


@dataclass(frozen=True)
class Launch:
    """How the command was typed, as Hydra tells it.

    Attributes:
        overrides: `key=value` arguments.
        choices: the config chosen for each group.
        job_dir: the directory of this job of a sweep, None outside sweeps.
        user_config_dirs: folders given with --config-dir.
    """

    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    job_dir: Path | None = None
    user_config_dirs: list[Path] = field(default_factory=list)


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
    seed: int
    name: str | int | None = None
    run_dir: str | int | None = None
    resume: str | int | None = None


@dataclass
class Run:
    """A run that is ready to start."""

    trainer: Any
    console: Any
    run_dir: Path
    config: dict[str, Any]
    origins: dict[str, str]
    notes: list[str]
    multiply_adds: int


# ------------------------------------------------------------------------------------------------ checking
def check_config(cfg: DictConfig) -> None:
    """Every error of a composed configuration at once, without building or touching anything.

    Raises:
        ConfigError: one line per error, each with its full key.
    """
    errors = _broken_interpolations(cfg)
    if not errors:
        plain = _plain(cfg)
        errors = check({"_target_": "vit_train.build.Root", **plain}, pending=_pending(cfg))
        augment = plain.get("augment")
        extra = set(augment) - {"sample", "batch"} if isinstance(augment, dict) else set()
        errors += [f"augment.{key}: unknown; augment holds sample and batch" for key in sorted(extra)]
        for group in _GROUPS:
            if group != "augment" and not is_node(plain.get(group)):
                errors.append(f"{group}: needs a `_target_`; choose one with {group}=...")
    if errors:
        raise ConfigError(_one_message([e.replace("Root has", "the configuration has") for e in errors]))


def _one_message(errors: list[str]) -> str:
    if len(errors) == 1:
        return errors[0]
    return f"{len(errors)} errors in the configuration:\n" + "\n".join(f"  {error}" for error in errors)


def check_launch(launch: Launch) -> None:
    """What Hydra would accept silently and the user did not mean.

    Raises:
        ConfigError: a list of choices for one group, or a user's config hidden by a built-in one.
    """
    groups = "|".join((*_GROUPS, "experiment"))
    for override in launch.overrides:
        match = re.match(rf"^({groups})=\[(.*)\]$", override)
        if match:
            group, wanted = match.groups()
            first = wanted.split(",")[0].strip() or "NAME"
            raise ConfigError(
                f"{override}: one {group} per run; type {group}={first}, or -m {group}={wanted} for a sweep"
            )
    for folder in launch.user_config_dirs:
        for group, choice in launch.choices.items():
            name = f"{group}/{choice}.yaml"
            if (folder / name).is_file() and (config_dir() / name).is_file():
                raise ConfigError(f"{folder / name} has the name of a built-in config, which wins; rename it")


def _broken_interpolations(cfg: DictConfig, prefix: str = "") -> list[str]:
    errors: list[str] = []
    keys = cfg.keys() if isinstance(cfg, DictConfig) else range(len(cfg))
    for key in keys:
        full = f"{prefix}.{key!s}" if prefix else str(key)
        try:
            value = cfg[key]
        except OmegaConfBaseException as error:
            errors.append(f"{full}: {str(error).splitlines()[0]}")
            continue
        if OmegaConf.is_config(value):
            errors += _broken_interpolations(value, full)
    return errors


def _pending(cfg: DictConfig, prefix: str = "") -> frozenset[str]:
    """Keys whose value is still null because only the data will know it."""
    found: set[str] = set()
    for key in cfg.keys():  # noqa: SIM118 - a DictConfig
        full = f"{prefix}.{key!s}" if prefix else str(key)
        if OmegaConf.is_interpolation(cfg, key):  # type: ignore[arg-type]
            if cfg[key] is None:
                found.add(full)
        elif isinstance(cfg[key], DictConfig):
            found |= _pending(cfg[key], full)
    return frozenset(found)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}


# -------------------------------------------------------------------------------------------- where it lives
def default_name(choices: Mapping[str, str]) -> str:
    """<model>-<data>."""
    return f"{choices.get('model', 'model')}-{choices.get('data', 'data')}"


def choose_run_dir(cfg: DictConfig, launch: Launch) -> Path:
    """`run_dir`, else the sweep's job directory, else one keyed by the scheduler's job, else by the time.

    A requeued job has the id it had before, so the same command finds its run again.
    """
    if cfg.run_dir is not None:
        return Path(str(cfg.run_dir))
    if launch.job_dir is not None:
        return launch.job_dir
    home = Path("runs") / str(cfg.name or default_name(launch.choices))
    array = [os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK")]
    job = "_".join(part for part in array if part) if all(array) else os.environ.get("SLURM_JOB_ID")
    job = job or os.environ.get("TORCHELASTIC_RUN_ID")
    if job and job != "none":
        return home / f"job_{job}"
    return home / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")


def find_run(resume: str) -> Path:
    """The run directory `resume=` means.

    Raises:
        CheckpointError: there is none.
    """
    if resume == "latest":
        runs = [
            path.parent
            for pattern in ("runs/*/*", "sweeps/*/*")
            for path in Path().glob(f"{pattern}/config.yaml")
        ]
        if not runs:
            raise CheckpointError("resume=latest finds no run under ./runs; type resume=PATH/TO/RUN")
        return max(runs, key=lambda run: (run / "config.yaml").stat().st_mtime)
    run = Path(resume)
    inside = [run.parent.parent] if run.absolute().parent.name == "checkpoints" else []
    for candidate in (run, *inside):  # a checkpoint inside a run means that run
        if (candidate / "config.yaml").is_file():
            return candidate
    raise CheckpointError(
        f"resume={resume}: no run there (no config.yaml); type the run directory, or latest"
    )


def read_config(run_dir: Path) -> dict[str, Any]:
    """The stored configuration of a run.

    Raises:
        CheckpointError: config.yaml is missing or damaged.
    """
    path = run_dir / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} is damaged: expected keys and values")
    return stored


def _with_overrides(stored: dict[str, Any], overrides: list[str]) -> DictConfig:
    """The stored configuration with what the user typed beside resume=.

    Raises:
        ConfigError: a group choice, or a key the run does not have.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    cfg = OmegaConf.create(stored)
    # limits of the part that ended; the continuation has its own
    cfg.trainer.stop_at_step = cfg.trainer.stop_after_minutes = None
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key in _NOT_IN_STORE:
            continue
        added = override.is_add() and not override.is_force_add()  # the command forces, see cli/train.py
        if key in (*_GROUPS, "experiment") or added or override.is_delete():
            raise ConfigError(
                f"{override.input_line}: resume= continues with the stored configuration; only single values "
                "such as trainer.epochs=50 can be given beside it"
            )
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig) or name not in node:
            known = [str(k) for k in node] if isinstance(node, DictConfig) else []
            raise ConfigError(f"{key}: the run has no such key{suggest(name, known)}")
        node[name] = override.value()
    return cfg


def _adopt(cfg: DictConfig, stored: Mapping[str, Any]) -> None:
    """What was left to the data or to `auto` is taken from the run that is continued."""
    for key in _RESOLVED_KEYS:
        known = OmegaConf.select(OmegaConf.create(dict(stored)), key)
        if OmegaConf.select(cfg, key) in (None, "auto") and known is not None:
            OmegaConf.update(cfg, key, known)


def _check_continuation(stored: Mapping[str, Any], config: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Sorts the differences; returns what to tell the user.

    Raises:
        ConfigError: keys differ that decide what the run is.
    """
    schedule, trainer = config["schedule"], config["trainer"]
    listens = schedule.get("monitor") is not None or trainer["early_stop_patience"] is not None
    differences = checkpoint.compare(stored, config, cadence_matters=listens)
    if differences.identity:
        raise ConfigError(
            f"{run_dir} holds a run with another configuration ({'; '.join(differences.identity)}); "
            "choose another run_dir, or type the values it has"
        )
    notes = [f"{line}: the schedule now spans the new budget" for line in differences.grown]
    if differences.hardware:
        notes.append(f"{'; '.join(differences.hardware)}: results may differ in the last bits from here on")
    return notes


# ------------------------------------------------------------------------------------------------- building
def build_run(cfg: DictConfig, launch: Launch) -> Run | Path:
    """Builds everything a run needs. Writes nothing.

    Returns:
        The run, or the directory of a run that is finished already.

    Raises:
        ConfigError, DataError, CheckpointError: see the messages.
    """
    check_launch(launch)
    allow = None
    if cfg.resume is not None:
        run_dir = find_run(str(cfg.resume))
        stored = read_config(run_dir)
        foreign = foreign_code(stored, _STORED_CODE)
        if foreign:
            raise ConfigError(
                f"{run_dir / 'config.yaml'} names code that is not vit-train's ({'; '.join(foreign)}); "
                f"if it is yours, type the full command with run_dir={run_dir}"
            )
        cfg, allow = _with_overrides(stored, launch.overrides), _STORED_CODE
        check_config(cfg)
    else:
        check_config(cfg)
        run_dir = choose_run_dir(cfg, launch)
        stored = read_config(run_dir) if (run_dir / "config.yaml").is_file() else {}
    _check_free(run_dir)
    if cfg.name is None:
        cfg.name = default_name(launch.choices)
    for group in ("data", "trainer"):  # what a config of the user's own leaves to the constructor
        cfg[group] = {**with_defaults(_plain(cfg)[group]), **cfg[group]}
    _check_numbers(cfg)
    notes = []
    if stored:
        _adopt(cfg, stored)
        notes = _check_continuation(stored, _plain(cfg), run_dir)
        if (run_dir / "result.json").is_file() and not _grown(stored, cfg):
            return run_dir
    return _build(cfg, launch, run_dir, stored=stored, allow=allow, notes=notes)


def _build(
    cfg: DictConfig,
    launch: Launch,
    run_dir: Path,
    *,
    stored: Mapping[str, Any],
    allow: tuple[str, ...] | None,
    notes: list[str],
) -> Run:
    from vit_train.data.batch_transforms import Normalize
    from vit_train.precision import resolve_precision
    from vit_train.report.console import Console
    from vit_train.rng import seed_device
    from vit_train.state import Parts

    strategy = _make(cfg, "strategy", allow)
    if cfg.trainer.compile and not strategy.supports_compile:
        raise ConfigError("trainer.compile=true does not work with data_parallel; type strategy=single")
    strategy.start()
    data = _make(cfg, "data", allow)
    with _as_config_error("data"):
        data.setup(device=strategy.device, rank=strategy.rank, world_size=strategy.world_size)
    if data.num_classes < 2:
        raise DataError(f"there is only one class, {data.class_names[0]!r}: nothing to tell apart")
    if cfg.data.get("root") is not None:  # so that the run can be continued from any directory
        cfg.data.root = str(Path(str(cfg.data.root)).expanduser().absolute())
    for key in ("num_classes", "img_size", "in_channels"):
        OmegaConf.update(cfg, f"data.{key}", getattr(data, key), force_add=True)
    cfg.data.mean, cfg.data.std = list(data.mean), list(data.std)
    with _as_config_error("trainer.precision"):
        cfg.trainer.precision = resolve_precision(cfg.trainer.precision, strategy.device)
    config = _plain(cfg)

    cost = _multiply_adds(config, allow)
    seed_device(strategy.device, cfg.seed, "init")
    model = _make(cfg, "model", allow)
    console = Console()
    found, problems = checkpoint.newest_valid(run_dir)
    if found is None and problems:
        raise CheckpointError(f"{run_dir} holds no valid checkpoint: {'; '.join(problems)}")
    fingerprint = data.fingerprint()
    if found is not None and found.state.get("dataset_fingerprint") != fingerprint:
        raise DataError(
            f"the data is not what {run_dir} was trained on (classes or files differ); restore it, "
            "or start a new run with another run_dir"
        )
    notes += _check_machine(run_dir, strategy.describe())
    with _as_config_error():
        parts = Parts(
            model=model,
            data=data,
            objective=_make(cfg, "objective", allow)(data.class_names, data.class_counts),
            make_optimizer=_make(cfg, "optimizer", allow),
            make_schedule=_make(cfg, "schedule", allow),
            train_transform=_make(cfg, "augment.batch", allow)(data.mean, data.std).to(strategy.device),
            eval_transform=Normalize(data.mean, data.std).to(strategy.device),
            strategy=strategy,
            tracker=_make(cfg, "tracker", allow)(run_dir, console),
            checkpointer=checkpoint.Checkpointer(run_dir),
            seed=cfg.seed,
            about={"config": config, "inference": _inference(data), "dataset_fingerprint": fingerprint},
        )
        trainer = _make(cfg, "trainer", allow)(parts)
    if stored:
        _check_budget(stored["trainer"], trainer)
    if found is not None:
        try:
            trainer.resume(found)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{found.path} does not fit this configuration: {reason}") from error
        if trainer.state.closed_epochs < trainer.total_epochs and (run_dir / "result.json").is_file():
            trainer.state.stopped_early, trainer.state.evaluations_since_best = False, 0
    return Run(
        trainer=trainer,
        console=console,
        run_dir=run_dir,
        config=config,
        origins=origins(launch, stored=allow is not None),
        notes=[*notes, *data.notes, *(f"checkpoint skipped: {problem}" for problem in problems)],
        multiply_adds=cost,
    )


def _make(cfg: DictConfig, key: str, allow: tuple[str, ...] | None) -> Any:
    node: Any = _plain(cfg)
    for part in key.split("."):
        node = node[part]
    return make(node, key=key, allow=allow)


@contextmanager
def _as_config_error(key: str = "") -> Iterator[None]:
    """A value that a constructor or torch refuses is a mistake in the configuration."""
    try:
        yield
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}: {reason}" if key else reason) from error


def _check_budget(stored: Mapping[str, Any], trainer: Any) -> None:
    """A run can grow but not shrink: its schedule has been spanning the old budget."""
    before = stored.get("max_steps") or stored["epochs"] * trainer.steps_per_epoch
    if trainer.total_steps < before:
        epochs = -(-before // trainer.steps_per_epoch)
        raise ConfigError(
            f"{trainer.total_steps} steps are fewer than the {before} the run was started with; "
            f"type trainer.epochs={epochs} or more (trainer.max_steps=null), or start a new run"
        )


def _check_machine(run_dir: Path, device: str) -> list[str]:
    """One warning where a run goes on elsewhere: it is no longer promised to be bit for bit the same."""
    from vit_train.report.record import package_versions, read_facts

    facts = read_facts(run_dir)
    if not facts:
        return []
    now = {"device": device, **package_versions()}
    then = {"device": facts.get("device"), **facts.get("versions", {})}
    changed = [f"{key} {then.get(key)} -> {value}" for key, value in now.items() if then.get(key) != value]
    return [f"{', '.join(changed)}: results may differ in the last bits from here on"] if changed else []


def _inference(data: Any) -> dict[str, Any]:
    return {
        "class_names": data.class_names,
        "mean": list(data.mean),
        "std": list(data.std),
        "img_size": data.img_size,
        "in_channels": data.in_channels,
    }


def _multiply_adds(config: Mapping[str, Any], allow: tuple[str, ...] | None) -> int:
    """Per image, from a copy of the model that holds no memory; also proves that it takes such images."""
    import torch

    from vit_train.report.summary import multiply_adds
    from vit_train.trained import without_download

    with torch.device("meta"):
        model = make(without_download(config["model"]), key="model", allow=allow)
    data = config["data"]
    if model.num_classes != data["num_classes"]:
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but the data has {data['num_classes']} classes; "
            "leave it out: it comes from the data"
        )
    with _as_config_error("model"):
        return multiply_adds(model, in_channels=data["in_channels"], img_size=data["img_size"])


def _check_numbers(cfg: DictConfig) -> None:
    batch, pieces = cfg.data.batch_size, cfg.trainer.grad_accum_steps
    if pieces < 1 or batch % pieces:
        fitting = f"; type data.batch_size={-(-batch // pieces) * pieces}" if pieces > 1 else ""
        raise ConfigError(
            f"data.batch_size={batch} is not divisible by trainer.grad_accum_steps={pieces}{fitting}"
        )


def _check_free(run_dir: Path) -> None:
    """A run directory is new, empty, or holds a run; and it can be written."""
    existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"run_dir={run_dir} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"run_dir={run_dir} cannot be written: no permission to write in {existing}")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"run_dir={run_dir} holds files that are no run; name a new or empty directory")


def _grown(stored: Mapping[str, Any], cfg: DictConfig) -> bool:
    return any(stored["trainer"][key] != cfg.trainer[key] for key in ("epochs", "max_steps"))


def origins(launch: Launch, *, stored: bool) -> dict[str, str]:
    """Where the values of the recipe come from, for the summary: full key or group -> words.

    Args:
        launch: how the command was typed.
        stored: whether `resume=` took everything not typed from the run.
    """
    defaults = _default_choices()
    typed = {override.partition("=")[0].removeprefix("++") for override in launch.overrides}
    experiment = launch.choices.get("experiment")
    by_experiment = _experiment_keys(experiment, launch) if experiment else set()
    result = {"data": "as stored" if stored else f"data={launch.choices.get('data')}"}
    for key in ("model", "augment", "schedule", "data.batch_size", "trainer.epochs", "optimizer.lr"):
        group = key.split(".")[0]
        choice = f"{group}={launch.choices.get(group)}"
        if key in typed:
            result[key] = "command line"
        elif stored:
            result[key] = "as stored"
        elif key in by_experiment:
            result[key] = f"experiment={experiment}"
        elif group in typed:
            result[key] = f"{choice}, command line"
        elif group != "data" and launch.choices.get(group) != defaults.get(group):
            source = (
                f"experiment={experiment}" if group in by_experiment else f"data={launch.choices.get('data')}"
            )
            result[key] = f"{choice}, brought by {source}"
        else:
            result[key] = choice
    return result


def _default_choices() -> dict[str, str]:
    entries = yaml.safe_load((config_dir() / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    return {str(k): str(v) for entry in entries if isinstance(entry, dict) for k, v in entry.items()}


def _experiment_keys(name: str, launch: Launch) -> set[str]:
    """Groups and full keys an experiment sets."""
    for folder in (*launch.user_config_dirs, config_dir()):
        path = folder / "experiment" / f"{name}.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            keys = {
                str(key).removeprefix("override /")
                for entry in content.pop("defaults", [])
                if isinstance(entry, dict)
                for key in entry
            }
            return keys | {f"{g}.{k}" for g, v in content.items() if isinstance(v, dict) for k in v}
    return set()
