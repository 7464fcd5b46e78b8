"""Data: what the trainer knows of it, and the datasets, which are imported when they are named."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vit_train.data.batch import Batch
from vit_train.data.contract import DataModule, Loader, Source, Split

if TYPE_CHECKING:
    from vit_train.data.cifar import Cifar10, Cifar100
    from vit_train.data.digits import Digits
    from vit_train.data.folder.image_folder import ImageFolder
    from vit_train.data.image_data import Found, ImageData
    from vit_train.data.loading.array_source import ArraySource

_DEFINED_IN = {
    "ArraySource": "loading.array_source",
    "Cifar10": "cifar",
    "Cifar100": "cifar",
    "Digits": "digits",
    "Found": "image_data",
    "ImageData": "image_data",
    "ImageFolder": "folder.image_folder",
}
__all__ = [
    "ArraySource",
    "Batch",
    "Cifar10",
    "Cifar100",
    "DataModule",
    "Digits",
    "Found",
    "ImageData",
    "ImageFolder",
    "Loader",
    "Source",
    "Split",
]


def __getattr__(name: str) -> Any:
    """`vit_train.data.ImageFolder` without torchvision for those who want a Batch only."""
    if name in _DEFINED_IN:
        return getattr(importlib.import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
