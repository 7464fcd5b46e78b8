"""Listings of large folders, kept in the user's cache so that the next run need not list again.

One file for each root, in `$XDG_CACHE_HOME/vit-train` (`~/.cache/vit-train`); never anything in the folder
of images itself. It is used as long as no folder in it has changed: adding, removing or renaming a file
changes its folder. What that cannot tell: a file that was overwritten in place keeps the size it had, and the
fingerprint made of it stays the same. Deleting the index makes the next run list anew.

What a file holds: SHA-256 of the rest, then safetensors. One that is damaged, of another version or owner, or
cannot be written does no harm: the folder is listed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save

from vit_train import durable
from vit_train.data.listing import Listing, list_images, stamp
from vit_train.data.names import Names

_VERSION = 1  # of what a file holds, and of which files a listing takes in
_WORTH_KEEPING = 20_000  # files; fewer are listed in a fraction of a second
_LARGEST = 2**33  # bytes of a file: some hundred million names
_DIGEST_SIZE = 32

# A change within the same tick of the file system's clock as the listing leaves no trace. FAT's tick is two
# seconds, the longest.
_TICK_NS = 2_000_000_000


def listed(root: Path, folders: Sequence[str]) -> tuple[Listing, Path | None]:
    """What `list_images` gives, and the index it was taken from, if it was.

    Args:
        root: the folder names start from.
        folders: relative to it.

    Raises:
        OSError: a folder cannot be listed.
    """
    path = _path(root)
    before = None if path is None else _read(path, root, folders)
    if before is not None:
        return before, path
    began = time.time_ns()
    listing = list_images(root, folders)
    # an empty file may be mended in place, which would not be noticed
    whole = len(listing.names) >= _WORTH_KEEPING and listing.sizes.min() > 0
    if path is not None and whole and listing.stamps[:, :2].max() < began - _TICK_NS:
        _write(path, root, folders, listing)
    return listing, None


def _path(root: Path) -> Path | None:
    """Where the index of a root is; None where this user has no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    name = hashlib.sha256(b"%d " % _VERSION + os.fsencode(root.absolute())).hexdigest()[:16]
    return cache / "vit-train" / f"listing_{name}.index"


def _key(root: Path, folders: Sequence[str]) -> list[str]:
    """What an index is of."""
    return [str(root.absolute()), *folders]


def _read(path: Path, root: Path, folders: Sequence[str]) -> Listing | None:
    """The listing an index holds, unless it is not to be trusted, or of something that has changed since."""
    try:
        if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
            return None
        content = durable.read(path, _LARGEST)
        digest, content = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
        if hashlib.sha256(content).digest() != digest:
            return None
        arrays = load(content)
        about = json.loads(arrays["about"].tobytes())
        if about["key"] != _key(root, folders):
            return None
        stamps = [stamp(f"{root}/{folder}") for folder in about["walked"]]
        if stamps != [tuple(row) for row in arrays["stamps"].tolist()]:
            return None
    except OSError:
        return None
    offsets = torch.from_numpy(arrays["offsets"])
    return Listing(
        names=Names(torch.from_numpy(arrays["buffer"]), offsets, torch.arange(len(offsets) - 1)),
        sizes=arrays["sizes"],
        counts=arrays["counts"],
        others=about["others"],
        links=about["links"],
        walked=about["walked"],
        stamps=arrays["stamps"],
    )


def _write(path: Path, root: Path, folders: Sequence[str], listing: Listing) -> None:
    about = {
        "key": _key(root, folders),
        "others": listing.others,
        "links": listing.links,
        "walked": listing.walked,
    }
    arrays = {
        "about": np.frombuffer(bytearray(json.dumps(about).encode()), dtype=np.uint8),
        "buffer": listing.names.buffer.numpy(),
        "offsets": listing.names.offsets.numpy(),
        "sizes": listing.sizes,
        "counts": listing.counts,
        "stamps": listing.stamps,
    }
    content = save(arrays)
    # no disk space, a home that cannot be written: then there is no index
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.replace(path, hashlib.sha256(content).digest() + content)
