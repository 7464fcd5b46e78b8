"""Fault points: named places where a test makes a real process fail. They do nothing unless asked for.

`VIT_TRAIN_FAULT` names one fault; without it `point` is an empty function.

    POINT:N:SIGKILL            the Nth time POINT is reached, the process sends itself this signal
    POINT:N:ENOSPC             the Nth time and ever after, the operating system "answers" with this error
    write:N:OFFSET:ENOSPC      from the Nth save on, byte OFFSET of the save cannot be written
    write:N:OFFSET:ENOSPC:M    the same for M saves only

The points are listed where they stand: `grep -rn faults.point vit_train`.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from typing import IO


def _nothing(name: str, file: IO[bytes] | None = None, data: bytes = b"") -> None:
    """Called at every point of a process nobody wants to fail."""


point = _nothing


def arm(spec: str | None) -> None:
    """Sets the one fault of this process, or none.

    Raises:
        ValueError: the specification is not one of the forms above.
    """
    global point
    point = _nothing if spec is None else _Fault(spec)


class _Fault:
    """One fault: counts how often its point is reached, and acts."""

    def __init__(self, spec: str) -> None:
        self.name, count, *rest = spec.split(":")
        self.count = int(count)
        self.offset = int(rest.pop(0)) if self.name == "write" else 0
        self.action = rest[0]
        self.last = self.count + int(rest[1]) - 1 if len(rest) > 1 else None
        if not hasattr(signal, self.action) and not hasattr(errno, self.action):
            raise ValueError(f"VIT_TRAIN_FAULT={spec}: {self.action} is neither a signal nor an error")
        self.reached: Counter[str] = Counter()
        self.written = 0

    def __call__(self, name: str, file: IO[bytes] | None = None, data: bytes = b"") -> None:
        self.reached[name] += 1
        if name == "save.begin":
            self.written = 0
        if name == "write" and self.name == "write":
            self._write(file, data)
        elif name == self.name and hasattr(signal, self.action):
            if self.reached[name] == self.count:
                os.kill(os.getpid(), getattr(signal, self.action))
        elif name == self.name and self.reached[name] >= self.count:
            self._refuse()

    def _write(self, file: IO[bytes] | None, data: bytes) -> None:
        """As a full disk does: what still fits is written, then comes the error."""
        save = self.reached["save.begin"]
        left = self.offset - self.written
        self.written += len(data)
        if save < self.count or (self.last is not None and save > self.last) or left > len(data):
            return
        if file is not None:
            file.write(data[: max(left, 0)])
            file.flush()
        self._refuse()

    def _refuse(self) -> None:
        number = getattr(errno, self.action)
        raise OSError(number, os.strerror(number))


arm(os.environ.get("VIT_TRAIN_FAULT"))
