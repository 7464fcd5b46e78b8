"""What the commands that take a RUN share: their first arguments, loading it, errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vit_train.errors import ConfigError, OutOfMemoryError, VitTrainError

if TYPE_CHECKING:
    import torch

    from vit_train.trained import Trained


def run(command: str, work: Callable[[], int | None]) -> int:
    """Does the work of a command and returns its exit code; an error of the user's becomes one line.

    Args:
        command: its name, which the line starts with.
        work: returns an exit code of its own, or None for 0.
    """
    try:
        return work() or 0
    except VitTrainError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it takes seconds
            raise
        print(f"{command}: error: out of memory; type a smaller batch size", file=sys.stderr)
        return OutOfMemoryError.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more at exit
        return 0


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds RUN and --weights."""
    parser.add_argument(
        "run", metavar="RUN", help="a run directory (its best checkpoint, else its last) or a checkpoint"
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="auto: the average where there is one",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")


def device(name: str) -> torch.device:
    """The device --device means.

    Raises:
        ConfigError: there is none of that name here.
    """
    from vit_train.strategy import resolve_device

    try:
        return resolve_device(name)
    except ValueError as error:
        raise ConfigError(str(error).replace("strategy.device=auto", "--device auto")) from error


def load_run(command: str, arguments: argparse.Namespace, device: torch.device) -> Trained:
    """The model of RUN; says on stderr which damaged checkpoints were passed over.

    Raises:
        CheckpointError: there is none that can be used.
    """
    from vit_train import checkpoint
    from vit_train.trained import fits, from_checkpoint

    stored, problems = checkpoint.load_run(Path(arguments.run), fits)
    say_skipped(command, problems, stored.path)
    return from_checkpoint(stored, device=device, weights=arguments.weights)


def say_skipped(command: str, problems: list[str], used: Path) -> None:
    """One line on stderr for each damaged checkpoint that `used` stands in for."""
    for problem in problems:
        print(f"{command}: skipped: {problem}; {used.name} is used", file=sys.stderr)
