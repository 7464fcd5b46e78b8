"""stdin, stdout and stderr of a command, which may be closed, full, or a pipe that nobody reads.

Once a write to a stream has failed, the stream takes everything and keeps nothing. On stdout, which is what
most commands are for, the first failure ends the command; a run goes on, because it only says things.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vit_train.errors import SaveError

_NUMBERS = {"stdout": 1, "stderr": 2}


def stand() -> None:
    """Opens /dev/null in place of whatever was closed at the start, or the next file would get its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def mend() -> None:
    """Replaces stdout and stderr by streams that fail at most once.

    A name that the terminal cannot show comes out as an escape.
    """
    for name, number in _NUMBERS.items():
        stream: Any = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # somebody collects what is said, such as a test
            continue
        bare = io.FileIO(number, "w", closefd=False) if stream is None else stream.buffer
        raw = _Patient(getattr(bare, "raw", bare), ends=name == "stdout")
        mended = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding="utf-8" if stream is None else stream.encoding,
            errors="backslashreplace",
            line_buffering=name == "stderr" or raw.isatty() or getattr(stream, "write_through", False),
        )
        setattr(sys, name, mended)


@contextmanager
def output() -> Iterator[None]:
    """Around a command: its output is written to the end, or that is the error, unless it has one of its own.

    Raises:
        SaveError, SystemExit: see `_Patient.write`.
    """
    mend()
    try:
        yield
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    except BaseException:
        only_say()
        raise
    sys.stdout.flush()


def only_say() -> None:
    """From now on a failure of stdout ends nothing."""
    for raw in _raws().values():
        raw.ends = False


def failures() -> dict[str, str]:
    """stdout or stderr -> why it keeps nothing any more."""
    return {name: raw.failure for name, raw in _raws().items() if raw.failure}


def _raws() -> dict[str, _Patient]:
    buffers = {name: getattr(getattr(sys, name), "buffer", None) for name in _NUMBERS}
    raws = {name: getattr(buffer, "raw", None) for name, buffer in buffers.items()}
    return {name: raw for name, raw in raws.items() if isinstance(raw, _Patient)}


class _Patient(io.RawIOBase):
    """A raw stream that fails at most once.

    Args:
        raw: where the bytes go.
        ends: the failure ends the command.
    """

    def __init__(self, raw: io.FileIO, *, ends: bool) -> None:
        self.raw, self.ends, self.failure = raw, ends, ""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.raw.isatty()

    def fileno(self) -> int:
        return self.raw.fileno()

    def write(self, data: Any) -> int:
        """As any raw stream; nothing where it failed before.

        Raises:
            SaveError: it failed, and that ends the command.
            SystemExit: likewise, but because nobody reads on (`| head`), which is not an error.
        """
        while not self.failure:
            try:
                written = self.raw.write(data)
            except OSError as error:
                self.failure = error.strerror or str(error)
                if self.ends and isinstance(error, BrokenPipeError):
                    raise SystemExit(0) from error
                if self.ends:
                    raise SaveError(f"stdout cannot be written: {self.failure}") from error
            else:
                if written is not None:
                    return written
                select.select([], [self.raw], [])  # a terminal that another program made non-blocking
        return len(data)
