"""When checkpoints are written: in the background, one at a time, and again where it failed.

A failed save costs nothing but itself: the earlier checkpoints are untouched, the run goes on and saves again
at the next interval. Three failures in a row end the run, and so does a failure at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from vit_train.checkpoint.layout import directory_name
from vit_train.checkpoint.read import Checkpoint, Fits, load, load_run, newest_valid
from vit_train.checkpoint.write import Checkpointer, Snapshot
from vit_train.errors import CheckpointError, SaveError

MAX_FAILED_SAVES = 3


class Saver:
    """Hands snapshots to a checkpointer. A snapshot belongs to the saver; nobody changes it any more.

    Args:
        checkpointer: writes them.
        background: whether training goes on while a checkpoint is written.
        say: is told about each failed save, at once.
    """

    def __init__(self, checkpointer: Checkpointer, *, background: bool, say: Callable[[str], None]) -> None:
        self.checkpointer, self.background, self.say = checkpointer, background, say
        self._thread: Thread | None = None
        self._failures: list[SaveError] = []  # in a row
        self._bug: BaseException | None = None
        self._unsaved_best: Snapshot | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begins to write a checkpoint, once the one before is written.

        Raises:
            SaveError: too many saves in a row have failed.
        """
        self.wait()
        if not snapshot.tensors:
            return
        self._thread = Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
            SaveError: too many saves in a row have failed.
        """
        self._join()
        if len(self._failures) >= MAX_FAILED_SAVES:
            raise SaveError(f"{len(self._failures)} saves in a row failed: {self._failures[-1]}")

    def finish(self) -> None:
        """As `wait`, at a point where the newest save must not be missing.

        Raises:
            SaveError: it failed.
        """
        self.wait()
        if self._failures:
            raise self._failures[-1]

    def close(self) -> None:
        """Lets the save in flight end, on the way out of a run that failed for a reason of its own."""
        if self._thread is not None:
            self._thread.join()

    def best(self, fits: Fits) -> Checkpoint:
        """The best checkpoint; where that one is damaged, which is said, the newest one that verifies.

        Raises:
            CheckpointError: there is none.
        """
        best, problems = load_run(self.checkpointer.root.parent, fits)
        for problem in problems:
            self.say(f"{problem}; {best.path.name} is used instead of the best checkpoint")
        return best

    def checkpoint_of(self, step: int, fits: Fits | None = None) -> Checkpoint:
        """The checkpoint of a step; where that one is damaged, the newest one that verifies.

        Raises:
            CheckpointError: there is none.
        """
        self._join()
        try:
            return load(self.checkpointer.root / directory_name(step), fits)
        except CheckpointError as error:
            found, _ = newest_valid(self.checkpointer.root.parent, fits)
            if found is None:
                raise
            self.say(f"{error}; going back to {found.path.name} instead")
            return found

    def _join(self) -> None:
        self.close()
        if self._bug is not None:
            raise self._bug

    def _write(self, snapshot: Snapshot) -> None:
        """A best checkpoint that failed comes first: nothing later can stand in for it."""
        waiting = [self._unsaved_best, snapshot] if self._unsaved_best and not snapshot.best else [snapshot]
        try:
            for one in waiting:
                self._unsaved_best = one if one.best else None
                self.checkpointer.save(one)
                self._unsaved_best = None
            self._failures.clear()
        except SaveError as error:
            self._failures.append(error)
            self.say(f"{error}. Saving is tried again at the next interval")
        except BaseException as error:  # raised again in the main thread
            self._bug = error
