"""Data: datasets, splits, loaders, and the transforms of samples (CPU) and batches (device)."""

from vit_train.data.arrays import ArraySource
from vit_train.data.base import DataModule, Found, ImageData, Split
from vit_train.data.batch import Batch
from vit_train.data.batch_transforms import Augment, Normalize
from vit_train.data.chosen import Chosen
from vit_train.data.cifar import Cifar10, Cifar100
from vit_train.data.digits import Digits
from vit_train.data.imagefolder import ImageFolder
from vit_train.data.loaders import Loader, Source

__all__ = [
    "ArraySource",
    "Augment",
    "Batch",
    "Chosen",
    "Cifar10",
    "Cifar100",
    "DataModule",
    "Digits",
    "Found",
    "ImageData",
    "ImageFolder",
    "Loader",
    "Normalize",
    "Source",
    "Split",
]
