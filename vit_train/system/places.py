"""Places as people type them: folders and files behind `key=`, and in the commands that are printed."""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from io import BufferedReader
from pathlib import Path

from vit_train.errors import ConfigError

_KEYS = ("data.root", "run_dir", "resume", "init_from", "objective.teacher")
WEIGHT_FILES = (".yaml", ".yml", ".json")  # of classes; their key takes other values as well


def expanded(path: object) -> Path:
    """A leading `~` or `~user` is that user's home; of no user, it is the beginning of a name."""
    return Path(os.path.expanduser(str(path)))  # noqa: PTH111 - Path.expanduser ends at an unknown user


def require_here() -> None:
    """The working directory exists: torch and Hydra fail without one, each in its own way.

    Raises:
        ConfigError: it was deleted.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory is gone ({error.strerror}); cd to one that exists"
        ) from error


def open_plain(path: str | Path, *, follow: bool = True) -> BufferedReader:
    """A file for reading. Nobody waits for a pipe, a socket or a device.

    Raises:
        OSError: it cannot be opened, or is not a plain file, or a link where links are not to be followed.
    """
    flags = ["O_NONBLOCK", "O_BINARY", *([] if follow else ["O_NOFOLLOW"])]
    try:
        descriptor = os.open(path, sum((getattr(os, flag, 0) for flag in flags), os.O_RDONLY))
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            error.strerror = "it is a link"
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        reason = os.strerror(number) if stat.S_ISDIR(mode) else "it is not a plain file"
        raise OSError(number, reason, str(path))
    return os.fdopen(descriptor, "rb")


def is_text(key: str, value: str) -> bool:
    """Whether what stands behind `key=` names a place as it is, and no grammar has a say in it."""
    special = value in ("", "null") or "${" in value or (value[0] in "'\"" and value[1:].endswith(value[0]))
    named = key in _KEYS or (key == "objective.class_weights" and value.endswith(WEIGHT_FILES))
    return named and not special


def quoted(text: str) -> str:
    """Text as Hydra quotes it: backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (m[2] and r"\'"), text) + "'"


def as_argument(path: object) -> str:
    """A path as a shell takes it, of which no command thinks that it is an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def as_typed(key: str, path: object) -> str:
    """`key=path` as a shell takes it, for a command that is printed."""
    text = str(path)
    return shlex.quote(f"{key}={text if is_text(key, text) else quoted(text)}")
