"""The models of the shipped configs, made without Hydra, data or a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit_train.config.check import config_dir
from vit_train.construct import check, make
from vit_train.errors import ConfigError, blame
from vit_train.text import suggest

if TYPE_CHECKING:
    from torch import nn

_SIDES = {"_cifar": 32, "_digits": 8}  # pixels the models of these names are made for


def make_model(
    name: str, *, num_classes: int, img_size: int | None, in_channels: int, **keys: Any
) -> nn.Module:
    """The model of one of the shipped configs, with random weights; see `vit_train.make_model`."""
    if name not in model_names():
        guess = suggest(str(name), model_names())
        raise ConfigError(f"{name}: no such model{guess} (choices: {', '.join(model_names())})")
    img_size = img_size or next((side for word, side in _SIDES.items() if word in name), 224)
    data = {"num_classes": num_classes, "img_size": img_size, "in_channels": in_channels}
    with blame(ConfigError, name, (OmegaConfBaseException,)):
        node = model_node(name, data, keys)
    if errors := check(node, key=name):
        raise ConfigError("; ".join(errors))
    model: nn.Module = make(node, key=name)
    return model


def model_names() -> list[str]:
    """The names of the shipped model configs."""
    return sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def model_node(name: str, data: dict[str, int], keys: dict[str, Any]) -> dict[str, Any]:
    """The node of a shipped model with other values for some `keys`; it downloads nothing unless they say so.

    `data` holds num_classes, img_size and in_channels.
    """
    from vit_train.inference.trained import without_download  # here: torch, which --help can do without

    shipped = _merged(config_dir() / "model", name)
    shipped = OmegaConf.create(without_download(OmegaConf.to_container(shipped)))
    cfg = OmegaConf.create({"model": OmegaConf.merge(shipped, keys), "data": data})
    node: Any = OmegaConf.to_container(cfg.model, resolve=True)
    return dict(node)


def _merged(folder: Path, name: str) -> Any:
    """A config over those it is a delta of, without Hydra, which may be composing a run just now."""
    cfg: Any = OmegaConf.load(folder / f"{name}.yaml")
    bases = [base for base in cfg.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*(_merged(folder, base) for base in bases), cfg)
