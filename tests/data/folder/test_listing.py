"""Listing images."""

import os

import pytest
import torch

from vit_train.data import ImageFolder
from vit_train.data.folder.listing import images_below, list_images


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name / "more").mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(bytes(i + 1))
        (tmp_path / "photos" / name / "more" / "9.png").write_bytes(b"12")
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("")
    (tmp_path / "photos" / "cat" / os.fsdecode(b"no\xfftext.png")).write_bytes(b"1")
    (tmp_path / "photos" / "cat" / "link").symlink_to(tmp_path, target_is_directory=True)
    return tmp_path / "photos"


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
    assert [f"cat/{name}" for name in images_below(photos / "cat")] == cat


def test_a_file_overwritten_in_place_is_other_data(photos):
    """Nothing about its folder changes."""

    def fingerprint():
        data = ImageFolder(root=str(photos), img_size=8, num_workers=0, cache="none")
        data.setup(device=torch.device("cpu"), rank=0, world_size=1)
        return data.fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    with (photos / "dog" / "1.png").open("r+b") as file:
        file.write(b"12345")
    assert fingerprint() != before
