"""The console, and train.log: every line said goes to both."""

from __future__ import annotations

import errno
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

import rich.console
from rich.console import RenderableType
from tqdm import tqdm

from vit_train.errors import ConfigError
from vit_train.system import streams
from vit_train.text import printable

_PLAIN_WIDTH = 110  # columns where the output is not a terminal, so that logs do not wrap at 80


def _claim(file: IO[str]) -> bool:
    """Whether no other process holds the file. The operating system lets go when the process ends.

    Record locks, because they are not inherited by the forked workers, which may live a little longer.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system may have no locks
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


class Console:
    """Says things on stdout and, once `log_to` was called, in train.log as well.

    Where stdout or stderr fails, train.log goes on alone, and says so once.
    """

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self._out = rich.console.Console(
            width=None if terminal else _PLAIN_WIDTH, highlight=False, emoji=False
        )
        self._log: rich.console.Console | None = None
        self._failed: set[str] = set()  # streams

    def log_to(self, path: Path) -> None:
        """Appends everything said from now on to a file, which is this process's own as long as it is open.

        Raises:
            ConfigError: another process is writing to it.
        """
        file = path.open("a", encoding="utf-8", buffering=1)
        if not _claim(file):
            file.close()
            raise ConfigError(f"{path.parent} is in use: another process is training this run")
        self._log = rich.console.Console(file=file, width=_PLAIN_WIDTH, highlight=False, emoji=False)

    def say(self, what: RenderableType = "") -> None:
        """Prints a line, a table or anything else rich renders. Square brackets are not markup, and
        `:key:` is not an emoji.

        Lines are not wrapped: a command in them is to be copied.
        """
        is_text = isinstance(what, str)
        what = printable(what) if isinstance(what, str) else what
        with tqdm.external_write_mode(file=sys.stdout):
            self._out.print(what, markup=False, soft_wrap=is_text)
        self._write_log(what, soft_wrap=is_text)
        for stream, why in streams.failures().items():
            if stream not in self._failed:
                self._failed.add(stream)
                self.log(
                    f"{stream} cannot be written ({why}): from here on its lines appear only in this log"
                )

    def log(self, text: str) -> None:
        """A line for train.log alone: what stderr gets anyway."""
        self._write_log(printable(text), soft_wrap=True)

    def _write_log(self, what: RenderableType, *, soft_wrap: bool) -> None:
        if self._log is not None:
            with suppress(OSError):  # a full disk: no reason to end a run
                self._log.print(what, markup=False, soft_wrap=soft_wrap)

    def close(self) -> None:
        """Closes train.log."""
        if self._log is not None:
            self._log.file.close()
            self._log = None
