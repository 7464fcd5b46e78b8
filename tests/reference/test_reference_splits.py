"""Which images are held out or left out, where the data changes: one file added or taken away moves at most one other.

The reference is a formula written out here: shares rounded per class, and Adams' method of apportionment.
"""

from __future__ import annotations

import heapq
import io
import math
import shutil
import unicodedata
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_train.data import Found, ImageData, ImageFolder
from vit_train.data.loading.array_source import ArraySource

PLACES = {"flat": "", "split": "train"}
FRACTIONS = ("0.001", "0.05", "0.1", "0.125", "0.25", "0.29", "0.3", "0.5", "0.7", "0.99")


def one_pixel() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    return file.getvalue()


PIXEL = one_pixel()


class Arrays(ImageData):
    """Classes 0, 1 ... of so many images, mixed up in the file; `extra` is one image more at its end."""

    default_mean, default_std = (0.5,), (0.5,)

    def __init__(self, counts, *, extra=(), **options):
        defaults = {
            "batch_size": 1,
            "num_workers": 0,
            "img_size": 1,
            "in_channels": 1,
            "val_fraction": 0.0,
            "limit": None,
            "cache": "none",
            "seed": 0,
            "mean": None,
            "std": None,
            "num_classes": None,
            "sample_transform": None,
        }
        super().__init__(**{**defaults, **options})
        targets = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
        self.all_targets = np.concatenate([targets, np.array(extra, dtype=np.int64)])

    def load(self):
        num = len(self.all_targets)
        pixels = torch.zeros(num, 1, 1, 1, dtype=torch.uint8)
        source = ArraySource(pixels, self.all_targets, "arrays", np.arange(num))
        return Found("arrays", [f"{i:03}" for i in range(self.all_targets.max() + 1)], {"train": source}, 1)


def set_up(data):
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    return data


def in_arrays(counts, **options):
    """Split -> {(class id, position in the file)}."""
    data = set_up(Arrays(counts, **options))
    return {
        split: {*zip(source.targets.tolist(), source.ids.tolist())} for split, source in data.sources.items()
    }


def in_folder(root, *, place="", **options):
    """Split -> {(class, path in its folder, composed)}."""
    data = set_up(
        ImageFolder(root=str(root), img_size=1, num_workers=0, batch_size=1, cache="none", **options)
    )
    found = {}
    for split in ("train", "val"):
        paths = (data.source(split, i).removeprefix(f"{root / place}/") for i in range(data.sizes[split]))
        found[split] = {tuple(unicodedata.normalize("NFC", path).split("/", 1)) for path in paths}
    return found


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PIXEL)


def name_of(i, kind):
    """Some images lie in folders of their own, some names are not ASCII."""
    names = ("img_{}.png", "Gr\u00f6\u00dfe \u00e9 {}.png", "2021/{}.png", "\u00e9t\u00e9/{}.png")
    return unicodedata.normalize(kind, names[i % 4].format(i))


def fill(folder, counts, kind="NFC"):
    for label, count in enumerate(counts):
        for i in range(count):
            write(folder / f"{label:03}" / name_of(i, kind))


def changed_sides(before, after):
    """Images of both that went from train to val or back."""
    return (before["train"] & after.get("val", set())) | (before.get("val", set()) & after["train"])


def entered_and_left(before, after):
    """Split -> what came into it and what went out of it."""
    return {split: (after[split] - before[split], before[split] - after[split]) for split in before}


def counts_in(images, num_classes):
    return np.bincount([int(label) for label, _ in images], minlength=num_classes).tolist()


def rounded(fraction, count):
    return math.floor(Fraction(fraction) * count + Fraction(1, 2))


def held_out(fraction, count):
    return min(max(rounded(fraction, count), 1), count - 1)


def kept(fraction, count):
    return max(rounded(fraction, count), 1)


def adams(counts, limit):
    """Seats one after another, each to the class with the most images per seat it has; the first of equals."""
    seats = [0] * len(counts)
    queue = [(Fraction(0), i) for i in range(len(counts))]
    while sum(seats) < min(limit, sum(counts)):
        _, i = heapq.heappop(queue)
        seats[i] += 1
        if seats[i] < counts[i]:
            heapq.heappush(queue, (Fraction(seats[i], counts[i]), i))
    return seats


@pytest.fixture(params=PLACES)
def thousand(request, tmp_path):
    """A folder of 1,000 files in four classes, and where its class folders lie."""
    place = PLACES[request.param]
    fill(tmp_path / "root" / place, (500, 300, 149, 51))
    return tmp_path / "root", place


def draws(root, place, num=50, **options):
    """Before and after a change of one file, and its class: added in even draws, taken away in odd ones."""
    random = np.random.RandomState(7)
    before = in_folder(root, place=place, **options)
    for draw in range(num):
        label = f"{random.randint(4):03}"
        if draw % 2:
            files = sorted(path for path in (root / place / label).rglob("*.png") if path.is_file())
            path = files[random.randint(len(files))]
            path.unlink()
        else:
            path = root / place / label / f"{random.randint(10**9)}.png"
            write(path)
        after = in_folder(root, place=place, **options)
        yield before, after, label
        before = after


def test_one_file_of_a_thousand_moves_at_most_one_other(thousand):
    moved = []
    for before, after, label in draws(*thousand, val_fraction=0.1):
        moved.append(changed_sides(before, after))
        assert len(moved[-1]) <= 1
        assert all(name == label for name, _ in moved[-1])
    assert any(moved), "no draw could fail"


@pytest.mark.parametrize(
    "options",
    [
        {"train_fraction": 0.3, "val_fraction": 0.1},
        {"limit": 77, "val_fraction": 0.1},
        {"limit": 200, "val_fraction": 0.3, "train_fraction": 0.5},
    ],
    ids=lambda options: " ".join(options),
)
def test_one_file_of_a_thousand_brings_at_most_one_in_and_one_out(thousand, options):
    for before, after, label in draws(*thousand, num=20, **options):
        assert len(changed_sides(before, after)) <= 1
        for entered, left in entered_and_left(before, after).values():
            assert len(entered) <= 1
            assert len(left) <= 1
            assert "limit" in options or {name for name, _ in entered | left} <= {label}


@settings(max_examples=100)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    label=st.integers(0, 8),
    val=st.sampled_from(("0", *FRACTIONS)),
    train=st.sampled_from((*FRACTIONS, "1")),
    more=st.integers(0, 60),
    limited=st.booleans(),
)
def test_one_image_more_in_an_array(counts, label, val, train, more, limited):
    extra = min(label, len(counts) - 1)
    options = {"val_fraction": float(val), "train_fraction": float(train)}
    if limited:
        options["limit"] = len(counts) + more
    before = in_arrays(counts, **options)
    after = in_arrays(counts, extra=(extra,), **options)
    moved = changed_sides(before, after)
    assert len(moved) <= 1
    assert {name for name, _ in moved} <= {extra}
    for entered, left in entered_and_left(before, {"val": set(), **after}).values():
        assert len(entered) <= 1
        assert len(left) <= 1


@settings(max_examples=100)
@given(
    counts=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 300)), min_size=1, max_size=9),
    val=st.sampled_from(FRACTIONS),
    train=st.sampled_from((*FRACTIONS, "1")),
    more=st.one_of(st.none(), st.integers(0, 400)),
)
def test_sizes_are_shares_rounded_per_class(counts, val, train, more):
    num_classes = len(counts)
    limit = None if more is None else num_classes + more
    found = in_arrays(counts, val_fraction=float(val), train_fraction=float(train), limit=limit)
    held = [held_out(val, count) for count in counts]
    trained = [count - out for count, out in zip(counts, held)]
    if train != "1":
        trained = [kept(train, count) for count in trained]
    if limit is not None:
        present = [i for i, out in enumerate(held) if out]
        seats = adams([held[i] for i in present], limit)
        held = [seats[present.index(i)] if i in present else 0 for i in range(num_classes)]
        trained = adams(trained, limit)
    assert counts_in(found["train"], num_classes) == trained
    assert counts_in(found.get("val", ()), num_classes) == held
    assert found["train"].isdisjoint(found.get("val", ()))


@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=9), val=st.sampled_from(FRACTIONS))
def test_every_class_gives_its_share_within_one_image(counts, val):
    found = in_arrays(counts, val_fraction=float(val))
    for count, out in zip(counts, counts_in(found.get("val", ()), len(counts))):
        assert abs(out - Fraction(val) * count) <= 1


@settings(max_examples=20)
@given(
    counts=st.lists(st.integers(1, 14), min_size=2, max_size=5),
    options=st.sampled_from(
        (
            {"val_fraction": 0.3},
            {"val_fraction": 0.2, "train_fraction": 0.4},
            {"val_fraction": 0.1, "limit": 9},
        )
    ),
)
def test_the_place_of_a_folder_and_the_form_of_its_names_change_nothing(counts, options, tmp_path):
    made = []
    for name, place, kind in (
        ("one", "", "NFC"),
        ("renamed", "", "NFC"),
        ("one with train", "train", "NFC"),
        ("of a Mac", "", "NFD"),
        ("of a Mac, with train", "train", "NFD"),
    ):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        fill(tmp_path / name / place, counts, kind)
        made.append(in_folder(tmp_path / name, place=place, **options))
    assert all(found == made[0] for found in made)


def test_what_is_held_out_looks_drawn_by_chance():
    """Not the first images of the file: of 100 stretches of it, each gives about a tenth."""
    found = in_arrays((10_000,), val_fraction=0.1)
    per_stretch = np.bincount([i // 100 for _, i in found["val"]], minlength=100)
    assert (per_stretch.mean(), per_stretch.min() >= 1, per_stretch.max() <= 22) == (10, True, True)
    assert 2 < per_stretch.std() < 4  # sqrt(100 x 0.1 x 0.9) is 3
