"""A folder of images, one folder per class, however many.

`layout` says which folder is which split and class, `listing` which images are in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from vit_train.construct import Side
from vit_train.data.contract import Readable, Source, Split
from vit_train.data.folder import layout
from vit_train.data.folder.bad_files import bad_files, unreadable
from vit_train.data.folder.file_names import Names
from vit_train.data.folder.listing import SUFFIXES, Listing, list_images
from vit_train.data.image_data import Found, ImageData
from vit_train.data.transforms.decode import HEIC, NOT_READ, RGB, WHITE, ValueRange, decode, find_range
from vit_train.data.transforms.sample_transforms import SampleTransform, plain
from vit_train.errors import DataError, passing_over
from vit_train.system.places import as_argument, open_plain
from vit_train.text import NAMED, count, some

# The size to train at is read from the headers of a few files: enough to see whether they are all alike.
_NUM_HEADERS = 64
_SAMPLE_SEED = 20170612
_STANDARD_SIZE = 224

_MOST_SKIPPED = 0.01  # of the training images: more is a broken download, not a few broken files
_MOST_READ_AGAIN = 20_000  # images, which takes some seconds to a minute


@dataclass
class FileSource:
    """Images in files.

    Args:
        root: the folder `names` start from.
        names: paths relative to it, with forward slashes.
        targets: (n,) class ids.
        sizes: (n,) bytes of each file when it was listed.
        background: under what is transparent, 0 to 255 each.
        least_side: what is enough of a large JPEG, see `decode`; None reads every pixel.
        value_range: black and white of what is deeper than 8 bits, see `decode`.
        depth: how many folders a class lies below the root.
    """

    root: str
    names: Names
    targets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    background: RGB = WHITE
    least_side: int | None = None
    value_range: ValueRange | None = None
    depth: int = 1

    def read(self, index: int) -> Image.Image:
        return decode(
            self.content(index),
            name=self.name(index),
            background=self.background,
            least_side=self.least_side,
            value_range=self.value_range,
        )

    def content(self, index: int) -> str | bytes:
        return self.name(index)

    def name(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def keys(self) -> Iterator[str]:
        """Paths below the class folder, composed (NFC): the same wherever it is moved, and from a Mac."""
        return (normalize("NFC", name.split("/", self.depth)[-1]) for name in self.names)

    def select(self, indices: NDArray[np.int64]) -> FileSource:
        return replace(
            self, names=self.names.select(indices), targets=self.targets[indices], sizes=self.sizes[indices]
        )

    def update(self, digest: hashlib._Hash) -> None:
        for name, size in zip(self.names.encoded(), self.sizes):
            digest.update(b"%b\0%d\0" % (name, size))


class ImageFolder(ImageData):
    """Your own images. Arguments as for `ImageData`, and:

    Args:
        root: the folder.
        img_size: None takes the size of the files where they are all one square size of at most 224 pixels,
            else 224; the next multiple of `patch_size`.
        patch_size: of the model that will see the images.
        resize: how evaluation (and training without augmentation) makes an image square: "crop" keeps the
            centre, "squash" keeps everything and changes the aspect ratio.
        background: the colour under what is transparent, red, green and blue of 0 to 255.
        value_range: what is black and what is white in pictures deeper than 8 bits; None finds it in a few
            files of train, see `find_range`.
        on_bad_image: "error" ends the run at an image that cannot be read, and names all of them; "skip"
            reads every image before training and leaves those of train out that cannot be, if they are at
            most 1 percent. Evaluation leaves none out.
    """

    # Statistics of ImageNet's training images, as torchvision's reference recipes state them.
    default_mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    default_std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

    def __init__(
        self,
        *,
        root: str | None = None,
        patch_size: Side = 1,
        resize: Literal["crop", "squash"] = "crop",
        background: RGB = WHITE,
        value_range: ValueRange | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = root
        self.patch_size = patch_size
        self.resize: Literal["crop", "squash"] = resize
        self.background = background
        if value_range is not None and value_range[0] >= value_range[1]:
            raise ValueError(f"value_range must be black and a larger white, got {value_range}")
        self.value_range = value_range
        self.on_bad_image = on_bad_image

    def load(self) -> Found:
        """Lists the files; val and test classes are mapped to train's by name.

        Where only evaluation follows there may be no train/, and the classes are those of any split.

        Raises:
            DataError: the folder is missing, its layout is not one of the two, or a class or file is empty.
        """
        try:
            return self._list(layout.existing_folder(self.root))
        except OSError as error:  # no permission, a network drive gone
            raise DataError(f"{error.filename} cannot be listed ({error.strerror})") from error

    def _list(self, root: Path) -> Found:
        folders = layout.split_folders(root, training=self._training, notes=self.notes)
        classes = {split: layout.class_folders(folder, notes=self.notes) for split, folder in folders.items()}
        if self._training:
            class_names = classes["train"]
            layout.refuse_too_few(folders["train"], class_names)
        else:  # a class need not have images everywhere; where it has, it is spelled as in the first split
            spelled = {normalize("NFC", name): name for names in [*classes.values()][::-1] for name in names}
            class_names = sorted(spelled.values())
        ids = {normalize("NFC", name): i for i, name in enumerate(class_names)}
        for split, names in classes.items():
            layout.refuse_unknown(folders[split], names, ids)
        below = [
            (folders[split] / name).relative_to(root).as_posix()
            for split, names in classes.items()
            for name in names
        ]
        listing = list_images(root, below)
        self._add_listing_notes(listing)
        sources: dict[Split, FileSource] = {}
        counts, first = listing.counts, 0  # those of the splits to come, and where their images begin
        for split, names in classes.items():
            here, counts = counts[: len(names)], counts[len(names) :]
            self._refuse_empty(split, folders[split], names, here, _others(listing))
            rows = np.arange(first, first + here.sum())
            known_as = [ids[normalize("NFC", name)] for name in names]
            targets = np.repeat(np.array(known_as, dtype=np.int64), here)
            files, sizes = listing.names.select(rows), listing.sizes[rows]
            depth = 1 + len(folders[split].relative_to(root).parts)
            sources[split] = FileSource(str(root), files, targets, sizes, self.background, depth=depth)
            first += len(rows)
        if self._training and self.on_bad_image == "error":
            _refuse_no_content(sources)
        if self._training and self.value_range is None:
            self.value_range, note = find_range(sample_of(_Paths(sources["train"])))
            self.notes += [note] if note else []
        sources = {split: replace(s, value_range=self.value_range) for split, s in sources.items()}
        img_size = self._wanted_img_size
        if img_size is None:
            img_size = self._size_of(next(iter(sources.values())))
        return Found(str(root), class_names, {**sources}, img_size)

    def _refuse_empty(
        self, split: Split, folder: Path, class_names: list[str], counts: NDArray[np.int64], others: str
    ) -> None:
        """A split without images, or a class without any to train on."""
        if not counts.any():
            empty = [folder]
        elif self._training and split == "train":
            empty = [folder / class_names[i] for i in np.flatnonzero(counts == 0).tolist()]
        else:
            return
        if empty:
            verb, it = ("holds", "it") if len(empty) == 1 else ("hold", "them")
            raise DataError(
                f"{some(empty)} {verb} no images ({' '.join(SUFFIXES)}): fill {it} or remove {it}"
                + (others and f"; {others}")
            )

    def _add_listing_notes(self, listing: Listing) -> None:
        if listing.others:
            self.notes.append(_others(listing, ": ignored"))
        if listing.links:
            self.notes.append(f"linked folders inside class folders are not followed: {some(listing.links)}")

    def usable(self, sources: dict[Split, Source]) -> dict[Split, Source]:
        """With on_bad_image=skip: what can be read, the same on every rank, for any number of workers."""
        if self.on_bad_image == "error":
            return sources
        sources = dict(sources)
        for split, source in sources.items():
            assert isinstance(source, FileSource), "this module makes no other"
            bad = self._bad_lines(source)
            if not bad:
                continue
            if split != "train":
                raise DataError(f"{unreadable([*bad.values()])} (data.on_bad_image=skip is for train only)")
            if len(bad) > _MOST_SKIPPED * len(source.targets):
                raise DataError(
                    f"{unreadable([*bad.values()])}\n  data.on_bad_image=skip leaves out at most "
                    f"{_MOST_SKIPPED:.0%} of {len(source.targets):,} training images"
                )
            good = np.setdiff1d(np.arange(len(source.targets)), [*bad])
            sources[split] = source.select(good)
            if len(np.setdiff1d(source.targets, sources[split].targets)):
                raise DataError(
                    f"{unreadable([*bad.values()])}: without these files a class would have no images"
                )
            self.notes.append(
                f"data.on_bad_image=skip leaves out {count(len(bad), 'image')} of "
                f"{len(source.targets):,}: {some([source.name(i) for i in bad])}"
            )
        return sources

    def unreadable_in(self, source: Source) -> list[str]:
        assert isinstance(source, FileSource), "this module makes no other"
        return [*self._bad_lines(source).values()]

    def _bad_lines(self, source: FileSource) -> dict[int, str]:
        """What is wrong with each image that cannot be read."""
        with tqdm(
            total=len(source.targets), desc="reading", unit="image", leave=False, delay=1, disable=None
        ) as bar:

            def progress(done: int) -> None:
                bar.update(done)
                if self._should_stop():
                    raise KeyboardInterrupt  # the command knows which signal it was; nothing has begun yet

            paths = _Paths(source)
            bad = bad_files(paths, num_workers=self.num_workers, progress=progress)
        return {i: f"{paths[i]} {reason}" for i, reason in bad.items()}

    def bad_images(self, lines: list[str]) -> str:
        """All images that cannot be read, where one was met; see `ImageData.bad_images`.

        Not of more images than can be read while a user waits.
        """
        sources = {split: s for split, s in self.sources.items() if isinstance(s, FileSource)}
        if sum(len(source.targets) for source in sources.values()) > _MOST_READ_AGAIN:
            return f"{unreadable(lines)} (vit-data check {as_argument(self.root)} names all)"
        found = {split: self._bad_lines(source) for split, source in sources.items()}
        known = [line for bad in found.values() for line in bad.values()]
        # a transform may have failed on others, which can be read
        paths = [sources[split].name(i) for split, bad in found.items() for i in bad]
        others = [line for line in lines if not any(line.startswith(path) for path in paths)]
        if len(known) + len(others) == 1:
            return lines[0]
        advice = "repair or remove them"
        if self._training and len(found["train"]) <= _MOST_SKIPPED * len(sources["train"].targets):
            advice += ", or type data.on_bad_image=skip, which leaves out those of train"
        return f"{unreadable([*known, *others])}\n  {advice}"

    def sized(self, source: Readable, transform: SampleTransform | None) -> Readable:
        """Large JPEGs need not be read whole where the transform makes them small."""
        if not isinstance(source, FileSource):
            return source
        return replace(source, least_side=getattr(transform, "least_side", None))

    def decoded_pixels(self, source: Readable) -> int:
        """Of an average file, as far as `sized` lets it be read; from the headers of a few."""
        assert isinstance(source, FileSource), "this module makes no other"
        pixels = []
        for width, height, kind in _headers(source):
            reduced = 8 if kind in ("JPEG", "MPO") else 1
            while reduced > 1 and min(width, height) < reduced * (source.least_side or math.inf):
                reduced //= 2
            pixels.append(width * height // reduced**2)
        return sum(pixels) // max(len(pixels), 1)

    def plain_transform(self, found: Found) -> SampleTransform:  # noqa: ARG002 - files may have any size
        """Always a resize: only some of the files' sizes are known."""
        return plain(self.img_size, resize=self.resize)

    def _size_of(self, source: FileSource) -> int:
        sizes = {(width, height) for width, height, _ in _headers(source)}
        width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
        whole = width == height <= _STANDARD_SIZE
        side = width if whole else _STANDARD_SIZE
        why = (
            "the size of the files"
            if whole
            else "the files are larger than that, not square, or not all of one size"
        )
        img_size = -(-side // self.patch_size) * self.patch_size
        if img_size != side:
            why = f"{side} ({why}) is not a multiple of the model's patch of {self.patch_size}"
        self.notes.append(f"data.img_size={img_size}{', ' if img_size == width else ': '}{why}")
        return img_size


def _others(listing: Listing, what_of_it: str = "") -> str:
    """`2 files are not images by name (.txt)`, or nothing."""
    number = sum(listing.others.values())
    kinds = some([kind or "no suffix" for kind in listing.others])
    what = "1 file is not an image" if number == 1 else f"{number:,} files are not images"
    advice = "" if listing.others.keys().isdisjoint(HEIC) else f"; .heic {NOT_READ}"
    return f"{what} by name ({kinds}){what_of_it}{advice}" if number else ""


def _refuse_no_content(sources: Mapping[Split, FileSource]) -> None:
    """Known from the listing, so it need not wait until the file's turn comes in the middle of training."""
    bad = [(source, i) for source in sources.values() for i in np.flatnonzero(source.sizes <= 0).tolist()]
    if bad:
        what, it = ("1 image file has", "it") if len(bad) == 1 else (f"{len(bad):,} image files have", "them")
        named = some([source.name(i) for source, i in bad[:NAMED]], of=len(bad))
        raise DataError(
            f"{what} no content (empty, a link to nothing, a pipe): {named}: repair or remove {it}"
        )


def _headers(source: FileSource) -> list[tuple[int, int, str]]:
    """Width, height and format of a few files that can be opened, the same ones at every call."""
    headers = []
    for path in sample_of(_Paths(source)):
        with passing_over(), open_plain(path) as file, Image.open(file) as image:  # loaders name it
            headers.append((*image.size, str(image.format)))
    return headers


def sample_of(paths: Sequence[str]) -> list[str]:
    chosen = np.random.RandomState(_SAMPLE_SEED).permutation(len(paths))[:_NUM_HEADERS]
    return [paths[i] for i in chosen.tolist()]


class _Paths(Sequence[str]):
    """The paths of a source, made one at a time."""

    def __init__(self, source: FileSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.targets)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source.name(index)
