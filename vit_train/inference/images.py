"""Which images a command's IMAGE arguments mean: files, folders, patterns, URLs, a list on stdin."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from vit_train.data.folder.listing import SUFFIXES, images_below
from vit_train.data.transforms.decode import NOT_READ
from vit_train.errors import ConfigError, DataError
from vit_train.inference.download import is_url, shown

STDIN = "-"


def find_images(arguments: Sequence[str], *, stdin: Iterable[str], allow_url: bool) -> list[str]:
    """Paths and URLs, in the order of the arguments.

    A file stands for itself, whether it can be read or not; a folder for the images below it, sorted; a
    pattern that no shell expanded (`*`, `?`, `[a-z]`, `**`) for what it matches, sorted; `-` for the lines
    of `stdin`, each a file, a folder or, where `allow_url`, a URL. URLs that were typed are always allowed.

    Raises:
        DataError: there is not one image, or a folder cannot be listed.
        ConfigError: the list holds a URL that is not allowed.
    """
    found: list[str] = []
    try:
        for argument in arguments:
            if argument == STDIN:
                for line in filter(None, (line.rstrip("\r\n") for line in stdin)):
                    if is_url(line) and not allow_url:
                        raise ConfigError(
                            f"the list holds the URL {shown(line)}: type --allow-url to fetch it"
                        )
                    found += _below(line)
            elif not is_url(argument) and glob.has_magic(argument) and not Path(argument).exists():
                # nothing that matches: it stays, and is reported as a file that is missing
                for match in sorted(glob.glob(_pattern(argument), recursive=True)) or [argument]:  # noqa: PTH207
                    found += _below(match)
            else:
                found += _below(argument)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror})") from error
    if not found:
        where = (
            "the list on stdin is empty" if [*arguments] == [STDIN] else f"no image in {', '.join(arguments)}"
        )
        raise DataError(
            f"there are no images: {where} (images end in {' '.join(SUFFIXES)}; .heic {NOT_READ})"
        )
    return found


def _pattern(typed: str) -> str:
    """The pattern, with the folders in front that exist as they are: `Fotos [2024]/*.jpg` has one."""
    ends = (end for end in range(len(typed), 0, -1) if typed[end - 1] == "/" and Path(typed[:end]).is_dir())
    end = next(ends, 0)
    return glob.escape(typed[:end]) + typed[end:]


def _below(name: str) -> list[str]:
    if is_url(name) or not Path(name).is_dir():
        return [name]
    return [f"{name.rstrip('/')}/{file}" for file in images_below(Path(name))]
