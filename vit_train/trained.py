"""The only way back in: a trained model from a run or checkpoint, for evaluation and everything after it.

Stored data never chooses code: only classes defined in vit_train.models and vit_train.layers are built, and
backbones never download (the weights are in the checkpoint).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vit_train import checkpoint
from vit_train.construct import is_node, make
from vit_train.errors import CheckpointError, ConfigError
from vit_train.resume import check_plain

MODEL_CODE = ("vit_train.models", "vit_train.layers")
Weights = Literal["auto", "raw", "ema"]


@dataclass(frozen=True)
class Trained:
    """A trained model and what is needed to feed it and to read its answers.

    Attributes:
        model: in evaluation mode, on the device asked for.
        class_names: K names in the order of the logits.
        mean, std: normalisation per channel, on the 0 to 1 scale.
        img_size: side of the images in pixels.
        in_channels: 1 or 3.
        config: the run's whole resolved configuration, as plain data.
        path: the checkpoint directory.
        weights: which weights were loaded: "ema" or "raw".
        step: optimizer steps they were trained for.
    """

    model: nn.Module
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int
    in_channels: int
    config: dict[str, Any]
    path: Path
    weights: Literal["ema", "raw"]
    step: int


def load(run: Path, *, device: torch.device, weights: Weights = "auto") -> Trained:
    """Loads RUN: a run directory (its best checkpoint, else its last) or one checkpoint directory.

    Args:
        run: the directory.
        device: where the model goes.
        weights: "ema", "raw", or "auto": the average where there is one.

    Raises:
        CheckpointError: none is there, it is damaged, or it names code that is not ours.
    """
    stored, _ = checkpoint.load_run(run, fits)
    return from_checkpoint(stored, device=device, weights=weights)


def fits(path: Path, state: Mapping[str, Any], shapes: checkpoint.Shapes) -> None:
    """That the tensors of a checkpoint are those of the model it describes; see `checkpoint.load`.

    The model is built without memory, so neither a lying file nor a lying configuration can allocate much.

    Raises:
        CheckpointError: they are not, or the model is not one that can be built.
    """
    config = state.get("config")
    if not isinstance(config, dict) or not is_node(config.get("model")):
        raise CheckpointError(f"{path} does not describe a model")
    check_plain(config, path)
    node = config["model"]
    largest = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model/"))
    lie = _larger(node, largest)
    if lie is not None:
        raise CheckpointError(f"{path} does not describe its own model: {lie} in a file of {largest} weights")
    try:
        with torch.device("meta"):
            model = make(without_download(node), key="model", allow=MODEL_CODE)
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not describe a model that can be built: {reason}") from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{path} does not describe a model, but a {type(model).__name__}")
    checkpoint.check_shapes(path, shapes, model)


def _larger(node: Any, limit: int) -> int | None:
    """A number in a model's configuration above `limit`: width, depth and classes all count its weights."""
    values = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    if isinstance(node, int):
        return node if node > limit else None
    return next((n for value in values if (n := _larger(value, limit)) is not None), None)


def from_checkpoint(
    stored: checkpoint.Checkpoint, *, device: torch.device, weights: Weights = "auto"
) -> Trained:
    """The model of a checkpoint that was read already; see `load`."""
    path = stored.path
    has_ema = any(name.startswith("ema/") for name in stored.tensors)
    if weights == "ema" and not has_ema:
        raise CheckpointError(f"{path} holds no averaged weights; type --weights raw")
    chosen: Literal["ema", "raw"] = "ema" if weights == "ema" or (weights == "auto" and has_ema) else "raw"
    prefix = "ema/" if chosen == "ema" else "model/"
    try:
        config, inference = stored.state["config"], stored.state["inference"]
        model = make(without_download(config["model"]), key="model", allow=MODEL_CODE)
        state = {name[len(prefix) :]: t for name, t in stored.tensors.items() if name.startswith(prefix)}
        model.load_state_dict(state)
        return Trained(
            model=model.to(device).eval(),
            class_names=list(inference["class_names"]),
            mean=tuple(inference["mean"]),
            std=tuple(inference["std"]),
            img_size=inference["img_size"],
            in_channels=inference["in_channels"],
            config=config,
            path=path,
            weights=chosen,
            step=stored.state["train"]["step"],
        )
    except (ConfigError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not describe a model that can be built: {reason}") from error


def stored_config(stored: checkpoint.Checkpoint) -> dict[str, Any]:
    """The resolved configuration inside a checkpoint.

    Raises:
        CheckpointError: it holds none.
    """
    config = stored.state.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{stored.path} holds no configuration")
    return config


def without_download(node: Mapping[str, Any]) -> dict[str, Any]:
    """The same model node with every `pretrained: true` turned off."""
    copied: dict[str, Any] = copy.deepcopy(dict(node))
    _turn_off(copied)
    return copied


def _turn_off(node: dict[str, Any]) -> None:
    for key, value in node.items():
        if key == "pretrained":
            node[key] = False
        elif is_node(value):
            _turn_off(value)
