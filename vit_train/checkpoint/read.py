"""From the disk: a checkpoint is verified before anything is read from it."""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vit_train.checkpoint.layout import (
    FORMAT,
    KINDS,
    MANIFEST,
    MAX_JSON_BYTES,
    STATE,
    checkpoint_directories,
    moved_aside,
    resolve_link,
)
from vit_train.errors import CheckpointError, blame, ran_out
from vit_train.system import durable

if TYPE_CHECKING:
    from torch import Tensor, nn

# torch and safetensors are imported where tensors are read: the commands compare configurations and find
# checkpoints before they need either.

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Fits: TypeAlias = Callable[[Path, Mapping[str, Any], Shapes], None]


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint in memory: CPU tensors named `model/...`, and the contents of state.json."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


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
    kinds = {name: name.removesuffix(".safetensors") for name in sorted(files) if name != STATE}
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
    return _parse_json(_verified(path / STATE, files[STATE]), path / STATE), files


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
                raise CheckpointError(
                    f"{path} does not fit: it holds {name} with shape {shape}, which fits no parameter"
                )


def _listed_files(path: Path) -> dict[str, Any]:
    if path.is_symlink() and resolve_link(path) is None:
        raise CheckpointError(f"{path} is a link that leads out of its folder; it is not followed")
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    manifest = read_json(manifest_file)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this vit-train reads {FORMAT}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files or "model.safetensors" not in files:
        raise CheckpointError(f"{manifest_file} does not list {STATE} and model.safetensors")
    known = {f"{kind}.safetensors" for kind in KINDS} | {STATE}
    for name in sorted(files.keys() - known):
        raise CheckpointError(f"{manifest_file} lists {name!r}, which is not part of a checkpoint")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """One of the JSON files of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
        OSError: it cannot be read.
    """
    return _parse_json(_read(path, MAX_JSON_BYTES), path)


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
        kind = "a link" if stat.S_ISLNK(about.st_mode) else "not a plain file"
        raise CheckpointError(f"{path} cannot be read: it is {kind}")
    if type(wanted) is not int or size != wanted:
        raise CheckpointError(f"{path} is damaged: its size is {size} bytes, not as recorded")
    return wanted


def _verified(path: Path, entry: Any) -> bytes:
    size = _check_size(path, entry)
    data = _read(path, MAX_JSON_BYTES if path.name == STATE else size)
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
