"""`key=value` as people type it, in the words of Hydra's grammar.

The value of a key that names a place is plain text: a folder may be called `Bilder & Fotos [2024]`, which the
grammar has no place for. And every single value is typed as an addition (`++`), so that a key that does not
exist is found by the check of the whole configuration, beside all other mistakes, and not by Hydra alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from vit_train.config.check import CHOSEN, GROUPS, ROOT, config_dir
from vit_train.errors import ConfigError
from vit_train.system.places import expanded, is_text, quoted

_OVERRIDE = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """The arguments of `vit-train` as Hydra reads them: `key=value` first, and its own flags behind.

    In a sweep a comma separates values, and a place is none but text without one. Where Hydra shows a
    configuration instead of running it, nobody checks it.

    Raises:
        ConfigError: a flag is unknown, or its value is.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    flags, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        if argument.startswith("-"):
            name, _, value = argument.lstrip("-").partition("=")
            value = value or next(iter(arguments[arguments.index(argument) + 1 :]), "...")
            key = _full_key(name.replace("-", "_"))
            hint = f"a value is typed as {key}={value}" if key else "vit-train --cfg job shows every key"
            raise ConfigError(f"{argument} is not a flag of vit-train; {hint}")
    shown = flags.cfg or flags.info or flags.help or flags.hydra_help or flags.shell_completion
    typed = [*flags.overrides, *unknown]
    overrides = [_override(argument, raw=not flags.multirun, checked=not shown) for argument in typed]
    return [*overrides, *(argument for argument in arguments if argument not in typed)]


def _full_key(name: str) -> str:
    """`trainer.epochs` of `epochs`, and a whole key itself; empty where no config has its own value."""
    for group in GROUPS if name not in ROOT else ():
        shared = [config_dir() / "images.yaml"] if group == "data" else []
        for file in (*shared, *sorted((config_dir() / group).glob("*.yaml"))):
            value = yaml.safe_load(file.read_text(encoding="utf-8")).get(name, "${")
            if not str(value).startswith("${"):
                return f"{group}.{name}"
    return name if "." in name or name in ROOT or is_group(name) else ""


def key_and_value(argument: str) -> tuple[str, Any]:
    """One `key=value` of a command that Hydra does not run, as `vit-train` reads it.

    Raises:
        ConfigError: it is not one value for one key.
    """
    match = _OVERRIDE.fullmatch(argument)
    with suppress(HydraException):
        typed = _override(argument, raw=True, checked=False)
        parsed = OverridesParser.create().parse_override(typed)
        if match and not match["sign"] and not parsed.is_sweep_override():
            return parsed.key_or_group, parsed.value()
    raise ConfigError(
        f"{argument!r}: expected key=value, one value such as data.root=other/photos (close every bracket "
        "and quote)"
    )


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def _override(argument: str, *, raw: bool, checked: bool) -> str:
    match = _OVERRIDE.fullmatch(argument)
    if match is None:
        return argument
    sign, key, value = match.groups()
    # the shell leaves the ~ of key=~/path to us
    value = re.sub(r"^~(?=/|$)", lambda tilde: str(expanded(tilde[0])), value)
    if raw and is_text(key, value):
        value = quoted(value)
    if checked and not sign and not is_group(key) and not key.startswith("hydra."):
        sign = "++"
    return f"{sign}{key}={value}"


def choice_of(word: str) -> str:
    """`model=swin_cifar` of `swin_cifar`, joined by `or` where several groups have a config of that name."""
    files = (file for group in CHOSEN for file in (config_dir() / group).glob("*.yaml"))
    return " or ".join(f"{file.parent.name}={word}" for file in files if file.stem == word)


def is_group(name: str) -> bool:
    """Whether `name=...` chooses a config, and is not a value."""
    return name in CHOSEN
