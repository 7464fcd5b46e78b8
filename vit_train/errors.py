"""What can go wrong for a user, and the exit code each kind of failure ends in.

Every error a user can cause is raised as one of these classes with a one-line message that says what is
wrong, where, and what to type instead. The entry point prints the message and exits with `exit_code`;
anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from vit_train.text import printable

# Raised by building and running where a stored value, or one typed beside it, makes no sense
UNFIT = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class VitTrainError(Exception):
    """Base of every error that ends a command with one clear line: `KEY=WHERE WHAT; ADVICE`.

    Args:
        what: what is wrong, and where it is wrong if `where` does not say.
        where: the file or other thing that it is about.
        key: of the configuration, where the rest begins with its value.
        advice: what to type instead.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", key: str = "", advice: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.key = key
        self.advice = advice

    def __str__(self) -> str:
        named = f"{self.where} {self.what}" if self.where else self.what
        named = f"{self.key}={named}" if self.key else named
        return printable(f"{named}; {self.advice}" if self.advice else named)

    def reworded(self, *, key: str | None = None, advice: str | None = None) -> Self:
        """The same error in the words of another command."""
        return type(self)(
            self.what,
            where=self.where,
            key=self.key if key is None else key,
            advice=self.advice if advice is None else advice,
        )


class ConfigError(VitTrainError):
    """The composed configuration cannot be run."""

    exit_code = 2


class DataError(VitTrainError):
    """The dataset is missing, unreadable or does not fit what was asked for."""

    exit_code = 3


class CheckpointError(VitTrainError):
    """No valid checkpoint where one was needed."""

    exit_code = 4


class SaveError(VitTrainError):
    """A checkpoint could not be written."""

    exit_code = 5


class NonFiniteError(VitTrainError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 6


class OutOfMemoryError(VitTrainError):
    """The accelerator or the machine ran out of memory."""

    exit_code = 7


class WorkerLostError(VitTrainError):
    """A data worker or a rank died."""

    exit_code = 8


class Interrupted(VitTrainError):  # noqa: N818 - not an error: the run was saved and can be continued
    """The run was stopped by a signal after it was saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is full, that of an accelerator or of the machine.

    torch has no class for the latter, and importing it for the former takes seconds: both are known by name.
    """
    words = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def ran_out(error: BaseException) -> bool:
    """Whether memory or open files ran out: whatever was being read or built may be sound."""
    too_many = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return too_many or ran_out_of_memory(error)


def told(error: Exception) -> VitTrainError | None:
    """The error that a command ends with in one line; None for a bug, which keeps its traceback."""
    if isinstance(error, VitTrainError):
        return error
    if ran_out_of_memory(error):
        said = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
        return OutOfMemoryError(
            f"out of memory ({said}); type a smaller model or batch size, or end other programs that "
            "use this memory"
        )
    if isinstance(error, OSError) and error.errno is not None:
        what = error.filename or "the operating system refused something"
        return VitTrainError(f"{what}: {error.strerror}")
    return None


@contextmanager
def blame(
    kind: type[VitTrainError], what: str, errors: tuple[type[Exception], ...] = UNFIT
) -> Iterator[None]:
    """Whatever goes wrong inside is a mistake in what is stored or typed, unless something ran out.

    Raises:
        VitTrainError: of that kind, `what: reason` in one line.
    """
    try:
        yield
    except errors as error:
        if ran_out(error):
            raise
        reason = " ".join(str(error).split())
        if not reason or isinstance(error, LookupError):  # which says no more than a name
            reason = f"{type(error).__name__} {reason}".strip()
        raise kind(f"{what}: {reason}") from error


@contextmanager
def passing_over() -> Iterator[None]:
    """Passes over whatever goes wrong inside, unless something ran out."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise
