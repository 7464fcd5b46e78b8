"""Which image files cannot be read, and how that is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TypeAlias

from vit_train.data.folder.pool import each_file
from vit_train.data.transforms.decode import decode
from vit_train.errors import DataError

Progress: TypeAlias = Callable[[int], object]

_NAMED = 20  # in one message


def bad_files(
    paths: Sequence[str], *, num_workers: int, progress: Progress = lambda _: None
) -> dict[int, str]:
    """Which of these files cannot be read as images: position -> what is wrong, in ascending order.

    The reason continues a sentence that starts with the path: "cannot be read (image file is truncated)".
    Every file is decoded as training does it, on `num_workers` processes that outlive a crash of a decoder.

    Args:
        paths: the files, a million of them if need be.
        num_workers: processes; with 0 the work is done here, where a crash is a crash.
        progress: called with the number of files done since the last call, every second at least; what it
            raises ends the work.
    """
    bad = {}
    with closing(
        each_file(reason_unreadable, paths, num_workers=num_workers, tick=lambda: progress(0))
    ) as answers:
        for position, reason in answers:
            if reason is not None:
                bad[position] = str(reason)
            progress(1)
    return dict(sorted(bad.items()))


def reason_unreadable(path: str) -> str | None:
    """What is wrong with one file, as `bad_files` says it; None if it can be read."""
    try:
        decode(path)
    except DataError as error:
        return error.what
    return None


def unreadable(lines: Sequence[str]) -> str:
    """One message about all images that cannot be read, of a line for each."""
    if len(lines) == 1:
        return lines[0]
    shown = "".join(f"\n  {line}" for line in lines[:_NAMED])
    more = f"\n  and {len(lines) - _NAMED:,} more: vit-data check names all" if len(lines) > _NAMED else ""
    return f"{len(lines):,} images cannot be used:{shown}{more}"
