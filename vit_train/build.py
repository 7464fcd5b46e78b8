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
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit_train import checkpoint
from vit_train.construct import check, foreign_code, is_node, make, with_defaults
from vit_train.errors import CheckpointError, ConfigError, DataError, suggest
from vit_train.report.origins import origins
from vit_train.resume import (
    check_budget,
    check_continuation,
    check_data,
    check_entries,
    check_machine,
    checkpoint_to_continue,
    find_run,
    holds_run,
    read_config,
)

if TYPE_CHECKING:
    from torch import nn

    from vit_train.guard import Signals

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
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
# What a stored configuration may name; the user's own command may name anything
_STORED_CODE = {
    "model": ("vit_train.models", "vit_train.layers"),
    "data": ("vit_train.data",),
    "augment": ("vit_train.data",),
    "objective": ("vit_train.objective",),
    "optimizer": ("vit_train.optim",),
    "schedule": ("vit_train.optim",),
    "strategy": ("vit_train.strategy",),
    "trainer": ("vit_train.trainer",),
    "tracker": ("vit_train.tracker",),
}
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


def _with_overrides(stored: dict[str, Any], overrides: list[str]) -> DictConfig:
    """The stored configuration with what the user typed beside resume=.

    Raises:
        ConfigError: a group choice, or a key the run does not have.
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
        group, name = key.split(".")
        known = stored[group].get(name)
        if foreign_code(known, ()):  # a node: it would be built, and the user did not name it
            continue
        if OmegaConf.select(cfg, key) in (None, "auto") and known is not None:
            OmegaConf.update(cfg, key, known)
    if cfg.trainer.auto_batch and stored["trainer"].get("auto_batch"):
        cfg.trainer.grad_accum_steps = stored["trainer"]["grad_accum_steps"]


# ------------------------------------------------------------------------------------------------- building
def build_run(cfg: DictConfig, launch: Launch, signals: Signals | None = None) -> Run | Path:
    """Builds everything a run needs. Writes nothing.

    Args:
        cfg: as composed.
        launch: how the command was typed.
        signals: what has arrived at this process; None where nobody listens.

    Returns:
        The run, or the directory of a run that is finished already.

    Raises:
        ConfigError, DataError, CheckpointError: see the messages.
    """
    check_launch(launch)
    if cfg.resume is None:
        return _build_run(cfg, launch, signals)
    with _blaming(str(cfg.resume)):
        return _build_run(cfg, launch, signals)


@contextmanager
def _blaming(resume: str) -> Iterator[None]:
    """Whatever goes wrong while a stored configuration is built is a mistake in it, whoever wrote it.

    Raises:
        CheckpointError: something did.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        if type(e).__name__ == "OutOfMemoryError":
            raise
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise CheckpointError(f"resume={resume}: the stored configuration makes no run ({reason})") from e


def _build_run(cfg: DictConfig, launch: Launch, signals: Signals | None) -> Run | Path:
    allow = named = None
    notes: list[str] = []
    stored: dict[str, Any] = {}
    if cfg.resume is not None:
        run_dir, named = find_run(str(cfg.resume), None if cfg.run_dir is None else str(cfg.run_dir))
        stored, notes = read_config(run_dir)
        foreign = [
            line
            for key, node in stored.items()
            for line in foreign_code(node, _STORED_CODE.get(key, ()), key)
        ]
        if foreign:
            raise ConfigError(
                f"{run_dir / 'config.yaml'} names code that is not vit-train's ({'; '.join(foreign)}); "
                f"if it is yours, type the full command with run_dir={run_dir}"
            )
        force = cfg.resume == "force"
        cfg, allow = _with_overrides(stored, launch.overrides), _STORED_CODE
        _refuse_secrets(cfg)
        check_config(cfg)
    else:
        force = False
        _refuse_secrets(cfg)  # first: the other check repeats the values it does not like
        check_config(cfg)
        run_dir = choose_run_dir(cfg, launch)
        if holds_run(run_dir):
            stored, notes = read_config(run_dir)
    _check_free(run_dir)
    if cfg.name is None:
        cfg.name = default_name(launch.choices)
    for group in ("data", "trainer"):  # what a config of the user's own leaves to the constructor
        defaults = with_defaults(_plain(cfg)[group])
        cfg[group] = {**defaults, **cfg[group]}
        if stored and stored[group].get("_target_") == defaults["_target_"]:  # by an older version
            stored[group] = {**defaults, **stored[group]}
    _check_numbers(cfg)
    if stored:
        _adopt(cfg, stored)
        check_config(cfg)  # what was adopted as well
        _check_numbers(cfg)
        notes += check_continuation(stored, _plain(cfg), run_dir)
        if (run_dir / "result.json").is_file() and not _grown(stored, cfg):
            return run_dir
    return _build(
        cfg,
        launch,
        run_dir,
        stored=stored,
        allow=allow,
        notes=notes,
        named=named,
        force=force,
        signals=signals,
    )


def _build(
    cfg: DictConfig,
    launch: Launch,
    run_dir: Path,
    *,
    stored: Mapping[str, Any],
    allow: Mapping[str, tuple[str, ...]] | None,
    notes: list[str],
    named: Path | None,
    force: bool,
    signals: Signals | None,
) -> Run:
    from vit_train.data.batch_transforms import Normalize
    from vit_train.guard import Signals
    from vit_train.memory import fit_micro_batch
    from vit_train.precision import resolve_precision
    from vit_train.report.console import Console
    from vit_train.rng import seed_device
    from vit_train.state import Parts
    from vit_train.trained import check_sizes, without_download

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

    console, has_ema = Console(), config["trainer"]["ema_decay"] is not None
    costs: list[int] = []

    def fits(path: Path, _: Any, shapes: checkpoint.Shapes) -> None:
        """Compares with a model without memory: what is stored may lie about its size."""
        if allow is not None:
            check_sizes(config["model"], shapes, path)
        outline, cost = _outline(config, allow)
        costs.append(cost)
        checkpoint.check_shapes(path, shapes, outline, ema=has_ema)

    found, problems = checkpoint_to_continue(run_dir, named, fits)
    cost = costs[-1] if found is not None else _outline(config, allow)[1]
    seed_device(strategy.device, cfg.seed, "init")
    if allow is not None and without_download(config["model"]) != config["model"]:
        if found is None:
            raise CheckpointError(
                f"{run_dir} was to start from pretrained weights and has no checkpoint yet; type the full "
                f"command with run_dir={run_dir}: nothing stored starts a download"
            )
        model = make(without_download(config["model"]), key="model", allow=allow["model"])
    else:
        model = _make(cfg, "model", allow)
    fingerprint = data.fingerprint()
    if found is not None:
        notes += check_data(found, data, fingerprint, run_dir, force=force)
    notes += check_machine(run_dir, strategy.describe())
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
            signals=signals or Signals(),
            about={
                "config": config,
                "inference": _inference(data),
                "dataset_fingerprint": fingerprint,
            },
        )
        trainer = _make(cfg, "trainer", allow)(parts)
    _check_kinds(trainer, config)
    if stored:
        check_budget(stored["trainer"], trainer)
    if found is not None:
        try:
            trainer.resume(found)
            trainer.state.check_position(trainer.steps_per_epoch, trainer.total_steps)
        except (AttributeError, ArithmeticError, RuntimeError, ValueError, TypeError, LookupError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{found.path} does not fit this configuration: {reason}") from error
        if trainer.state.closed_epochs < trainer.total_epochs and (run_dir / "result.json").is_file():
            trainer.state.stopped_early, trainer.state.evaluations_since_best = False, 0
    elif cfg.trainer.auto_batch:
        pieces = fit_micro_batch(trainer, cfg.data.batch_size // strategy.world_size)
        trainer.grad_accum_steps = config["trainer"]["grad_accum_steps"] = pieces
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
        multiply_adds=cost,
    )


def _make(cfg: DictConfig, key: str, allow: Mapping[str, tuple[str, ...]] | None) -> Any:
    node: Any = _plain(cfg)
    for part in key.split("."):
        node = node[part]
    return make(node, key=key, allow=None if allow is None else allow[key.partition(".")[0]])


def _check_kinds(trainer: Any, config: Mapping[str, Any]) -> None:
    """That each node made what its place needs: constructors are checked before, what they make only now.

    Raises:
        ConfigError: one made something else.
    """
    from torch import nn
    from torch.optim import Optimizer

    from vit_train.optim import Schedule
    from vit_train.tracker import NullTracker
    from vit_train.trainer import Trainer

    if not isinstance(trainer, Trainer):
        raise ConfigError(f"trainer: expected a Trainer, {config['trainer']['_target_']} makes another thing")
    parts: dict[str, tuple[Any, type]] = {
        "model": (trainer.model, nn.Module),
        "objective": (trainer.objective, nn.Module),
        "optimizer": (trainer.optimizer, Optimizer),
        "schedule": (trainer.schedule, Schedule),
        "tracker": (trainer.tracker, NullTracker),
    }
    for key, (made, kind) in parts.items():
        if not isinstance(made, kind):
            target = config[key]["_target_"]
            raise ConfigError(f"{key}: expected {kind.__name__}, {target} makes {type(made).__name__}")


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


def _inference(data: Any) -> dict[str, Any]:
    return {
        "class_names": data.class_names,
        "mean": list(data.mean),
        "std": list(data.std),
        "img_size": data.img_size,
        "in_channels": data.in_channels,
    }


def _outline(config: Mapping[str, Any], allow: Mapping[str, tuple[str, ...]] | None) -> tuple[nn.Module, int]:
    """A copy of the model that holds no memory, and its multiply-adds per image, which proves that it takes
    such images."""
    import torch

    from vit_train.report.summary import multiply_adds
    from vit_train.trained import without_download

    with torch.device("meta"):
        node = without_download(config["model"])
        model = make(node, key="model", allow=None if allow is None else allow["model"])
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "num_classes"):
        raise ConfigError(f"model: {node['_target_']} makes no model")
    data = config["data"]
    if model.num_classes != data["num_classes"]:
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but the data has {data['num_classes']} classes; "
            "leave it out: it comes from the data"
        )
    with _as_config_error("model"):
        return model, multiply_adds(model, in_channels=data["in_channels"], img_size=data["img_size"])


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
    if run_dir.is_dir():
        check_entries(run_dir)
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"run_dir={run_dir} cannot be written: no permission to write in {existing}")
    # what a crash leaves behind before config.yaml is in place: its log and hidden files
    begun = run_dir.is_dir() and not holds_run(run_dir)
    if begun and any(p.name[0] != "." and p.name != "train.log" for p in run_dir.iterdir()):
        raise ConfigError(f"run_dir={run_dir} holds files that are no run; name a new or empty directory")


def _grown(stored: Mapping[str, Any], cfg: DictConfig) -> bool:
    return any(stored["trainer"][key] != cfg.trainer[key] for key in ("epochs", "max_steps"))
