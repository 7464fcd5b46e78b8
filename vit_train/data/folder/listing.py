"""Which images are below a folder: one walk, that remembers whatever else it meets.

Hidden files and folders are skipped, and so is what other programs leave behind (`__MACOSX`, thumbnails and
bins). Linked folders are not followed, because they may form a loop; but a folder that is asked for
may be a link.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vit_train.data.folder.file_names import Names

# What decode reads. AVIF takes Pillow 11.3: with an older one such a file is an error that names it.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif", ".jp2", ".j2k"),
)

# Name in lower case, in which programs do not agree -> who leaves it among the user's files
LEFT_BY = {
    **dict.fromkeys((".ds_store", "__macosx", "network trash folder"), "macOS"),
    **dict.fromkeys(("thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"), "Windows"),
    **dict.fromkeys(("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"), "a network drive"),
    "lost+found": "the file system",
    ".thumbnails": "an image viewer",
    ".ipynb_checkpoints": "Jupyter",
}
_PROGRESS_AFTER_SECONDS = 2


@dataclass(frozen=True)
class Listing:
    """The images below some folders of a root.

    Attributes:
        names: relative to the root with forward slashes, folder after folder, sorted within each.
        sizes: (n,) bytes of each file; -1 for what is not a file after all.
        counts: (folders,) images below each of the folders that were asked for.
        others: suffix (or "") -> how many visible files are not images by their names.
        links: linked folders below, relative to the root; what is in them is not listed.
    """

    names: Names
    sizes: NDArray[np.int64]
    counts: NDArray[np.int64]
    others: dict[str, int]
    links: list[str]


def list_images(root: Path, folders: Sequence[str]) -> Listing:
    """Lists the images below each of `folders` with their sizes; shows progress where that takes long.

    Folders and names are relative to `root`, with forward slashes.

    Raises:
        OSError: a folder cannot be listed.
    """
    sizes, counts = array("q"), []

    def found(walk: _Walk) -> Iterator[str]:
        for folder in folders:
            images = sorted((name, _size(entry)) for name, entry in walk.images(folder))
            sizes.extend(size for _, size in images)
            counts.append(len(images))
            yield from (name for name, _ in images)

    with _progress() as progress:
        walk = _Walk(str(root), progress)
        names = Names.of(found(walk))
    return Listing(
        names=names,
        sizes=np.asarray(sizes, dtype=np.int64),
        counts=np.asarray(counts, dtype=np.int64),
        others=dict(sorted(walk.others.items())),
        links=sorted(walk.links),
    )


def images_below(folder: Path) -> list[str]:
    """All images below a folder, sorted, as paths relative to it with forward slashes.

    Raises:
        OSError: a folder cannot be listed.
    """
    with _progress() as progress:
        return sorted(name for name, _ in _Walk(str(folder), progress).images(""))


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is the user's."""
    return not name.startswith(".") and name.lower() not in LEFT_BY


def is_image(name: str) -> bool:
    """Whether a file of this name should be an image."""
    return name.lower().endswith(SUFFIXES)


class _Walk:
    """Walks folders of a root, and remembers what it passed; see `Listing`."""

    def __init__(self, root: str, progress: tqdm[NoReturn]) -> None:
        self.root = root
        self.others: Counter[str] = Counter()
        self.links: list[str] = []
        self.progress = progress

    def images(self, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Images below `folder`, in no order, by their paths relative to the root."""
        waiting = [folder]
        while waiting:
            below = waiting.pop()
            path = f"{self.root}/{below}" if below else self.root
            with os.scandir(path) as entries:
                for entry in entries:
                    if not is_visible(entry.name):
                        continue
                    name = f"{below}/{entry.name}" if below else entry.name
                    if is_folder(entry):
                        (self.links if entry.is_symlink() else waiting).append(name)
                    elif is_image(entry.name):
                        yield name, entry
                    else:
                        self.others[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122
                    self.progress.update()


def _progress() -> tqdm[NoReturn]:
    """A bar that counts files, where there is a terminal and it takes long."""
    return tqdm(desc="listing", unit=" files", leave=False, delay=_PROGRESS_AFTER_SECONDS, disable=None)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        about = entry.stat()
    except OSError:  # a link to nothing, or gone meanwhile
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else -1
