"""A worker process of a DataLoader: how it is started, whom it obeys, and how its end is told in one line."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import sys
from threading import Thread
from types import TracebackType

from vit_train.errors import WorkerLostError

# Fork where it is sound. On Linux two workers are up in 0.05 s against 2 s for spawn, which imports torch in
# each, and share the arrays in memory. Forking beside threads is risky in general; a worker here touches no
# accelerator, runs torch on one thread (the DataLoader sets that, so the parent's OpenMP pool is never
# entered), and glibc and CPython make their own locks usable after a fork: 100 pools forked beside threads
# that log, hash and multiply started without a hang. On macOS the system's frameworks do not survive a fork.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

DIED = "DataLoader worker (pid"  # how torch's line about it begins
SHORT = {  # what a worker may run out of; the number is its exit code then
    errno.ENOSPC: "no space left in shared memory (/dev/shm)",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.EAGAIN: "no more processes may be started (ulimit -u)",
}
_FEWER = "type data.num_workers=0 or a smaller number"
_ORPHAN_SECONDS = 5  # how soon a worker notices that its parent is gone


def worker_lost(error: BaseException, reading: str = "") -> WorkerLostError | None:
    """The one line for an exception that means a worker died, None for any other.

    torch raises it from a signal handler, so it may surface anywhere in the main thread, not only in a
    loader: whoever reports errors asks here. A batch on its way from a dying worker ends in EOFError instead.
    `reading` is what the worker was doing, where that is known.
    """
    text = str(named_death(error))
    if (short := _short_of(error, text)) is not None:
        return WorkerLostError(f"data workers: {SHORT[short]}", advice=_FEWER)
    if isinstance(error, RuntimeError) and text.startswith(DIED):
        reason = text.splitlines()[0].rstrip(". ")
    elif is_broken(error):
        reason = "a DataLoader worker died"
    else:
        return None
    return WorkerLostError(f"{reason}{reading}: memory may have run out", advice=_FEWER)


def _short_of(error: BaseException, text: str) -> int | None:
    """The number in `SHORT` of what the processes ran out of, which torch says in several ways."""
    if isinstance(error, OSError):
        return error.errno if error.errno in SHORT else None
    ended = re.search(r"exit code (\d+)", text)
    if text.startswith(DIED) and ended:
        return int(ended[1]) if int(ended[1]) in SHORT else None
    if "unable to allocate shared memory" in text:  # torch 2.11 gives no reason
        return errno.ENOSPC
    if "shared memory" not in text and "Communication with the workers" not in text:
        return None  # somebody else's
    return next((number for number in SHORT if os.strerror(number) in text), None)


def named_death(error: BaseException) -> BaseException:
    """What the signal handler said, where the DataLoader caught it and said less: not how the worker died."""
    cause = error.__cause__
    return cause if cause is not None and str(cause).startswith(DIED) else error


def is_broken(error: BaseException) -> bool:
    """Whether a batch was on its way from a worker that died; not: whether a worker reports such an error."""
    first = str(error).partition("\n")[0]
    reported = first.startswith("Caught ") and "in pin memory thread" not in first
    return isinstance(error, EOFError | ConnectionError) and not reported


def end_if_short(error: BaseException) -> None:
    """Ends this worker where something in `SHORT` ran out: the exit code tells the main process which."""
    if (short := _short_of(error, str(error))) is not None:
        os._exit(short)


def detach_worker(worker_id: int) -> None:  # noqa: ARG001 - the DataLoader passes it
    """Leaves the terminal's process group, so Ctrl-C and a scheduler's signal reach the main process only.

    It then stops at a step boundary with its workers still serving. The DataLoader ends the workers, and they
    notice by themselves when the main process is gone. Where a scheduler signals every process of a job, a
    worker obeys its parent only.
    """
    started_by = multiprocessing.parent_process()
    assert started_by is not None, "a worker is a process that another one started"
    parent = started_by.pid
    if hasattr(os, "setsid"):
        os.setsid()
        # The DataLoader's own watch compares with whoever is the parent when it begins: too late, if the main
        # process was killed while this one started
        if os.getppid() != parent:
            os._exit(0)
    sys.excepthook = _report
    # A batch that cannot be handed over is gone, and the main process would wait for it
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM ends a worker whoever sends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey, args=(parent,), name="obey", daemon=True).start()


def _end(error: Exception, _: object) -> None:
    """Ends this process with a code that tells the main one why; not where that one breaks it off."""
    _report(type(error), error, error.__traceback__)
    if not isinstance(error, EOFError | ConnectionError):
        os._exit(1)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As usual; but a thread that hands batches over ends the process where something ran out, like `_end`,
    and says nothing where the main process breaks it off.
    """
    end_if_short(error)
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _obey(parent: int | None) -> None:
    """Waits until the parent sends SIGTERM or is gone, then ends this process: it is not an error."""
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, _ORPHAN_SECONDS)
        if told is not None and told.si_pid == parent:
            break
    os._exit(0)
