"""A folder of images, one folder per class.

Two layouts:
    root/train/<class>/...   with root/val (or valid, validation) and root/test where they exist;
                             evaluation does with any one of the three
    root/<class>/...         everything is train
Folders inside a class folder are searched too. Hidden files and folders are skipped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vit_train.construct import PositiveFloat
from vit_train.data.base import Found, ImageData, Split
from vit_train.data.decode import decode
from vit_train.data.sample_transforms import SampleTransform, plain
from vit_train.data.splits import SPLIT_SEED
from vit_train.errors import DataError, suggest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_VAL_NAMES = ("val", "valid", "validation")
_SKIPPED_FOLDERS = {"__MACOSX"}

# The size to train at is read from the headers of a few files: enough to see whether they are all alike.
_NUM_HEADERS = 64
_STANDARD_SIZE = 224


@dataclass
class FileSource:
    """Images in files.

    Args:
        root: the folder `names` start from.
        names: paths relative to it, with forward slashes.
        targets: (n,) class ids.
    """

    root: str
    names: list[str]
    targets: NDArray[np.int64]

    def read(self, index: int) -> Image.Image:
        return decode(self.name(index))

    def name(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def select(self, indices: NDArray[np.int64]) -> FileSource:
        return FileSource(self.root, [self.names[i] for i in indices.tolist()], self.targets[indices])

    def update(self, digest: hashlib._Hash) -> None:
        for index, name in enumerate(self.names):
            digest.update(os.fsencode(name) + f"\0{Path(self.name(index)).stat().st_size}\0".encode())


class ImageFolder(ImageData):
    """Your own images. Arguments as for `ImageData`, and:

    Args:
        root: the folder.
        img_size: None takes the size of the files where they are all one square size of at most 224 pixels,
            else 224.
        resize: how evaluation (and training without augmentation) makes an image square: "crop" keeps the
            centre, "squash" keeps everything and changes the aspect ratio.
    """

    # Statistics of ImageNet's training images, as torchvision's reference recipes state them.
    default_mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    default_std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        worker_timeout_seconds: PositiveFloat = 600.0,
        img_size: int | None = None,
        in_channels: Literal[1, 3] = 3,
        resize: Literal["crop", "squash"] = "crop",
        val_fraction: float = 0.1,
        limit: int | None = None,
        seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        num_classes: int | None = None,
        sample_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            worker_timeout_seconds=worker_timeout_seconds,
            img_size=img_size,
            in_channels=in_channels,
            val_fraction=val_fraction,
            limit=limit,
            seed=seed,
            mean=mean,
            std=std,
            num_classes=num_classes,
            sample_transform=sample_transform,
        )
        self.root = root
        self.resize: Literal["crop", "squash"] = resize

    def load(self) -> Found:
        """Lists the files; val and test classes are mapped to train's by name.

        Where only evaluation follows there may be no train/, and the classes are those of any split.

        Raises:
            DataError: the folder is missing, or its layout is not one of the two.
        """
        try:
            return self._list(_existing_folder(self.root))
        except OSError as error:  # no permission, a network drive gone
            raise DataError(f"{error.filename} cannot be listed ({error.strerror})") from error

    def _list(self, root: Path) -> Found:
        folders = _split_folders(root, training=self._training)
        if self._training:
            class_names = _class_names(folders["train"])
        else:  # a class need not have images everywhere
            class_names = sorted({name for folder in folders.values() for name in _folders_in(folder)})
        sources: dict[Split, FileSource] = {}
        for split, folder in folders.items():
            source = _list_split(root, folder, class_names)
            counts = np.bincount(source.targets, minlength=len(class_names))
            if not counts.any() or (self._training and split == "train" and not counts.all()):
                empty = folder / class_names[int(counts.argmin())] if counts.any() else folder
                raise DataError(f"{empty} holds no images ({' '.join(SUFFIXES)}): fill it or remove it")
            sources[split] = source
        img_size = self._wanted_img_size
        if img_size is None:
            img_size = self._size_of(next(iter(sources.values())))
        return Found(str(root), class_names, {**sources}, img_size)

    def plain_transform(self, found: Found) -> SampleTransform:  # noqa: ARG002 - files may have any size
        """Always a resize: only some of the files' sizes are known."""
        return plain(self.img_size, resize=self.resize)

    def _size_of(self, source: FileSource) -> int:
        chosen = np.random.RandomState(SPLIT_SEED).permutation(len(source.names))[:_NUM_HEADERS]
        sizes = {size for i in chosen.tolist() if (size := _header_size(source.name(i))) is not None}
        if len(sizes) == 1:
            width, height = sizes.pop()
            if width == height <= _STANDARD_SIZE:
                self.notes.append(f"data.img_size={width}, the size of the files")
                return width
        self.notes.append(
            f"data.img_size={_STANDARD_SIZE}: the files are larger than that, not square or of several sizes"
        )
        return _STANDARD_SIZE


def _existing_folder(root: str | None) -> Path:
    if root is None:
        raise DataError("data.root is not set: type data.root=/path/to/your/folder")
    path = Path(root).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"data.root={path} is not a folder: type the folder that holds the class folders")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"data.root={path} does not exist{suggest(path.name, siblings)}")


def _folders_in(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _visible(entry.name) and entry.is_dir())


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in _SKIPPED_FOLDERS


def _split_folders(root: Path, *, training: bool) -> dict[Split, Path]:
    """Which folder holds which split."""
    names = _folders_in(root)
    if not names:
        raise DataError(f"{root} holds no folders: expected <class>/<image> or train/<class>/<image> in it")
    vals = [name for name in _VAL_NAMES if name in names]
    if "train" not in names:
        if not {*names} <= {*_VAL_NAMES, "test"}:
            return {"train": root}
        if training:
            raise DataError(
                f"{root} holds {' and '.join(names)} but no train/: put the training images there"
            )
    if len(vals) > 1:
        raise DataError(
            f"{root} holds {' and '.join(vals)}: keep one of them, both would be the validation split"
        )
    folders: dict[Split, Path] = {"train": root / "train"} if "train" in names else {}
    if vals:
        folders["val"] = root / vals[0]
    if "test" in names:
        folders["test"] = root / "test"
    return folders


def _class_names(train: Path) -> list[str]:
    names = _folders_in(train)
    if not names:
        raise DataError(f"{train} holds no class folders: expected {train}/<class>/<image>")
    if len(names) == 1:
        raise DataError(
            f"{train} holds one class only ({names[0]}): training needs two or more class folders"
        )
    return names


def _list_split(root: Path, folder: Path, class_names: Sequence[str]) -> FileSource:
    """The images of the class folders in `folder`, in the order of the class ids, sorted within."""
    ids = {name: i for i, name in enumerate(class_names)}
    names: list[str] = []
    targets: list[int] = []
    for name in _folders_in(folder):
        if name not in ids:
            raise DataError(f"train has no class for {folder / name}{suggest(name, class_names)}")
        below = (folder / name).relative_to(root).as_posix()
        files = [f"{below}/{file}" for file in images_below(folder / name)]
        names += files
        targets += [ids[name]] * len(files)
    return FileSource(str(root), names, np.asarray(targets, dtype=np.int64))


def images_below(folder: Path) -> list[str]:
    """All images below a folder, sorted, as paths relative to it with forward slashes.

    Hidden files and folders are skipped. Linked folders are not followed: they may form a loop.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = []
    for path, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if _visible(name)]
        below = os.path.relpath(path, folder).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + name for name in files if _visible(name) and name.lower().endswith(SUFFIXES)]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise error  # os.walk would skip the folder, and the user would train on less than is there


def _header_size(path: str) -> tuple[int, int] | None:
    """Width and height; None for a file that cannot be opened, which the loader will name."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # as in decode
        return None
