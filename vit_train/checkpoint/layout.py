"""What a checkpoint consists of, and where the checkpoints of a run are."""

from __future__ import annotations

from pathlib import Path

FORMAT = 1
KINDS = ("model", "ema", "optimizer")
MANIFEST, STATE = "manifest.json", "state.json"
PARTIAL = ".partial_"
# Far above what is ever written (20,000 class names are half a megabyte), far below what would hurt
MAX_JSON_BYTES = 16 * 2**20


def directory_name(step: int) -> str:
    """step_00001234."""
    return f"step_{step:08d}"


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
        root / aside.name.removeprefix(f"{PARTIAL}replaced_").rpartition("_")[0]: aside
        for aside in root.glob(f"{PARTIAL}replaced_step_*")
    }
    return {place: aside for place, aside in places.items() if not place.exists()}
