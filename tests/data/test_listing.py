"""Listing images, and the index of large folders: used while nothing has changed, else as if it were not there."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vit_train.data import ImageFolder, listing_index
from vit_train.data.listing import images_below, list_images
from vit_train.data.listing_index import listed

CLASSES = ("cat", "dog")


def plain(listing):
    return (
        [*listing.names],
        listing.sizes.tolist(),
        listing.counts.tolist(),
        listing.others,
        listing.links,
        listing.walked,
        listing.stamps.tolist(),
    )


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder that was made long enough ago, and counts as a large one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_index, "_WORTH_KEEPING", 4)
    monkeypatch.setattr(listing_index, "_TICK_NS", -1)  # every folder is old enough at once
    for name in CLASSES:
        (tmp_path / "photos" / name / "more").mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(bytes(i + 1))
        (tmp_path / "photos" / name / "more" / "9.png").write_bytes(b"12")
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("")
    (tmp_path / "photos" / "cat" / os.fsdecode(b"no\xfftext.png")).write_bytes(b"1")
    (tmp_path / "photos" / "cat" / "link").symlink_to(tmp_path, target_is_directory=True)
    return tmp_path / "photos"


def index_of(photos):
    return list((photos.parent / "cache").rglob("*.index"))


def test_what_is_listed(photos):
    listing = list_images(photos, ["dog", "cat"])
    dog = [f"dog/{name}" for name in ("0.png", "1.png", "2.png", "more/9.png")]
    cat = [
        f"cat/{name}" for name in ("0.png", "1.png", "2.png", "more/9.png", os.fsdecode(b"no\xfftext.png"))
    ]
    assert [*listing.names] == dog + cat
    assert listing.sizes.tolist() == [1, 2, 3, 2, 1, 2, 3, 2, 1]
    assert listing.counts.tolist() == [4, 5]
    assert (listing.others, listing.links) == ({".txt": 1}, ["cat/link"])
    assert sorted(listing.walked) == ["cat", "cat/more", "dog", "dog/more"]
    assert [f"cat/{name}" for name in images_below(photos / "cat")] == cat


def test_a_listing_is_kept_and_used(photos):
    fresh, index = listed(photos, CLASSES)
    assert index is None
    again, index = listed(photos, CLASSES)
    assert [index] == index_of(photos)
    assert plain(again) == plain(fresh)
    assert not list(photos.rglob("*.index"))


CHANGES = {
    "a file is added": lambda photos: (photos / "cat" / "new.png").write_bytes(b"1"),
    "a file is added below": lambda photos: (photos / "cat" / "more" / "new.png").write_bytes(b"1"),
    "a file is removed": lambda photos: (photos / "dog" / "1.png").unlink(),
    "a file is renamed": lambda photos: (photos / "dog" / "1.png").rename(photos / "dog" / "7.png"),
    "a folder is gone": lambda photos: shutil.rmtree(photos / "dog" / "more"),
    "a folder is another one": lambda photos: (
        shutil.copytree(photos / "dog", photos / "copy"),  # with its times
        (photos / "copy" / "1.png").rename(photos / "copy" / "7.png"),
        os.utime(photos / "copy", ns=((photos / "dog").stat().st_mtime_ns,) * 2),
        (photos / "dog").rename(photos.parent / "away"),
        (photos / "copy").rename(photos / "dog"),
    ),
    "a file is added and the time set back": lambda photos: (
        before := (photos / "dog").stat().st_mtime_ns,
        (photos / "dog" / "new.png").write_bytes(b"1"),
        os.utime(photos / "dog", ns=(before, before)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(photos, change):
    listed(photos, CLASSES)
    assert listed(photos, CLASSES)[1] is not None
    CHANGES[change](photos)
    after, index = listed(photos, CLASSES)
    assert index is None
    assert plain(after) == plain(list_images(photos, CLASSES))
    assert plain(listed(photos, CLASSES)[0]) == plain(after)


def test_other_folders_of_the_same_root_are_listed(photos):
    listed(photos, CLASSES)
    assert len(listed(photos, ["dog"])[0].names) == 4


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
    ),
    "text": lambda path: path.write_text("{}" * 100),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.with_name("other")), path.symlink_to(path.with_name("other"))),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_as_none(photos, damage):
    fresh, _ = listed(photos, CLASSES)
    DAMAGES[damage](*index_of(photos))
    again, index = listed(photos, CLASSES)
    assert index is None
    assert plain(again) == plain(fresh)


def test_the_index_of_another_root_is_not_used(photos):
    shutil.copytree(photos, photos.parent / "others", symlinks=True)
    (photos.parent / "others" / "cat" / "0.png").rename(photos.parent / "others" / "cat" / "7.png")
    listed(photos, CLASSES)
    (mine,) = index_of(photos)
    listed(photos.parent / "others", CLASSES)
    (theirs,) = set(index_of(photos)) - {mine}
    theirs.replace(mine)
    assert "cat/0.png" in listed(photos, CLASSES)[0].names


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_the_index_of_somebody_else_is_not_trusted(photos):
    listed(photos, CLASSES)
    os.chown(index_of(photos)[0], 12345, 12345)
    assert listed(photos, CLASSES)[1] is None


def test_without_a_cache_folder_there_is_no_index(photos, monkeypatch):
    (photos.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos.parent / "file"))
    assert len(listed(photos, CLASSES)[0].names) == len(listed(photos, CLASSES)[0].names) == 9


def test_a_folder_that_changed_just_now_is_not_kept(photos, monkeypatch):
    """A later change within the same tick of the clock would leave no trace."""
    monkeypatch.setattr(listing_index, "_TICK_NS", 2_000_000_000)
    listed(photos, CLASSES)
    assert index_of(photos) == []


def test_small_folders_and_empty_files_are_not_kept(photos, monkeypatch):
    (photos / "cat" / "0.png").write_bytes(b"")  # could be mended in place
    listed(photos, CLASSES)
    assert index_of(photos) == []
    (photos / "cat" / "0.png").write_bytes(b"1")
    monkeypatch.setattr(listing_index, "_WORTH_KEEPING", 10)
    listed(photos, CLASSES)
    assert index_of(photos) == []


def test_twenty_thousand_files_through_the_data_module(tmp_path, monkeypatch):
    """As a user meets it: nothing said the first time, the index named the second; equal data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        first = tmp_path / "photos" / name / "0.png"
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(first)
        for i in range(1, 10_001):
            os.link(first, tmp_path / "photos" / name / f"{i}.png")
    time.sleep(2.1)  # see _TICK_NS
    found = []
    for _ in range(2):
        data = ImageFolder(root=str(tmp_path / "photos"), num_workers=0, cache="none")
        data.setup(device=torch.device("cpu"), rank=0, world_size=1)
        found.append((data.fingerprint(), data.sizes, next(iter(data.loader("train"))).index.tolist()))
        found[-1] += ([note for note in data.notes if "listed before" in note],)
    index = next((tmp_path / "cache" / "vit-train").iterdir())
    assert found[0][:3] == found[1][:3]
    assert (found[0][3], found[1][3]) == ([], [f"20,002 files, listed before (index: {index})"])
