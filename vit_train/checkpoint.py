"""Checkpoint directories that appear whole or not at all, and are verified before anything is read from them.

    checkpoints/step_00001234/  model.safetensors  ema.safetensors  optimizer.safetensors
                                state.json         manifest.json (size and SHA-256 of each of them)
    checkpoints/last, best      relative links to such directories
    checkpoints/.partial_*      what a save or a removal is working on; left behind only by a crash

A directory is written aside, every file synced, the manifest last; then it is renamed into place and its
parent synced. Loading verifies the manifest first, then sizes and shapes, and only then reads tensors. No
pickle anywhere: tensors are safetensors, the rest is JSON. Optimizer tensors are named
`<parameter name>/<slot>`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vit_train.errors import CheckpointError, SaveError, blame, count, ran_out
from vit_train.system import durable, faults

if TYPE_CHECKING:
    from torch import Tensor, nn


# torch and safetensors are imported where tensors are read or written: the commands compare configurations
# and find checkpoints before they need either.

FORMAT = 1
_KINDS = ("model", "ema", "optimizer")
MANIFEST, _STATE = "manifest.json", "state.json"
_PARTIAL = ".partial_"
# Far above what is ever written (20,000 class names are half a megabyte), far below what would hurt
_MAX_JSON_BYTES = 16 * 2**20

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Fits: TypeAlias = Callable[[Path, Mapping[str, Any], Shapes], None]


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint in memory: CPU tensors named `model/...`, and the contents of state.json."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


# ------------------------------------------------------------------------------------------------ writing
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

    def save(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        step: int,
        best: bool,
        keep: int,
        kept: Collection[int] = (),
    ) -> Path:
        """Makes step_<step> durable, then moves the links, then removes what is no longer kept.

        Args:
            tensors: named `model/...`, `ema/...`, `optimizer/...`, on the CPU.
            state: plain data for state.json.
            step: optimizer steps done.
            best: whether `best` now means this checkpoint.
            keep: how many of the newest checkpoints stay on disk beside the best one; at least 1.
            kept: steps of further checkpoints that stay.

        Raises:
            SaveError: the operating system refused; earlier checkpoints are untouched, except that on a full
                disk the oldest that only `keep` holds may be gone, never the newest.
        """
        target = self.root / directory_name(step)
        aside = self.root / f"{_PARTIAL}{target.name}_{os.getpid()}"
        try:
            self.make()
            faults.point("save.begin")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            faults.point("save.made")
            now_best = target if best else self.best_path()
            _write_checkpoint(aside, tensors, {**state, "best": now_best and now_best.name})
            self._rename(aside, target)
            durable.sync_directory(self.root)
            faults.point("save.durable")
            self._point("last", target.name)
            faults.point("save.last")
            if best:
                self._point("best", target.name)
            faults.point("save.best")
            self._retain(keep, newest=target.name, kept=kept)
            faults.point("save.end")
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and self._give_way(target.name, kept, error.errno):
                return self.save(tensors, state, step=step, best=best, keep=keep, kept=kept)
            reason = f"{error.strerror or error}; the one saved before is untouched"
            if self._made and not self.root.is_dir():
                reason = f"{self.root} was moved or deleted"
            raise SaveError(f"checkpoint {target} could not be written: {reason}") from error
        return target

    def finish_interrupted(self, *, step: int, keep: int, kept: Collection[int]) -> None:
        """Moves the links and removes what is no longer kept, where a crash came between that and the save.

        Args:
            step: of the checkpoint the run continues from; without one nothing happens.
            keep, kept: as in `save`.

        Raises:
            OSError: the operating system refused.
            CheckpointError: the checkpoint cannot be read any more.
        """
        newest = self.root / directory_name(step)
        if not newest.is_dir():
            return
        state = _parse_json(_read(newest / _STATE, _MAX_JSON_BYTES), newest / _STATE)
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
        for leftover in self.root.glob(f"{_PARTIAL}*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def check_space(self, nbytes: int, *, keep: int) -> None:
        """Refuses to begin where what is kept, the best and the one being written would not fit.

        A run that goes on needs room for the newest, the best and the one being written: others give way.

        Args:
            nbytes: size of one.
            keep: as in `save`.

        Raises:
            SaveError: the file system has less free space.
        """
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

    def best_path(self) -> Path | None:
        """Where `best` points, or None."""
        return resolve_link(self.root / "best")

    def _rename(self, aside: Path, target: Path) -> None:
        """Into place. The same step may be there: damaged, or saved again because its epoch is now closed."""
        replaced = self.root / f"{_PARTIAL}replaced_{target.name}_{os.getpid()}"
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
        aside = self.root / f"{_PARTIAL}{link}_{os.getpid()}"
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
        removed = self.root / f"{_PARTIAL}removed_{path.name}_{os.getpid()}"
        path.rename(removed)
        faults.point("save.removing")
        shutil.rmtree(removed, ignore_errors=True)

    def _retain(self, keep: int, *, newest: str, kept: Collection[int]) -> None:
        """Later steps than the one just saved do not count: the run went back, because they are damaged."""
        saved = [path for path in checkpoint_directories(self.root) if path.name <= newest]
        for path in self._removable(saved[keep:], kept):
            self._remove(path)

    def _removable(self, saved: list[Path], kept: Collection[int]) -> list[Path]:
        best = self.best_path()
        # names, because the link is resolved and the run directory may not be
        names = {best.name if best is not None else "", *map(directory_name, kept)}
        return [path for path in saved if path.name not in names]


def directory_name(step: int) -> str:
    """step_00001234."""
    return f"step_{step:08d}"


def _write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    import safetensors.torch

    manifest = {}

    def write(name: str, data: bytes) -> None:
        durable.write(folder / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        faults.point("save.file")

    for kind in _KINDS:  # one at a time: serialised, a file is as large in memory as its tensors
        part = {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}
        if part:
            write(f"{kind}.safetensors", safetensors.torch.save(part))
    write(_STATE, json.dumps({"format": FORMAT, **state}, indent=1).encode())
    faults.point("save.files")
    durable.write(folder / MANIFEST, json.dumps({"format": FORMAT, "files": manifest}, indent=1).encode())
    faults.point("save.manifest")
    durable.sync_directory(folder)
    faults.point("save.synced")


# ------------------------------------------------------------------------------------------------ finding
def checkpoint_directories(root: Path) -> list[Path]:
    """Checkpoint directories under `checkpoints/`, newest step first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if p.name.startswith("step_") and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: p.name, reverse=True)


def resolve_link(link: Path) -> Path | None:
    """The directory beside it that `last` or `best` names (a link, or a small file holding a name), or None.

    A link that leads out of its own folder is not followed.
    """
    target = None
    if link.is_symlink() or link.is_dir():
        target = link
    elif link.is_file() and link.stat().st_size < 100:  # longer than our names, shorter than any may be
        target = link.parent / link.read_text(encoding="utf-8", errors="ignore").strip()
    if target is None or not target.is_dir():
        return None
    resolved = target.resolve()
    return resolved if resolved.parent == link.parent.resolve() else None


def moved_aside(root: Path) -> dict[Path, Path]:
    """Checkpoints that made way for a new one of their step which never came.

    Returns:
        Where one belongs -> where it is.
    """
    places = {
        root / aside.name.removeprefix(f"{_PARTIAL}replaced_").rpartition("_")[0]: aside
        for aside in root.glob(f"{_PARTIAL}replaced_step_*")
    }
    return {place: aside for place, aside in places.items() if not place.exists()}


@contextmanager
def must_be_readable() -> Iterator[None]:
    """Turns a refusal of the operating system into a CheckpointError; also a decorator.

    Not where files or memory ran out: what was to be read may be sound, and must not be passed over.
    """
    try:
        yield
    except OSError as error:
        if ran_out(error):
            raise
        place = error.filename or "what is stored"
        raise CheckpointError(f"{place} cannot be read: {error.strerror or error}") from error


@must_be_readable()
def newest_valid(run_dir: Path, fits: Fits | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, and a line about each newer one that does not."""
    root = run_dir / "checkpoints"
    # said, or a run whose checkpoints are all links would begin anew
    problems = [
        f"{path} is a link, which is not followed" for path in root.glob("step_*") if path.is_symlink()
    ]
    # not moved back: another process may be training this run
    places = moved_aside(root) | {path: path for path in checkpoint_directories(root)}
    for path in sorted(places, key=lambda p: p.name, reverse=True):
        try:
            return replace(load(places[path], fits), path=path), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


@must_be_readable()
def load_run(run: Path, fits: Fits | None = None) -> tuple[Checkpoint, list[str]]:
    """The checkpoint a RUN argument means: itself, or of a run directory its best one, else its last.

    Returns:
        The checkpoint, and a line about each one that should have come first and is damaged. A checkpoint
        that was named itself is never replaced by another.

    Raises:
        CheckpointError: there is none, or none that verifies.
    """
    root = run / "checkpoints"
    inside = run.absolute().parent.name == "checkpoints" and not root.is_dir()
    if inside or (run / MANIFEST).is_file():
        return load(run, fits), []
    aside = moved_aside(root)  # where `best` leads nowhere, it means this
    best, last = (resolve_link(root / link) for link in ("best", "last"))
    candidates = [best, *aside, last, *(path.resolve() for path in checkpoint_directories(root))]
    problems: list[str] = []
    for path in dict.fromkeys(filter(None, candidates)):
        try:
            return replace(load(aside.get(path, path), fits), path=path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(dict.fromkeys(problems)))
    missing = "holds no checkpoint" if run.exists() else "does not exist"
    raise CheckpointError(f"{run} {missing}; give a run directory or a checkpoint directory")


# ------------------------------------------------------------------------------------------------ reading
@must_be_readable()
def load(path: Path, fits: Fits | None = None) -> Checkpoint:
    """Reads and verifies one checkpoint directory.

    Args:
        path: the directory.
        fits: gets path, contents of state.json and the shape of each tensor (`model/...`) before any tensor
            is read, and raises CheckpointError where they are not what is wanted.

    Raises:
        CheckpointError: the directory is missing, incomplete, damaged or does not fit; the message says
            which file and how.
    """
    import safetensors.torch

    state, files = load_state(path)
    kinds = {name: name.removesuffix(".safetensors") for name in sorted(files) if name != _STATE}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, kind in kinds.items():
        _check_size(path / name, files[name])
        shapes |= {f"{kind}/{key}": shape for key, shape in _shapes(path / name).items()}
    if fits is not None:
        fits(path, state, shapes)
    tensors: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        data = _verified(path / name, files[name])
        with blame(CheckpointError, f"{path / name} is damaged: it is not a safetensors file", (Exception,)):
            part = safetensors.torch.load(data)
        tensors |= {f"{kind}/{key}": tensor for key, tensor in part.items()}
    return Checkpoint(path, tensors, state)


@must_be_readable()
def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The verified state.json of a checkpoint directory, and the entries of its manifest, without tensors.

    Raises:
        CheckpointError: see `load`.
    """
    files = _listed_files(path)
    return _parse_json(_verified(path / _STATE, files[_STATE]), path / _STATE), files


def fits_model(model: nn.Module, *, ema: bool) -> Fits:
    """What `load` takes, for a model that exists already and may have an average; see `check_shapes`."""
    return lambda path, _, shapes: check_shapes(path, shapes, model, ema=ema)


def check_shapes(path: Path, shapes: Shapes, model: nn.Module, *, ema: bool | None = None) -> None:
    """Compares what a checkpoint says it holds with a model, which may be on the meta device.

    Args:
        path: for the message.
        shapes: of its tensors, named `model/...`, `ema/...`, `optimizer/<parameter>/<slot>`.
        model: what they are for.
        ema: whether there must be averaged weights; None takes them or leaves them.

    Raises:
        CheckpointError: a tensor is missing, is of no use here, or has another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    has_ema = any(name.startswith("ema/") for name in shapes) if ema is None else ema
    kinds = ("model", "ema") if has_ema else ("model",)
    expected = {f"{kind}/{name}": shape for kind in kinds for name, shape in own.items()}
    given = {name: shape for name, shape in shapes.items() if not name.startswith("optimizer/")}
    for name in sorted({*expected, *given}):
        wanted, got = expected.get(name), given.get(name)
        if wanted != got:
            said = "absent" if got is None else f"{got}"
            needed = "has no such tensor" if wanted is None else f"needs {wanted}"
            raise CheckpointError(f"{path} does not fit: {name} is {said}, the model {needed}")
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        if name.startswith("optimizer/"):
            owner = name.removeprefix("optimizer/").rpartition("/")[0]
            if owner not in parameters or math.prod(shape) > max(1, parameters[owner]):
                raise CheckpointError(f"{path} does not fit: {name} with shape {shape} has no place here")


def _listed_files(path: Path) -> dict[str, Any]:
    if path.is_symlink() and resolve_link(path) is None:
        raise CheckpointError(f"{path} is a link that leads out of its folder; it is not followed")
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    manifest = _parse_json(_read(manifest_file, _MAX_JSON_BYTES), manifest_file)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this vit-train reads {FORMAT}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or _STATE not in files or "model.safetensors" not in files:
        raise CheckpointError(f"{manifest_file} does not list {_STATE} and model.safetensors")
    known = {f"{kind}.safetensors" for kind in _KINDS} | {_STATE}
    for name in sorted(files.keys() - known):
        raise CheckpointError(f"{manifest_file} lists {name!r}, which is not part of a checkpoint")
    return files


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a plain file. Links are not followed: they could lead anywhere."""
    try:
        return durable.read(path, limit)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None


def _check_size(path: Path, entry: Any) -> int:
    """The recorded size, which is also the size on disk."""
    wanted = entry.get("bytes") if isinstance(entry, dict) else None
    try:
        about = path.lstat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    size = about.st_size
    if not stat.S_ISREG(about.st_mode):
        kind = "a link" if stat.S_ISLNK(about.st_mode) else "no plain file"
        raise CheckpointError(f"{path} cannot be read: it is {kind}")
    if type(wanted) is not int or size != wanted:
        raise CheckpointError(f"{path} is damaged: its size is {size} bytes, not as recorded")
    return wanted


def _verified(path: Path, entry: Any) -> bytes:
    size = _check_size(path, entry)
    data = _read(path, _MAX_JSON_BYTES if path.name == _STATE else size)
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one")
    return data


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file: its header alone is read, and held against its size."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except MemoryError as error:  # a sparse file of a terabyte cannot be mapped: its own fault
        raise CheckpointError(f"{path} is too large for the memory of this machine") from error
    except Exception as error:  # undocumented types of safetensors; they may quote the file
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is damaged: it is not a safetensors file: {reason}") from error


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it holds no JSON where it should") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected an object")
    return value
