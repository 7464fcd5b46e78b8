"""`vit-train`: compose the configuration, build the run, train, say how it went."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit_train.cli.hydra_errors import chain, explain
from vit_train.cli.typed import for_hydra
from vit_train.config.build import Run, build_run
from vit_train.config.check import Launch, config_dir, plain
from vit_train.config.describe import describe
from vit_train.errors import (
    ConfigError,
    Interrupted,
    OutOfMemoryError,
    SaveError,
    VitTrainError,
    ran_out_of_memory,
    told,
)
from vit_train.runs.record import read_result
from vit_train.runs.stored import packages_of, trust_options, trusted
from vit_train.system import durable, places, streams
from vit_train.text import count

if TYPE_CHECKING:
    from torch import nn

    from vit_train.data import DataModule
    from vit_train.report.sweep import Job
    from vit_train.system.precision import Precision
    from vit_train.training.guard import Signals, Stop
    from vit_train.training.state import Transform
    from vit_train.training.strategy import SingleDevice
    from vit_train.training.tracker import Plan
    from vit_train.training.trainer import Trainer

_FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Entry point of `vit-train` and `python -m vit_train`. Exits with the codes of errors.py."""
    fail = partial(_fail, os.environ.get(_FULL_ERROR) == "1")
    threading.excepthook = _thread_failed
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises instead of printing and exiting
    failures: list[int] = []  # codes: an error would keep the job it ended, and its memory, alive
    jobs: list[Job] = []
    composed = False

    def task(cfg: DictConfig) -> float | None:
        nonlocal composed
        composed = True
        sys.argv[1:] = arguments  # as typed, for run.json
        result = None
        # Hydra announces an exception in a line of its own, and a sweep would end with it: kept until the end
        try:
            result = train(cfg)
        except Interrupted as stopped:  # said so already; ends a sweep too
            sys.exit(stopped.exit_code)
        except Exception as error:
            failure = told(error)
            if isinstance(error, OmegaConfBaseException):  # what a value refers to is not there, or itself
                failure = ConfigError(f"{error.full_key}: {str(error).partition(chr(10))[0]}")
            if failure is None:
                raise
            streams.only_say()
            failures.append(fail(str(failure), failure.exit_code))
        finally:
            if HydraConfig.get().mode == RunMode.MULTIRUN and not cfg.get("summary"):
                jobs.append(_job(result))
        return None if result is None else result.get("best/val/top1")

    arguments = sys.argv[1:]
    try:
        with streams.output():
            places.require_here()
            sys.argv[1:] = for_hydra(arguments)
            try:
                hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(task)()
            except Exception as error:
                if any(isinstance(e, KeyboardInterrupt) for e in chain(error)):  # OmegaConf trips over it
                    raise KeyboardInterrupt from error
                raise
            finally:
                _say_sweep(jobs)
    except KeyboardInterrupt:
        sys.exit(130)
    except VitTrainError as error:  # what is typed, or --help > /dev/full
        sys.exit(fail(str(error), error.exit_code))
    except (HydraException, TypeError, ValueError) as error:  # the latter: model=3
        if composed and not isinstance(error, HydraException):
            raise
        sys.exit(fail(explain(error), 2))
    except OSError as error:  # after Hydra's, some of which are such
        if composed:
            raise
        # such as the folder of a sweep, which is made before its first job
        sys.exit(fail(f"{error.filename or Path.cwd()} cannot be used: {error.strerror}", 2))
    if failures:
        sys.exit(failures[0])


def _fail(shows_where: bool, message: str, exit_code: int) -> int:
    """Prints the error in one line, after a traceback if that was asked for."""
    if shows_where:
        traceback.print_exc()
    print(f"vit-train: error: {message}", file=sys.stderr)
    return exit_code


def _job(result: dict[str, Any] | None) -> Job:
    """The job of a sweep that has just run, and what came of it."""
    from vit_train.report.sweep import Job

    typed = (override.lstrip("+~").partition("=") for override in _launch().overrides)
    return Job(HydraConfig.get().job.num, {key: value for key, _, value in typed}, result)


def _say_sweep(jobs: list[Job]) -> None:
    """The jobs that ran in this process, if it was more than one, in a table."""
    if len(jobs) > 1:
        from vit_train.report.console import Console
        from vit_train.report.sweep import sweep_table

        Console().say(sweep_table(jobs))


def _thread_failed(what: threading.ExceptHookArgs) -> None:
    """On a full disk TensorBoard's writing thread ends in a traceback; the tracker says it in a line."""
    if not isinstance(what.exc_value, OSError):
        threading.__excepthook__(what)


def train(cfg: DictConfig) -> dict[str, Any] | None:
    """One job, with the composed configuration. Returns the closing figures, if it came to its end."""
    if cfg.get("summary"):
        _describe(cfg)
        return None
    streams.mend()  # a launcher of sweeps may run this in a process of its own
    streams.only_say()
    from vit_train.training.guard import Signals

    with Signals() as signals:
        built = _build(cfg, signals)
        if isinstance(built, Path):
            if (built / ".history.png").exists() or not (built / "history.png").exists():
                with suppress(OSError):  # a full disk: the run is finished all the same
                    _draw(built)  # killed at the very last
            own = packages_of(plain(cfg)) or trusted(cfg.trust, hydra=True)
            evaluate = f"vit-eval {places.as_argument(built)}{trust_options(own)}"
            print(f"{built} is finished: nothing to do. To see its figures, type:  {evaluate}")
            return read_result(built)
        return execute(built)


def _describe(cfg: DictConfig) -> None:
    """`summary=true`: what the configuration costs."""
    described = describe(cfg, _launch())

    from vit_train.report.console import Console
    from vit_train.report.model_cost import description

    console = Console()
    for part in description(described):
        console.say(part)


def _build(cfg: DictConfig, signals: Signals) -> Run | Path:
    from vit_train.report.console import Console

    try:
        return build_run(cfg, _launch(), Console(), signals)
    except KeyboardInterrupt as error:
        if not signals.arrived():
            raise
        message = f"stopped by {signal.Signals(signals.signum).name} before the first step: nothing to save"
        print(message, file=sys.stderr)
        raise Interrupted(message, signals.signum) from error


def _launch() -> Launch:
    hydra_config = HydraConfig.get()
    sources = hydra_config.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.provider == "command-line"]
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    # as typed: `run_dir=runs/${seed}` refers to nothing in Hydra's own settings
    typed: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return Launch(
        overrides=[str(override) for override in typed],
        choices={str(k): str(v) for k, v in hydra_config.runtime.choices.items() if v is not None},
        job_dir=Path(hydra_config.runtime.output_dir) if sweeping else None,
        user_config_dirs=folders,
    )


def execute(run: Run) -> dict[str, Any] | None:
    """Trains, and leaves a complete run directory behind whatever happens.

    Returns:
        The closing figures, or None where the run was stopped by a limit.

    Raises:
        Interrupted: a signal stopped it; everything is saved.
        VitTrainError: it failed.
    """
    from vit_train.training.guard import Stop

    trainer, run_dir = run.trainer, run.run_dir
    try:
        durable.make_directory(run_dir)
        run.console.log_to(run_dir / "train.log")
    except OSError as error:
        raise SaveError(f"{run_dir} cannot be written: {error.strerror or error}") from error
    try:
        _open(run)
        outcome = trainer.fit()
        return _stopped(run, outcome) if isinstance(outcome, Stop) else _finish(run, outcome)
    except Exception as error:
        failure = _failure(run, error)
        if failure is error:
            raise
        raise failure from error
    finally:
        log_error = partial(_log_error, run, sys.exc_info()[1])
        # data first: until its workers have ended, the death of another one can interrupt anything
        for cleanup in (
            trainer.parts.data.close,
            trainer.tracker.close,
            partial(_draw, run_dir),
            log_error,
            run.console.close,
        ):
            with suppress(OSError):  # a full disk ends in its own error, not in that of the cleaning up
                cleanup()


def _open(run: Run) -> None:
    """The run directory as a run in progress has it, and the first lines."""
    import yaml

    from vit_train.report.summary import summary
    from vit_train.runs.record import open_run_dir, write_facts

    trainer, run_dir, strategy = run.trainer, run.run_dir, run.trainer.strategy
    checkpointer = trainer.parts.checkpointer
    checkpointer.remove_partial()
    checkpointer.finish_interrupted(
        step=trainer.state.step, keep=trainer.keep_checkpoints, kept=trainer.state.kept_steps()
    )
    checkpointer.check_space(trainer.model, ema=trainer.ema is not None, keep=trainer.keep_checkpoints)
    open_run_dir(run_dir, run.config)
    checkpointer.make()  # a folder with checkpoints/ and no configuration would be nobody's
    write_facts(
        run_dir,
        config=run.config,
        device=strategy.describe(),
        fingerprint=trainer.parts.about["dataset_fingerprint"],
        world_size=strategy.world_size,
        teacher=run.teacher,
    )
    run.console.say(summary(run))
    trainer.tracker.start(_plan(run))
    trainer.tracker.text("config", yaml.safe_dump(run.config, sort_keys=False))


def _failure(run: Run, error: Exception) -> Exception:
    """The error a user can do something about, or the same one where it is a bug."""
    # torch raises it from a signal handler, wherever the main thread happens to be
    lost = run.trainer.parts.data.worker_lost(error) if isinstance(error, RuntimeError) else None
    if lost is not None:
        return lost
    if ran_out_of_memory(error) and not isinstance(error, VitTrainError):
        from vit_train.training.memory import advice

        model = type(run.trainer.model).__name__
        return OutOfMemoryError(advice(run.config, model, run.trainer.strategy.device, error))
    if "does not have a deterministic implementation" in str(error):
        return ConfigError(f"trainer.deterministic=true: {str(error).split(', but you set')[0]}")
    if isinstance(error, OSError) and _is_save(error, run.run_dir):
        return SaveError(f"{run.run_dir} cannot be written: {error.strerror}")
    return told(error) or error


def _is_save(error: OSError, run_dir: Path) -> bool:
    """Whether it lies in the run directory; a flush that fails does not say where."""
    if error.filename is None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    return Path(os.fsdecode(error.filename)).absolute().is_relative_to(run_dir.absolute())


def _log_error(run: Run, error: BaseException | None) -> None:
    if isinstance(error, VitTrainError) and not isinstance(error, Interrupted):
        run.console.log(f"error: {error}")


def _draw(run_dir: Path) -> None:
    from vit_train.report.history import draw_history

    draw_history(run_dir)


def pictured(trainer: Trainer) -> tuple[nn.Module, DataModule, Transform, SingleDevice, Precision]:
    """The arguments of the pictures of a run: of the averaged weights, where there are any."""
    model = trainer.model if trainer.ema is None else trainer.ema.module
    parts = trainer.parts
    return model, parts.data, parts.eval_transform, trainer.strategy, trainer.precision


def _plan(run: Run) -> Plan:
    from vit_train.report.pictures import sheet_of_attention
    from vit_train.training.tracker import Plan

    trainer = run.trainer
    data, evaluations = trainer.parts.data, 1 if trainer.ema is None else 2
    return Plan(
        first_step=trainer.state.step,
        closed_epochs=trainer.state.closed_epochs,
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.steps_per_epoch,
        batch_size=min(run.config["data"]["batch_size"], data.sizes["train"]),
        eval_images_per_epoch=evaluations * data.sizes["val"] // trainer.eval_every_epochs,
        mean=data.mean,
        std=data.std,
        loss_parts=trainer.loss_parts,
        draw_attention=partial(sheet_of_attention, *pictured(trainer)),
    )


def _stopped(run: Run, stop: Stop) -> dict[str, Any] | None:
    message = f"{stop.reason}; step {run.trainer.state.step} is saved. Continue with:"
    trust = trust_options(packages_of(run.config), hydra=True)
    run.console.say(f"{message}\n  vit-train {places.as_typed('resume', run.run_dir)}{trust}")
    if stop.signum is not None:
        raise Interrupted(message, stop.signum)
    return None


def _finish(run: Run, test: dict[str, float]) -> dict[str, Any]:
    from vit_train.report.pictures import sheet_of_attention, sheet_of_predictions
    from vit_train.report.summary import closing_table, hyperparameters
    from vit_train.runs.record import closing_figures

    trainer, run_dir = run.trainer, run.run_dir
    result = closing_figures(
        state=trainer.state,
        test=test,
        steps_per_epoch=trainer.steps_per_epoch,
        batch_size=min(run.config["data"]["batch_size"], trainer.parts.data.sizes["train"]),
        seed=run.config["seed"],
    )
    step = trainer.state.step
    trainer.tracker.test(step, test)
    trainer.tracker.picture("predictions", partial(sheet_of_predictions, *pictured(trainer)), step)
    trainer.tracker.picture("attention", partial(sheet_of_attention, *pictured(trainer)), step)
    final = {k: v for k, v in result.items() if isinstance(v, float) and "/top1" in k}
    trainer.tracker.hparams(hyperparameters(run.config), final)
    trainer.tracker.flush()  # with its result a run counts as finished, and nothing is logged again
    durable.replace(run_dir / "result.json", json.dumps(result, indent=1))
    run.console.say(closing_table(result))
    by_steps = run.config["trainer"]["max_steps"] is not None
    own = packages_of(run.config)
    resume = f"{places.as_typed('resume', run_dir)}{trust_options(own, hydra=True)}"
    longer = f"trainer.max_steps={2 * step}" if by_steps else f"trainer.epochs={2 * trainer.total_epochs}"
    if trainer.state.stopped_early:
        waited = trainer.state.evaluations_since_best
        run.console.say(f"stopped early: no better validation top-1 in {count(waited, 'evaluation')}")
        longer = f"trainer.early_stop_patience={2 * waited}"
    run.console.say(
        f"run directory  {run_dir}\n"
        f"curves         tensorboard --logdir {places.as_argument(run_dir.parent)}\n"
        f"evaluate       vit-eval {places.as_argument(run_dir)}{trust_options(own)}\n"
        f"train longer   vit-train {resume} {longer}"
    )
    return result
