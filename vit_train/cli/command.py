"""What the commands that take a RUN share: their first arguments, loading it, errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vit_train import checkpoint
from vit_train.errors import ConfigError, ran_out, told
from vit_train.runs.run_dir import OWN_FILES, holds_run
from vit_train.system import streams
from vit_train.system.places import expanded, require_here

if TYPE_CHECKING:
    import torch

    from vit_train.checkpoint import Checkpoint
    from vit_train.inference.trained import Trained


def run(
    command: str,
    work: Callable[[argparse.Namespace], int | None],
    parse: Callable[[], argparse.Namespace],
) -> int:
    """Does the work of a command and returns its exit code; an error of the user's becomes one line.

    `work` returns an exit code of its own, or None for 0.
    """
    try:
        with streams.output():
            arguments = parse()
            require_here()
            return work(arguments) or 0
    except Exception as error:
        failure = told(error)
        if failure is None:
            raise
        print(f"{command}: error: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    """One whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help says more")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds RUN, --weights and --trust."""
    parser.add_argument(
        "run", metavar="RUN", help="a run directory (its best checkpoint, else its last) or a checkpoint"
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="auto: the averaged weights if the run has any",
    )
    parser.add_argument(
        "--trust", metavar="PACKAGE", action="append", default=[], help="whose code RUN may name as well"
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds IMAGE... and --allow-url, with an epilog that explains them."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder, pattern, URL or -")
    parser.add_argument("--allow-url", action="store_true", help="also fetch URLs that a list holds")
    parser.epilog = (
        "IMAGE is a file, a folder (searched below, sorted), a quoted pattern such as 'photos/**/*.jpg', an "
        "http or https URL, or - for a list on stdin, one per line. An image that cannot be read is named, "
        "the others are processed, and the exit code is 3."
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type with which argparse makes a whole number, and refuses a smaller or larger one."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} to {most}, got {text!r}")
        return int(text)

    return number


def device(name: str) -> torch.device:
    """The device --device means.

    Raises:
        ConfigError: there is none of that name here.
    """
    from vit_train.training.strategy import resolve_device

    try:
        return resolve_device(name, advice="--device auto")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_run(command: str, arguments: argparse.Namespace, device: torch.device) -> Trained:
    """The model of RUN; see `read_run`."""
    from vit_train.inference.trained import from_checkpoint

    stored, trust = read_run(command, arguments)
    return from_checkpoint(stored, device=device, weights=arguments.weights, trust=trust)


def read_run(command: str, arguments: argparse.Namespace) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint of RUN and the packages of --trust; says on stderr which damaged ones were passed over.

    Raises:
        CheckpointError, ConfigError: there is none that can be used, or no package to trust.
    """
    from vit_train.inference.trained import fits
    from vit_train.runs.stored import trusted

    trust = trusted(arguments.trust)
    stored, problems = checkpoint.load_run(Path(arguments.run), partial(fits, trust=trust))
    for problem in problems:
        print(f"{command}: skipped: {problem}; {stored.path.name} is used", file=sys.stderr)
    return stored, trust


def stdin_lines() -> Iterator[str]:
    """What stdin holds; names need not be text, and a process may have no stdin."""
    for line in sys.stdin.buffer if sys.stdin else ():
        yield os.fsdecode(line)


def output_file(option: str, path: str) -> Path:
    """A file that may be written: one that does not exist yet, or a plain one, which is replaced.

    Its folder may not exist yet either, if it can be made.

    Raises:
        ConfigError: it is a directory, a device, a pipe or a link, which a rename would destroy, an image, or
            a file of a run; or there can be no file.
    """
    from vit_train.data.folder.listing import is_image

    target = expanded(path)
    if is_image(path):
        raise ConfigError(f"{option} {path} names an image; type another name")
    in_checkpoint = (target.parent / checkpoint.MANIFEST).exists()
    if in_checkpoint or (target.name in OWN_FILES and holds_run(target.parent)):
        raise ConfigError(f"{option} {path} is a file of a run, which would be lost; type another place")
    if path.endswith(("/", os.sep)) or target.is_symlink() or (target.exists() and not target.is_file()):
        raise ConfigError(f"{option} {path} is not a plain file; type the name of one")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be made in {above}; type another place")
    return target


@contextmanager
def writing(what: object, advice: str = "") -> Iterator[None]:
    """Around whatever a command writes.

    Raises:
        ConfigError: the operating system refused; `advice` is what to type instead.
        OSError: memory or open files ran out, perhaps of what is read meanwhile.
    """
    try:
        yield
    except OSError as error:
        if ran_out(error):
            raise
        raise ConfigError(f"{what} cannot be written: {error.strerror or error}{advice}") from error


def output_folder(run: Path, name: str) -> Path:
    """A folder inside a run, which may not lead out of it: a run can come from somebody else.

    Raises:
        ConfigError: it is a link.
    """
    folder = run / name
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link, which is not followed; name another place with --out")
    return folder
