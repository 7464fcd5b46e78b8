"""The parts of a run, each built from its node; and what `auto` stands for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vit_train.config.check import is_typed
from vit_train.construct import as_config_error, make
from vit_train.errors import ConfigError
from vit_train.runs.stored import Packages

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHIFT = "augment.batch.max_shift"


def resolve_auto(cfg: DictConfig, overrides: list[str], model: nn.Module) -> list[str]:
    """The crops and the learning rate that were left to `auto` become numbers; returns why, a line each."""
    from vit_train.data.transforms.batch_transforms import auto_crop_scale
    from vit_train.training.optimizers import auto_lr

    notes = []
    scale = OmegaConf.select(cfg, "augment.batch.crop_scale")
    shift = OmegaConf.select(cfg, "augment.batch.max_shift") if is_typed(_SHIFT, overrides) else None
    if scale == "auto":
        scale = None if shift else auto_crop_scale(cfg.data.img_size)
        reason = "a shift was typed" if shift else f"images of {cfg.data.img_size} pixels"
        cfg.augment.batch.crop_scale = scale
        notes.append(f"augment.batch.crop_scale={scale or 'null, a shift instead'} (auto): {reason}")
    elif scale is not None and shift:
        raise ConfigError(f"{_SHIFT}={shift:g}: crops replace shifts; type only one of the two")
    if cfg.optimizer.get("lr") == "auto":
        cfg.optimizer.lr, reason = auto_lr(model, fine_tuned=cfg.init_from is not None)
        notes.append(f"optimizer.lr={cfg.optimizer.lr:g} (auto): {reason}")
    return notes


def doubts(precision: str, device: torch.device) -> list[str]:
    """A note where bf16 was typed for a processor that is not faster in it."""
    from vit_train.system.precision import bf16_is_faster

    if precision != "bf16" or device.type != "cpu" or bf16_is_faster(device):
        return []
    return ["trainer.precision=bf16: fp32 is probably faster on this processor, perhaps much faster"]


def make_part(
    config: Mapping[str, Any], key: str, allow: Mapping[str, Packages] | None, kind: type = object
) -> Any:
    """The object that one node of the configuration describes, or the factory of it that waits for arguments.

    Args:
        config: the whole configuration, as plain data.
        key: of the node, such as augment.batch.
        allow: what each group may name where the configuration was stored; None allows everything.
        kind: what it must make.

    Raises:
        ConfigError: it cannot be built, or is of another kind; the factory raises it as well.
    """
    node: Any = config
    for part in key.split("."):
        node = node[part]
    made = make(node, key=key, allow=None if allow is None else allow[key.partition(".")[0]])

    def of_kind(made: Any, its: type) -> Any:
        if issubclass(its, kind):
            return made
        raise ConfigError(f"{key}: expected {kind.__name__}, {node['_target_']} makes {its.__name__}")

    def finish(*arguments: Any) -> Any:
        with as_config_error(key):
            finished = made(*arguments)
            return of_kind(finished, type(finished))

    if node.get("_partial_"):  # before a class of another kind meets arguments that are not meant for it
        return of_kind(finish, made.func if inspect.isclass(made.func) else kind)
    return of_kind(made, type(made))


def outline(config: Mapping[str, Any], allow: Mapping[str, Packages] | None) -> tuple[nn.Module, int]:
    """A copy of the model that holds no memory, and its multiply-adds per image.

    Counting them proves that the model takes such images.

    Raises:
        ConfigError: it does not, or see `without_memory`.
    """
    from vit_train.models.cost import multiply_adds

    model, data = without_memory(config, allow), config["data"]
    with as_config_error("model"):
        return model, multiply_adds(model, in_channels=data["in_channels"], img_size=data["img_size"])


def without_memory(config: Mapping[str, Any], allow: Mapping[str, Packages] | None) -> nn.Module:
    """The model on the meta device.

    Raises:
        ConfigError: it cannot be built, it is not a model, or it has another number of classes than the data.
    """
    import torch

    from vit_train.inference.trained import without_download

    node, data = without_download(config["model"]), config["data"]
    try:
        with torch.device("meta"):
            model = make(node, key="model", allow=None if allow is None else allow["model"])
    except ConfigError as error:
        patch, side = (node.get("patch_embed") or {}).get("patch_size"), data["img_size"]
        fitting = f", or type data.img_size={-(-side // patch) * patch}" if patch and side % patch else ""
        raise ConfigError(f"{error}{fitting}") from error
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "num_classes"):
        raise ConfigError(f"model: {node['_target_']} does not make a model")
    mixed = config["augment"]["batch"].get("num_classes", data["num_classes"])
    for key, number in (("model", model.num_classes), ("augment.batch", mixed)):
        if number != data["num_classes"]:
            raise ConfigError(
                f"{key}.num_classes={number}, but the data has {data['num_classes']} classes; "
                "leave it out: it comes from the data"
            )
    return model
