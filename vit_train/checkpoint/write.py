"""To the disk: a checkpoint is written aside and appears whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_train.checkpoint.layout import (
    FORMAT,
    KINDS,
    MANIFEST,
    PARTIAL,
    STATE,
    checkpoint_directories,
    directory_name,
    moved_aside,
    resolve_link,
)
from vit_train.checkpoint.read import read_json
from vit_train.errors import SaveError
from vit_train.system import durable, faults
from vit_train.text import count

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run, as it is saved. Without tensors on all ranks but the first.

    Attributes:
        tensors: named `model/...`, `ema/...`, `optimizer/...`, on the CPU.
        state: plain data for state.json.
        step: optimizer steps done.
        best: whether `best` now means this checkpoint.
        keep: how many of the newest checkpoints stay on disk beside the best one; at least 1.
        kept: steps of further checkpoints that stay.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    step: int
    best: bool
    keep: int
    kept: Collection[int] = ()


class Checkpointer:
    """Writes and keeps the checkpoints of one run.

    Args:
        run_dir: the run directory; `checkpoints/` is made inside it once, so that a run whose directory was
            moved away does not begin a second one.
    """

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "checkpoints"
        self._made = False

    def make(self) -> None:
        """Makes `checkpoints/`, the first time it is called."""
        if not self._made:
            durable.make_directory(self.root)
            self._made = True

    def save(self, snapshot: Snapshot) -> Path:
        """Makes step_<step> durable, then moves the links, then removes what is no longer kept.

        Raises:
            SaveError: the operating system refused; earlier checkpoints are untouched, except that on a full
                disk the oldest that only `keep` holds may be gone, never the newest.
        """
        kept = snapshot.kept
        target = self.root / directory_name(snapshot.step)
        aside = self.root / f"{PARTIAL}{target.name}_{os.getpid()}"
        try:
            self.make()
            faults.point("save.begin")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            faults.point("save.made")
            now_best = target if snapshot.best else resolve_link(self.root / "best")
            state = {**snapshot.state, "best": now_best and now_best.name}
            _write_checkpoint(aside, snapshot.tensors, state)
            self._rename(aside, target)
            durable.sync_directory(self.root)
            faults.point("save.durable")
            self._point("last", target.name)
            faults.point("save.last")
            if snapshot.best:
                self._point("best", target.name)
            faults.point("save.best")
            self._retain(snapshot.keep, newest=target.name, kept=kept)
            faults.point("save.end")
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and self._give_way(target.name, kept, error.errno):
                return self.save(snapshot)
            reason = f"{error.strerror or error}; the previous checkpoint is untouched"
            if self._made and not self.root.is_dir():
                reason = f"{self.root} was moved or deleted"
            raise SaveError(f"checkpoint {target} could not be written: {reason}") from error
        return target

    def finish_interrupted(self, *, step: int, keep: int, kept: Collection[int]) -> None:
        """Moves the links and removes what is no longer kept, where a crash came between that and the save.

        Args:
            step: of the checkpoint the run continues from; without one nothing happens.
            keep, kept: as in a `Snapshot`.

        Raises:
            OSError: the operating system refused.
            CheckpointError: the checkpoint cannot be read any more.
        """
        newest = self.root / directory_name(step)
        if not newest.is_dir():
            return
        state = read_json(newest / STATE)
        for link, target in (("last", newest.name), ("best", state.get("best"))):
            linked = resolve_link(self.root / link)
            known = any(path.name == target for path in checkpoint_directories(self.root))
            if known and (linked is None or linked.name != target):
                self._point(link, str(target))
        self._retain(keep, newest=newest.name, kept=kept)

    def put_best_back(self, step: float | None) -> None:
        """`best` is again the checkpoint of an earlier step; where there is none, there is no `best`."""
        if step is not None and (self.root / directory_name(int(step))).is_dir():
            self._point("best", directory_name(int(step)))
        else:
            (self.root / "best").unlink(missing_ok=True)

    def remove_partial(self) -> None:
        """Deletes what an interrupted save left behind."""
        for place, aside in moved_aside(self.root).items():
            aside.rename(place)
        for leftover in self.root.glob(f"{PARTIAL}*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def check_space(self, model: nn.Module, *, ema: bool, keep: int) -> None:
        """Refuses to begin where what is kept, the best and the one being written would not fit.

        A run that goes on needs room for the newest, the best and the one being written: others give way.
        An optimizer is taken to keep two numbers per trained parameter, as AdamW does.

        Raises:
            SaveError: the file system has less free space.
        """
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        nbytes = (1 + ema) * weights + 2 * trained
        free = shutil.disk_usage(next(p for p in self.root.absolute().parents if p.exists())).free
        there = len(checkpoint_directories(self.root))
        more = max(1, 3 - there) if there else keep + 2
        if free < more * nbytes:
            two = not there and keep > 2 and free >= 4 * nbytes
            fewer = ", type trainer.keep_checkpoints=2" if two else ""
            needed = f"{count(more, 'more checkpoint')} of this run will take {more * nbytes / 1e6:,.1f} MB"
            raise SaveError(
                f"{self.root.parent} has {free / 1e6:,.1f} MB free, but {needed}; free some space{fewer} or "
                "type run_dir=... on another disk"
            )

    def _rename(self, aside: Path, target: Path) -> None:
        """Into place. The same step may be there: damaged, or saved again because its epoch is now closed."""
        replaced = self.root / f"{PARTIAL}replaced_{target.name}_{os.getpid()}"
        if target.exists():
            target.rename(replaced)
            faults.point("save.replaced")
        try:
            aside.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        faults.point("save.renamed")
        if replaced.exists():
            durable.sync_directory(self.root)  # the new name is durable before the old one goes
            shutil.rmtree(replaced, ignore_errors=True)

    def _point(self, link: str, target: str) -> None:
        """Swaps a relative link atomically; where links are not allowed (Windows) it is a small file."""
        aside = self.root / f"{PARTIAL}{link}_{os.getpid()}"
        aside.unlink(missing_ok=True)
        try:
            aside.symlink_to(target)
        except (OSError, NotImplementedError):
            aside.write_text(target)
        faults.point(f"save.linked_{link}")
        aside.replace(self.root / link)
        durable.sync_directory(self.root)

    def _give_way(self, target: str, kept: Collection[int], reason: int) -> bool:
        """Removes the oldest checkpoint that need not stay, if the space it frees is what `target` lacks.

        Neither the newest before `target` nor later ones, which are damaged: see `_retain`. Where a quota is
        used up (EDQUOT), the file system does not say how much is free.

        Returns:
            Whether there is now more room.
        """
        older = [path for path in checkpoint_directories(self.root) if path.name < target]
        with suppress(OSError):
            for oldest in self._removable(older[1:], kept)[-1:]:
                room = sum(file.stat().st_size for file in oldest.iterdir())
                if reason == errno.EDQUOT or shutil.disk_usage(self.root).free < room:
                    self._remove(oldest)
                    return True
        return False

    def _remove(self, path: Path) -> None:
        """A removal that is interrupted leaves no half of a checkpoint."""
        removed = self.root / f"{PARTIAL}removed_{path.name}_{os.getpid()}"
        path.rename(removed)
        faults.point("save.removing")
        shutil.rmtree(removed, ignore_errors=True)

    def _retain(self, keep: int, *, newest: str, kept: Collection[int]) -> None:
        """Later steps than the one just saved do not count: the run went back, because they are damaged."""
        saved = [path for path in checkpoint_directories(self.root) if path.name <= newest]
        for path in self._removable(saved[keep:], kept):
            self._remove(path)

    def _removable(self, saved: list[Path], kept: Collection[int]) -> list[Path]:
        best = resolve_link(self.root / "best")
        # names, because the link is resolved and the run directory may not be
        names = {best.name if best is not None else "", *map(directory_name, kept)}
        return [path for path in saved if path.name not in names]


def _write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    import safetensors.torch

    manifest = {}

    def write(name: str, data: bytes) -> None:
        durable.write(folder / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        faults.point("save.file")

    for kind in KINDS:  # one at a time: serialised, a file is as large in memory as its tensors
        part = {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}
        if part:
            write(f"{kind}.safetensors", safetensors.torch.save(part))
    write(STATE, json.dumps({"format": FORMAT, **state}, indent=1).encode())
    faults.point("save.files")
    durable.write(folder / MANIFEST, json.dumps({"format": FORMAT, "files": manifest}, indent=1).encode())
    faults.point("save.manifest")
    durable.sync_directory(folder)
    faults.point("save.synced")
