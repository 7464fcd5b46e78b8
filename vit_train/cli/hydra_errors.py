"""What Hydra means to say: one line for whatever it raises while it composes."""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vit_train.cli.typed import choice_of, is_group
from vit_train.system import places
from vit_train.text import suggest


def explain(error: BaseException) -> str:
    """One line for an error Hydra raised while composing."""
    missing = next((e for e in chain(error) if isinstance(e, MissingConfigException)), None)
    if missing is not None and missing.options:
        group, _, choice = str(missing.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
        choices = sorted(str(option) for option in missing.options)
        group = group or "config"
        guess = suggest(choice, choices) or _suggest_family(choice, choices)
        if group == "data" and os.path.isdir(choice):  # noqa: PTH112 - as below
            guess = f"; for a folder of images type data=imagefolder {places.as_typed('data.root', choice)}"
        return f"{group}={choice}: no such {group}{guess} (choices: {', '.join(choices)})"
    if nameless := [a for a in sys.argv[1:] if a.startswith("=")]:
        return f"{nameless[0]}: expected key=value, such as trainer.epochs=3"
    typed = " ".join(a for a in sys.argv[1:] if is_group(a.partition("=")[0]))
    if typed and isinstance(error, TypeError | ValueError):
        return f"{typed}: a config is chosen by its name, such as model=vit_tiny"
    text = " ".join(" ".join(str(e) for e in chain(error)).split())
    match = re.search(r"Could not override '([^']+)'", text)
    if match and "must be" not in text:
        at: Any = next((e for e in chain(error) if isinstance(e, OmegaConfBaseException)), None)
        node = str(at and at.full_key).rpartition(".")[0]
        keys = map(str, at.parent_node) if at and isinstance(at.parent_node, DictConfig) else ()
        return f"{match[1]} is not a key{suggest(str(at and at.key), keys, inside=node)}"
    if isinstance(error, OverrideParseException):
        typed = getattr(error, "override", None) or "an argument"
        hint = "close every bracket and quote, and put a value with spaces or = in quotes"
        if re.fullmatch(r"\w+", typed):
            choice = choice_of(typed)
            hint = f"did you mean {choice}?" if choice else "vit-train --help shows more"
        if os.path.isdir(typed):  # noqa: PTH112 - Path.is_dir ends at a name that is too long
            hint = f"for a folder of images: data=imagefolder {places.as_typed('data.root', typed)}"
        if "class_weights=" in typed:
            hint = (
                "if a class name cannot be typed, use a file with one `name: weight` per line: "
                "objective.class_weights=FILE.yaml"
            )
        return f"{typed.removeprefix('++')}: expected key=value, such as trainer.epochs=3 ({hint})"
    return " ".join(str(error).split())


def _suggest_family(choice: str, choices: list[str]) -> str:
    """`swim` is close to no config's name, but to the first word of several."""
    close = difflib.get_close_matches(choice.split("_")[0], {name.split("_")[0] for name in choices}, n=1)
    members = [name for name in choices if name.split("_")[0] in close]
    return f"; did you mean one of {', '.join(members)}?" if members else ""


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it, latest first."""
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
