"""One function applied to every file of a long list, on all cores, whatever a file does to the process.

A decoder written in C can crash or run out of memory on a hostile file, and takes its process along. The
worker processes here are replaced when that happens, and the file that did it is an answer like any other.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from vit_train.data.loading.workers import START_METHOD

T = TypeVar("T")

_CONTEXT: Any = multiprocessing.get_context(START_METHOD)

_CHUNK = 32  # files per message: few enough to end soon after the main process, many enough to cost nothing
_TICK_SECONDS = 1
_GRACE_SECONDS = 5  # for a worker whose connection is closed to be gone, so that its exit code tells why


@dataclass(frozen=True)
class Crash:
    """A file that ended the process reading it, twice.

    Args:
        exit_code: of that process; negative is a signal.
    """

    exit_code: int

    def __str__(self) -> str:
        why = f"exit code {self.exit_code}" if self.exit_code >= 0 else f"signal {-self.exit_code}"
        with suppress(ValueError):  # not of an exit code, nor of a real-time signal
            why = signal.Signals(-self.exit_code).name
        memory = ": memory may have run out" if why == "SIGKILL" else ""
        return f"crashes the process that reads it ({why}{memory})"


def each_file(
    function: Callable[[str], T],
    paths: Sequence[str],
    *,
    num_workers: int,
    tick: Callable[[], object] = lambda: None,
) -> Generator[tuple[int, T | Crash]]:
    """Yields position and `function(path)` for every path, in the order in which they are done.

    Memory does not grow with the number of paths: at most one small chunk per worker is under way. The
    workers end with the generator (close it, or leave the loop by an exception such as KeyboardInterrupt),
    and soon after the main process if that is killed.

    Args:
        function: of a module, or a partial of such a one; returns something small. What it raises is raised
            here, and ends the work: memory or open files ran out, which is not the file's fault.
        paths: the files. `function` alone decides whether and how one is opened.
        num_workers: processes; with 0 the work is done here, where a crash is a crash.
        tick: called every second while all workers are at it; what it raises ends the work.
    """
    if num_workers == 0:
        for position in range(len(paths)):
            yield position, function(paths[position])
        return
    size = max(1, min(_CHUNK, len(paths) // (4 * num_workers)))
    chunks = (range(start, min(start + size, len(paths))) for start in range(0, len(paths), size))
    again: list[Sequence[int]] = []  # what was under way in a worker that died
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        for _ in range(min(num_workers, -(-len(paths) // size))):
            idle.append(_Worker(function))
        while True:
            while idle and (chunk := again.pop() if again else next(chunks, None)) is not None:
                worker = idle.pop()
                busy.append(worker)
                worker.give(chunk, paths)
            if not busy:
                return
            ready = wait([worker.connection for worker in busy], timeout=_TICK_SECONDS)
            if not ready:
                tick()
            for worker in [worker for worker in busy if worker.connection in ready]:
                chunk, results = worker.chunk, worker.answer()
                if isinstance(results, Exception):
                    raise results
                busy.remove(worker)
                if results is not None:
                    idle.append(worker)
                    yield from zip(chunk, results, strict=True)
                    continue
                exit_code, last = worker.exit_code(), min(worker.num_done.value, len(chunk) - 1)
                idle.append(_Worker(function))
                if len(chunk) == 1:
                    yield chunk[0], Crash(exit_code)
                else:  # it gets a second chance, alone: somebody else may have taken the memory
                    again += [chunk[last : last + 1], [*chunk[:last], *chunk[last + 1 :]]]
    finally:
        for worker in (*idle, *busy):
            worker.end()


class _Worker:
    """A process, and what it is doing."""

    def __init__(self, function: Callable[[str], Any]) -> None:
        self.chunk: Sequence[int] = ()
        self.num_done: Any = _CONTEXT.RawValue(ctypes.c_int, 0)  # of the chunk: tells which file it died of
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_serve,
            args=(function, theirs, self.connection, self.num_done),
            name="read files",
            daemon=True,
        )
        self._process.start()
        theirs.close()  # the only other end is the worker's: when it dies, `answer` notices

    def give(self, chunk: Sequence[int], paths: Sequence[str]) -> None:
        self.chunk = chunk
        self.num_done.value = 0
        with suppress(OSError):  # it has died already, as `answer` will say
            self.connection.send([paths[position] for position in chunk])

    def answer(self) -> list[Any] | Exception | None:
        """The results for the chunk, or what the function raised; None if the worker has died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def exit_code(self) -> int:
        """Of a worker that has died."""
        self._process.join(_GRACE_SECONDS)
        self.end()
        return int(self._process.exitcode)

    def end(self) -> None:
        """Ends the process at once: it may be inside a decoder that never comes back to Python."""
        self.connection.close()
        self._process.kill()
        self._process.join()


def _serve(
    function: Callable[[str], Any], connection: Connection, other_end: Connection, num_done: Any
) -> None:
    """What a worker does until the main process closes its end of the connection, or is gone."""
    other_end.close()  # a copy: as long as it is open here, nobody is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
    sys.stderr = os.fdopen(os.dup(2), "w", errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints a line for every mistake it meets
    with suppress(EOFError, OSError):  # of the connection
        while True:
            connection.send(_results(function, connection.recv(), num_done))


def _results(function: Callable[[str], T], paths: Sequence[str], num_done: Any) -> list[T] | Exception:
    results = []
    for path in paths:
        try:
            results.append(function(path))
        except Exception as error:
            return error
        num_done.value += 1
    return results
