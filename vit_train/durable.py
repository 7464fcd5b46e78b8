"""Files that survive a power failure: synced, and whole or not there.

`write` makes one file durable; it still has to be renamed into place, and the folder it is in synced, before
its name is durable too. `replace` does all of it for a single file.
"""

from __future__ import annotations

import os
from pathlib import Path

from vit_train import faults


def write(path: Path, data: bytes) -> None:
    """Writes and syncs one file."""
    with path.open("wb") as file:
        faults.point("write", file, data)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
    """Writes a text aside, syncs it, and renames it over `path`: readers see the old one or the new one.

    Raises:
        OSError: the operating system refused; `path` is as before and nothing else is left.
    """
    aside = path.with_name(f".{path.name}")
    try:
        write(aside, text.encode())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable: what was created, renamed or removed in it."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
