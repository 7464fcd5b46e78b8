"""Checkpoint directories that appear whole or not at all, and the rules of resuming.

    checkpoints/step_00001234/  model.safetensors  ema.safetensors  optimizer.safetensors
                                state.json         manifest.json (size and SHA-256 of each of them)
    checkpoints/last, best      relative links to such directories

A directory is written aside, every file synced, the manifest last; then it is renamed into place and its
parent synced. Loading verifies the manifest first. No pickle anywhere: tensors are safetensors, the rest is
JSON. Optimizer tensors are named `<parameter name>/<slot>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_train.errors import CheckpointError, SaveError

if TYPE_CHECKING:
    from torch import Tensor

# torch and safetensors are imported where tensors are read or written: the commands compare configurations
# and find checkpoints before they need either.

FORMAT = 1
_KINDS = ("model", "ema", "optimizer")
MANIFEST, _STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint in memory: CPU tensors named `model/...`, and the contents of state.json."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpointer:
    """Writes, keeps and finds the checkpoints of one run.

    Args:
        run_dir: the run directory; `checkpoints/` is made inside it at the first save.
    """

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "checkpoints"

    def save(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        step: int,
        best: bool,
        keep: int,
    ) -> Path:
        """Makes step_<step> durable, then moves the links, then removes what is no longer kept.

        Args:
            tensors: named `model/...`, `ema/...`, `optimizer/...`, on the CPU.
            state: plain data for state.json.
            step: optimizer steps done.
            best: whether `best` now means this checkpoint.
            keep: how many of the newest checkpoints stay on disk beside the best one; at least 1.

        Raises:
            SaveError: the operating system refused; earlier checkpoints are untouched.
        """
        target = self.root / f"step_{step:08d}"
        aside = self.root / f".partial_{target.name}_{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _write_checkpoint(aside, tensors, state)
            replaced = self.root / f".partial_replaced_{target.name}_{os.getpid()}"
            if target.exists():  # the same step saved again, or a damaged one
                target.rename(replaced)
            try:
                aside.rename(target)
            except OSError:
                if replaced.exists():
                    replaced.rename(target)
                raise
            _sync_directory(self.root)
            shutil.rmtree(replaced, ignore_errors=True)
            self._point("last", target.name)
            if best:
                self._point("best", target.name)
            self._retain(keep, newest=target.name)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = error.strerror or str(error)
            raise SaveError(
                f"checkpoint {target} could not be written: {reason}; earlier checkpoints are untouched"
            ) from error
        return target

    def remove_partial(self) -> None:
        """Deletes what an interrupted save left behind."""
        restore_replaced(self.root)
        for leftover in self.root.glob(".partial_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def best_path(self) -> Path | None:
        """Where `best` points, or None."""
        return resolve_link(self.root / "best")

    def _point(self, link: str, target: str) -> None:
        """Swaps a relative link atomically; where links are not allowed (Windows) it is a small file."""
        aside = self.root / f".{link}_{os.getpid()}"
        aside.unlink(missing_ok=True)
        try:
            aside.symlink_to(target)
        except (OSError, NotImplementedError):
            aside.write_text(target)
        aside.replace(self.root / link)
        _sync_directory(self.root)

    def _retain(self, keep: int, *, newest: str) -> None:
        """Later steps than the one just saved do not count: the run went back, because they are damaged."""
        best = self.best_path()
        saved = [path for path in checkpoint_directories(self.root) if path.name <= newest]
        for path in saved[keep:]:
            if best is None or path.name != best.name:  # the link is resolved, the run directory may not be
                shutil.rmtree(path, ignore_errors=True)


def _write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    import safetensors.torch

    files = {}
    for kind in _KINDS:
        part = {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}
        if part:
            files[f"{kind}.safetensors"] = safetensors.torch.save(part)
    files[_STATE] = json.dumps({"format": FORMAT, **state}, indent=1).encode()
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    for name, data in files.items():
        write_durably(folder / name, data)
    write_durably(folder / MANIFEST, json.dumps({"format": FORMAT, "files": manifest}, indent=1).encode())
    _sync_directory(folder)


def write_durably(path: Path, data: bytes) -> None:
    """Writes and syncs one file."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_directories(root: Path) -> list[Path]:
    """Checkpoint directories under `checkpoints/`, newest step first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if p.name.startswith("step_") and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: p.name, reverse=True)


def resolve_link(link: Path) -> Path | None:
    """The directory `last` or `best` names (a link, or a small file holding a name), or None."""
    if link.is_symlink() or link.is_dir():
        return link.resolve() if link.is_dir() else None
    if link.is_file():
        target = link.parent / link.read_text().strip()
        return target.resolve() if target.is_dir() else None
    return None


def load(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint directory.

    Raises:
        CheckpointError: the directory is missing, incomplete or damaged; the message says which file and how.
    """
    import safetensors.torch

    files = _listed_files(path)
    known = {f"{kind}.safetensors" for kind in _KINDS} | {_STATE}
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    for name in sorted(files):
        if name not in known:
            raise CheckpointError(f"{path / MANIFEST} lists {name!r}, which is not part of a checkpoint")
        data = _verified(path / name, files[name])
        if name == _STATE:
            state = _parse_json(data, path / name)
            continue
        kind = name.removesuffix(".safetensors")
        try:
            part = safetensors.torch.load(data)
        except Exception as error:  # safetensors raises its own, undocumented types
            raise CheckpointError(f"{path / name} is not a safetensors file: {error}") from error
        tensors |= {f"{kind}/{key}": tensor for key, tensor in part.items()}
    return Checkpoint(path, tensors, state)


def _listed_files(path: Path) -> dict[str, Any]:
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST}")
    manifest = _read_json(manifest_file)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this vit-train reads {FORMAT}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or _STATE not in files or "model.safetensors" not in files:
        raise CheckpointError(f"{manifest_file} does not list {_STATE} and model.safetensors")
    return files


def _verified(path: Path, entry: Any) -> bytes:
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{path} is missing")
    if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
        raise CheckpointError(f"{path} is damaged: its size is {path.stat().st_size} bytes, not as recorded")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one")
    return data


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(path.read_bytes(), path)


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected an object")
    return value


def newest_valid(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, and a line about each newer one that does not."""
    problems: list[str] = []
    restore_replaced(run_dir / "checkpoints")
    for path in checkpoint_directories(run_dir / "checkpoints"):
        try:
            return load(path), problems
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    return None, problems


def restore_replaced(root: Path) -> None:
    """Puts a checkpoint back that was moved aside for a new one of its step which never came."""
    for aside in root.glob(".partial_replaced_step_*"):
        target = root / aside.name.removeprefix(".partial_replaced_").rpartition("_")[0]
        if not target.exists():
            aside.rename(target)


def load_run(run: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint a RUN argument means: itself, or of a run directory its best one, else its last.

    Returns:
        The checkpoint, and a line about each one that should have come first and is damaged. A checkpoint
        that was named itself is never replaced by another.

    Raises:
        CheckpointError: there is none, or none that verifies.
    """
    root = run / "checkpoints"
    if (run / MANIFEST).is_file() or run.parent.name == "checkpoints":
        return load(run), []
    linked = [resolve_link(root / link) for link in ("best", "last")]
    candidates = list(
        dict.fromkeys([*filter(None, linked), *(p.resolve() for p in checkpoint_directories(root))])
    )
    problems: list[str] = []
    for path in candidates:
        try:
            return load(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    missing = "holds no checkpoint" if run.exists() else "does not exist"
    raise CheckpointError(f"{run} {missing}; give a run directory or a checkpoint directory")


# ------------------------------------------------------------------------------------------- resuming
# How a key of the configuration may differ between a run and its continuation. A prefix covers what is
# below it; whatever is not listed is identity: it must be equal.
_FREE = (
    "run_dir",
    "resume",
    "name",
    "tracker",
    "data.root",  # a moved folder is still the same data: the fingerprint says so
    "data.num_workers",
    "trainer.stop_at_step",
    "trainer.stop_after_minutes",
    "trainer.save_every_steps",
    "trainer.save_every_epochs",
    "trainer.keep_checkpoints",
)
_GROWABLE = ("trainer.epochs", "trainer.max_steps")
_HARDWARE = ("strategy",)
_CADENCE = ("trainer.eval_every_epochs",)


@dataclass(frozen=True)
class Comparison:
    """How the configuration of a continuation differs from that of the run."""

    identity: list[str]
    grown: list[str]
    hardware: list[str]


def compare(stored: Mapping[str, Any], new: Mapping[str, Any], *, cadence_matters: bool) -> Comparison:
    """Sorts every difference by what it means for an exact continuation.

    Args:
        stored: resolved configuration of the run.
        new: resolved configuration of its continuation.
        cadence_matters: whether the schedule or early stopping listens to the evaluations.

    Returns:
        One line `key: stored -> new` for each key that differs and is not free.
    """
    free = _FREE if cadence_matters else _FREE + _CADENCE
    before, after = _flat(stored), _flat(new)
    lines: dict[str, list[str]] = {"identity": [], "grown": [], "hardware": []}
    for key in sorted({*before, *after}):
        old, now = before.get(key, "(absent)"), after.get(key, "(absent)")
        if old == now or _covered(key, free):
            continue
        kind = "grown" if key in _GROWABLE else "hardware" if _covered(key, _HARDWARE) else "identity"
        lines[kind].append(f"{key}: {old} -> {now}")
    return Comparison(**lines)


def _covered(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        flat: dict[str, Any] = {}
        for name, value in tree.items():
            flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}
