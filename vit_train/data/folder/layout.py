"""Which folder is which split and which class, and one clear line where that cannot be told.

root/train/<class>/...   with val (or valid, validation) and test where they exist, in capitals or not
root/<class>/...         everything is train
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from vit_train.data.contract import Split
from vit_train.data.folder.listing import is_folder, is_image, is_visible
from vit_train.errors import DataError
from vit_train.system.places import as_argument, expanded
from vit_train.text import count, some, suggest

_SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_SIMILAR = {"training", "trainset", "testing", "testset", "eval", "evaluation", "dev"}
_WORDS: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass(frozen=True)
class Inside:
    """What lies directly in a folder, hidden things aside.

    Attributes:
        folders: names of the folders in it, links to folders too, sorted.
        linked: those of them that are links.
        broken: names of links that lead nowhere, sorted.
        num_images: images in the folder itself.
    """

    folders: list[str]
    linked: list[str]
    broken: list[str]
    num_images: int


def inside(folder: Path) -> Inside:
    """Looks into one folder.

    Raises:
        OSError: it cannot be listed.
    """
    folders, linked, broken, num_images = [], [], [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_visible(entry.name):
                continue
            if is_folder(entry):
                folders.append(entry.name)
                if entry.is_symlink():
                    linked.append(entry.name)
            elif entry.is_symlink() and not Path(entry).exists():
                broken.append(entry.name)
            else:
                num_images += is_image(entry.name)
    return Inside(sorted(folders), sorted(linked), sorted(broken), num_images)


def existing_folder(root: str | None) -> Path:
    """The folder `data.root` names.

    Raises:
        DataError: it is not set, not there or no folder.
    """
    if not root:  # also what an unset variable of the shell leaves
        raise DataError("data.root is not set: type data.root=/path/to/your/folder")
    path = expanded(root)
    if path.is_dir():
        return path
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to {path.readlink()}, which does not exist", key="data.root")
    if path.name.lower().endswith(_ARCHIVES) and path.exists():
        raise DataError(
            f"{path} is an archive: unpack it and type the folder that comes out", key="data.root"
        )
    if path.exists():
        raise DataError(
            f"{path} is not a folder: type the folder that holds the class folders", key="data.root"
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"{path} does not exist{suggest(path.name, siblings)}", key="data.root")


def split_folders(root: Path, *, training: bool, notes: list[str]) -> dict[Split, Path]:
    """Which folder holds which split; what to tell the user is added to `notes`.

    `training` says whether there must be a training split.

    Raises:
        DataError: there are no folders, or they are not one of the two layouts.
        OSError: a folder cannot be listed.
    """
    here = inside(root)
    names = here.folders
    if not names:
        expected = "expected <class>/<image> or train/<class>/<image> in it"
        if here.num_images:
            raise DataError(
                f"{root} holds {count(here.num_images, 'image')} but no class folders: {expected}; "
                f"move the images of each class into a folder of its own; {_unlabelled(root)}"
            )
        raise DataError(f"{root} holds no folders: {expected}")
    known = [name for name in names if name.lower() in _SPLITS]
    others = [name for name in names if name not in known]
    if "train" not in names and others:
        _refuse_splits_as_classes(root, names)
        notes += _one_too_high(root, names)
        return {"train": root}
    folders: dict[Split, Path] = {}
    for name in known:
        split = _SPLITS[name.lower()]
        if split in folders:
            raise DataError(
                f"{root} holds {folders[split].name} and {name}, and both names mean the "
                f"{_WORDS[split]} split: keep only one of them"
            )
        folders[split] = root / name
    if training and "train" not in folders:
        raise DataError(f"{root} holds {' and '.join(names)} but no train/: put the training images there")
    if others:
        notes.append(f"ignored, not the name of a split: {some([f'{name}/' for name in others])}")
    if {"train", "test"} <= folders.keys():
        both = inside(folders["train"]), inside(folders["test"])
        ours, theirs = ({normalize("NFC", name).casefold() for name in each.folders} for each in both)
        alike = any(suggest(name, ours) for name in theirs)
        if ours and (theirs or both[1].num_images) and not alike:  # as Kaggle has it
            test = folders.pop("test")
            notes.append(
                f"{test} has none of the classes of train, so the test split is left out: {_unlabelled(test)}"
            )
    return {split: folders[split] for split in _WORDS if split in folders}


def _refuse_splits_as_classes(root: Path, names: Sequence[str]) -> None:
    """A folder of class folders that is named like a split would become a class itself."""
    suspects = []
    for name in names:
        if name.lower() in _SPLITS or name.lower() in _SIMILAR:
            found = inside(root / name)
            if found.folders and not found.num_images:
                suspects.append(name)
    if suspects:
        others = [name for name in names if name not in suspects]
        beside = f" beside {some(others)}" if others else ""
        raise DataError(
            f"{root} holds {some(suspects)}{beside}, which would become classes: name the splits train, val "
            "and test, and move everything else out of the folder or into train/"
        )


def _one_too_high(root: Path, names: Sequence[str]) -> Iterator[str]:
    """A note where every class is a folder of folders: nested ones, or whole data sets."""
    below = {}
    for name in names:
        below[name] = inside(root / name)
        if below[name].num_images or not below[name].folders:
            return
    meant = [name for name in names if "train" in map(str.lower, below[name].folders)]
    meant = meant or [name for name in names if len(below[name].folders) > 1]
    hint = f"; did you mean {as_argument(root / meant[0])}?" if len(meant) == 1 else ""
    yield f"the class folders ({some(names)}) contain folders instead of images; the images lie deeper{hint}"


def class_folders(folder: Path, *, notes: list[str]) -> list[str]:
    """Names of the class folders of a split, sorted; what to tell the user is added to `notes`.

    Raises:
        DataError: there are images and no class folders, a class folder is a link to nothing, or two of them
            hold the same images or have one name.
        OSError: a folder cannot be listed.
    """
    here = inside(folder)
    if here.broken:
        raise DataError(f"{folder / here.broken[0]} is a link to nothing: repair or remove it")
    if here.linked:
        _refuse_images_twice(folder, here)
    spelled: dict[str, str] = {}
    for name in here.folders:
        if (other := spelled.setdefault(normalize("NFC", name), name)) != name:
            raise DataError(
                f"{folder} holds {other!a} and {name!a}, the same name in two Unicode forms: put "
                "the images of both into one of them"
            )
    if here.num_images and not here.folders:
        raise DataError(
            f"{folder} holds {count(here.num_images, 'image')} but no class folders: expected "
            f"{folder}/<class>/<image>, or the images elsewhere: {_unlabelled(folder)}"
        )
    if here.num_images:
        notes.append(f"{count(here.num_images, 'image')} directly in {folder}, in no class folder: ignored")
    return here.folders


def _refuse_images_twice(folder: Path, here: Inside) -> None:
    places: dict[Path, str] = {}
    for name in here.folders:
        place = (folder / name).resolve()
        if folder.resolve().is_relative_to(place):
            raise DataError(
                f"{folder / name} is a link to {place}, a folder that contains the link: remove the link"
            )
        if place in places:
            raise DataError(
                f"{folder / places[place]} and {folder / name} are the same folder ({place}): remove the link"
            )
        places[place] = name
    for place, name in places.items():
        for above in place.parents:
            if above in places:
                raise DataError(
                    f"{folder / name} lies in {folder / places[above]} ({place}): remove the link, or its "
                    "images belong to two classes"
                )


def refuse_too_few(train: Path, names: Sequence[str]) -> None:
    """Training needs two classes.

    Raises:
        DataError: there are fewer.
    """
    if not names:
        raise DataError(f"{train} holds no class folders: expected {train}/<class>/<image>")
    if len(names) == 1:
        below = inside(train / names[0]).folders
        if any(name.lower() in _SPLITS for name in below) or len(below) > 1:
            raise DataError(f"{train} holds one folder only: did you mean {as_argument(train / names[0])}?")
        raise DataError(
            f"{train} holds one class only ({names[0]}): training needs two or more class folders"
        )


def refuse_unknown(folder: Path, names: Sequence[str], class_names: Collection[str]) -> None:
    """Every class of a split must be one of these, which are composed (NFC).

    Raises:
        DataError: one is not; the line names the class that was probably meant.
    """
    for name in names:
        if normalize("NFC", name) not in class_names:
            what_to_do = suggest(name, class_names) or ": rename it, or move it elsewhere"
            raise DataError(f"train has no class for {folder / name}{what_to_do}")


def _unlabelled(folder: Path) -> str:
    return f"images without labels are for vit-predict RUN {as_argument(folder)}"
