"""Mean and std of a folder: those that numpy finds in the very pixels training gets."""

import numpy as np
import pytest
import torch
from PIL import Image

from vit_train.data import ImageFolder
from vit_train.data.transforms.stats import channel_stats
from vit_train.errors import DataError


def folder(root, count=12):
    random = np.random.RandomState(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(count):
            size = (20 + i, 30 + 3 * (i % 4), 3)
            pixels = random.randint(0, 256, size, dtype=np.uint8) // (1 + i % 3)
            Image.fromarray(pixels).save(root / label / f"{i}.png")


def made(root, **options):
    data = ImageFolder(root=str(root), **{"num_workers": 0, "cache": "none", "batch_size": 7, **options})
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    return data


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_they_are_numpys(tmp_path, num_workers, in_channels, resize):
    folder(tmp_path)
    data = made(tmp_path, in_channels=in_channels, resize=resize, num_workers=num_workers, img_size=24)
    done = []
    found = channel_stats(data, "train", progress=done.append)
    data.close()
    assert found.num_images == data.sizes["train"] == sum(done) == 22  # two are held out
    pixels = data.pick("train", range(22)).images.numpy() / 255
    assert np.abs(np.array(found.mean) - pixels.mean(axis=(0, 2, 3))).max() < 1e-9
    assert np.abs(np.array(found.std) - pixels.std(axis=(0, 2, 3))).max() < 1e-9


def test_one_colour_has_no_spread(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8), (255, 51, 0)).save(tmp_path / label / "0.png")
    found = channel_stats(made(tmp_path), "train")
    assert found.mean == (1.0, 0.2, 0.0)
    assert found.std == (0.0, 0.0, 0.0)


def test_a_damaged_file_is_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "a" / "bad.png").write_text("no image")
    with pytest.raises(DataError, match=r"a/bad.png is not an image"):
        channel_stats(made(tmp_path, img_size=8, val_fraction=0.0), "train")
