"""Where the values of the recipe come from, for the summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml


def origins(
    overrides: Iterable[str], choices: Mapping[str, str], config_dirs: list[Path], *, stored: bool
) -> dict[str, str]:
    """Full key or group -> where it comes from, in words.

    Args:
        overrides: `key=value` arguments as typed.
        choices: the config chosen for each group.
        config_dirs: where configs are looked for, the built-in ones last.
        stored: whether `resume=` took everything not typed from the run.
    """
    defaults = _default_choices(config_dirs[-1])
    typed = {override.partition("=")[0].removeprefix("++") for override in overrides}
    experiment = choices.get("experiment")
    by_experiment = _experiment_keys(experiment, config_dirs) if experiment else set()
    result = {"data": "as stored" if stored else f"data={choices.get('data')}"}
    for key in ("model", "augment", "schedule", "data.batch_size", "trainer.epochs", "optimizer.lr"):
        group = key.split(".")[0]
        choice = f"{group}={choices.get(group)}"
        if key in typed and key != group:
            result[key] = "command line"
        elif stored:
            result[key] = "as stored"
        elif key in by_experiment:
            result[key] = f"experiment={experiment}"
        elif group in typed:
            result[key] = f"{choice}, command line"
        elif group != "data" and choices.get(group) != defaults.get(group):
            source = f"experiment={experiment}" if group in by_experiment else f"data={choices.get('data')}"
            result[key] = f"{choice}, brought by {source}"
        else:
            result[key] = choice
    changes = sorted(name for name in typed if name.startswith("augment."))  # no other row shows them
    result["augment"] += "".join(f", {name} typed" for name in changes)
    return result


def _default_choices(config_dir: Path) -> dict[str, str]:
    entries = yaml.safe_load((config_dir / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    return {str(k): str(v) for entry in entries if isinstance(entry, dict) for k, v in entry.items()}


def _experiment_keys(name: str, config_dirs: list[Path]) -> set[str]:
    """Groups and full keys an experiment sets."""
    for folder in config_dirs:
        path = folder / "experiment" / f"{name}.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            keys = {
                str(key).removeprefix("override /")
                for entry in content.pop("defaults", [])
                if isinstance(entry, dict)
                for key in entry
            }
            return keys | {f"{g}.{k}" for g, v in content.items() if isinstance(v, dict) for k in v}
    return set()
