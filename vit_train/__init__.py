"""vit-train: a config-driven trainer for vision transformers.

The command line is the product (see README.md); `load` and `make_model` are the door for a notebook
(docs/PYTHON.md). docs/ARCHITECTURE.md explains the rooms of this package. Importing it is free: torch is
loaded by what needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from vit_train.inference.predictor import Predictor

__all__ = ["__version__", "load", "make_model"]

try:
    __version__ = version("vit-train")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def load(
    run: str | Path,
    *,
    trust: str | Sequence[str] = (),
    weights: Literal["auto", "ema", "raw"] = "auto",
    device: str = "auto",
) -> Predictor:
    """The trained model of a run, with `.predict(images)`, `.features(images)`, `.model` and `.class_names`.

    Args:
        run: a run directory (its best checkpoint, else its last) or one checkpoint.
        trust: packages whose code the run may name beside vit-train's own.
        weights: "ema" are the averaged ones, "raw" the others; "auto" takes the average where there is one.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        vit_train.errors.CheckpointError: there is no checkpoint, or none that can be used.
        vit_train.errors.ConfigError: a package that cannot be imported, or a device that is not there.
    """
    from vit_train.inference import predictor

    return predictor.load(run, trust=trust, weights=weights, device=device)


def make_model(
    name: str, *, num_classes: int = 1000, img_size: int | None = None, in_channels: int = 3, **keys: Any
) -> nn.Module:
    """A model of the shipped configs (configs/model/) with random weights: (B, C, H, W) -> logits (B, K).

    It is in training mode, as every new module is.

    Args:
        name: of the config, such as "swin_tiny".
        num_classes: K.
        img_size: H and W in pixels; None is 32 for *_cifar, 8 for *_digits and 224 for the others.
        in_channels: C.
        keys: of the config, such as drop_path_rate=0.1; patch_embed={"patch_size": 8} for keys further in.

    Raises:
        vit_train.errors.ConfigError: there is no such model or key, or a value does not fit.
    """
    from vit_train.config import shipped

    return shipped.make_model(
        name, num_classes=num_classes, img_size=img_size, in_channels=in_channels, **keys
    )
