"""The only way back in: a trained model from a run or checkpoint, for evaluation and everything after it.

Stored data never chooses code: only classes defined in vit_train.models, vit_train.layers and packages the
user trusts are built, and backbones never download (the weights are in the checkpoint).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import torch
from torch import Tensor, nn

from vit_train import checkpoint
from vit_train.construct import check, is_node, make
from vit_train.data.transforms.batch_transforms import Normalize
from vit_train.data.transforms.decode import RGB, WHITE, ValueRange, decode
from vit_train.data.transforms.sample_transforms import Steps, plain
from vit_train.errors import UNFIT, CheckpointError, ConfigError, blame
from vit_train.runs.stored import Packages, allowed, check_stored
from vit_train.system.precision import Precision, inference_precision

Weights = Literal["auto", "raw", "ema"]


@dataclass(frozen=True)
class Trained:
    """A trained model and what is needed to feed it and to read its answers.

    Attributes:
        model: in evaluation mode, on the device asked for.
        class_names: K names in the order of the logits, composed (NFC), which older versions did not store.
        mean, std: normalisation per channel, on the 0 to 1 scale.
        img_size: side of the images in pixels.
        in_channels: 1 or 3.
        resize: how evaluation made an image square: "crop" or "squash"; see `sample_transforms.plain`.
        background: the colour under what is transparent.
        value_range: what is black and white in pictures deeper than 8 bits; see `decode`.
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
    resize: Literal["crop", "squash"]
    background: RGB
    value_range: ValueRange | None
    config: dict[str, Any]
    path: Path
    weights: Literal["ema", "raw"]
    step: int

    def precision(self) -> Precision:
        """What the forward pass computes in: as in training, where the model's device does."""
        device = next(self.model.parameters()).device
        return inference_precision(self.config["trainer"].get("precision"), device)

    def sample_transform(self) -> Steps:
        """What evaluation did to an image on the CPU: PIL image -> uint8 (C, img_size, img_size)."""
        return plain(self.img_size, resize=self.resize)

    def read(self, content: str | Path | bytes, *, name: str = "") -> Tensor:
        """(C, img_size, img_size) uint8: a file, or what is in one, as evaluation reads it.

        Args:
            content: see `decode`.
            name: for messages.

        Raises:
            DataError: it cannot be read.
        """
        transform = self.sample_transform()
        image = decode(
            content,
            name=name,
            background=self.background,
            least_side=transform.least_side,
            value_range=self.value_range,
        )
        return transform(image.convert("L" if self.in_channels == 1 else "RGB"))

    def batch_transform(self) -> Normalize:
        """What evaluation did to a batch, on the model's device."""
        return Normalize(self.mean, self.std).to(next(self.model.parameters()).device)


def fits(
    path: Path,
    state: Mapping[str, Any],
    shapes: checkpoint.Shapes,
    *,
    trust: Packages = (),
    hydra: bool = False,
) -> None:
    """That the tensors of a checkpoint are those of the model it describes; see `checkpoint.load`.

    The model is built without memory, so neither a lying file nor a lying configuration can allocate much.

    Raises:
        CheckpointError: they are not, or the model is not one that can or (see `trust`) may be built.
    """
    config = state.get("config")
    if not isinstance(config, dict) or not is_node(config.get("model")):
        raise CheckpointError(f"{path} does not describe a model")
    check_stored(config, path)
    node = config["model"]
    allow = allowed({"model": node}, trust, hydra=hydra)
    with _blaming(path), torch.device("meta"):
        if errors := check(node, key="model"):
            raise ConfigError("; ".join(errors))
        model = make(without_download(node), key="model", allow=allow["model"])
        if not isinstance(model, nn.Module):
            raise TypeError(f"{node['_target_']} makes a {type(model).__name__}")
        checkpoint.check_shapes(path, shapes, model)
        _check_inference(state["inference"], model)
        if type(step := state["train"]["step"]) is not int or not 0 <= step < 2**63:
            raise ValueError(f"{step!r:.40} steps")


def _blaming(path: Path) -> AbstractContextManager[None]:
    what = f"{path} does not describe a model that can be built"
    return blame(CheckpointError, what, (ConfigError, *UNFIT))


def _check_inference(inference: Mapping[str, Any], model: nn.Module) -> None:
    """That what is stored for feeding the model and reading its answers fits it.

    Raises:
        ValueError, KeyError, TypeError: it does not.
    """
    names, side, channels = inference["class_names"], inference["img_size"], inference["in_channels"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of names")
    if channels not in (1, 3) or type(side) is not int or side < 1:
        raise ValueError(f"images of {channels!r} channels and {side!r} pixels")
    for key in ("mean", "std"):
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in inference[key])
        if len(inference[key]) != channels or not numbers:
            raise ValueError(f"{key} is {inference[key]!r} for {channels} channels")
    Normalize(inference["mean"], inference["std"])
    with torch.no_grad():
        answer = model.eval()(torch.empty(1, channels, side, side))
    if tuple(answer.shape) != (1, len(names)):
        raise ValueError(f"answers of shape {tuple(answer.shape)} for {len(names)} classes")


def from_checkpoint(
    stored: checkpoint.Checkpoint, *, device: torch.device, weights: Weights = "auto", trust: Packages = ()
) -> Trained:
    """The model of a checkpoint that was read already, and checked by `fits`."""
    path = stored.path
    has_ema = any(name.startswith("ema/") for name in stored.tensors)
    if weights == "ema" and not has_ema:
        raise CheckpointError(f"{path} holds no averaged weights", advice="type --weights raw")
    chosen: Literal["ema", "raw"] = "ema" if weights == "ema" or (weights == "auto" and has_ema) else "raw"
    prefix = "ema/" if chosen == "ema" else "model/"
    with _blaming(path):
        config, inference = stored.state["config"], stored.state["inference"]
        allow = allowed({"model": config["model"]}, trust)
        model = make(without_download(config["model"]), key="model", allow=allow["model"])
        state = {name[len(prefix) :]: t for name, t in stored.tensors.items() if name.startswith(prefix)}
        model.load_state_dict(state)
        return Trained(
            model=model.to(device).eval(),
            class_names=[normalize("NFC", name) for name in inference["class_names"]],
            mean=tuple(inference["mean"]),
            std=tuple(inference["std"]),
            img_size=inference["img_size"],
            in_channels=inference["in_channels"],
            # only a folder of images chooses; a data module of arrays squashes
            resize="crop" if config["data"].get("resize") == "crop" else "squash",
            background=_colour(config["data"].get("background")),
            value_range=_range(config["data"].get("value_range")),
            config=config,
            path=path,
            weights=chosen,
            step=stored.state["train"]["step"],
        )


def _colour(stored: object) -> RGB:
    """A stored background, where there is one."""
    match stored:
        case [int(red), int(green), int(blue)] if 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
            return red, green, blue
        case _:
            return WHITE


def _range(stored: object) -> ValueRange | None:
    """A stored value range, where there is one."""
    match stored:
        case [int() | float() as black, int() | float() as white] if -math.inf < black < white < math.inf:
            return float(black), float(white)
        case None:
            return None
    raise ValueError(f"data.value_range is {stored!r}")


def without_download(node: Any) -> Any:
    """The same model node with every `pretrained: true` turned off."""
    if isinstance(node, Mapping):
        return {key: False if key == "pretrained" else without_download(inner) for key, inner in node.items()}
    return [without_download(inner) for inner in node] if isinstance(node, list) else node
