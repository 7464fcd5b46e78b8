"""`key=value` as people type it, in the words of Hydra's grammar.

The value of a key that names a place is plain text: a folder may be called `Bilder & Fotos [2024]`, which the
grammar has no place for. And every single value is typed as an addition (`++`), so that a key that does not
exist is found by the check of the whole configuration, beside all other mistakes, and not by Hydra alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vit_train.composed import config_dir
from vit_train.places import is_text, quoted

_OVERRIDE = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
# Flags with which Hydra shows a configuration instead of running it: nobody would check it
_SHOWN = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--shell-completion", "-sc")
_SWEEP = ("--multirun", "-m")


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """The arguments of `vit-train` as Hydra reads them.

    Args:
        arguments: as the shell passed them. In a sweep a comma separates values, and a place is none but text
            without one.
    """
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    return [
        _override(argument, raw=flags.isdisjoint(_SWEEP), checked=flags.isdisjoint(_SHOWN))
        for argument in arguments
    ]


def _override(argument: str, *, raw: bool, checked: bool) -> str:
    match = _OVERRIDE.fullmatch(argument)
    if match is None:
        return argument
    sign, key, value = match.groups()
    # the shell leaves the ~ of key=~/path to us
    value = re.sub(r"^~(?=/|$)", str(Path.home()), value)
    if raw and is_text(key, value):
        value = quoted(value)
    if checked and not sign and not is_group(key) and not key.startswith("hydra."):
        sign = "++"
    return f"{sign}{key}={value}"


def is_group(name: str) -> bool:
    """Whether `name=...` chooses a config, and is not a value."""
    return "." not in name and (config_dir() / name).is_dir()
