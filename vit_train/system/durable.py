"""Files that survive a power failure: synced, and whole or not there.

`write` makes one file durable; it still has to be renamed into place, and the folder it is in synced, before
its name is durable too. `replace` does all of it for a single file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vit_train.system import faults
from vit_train.system.places import open_plain


def write(path: Path, data: bytes) -> None:
    """Writes and syncs one new file; never through a link that somebody put in its place.

    Raises:
        FileExistsError: there is one.
        OSError: the operating system refused; it names the file.
    """
    try:
        with path.open("xb") as file:
            faults.point("write", file, data)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a full disk does not
        raise


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file aside, syncs it, and renames it over `path`: readers see the old one or the new one.

    Raises:
        OSError: the operating system refused; `path` is as before and nothing else is left.
    """
    aside = path.with_name(f".{path.name}")
    try:
        aside.unlink(missing_ok=True)  # left by a crash
        # a name may hold half a surrogate pair
        write(aside, content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def read(path: Path, limit: int) -> bytes:
    """The bytes of a plain file. Links are not followed, and nothing is waited for.

    Raises:
        OSError: it is missing, not a plain file, or longer than `limit` bytes.
    """
    with open_plain(path, follow=False) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes are more than it can have", str(path))
        return file.read()


def make_directory(path: Path) -> None:
    """Makes a directory and those above it that are missing, all durable; it may be there already."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable: what was created, renamed or removed in it."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a directory
            raise
    finally:
        os.close(descriptor)
