"""What is wrong with a folder of images, found before training by decoding every one of them.

What no decoder can see stays unseen: of 100 JPEGs with one flipped bit 98 decode without a complaint. Only a
checksum made when the file was whole would tell.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vit_train.data.contract import SPLITS, Split
from vit_train.data.folder import layout
from vit_train.data.folder.bad_files import Progress
from vit_train.data.folder.image_folder import ImageFolder, sample_of
from vit_train.data.folder.listing import LEFT_BY, images_below, is_folder, is_image, is_visible
from vit_train.data.folder.pool import Crash, each_file
from vit_train.data.transforms.decode import HEIC, NOT_READ, ValueRange, decode, find_range
from vit_train.data.transforms.stats import unusual
from vit_train.errors import DataError, ran_out
from vit_train.system.places import open_plain
from vit_train.text import count, printable, suggest

_DIGEST_BYTES = 16
_DARK = 3  # levels
_PATCH_SIZE = 16  # of the model that data=imagefolder brings along
_SIDE_EDGES = (32, 64, 128, 224, 384, 768, 1536)  # shorter side in pixels


class _Seen(NamedTuple):
    """One image that can be read."""

    width: int  # as shown, after EXIF orientation
    height: int
    mode: str  # Pillow's, as stored
    num_bytes: int
    digest: bytes  # of the file, not of its pixels
    levels: tuple[float, float, float]  # the least, the largest and the mean


def _look(path: str, *, value_range: ValueRange | None) -> _Seen | str:
    """What is in a file, or why it cannot be read."""
    try:
        shown = decode(path, value_range=value_range)
        with open_plain(path) as file:
            digest = hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=_DIGEST_BYTES))
            num_bytes = file.tell()
            file.seek(0)
            with Image.open(file) as stored:
                mode = stored.mode
    except DataError as error:
        return error.what
    except Exception as error:  # gone or changed meanwhile, or another of Pillow's plugins takes it
        if ran_out(error):
            raise
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return _Seen(*shown.size, mode, num_bytes, digest.digest(), _levels(shown))


def _levels(shown: Image.Image) -> tuple[float, float, float]:
    """See `stats.unusual`. A few pixels tell it, unless they are alike, or so dark that rounding counts."""
    few: Any = shown.resize((16, 16), Image.Resampling.NEAREST).convert("L")
    (low, high), mean = few.getextrema(), few.reduce(16).getpixel((0, 0))
    if mean >= _DARK and high - low >= _DARK:
        return low, high, mean
    pixels = np.asarray(shown)
    return float(pixels.min()), float(pixels.max()), float(pixels.mean())


@dataclass(frozen=True)
class Item:
    """One case of a finding.

    Args:
        files: paths of files or folders below the root; several where they belong together.
        detail: what is to be said of it.
    """

    files: tuple[str, ...]
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """Something the user should know.

    Args:
        kind: one word for programs, such as "unreadable".
        text: one line for people.
        items: every case, sorted.
    """

    kind: str
    text: str
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `check_folder` found.

    Attributes:
        root: the folder.
        num_images: those that training would list, readable or not.
        num_bytes: of those that can be read; so are the figures below.
        problems: what would break training.
        warnings: what would not, but may spoil it.
        notes: what training would say about this folder; empty if it would not start.
        counts: split -> class -> images, readable or not; a class of any split is in all.
        shorter_sides: range in pixels -> images; empty ranges at both ends are left out.
        modes: Pillow's mode as stored -> images, the most frequent first.
        smallest, largest: width and height of the image with the fewest and the most pixels.
    """

    root: str
    num_images: int
    num_bytes: int
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    shorter_sides: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None


@dataclass
class _Survey:
    """What lies in a folder, where its layout can be told.

    Attributes:
        root: the folder.
        classes: split -> its class folders below the root, with or without images, sorted -> their class.
        below: split -> its folder below the root with a slash at the end, or nothing where it is the root.
        names: images that training would list, as paths below the root.
        splits, labels: (n,) split and class of each.
        refused: folders that cannot be listed.
        strays: what training passes over.
    """

    root: Path
    classes: dict[Split, dict[str, str]] = field(default_factory=dict)
    below: dict[Split, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    refused: list[Item] = field(default_factory=list)
    strays: list[Item] = field(default_factory=list)

    def pairs(self) -> Counter[tuple[Split, str]]:
        """Images by split and class."""
        return Counter(zip(self.splits, self.labels))


def _survey(root: Path) -> _Survey:
    """Lists a folder as training does, but goes on where that stops."""
    survey, left_out = _Survey(root), set()
    with suppress(DataError, OSError):  # then training's own line about it is all there is to say
        folders = layout.split_folders(root, training=False, notes=[])
        if "test" not in folders and folders.get("train") != root:  # as Kaggle has it: training says so
            left_out = {name for name in layout.inside(root).folders if name.lower() == "test"}
        for split, folder in folders.items():
            below = "" if folder == root else f"{folder.name}/"
            names, survey.below[split] = layout.inside(folder).folders, below
            survey.classes[split] = {below + name: normalize("NFC", name) for name in names}
    followed = {""}
    for split, places in survey.classes.items():
        followed |= {survey.below[split].rstrip("/"), *places}
        for place, label in places.items():
            with suppress(OSError):  # the walk over everything names the folder
                found = images_below(root / place)
                survey.names += [f"{place}/{name}" for name in found]
                survey.splits += [split] * len(found)
                survey.labels += [label] * len(found)
    _walk(survey, followed, left_out)
    return survey


def _walk(survey: _Survey, followed: set[str], left_out: set[str]) -> None:
    """Everything below the root: what is not among the images, and what cannot be listed.

    Args:
        survey: with its images.
        followed: folders below the root that training looks into even where they are links.
        left_out: others, which training names.
    """
    images, waiting = {*survey.names}, [""]
    while waiting:
        where = waiting.pop()
        try:
            with os.scandir(survey.root / where) as entries:
                inside = [(entry.name, is_folder(entry), entry.is_symlink()) for entry in entries]
        except OSError as error:
            survey.refused.append(Item((where or ".",), f"cannot be listed ({error.strerror})"))
            continue
        for name, folder, is_link in inside:
            below = f"{where}/{name}" if where else name
            if below in left_out:
                continue
            if folder and is_visible(name) and (not is_link or below in followed):
                waiting.append(below)
            elif below not in images:
                what = "linked folder, not followed" if folder and is_link else _stray_reason(name)
                survey.strays.append(Item((f"{below}/" if folder else below,), what))
    survey.strays.sort(key=lambda item: item.files)
    survey.refused.sort(key=lambda item: item.files)


def _stray_reason(name: str) -> str:
    if name.startswith("._"):
        return "left by macOS"
    if name.lower() in LEFT_BY:
        return f"left by {LEFT_BY[name.lower()]}"
    if not is_visible(name):
        return "hidden"
    if name.lower().endswith(HEIC):
        return NOT_READ
    return "in no class folder" if is_image(name) else "not an image by its name"


def check_folder(
    root: str, *, num_workers: int, start: Callable[[int], Progress] = lambda _: lambda _: None
) -> Report:
    """Looks at everything in a folder of images: its layout as training reads it, and every image.

    `start` is called with the number of images, and returns what is called with the number done.

    Raises:
        DataError: there is no such folder.
    """
    survey = _survey(layout.existing_folder(root))
    images = _Images(len(survey.names))
    progress = start(len(survey.names))
    paths = [f"{survey.root}/{name}" for name in survey.names]
    train = [path for path, split in zip(paths, survey.splits) if split == "train"]
    look = functools.partial(_look, value_range=find_range(sample_of(train))[0])
    with closing(each_file(look, paths, num_workers=num_workers)) as answers:
        for position, seen in answers:
            images.put(position, seen)
            progress(1)
    problems = [
        _unknown_classes(survey),
        _empty_classes(survey),
        _refused_folders(survey),
        _unreadable(survey, images),
    ]
    line, notes = _verdict(survey)
    if line is not None:
        problems.insert(0, _layout(survey, line, [finding for finding in problems if finding]))
    warnings = [*_same_files(survey, images), _unmeasured(survey), _alike_classes(survey), _strays(survey)]
    warnings += _brightness(survey, images)
    return Report(
        root=str(survey.root),
        num_images=len(survey.names),
        num_bytes=int(images.num_bytes.sum()),
        problems=[finding for finding in problems if finding],
        warnings=[finding for finding in warnings if finding],
        notes=notes,
        counts=_counts(survey),
        shorter_sides=images.shorter_sides(),
        modes=dict(images.modes.most_common()),
        smallest=images.extreme(np.argmin),
        largest=images.extreme(np.argmax),
    )


class _Images:
    """What is known of n images, in 52 bytes each."""

    def __init__(self, count: int) -> None:
        self.sizes: NDArray[np.int64] = np.zeros((count, 2), dtype=np.int64)  # 0 x 0 where unreadable
        self.num_bytes: NDArray[np.int64] = np.zeros(count, dtype=np.int64)
        self.digests: NDArray[np.uint8] = np.zeros((count, _DIGEST_BYTES), dtype=np.uint8)
        self.levels: NDArray[np.float32] = np.full((count, 3), np.nan, dtype=np.float32)
        self.modes: Counter[str] = Counter()
        self.bad: dict[int, str] = {}

    def put(self, position: int, seen: _Seen | str | Crash) -> None:
        if not isinstance(seen, _Seen):
            self.bad[position] = str(seen)
            return
        self.sizes[position] = seen.width, seen.height
        self.num_bytes[position] = seen.num_bytes
        self.digests[position] = np.frombuffer(seen.digest, dtype=np.uint8)
        self.levels[position] = seen.levels
        self.modes[seen.mode] += 1

    def readable(self) -> NDArray[np.int64]:
        """Positions."""
        return np.flatnonzero(self.sizes[:, 0])

    def same(self) -> list[list[int]]:
        """Positions of files with equal content, in groups of two or more; all in ascending order."""
        positions = self.readable()
        _, group, counts = np.unique(self.digests[positions], axis=0, return_inverse=True, return_counts=True)
        group = group.reshape(-1)
        repeated = np.flatnonzero(counts[group] > 1)
        groups: dict[int, list[int]] = {}
        for each in repeated.tolist():
            groups.setdefault(int(group[each]), []).append(int(positions[each]))
        return list(groups.values())

    def shorter_sides(self) -> dict[str, int]:
        sides = self.sizes[self.readable()].min(axis=1)
        counts = np.bincount(np.searchsorted(_SIDE_EDGES, sides, side="right"), minlength=1).tolist()
        labels = [
            f"below {_SIDE_EDGES[0]}",
            *(f"{low} to {high - 1}" for low, high in itertools.pairwise(_SIDE_EDGES)),
            f"{_SIDE_EDGES[-1]} and more",
        ]
        first = next((i for i, count in enumerate(counts) if count), len(counts))
        return dict(zip(labels[first:], counts[first:]))

    def extreme(self, choose: Callable[[NDArray[np.int64]], np.intp]) -> tuple[int, int] | None:
        positions = self.readable()
        if not len(positions):
            return None
        width, height = self.sizes[positions[choose(self.sizes[positions].prod(axis=1))]].tolist()
        return width, height


def _verdict(survey: _Survey) -> tuple[str | None, list[str]]:
    """The line that training would end in, if there is one; else what it would say."""
    data = ImageFolder(root=str(survey.root), patch_size=_PATCH_SIZE, num_workers=0, cache="none")
    try:
        data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    except DataError as error:
        return str(error.reworded(key="")), []
    return None, data.notes


def _layout(survey: _Survey, line: str, found: list[Finding]) -> Finding | None:
    """Training stops at the first thing it meets; the others have it among all of its kind."""
    named = (f"{survey.root}/{file}" for each in found for item in each.items for file in item.files)
    if any(printable(path) + end in f"{line} " for path in named for end in " ,:;"):
        return None
    return Finding("layout", line)


def _finding(kind: str, text: str, items: list[Item]) -> Finding | None:
    return Finding(kind, text, tuple(items)) if items else None


def _unreadable(survey: _Survey, images: _Images) -> Finding | None:
    items = [Item((survey.names[position],), images.bad[position]) for position in sorted(images.bad)]
    many = count(len(items), "image cannot be read", "images cannot be read")
    return _finding("unreadable", f"{many}: repair or remove", items)


def _refused_folders(survey: _Survey) -> Finding | None:
    many = count(len(survey.refused), "folder cannot be listed", "folders cannot be listed")
    return _finding("refused", f"{many}: ask for permission", survey.refused)


def _empty_classes(survey: _Survey) -> Finding | None:
    """Of train: nothing to learn a class from."""
    counts, refused = survey.pairs(), {item.files[0] for item in survey.refused}
    items = [
        Item((place,), "no images")
        for place, label in survey.classes.get("train", {}).items()
        if not counts["train", label] and place not in refused
    ]
    many = count(len(items), "class has no training image", "classes have no training image")
    return _finding("empty_class", f"{many}: fill the folder or remove it", items)


def _unknown_classes(survey: _Survey) -> Finding | None:
    """Of val and test: the model has no such output."""
    if "train" not in survey.classes:
        return None
    known = {*survey.classes["train"].values()}
    in_capitals = {name.casefold(): name for name in known}
    items = []
    for places in survey.classes.values():
        for place, label in places.items():
            if label not in known:
                alike = in_capitals.get(label.casefold())
                detail = f"train has {alike!r}" if alike else f"not in train{suggest(label, known)}"
                items.append(Item((place,), detail))
    many = count(len(items), "class folder does not exist", "class folders do not exist")
    them = "it" if len(items) == 1 else "them"
    return _finding("unknown_class", f"{many} in train: rename or remove {them}", items)


def _unmeasured(survey: _Survey) -> Finding | None:
    """Classes of train that val or test say nothing about."""
    counts, items = survey.pairs(), []
    for split, places in survey.classes.items():
        there = dict(zip(places.values(), places))
        for label in survey.classes.get("train", {}).values():
            if split != "train" and counts["train", label] and not counts[split, label]:
                detail = "no images" if label in there else "no such folder"
                items.append(Item((there.get(label, survey.below[split] + label),), detail))
    many = count(len(items), "class is", "classes are")
    return _finding("missing_class", f"{many} missing in val or test: nothing is measured there", items)


def _alike_classes(survey: _Survey) -> Finding | None:
    alike: dict[str, dict[str, str]] = {}
    for place, label in survey.classes.get("train", {}).items():
        alike.setdefault(label.casefold(), {})[label] = place
    items = [Item(tuple(places.values())) for places in alike.values() if len(places) > 1]
    return _finding("alike", "classes that differ only in upper and lower case: are they one?", items)


def _same_files(survey: _Survey, images: _Images) -> Iterator[Finding | None]:
    """Equal content across splits, across classes, and the rest."""
    leaks, contradictions, copies, surplus = [], [], [], 0
    for group in images.same():
        files = tuple(survey.names[position] for position in group)
        splits = {survey.splits[position] for position in group}
        labels = {survey.labels[position] for position in group}
        if len(splits) > 1:
            leaks.append(Item(files, " and ".join(split for split in SPLITS if split in splits)))
        if len(labels) > 1:
            contradictions.append(Item(files, " or ".join(sorted(labels))))
        if len(splits) == len(labels) == 1:
            copies.append(Item(files))
            surplus += len(files) - 1
    many = count(len(leaks), "picture is", "pictures are")
    yield _finding("leak", f"{many} in more than one split: results on them will look too good", leaks)
    many = count(len(contradictions), "picture has", "pictures have")
    yield _finding("contradiction", f"{many} more than one label: only one can be right", contradictions)
    text = f"{count(surplus, 'file is a copy', 'files are copies')} of another one of the same class"
    if "val" not in survey.classes:
        text += "; held-out validation images may be among them"
    yield _finding("copy", text, copies)


def _brightness(survey: _Survey, images: _Images) -> Iterator[Finding]:
    for text, which in unusual(images.levels):
        items = tuple(Item((survey.names[i],)) for i in which)
        yield Finding("brightness", f"{count(len(items), 'picture')} {text}", items)


def _strays(survey: _Survey) -> Finding | None:
    many = count(len(survey.strays), "other file or folder is", "other files and folders are")
    return _finding("stray", f"{many} not used", survey.strays)


def _counts(survey: _Survey) -> dict[str, dict[str, int]]:
    pairs = survey.pairs()
    labels = sorted({label for places in survey.classes.values() for label in places.values()})
    return {split: {label: pairs[split, label] for label in labels} for split in survey.classes}
