"""Image folders: layouts, class maps, sizes, and every line a wrong folder ends in."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vit_train.data import ImageFolder
from vit_train.errors import DataError


def write(path, *, size=(8, 8), mode="RGB", value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(value).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def fill(folder, classes, count=4, **options):
    for name in classes:
        for i in range(count):
            write(folder / name / f"{i}.png", value=i, **options)


def made(root, **options):
    data = ImageFolder(root=str(root), **{"num_workers": 0, "batch_size": 4, **options})
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    return data


def line_of(root, **options):
    with pytest.raises(DataError) as raised:
        made(root, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_all_three_splits(tmp_path):
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        fill(tmp_path / split, ["cat", "dog"], count)
    data = made(tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert data.sizes == {"train": 10, "val": 4, "test": 6}
    assert data.source("val", 3) == f"{tmp_path}/val/dog/1.png"
    assert data.class_counts == [5, 5]
    batches = list(data.loader("test"))
    assert torch.cat([b.targets for b in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "test/cat/1.png") as image:
        assert np.array_equal(np.asarray(image), batches[0].images[1].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_every_name_of_the_validation_folder(tmp_path, name):
    fill(tmp_path / "train", ["a", "b"])
    fill(tmp_path / name, ["a", "b"], 1)
    assert made(tmp_path).sizes == {"train": 8, "val": 2, "test": 0}


def test_a_flat_folder_is_split_stratified(tmp_path):
    fill(tmp_path, ["a", "b", "c"], 10)
    data = made(tmp_path, val_fraction=0.2)
    assert data.sizes == {"train": 24, "val": 6, "test": 0}
    assert np.bincount(data.sources["val"].targets).tolist() == [2, 2, 2]
    assert set(data.sources["train"].names).isdisjoint(data.sources["val"].names)
    assert any("no test split" in note for note in data.notes)
    assert data.fingerprint() == made(tmp_path, val_fraction=0.2, seed=4).fingerprint()


def test_a_relative_root(tmp_path, monkeypatch):
    fill(tmp_path, ["a", "b"])
    monkeypatch.chdir(tmp_path)
    data = made(".")
    assert sorted(data.sources["train"].names)[0].startswith("a/")
    assert len(list(data.loader("train"))) == 1
    assert data.fingerprint() == made(tmp_path).fingerprint()


def test_validation_classes_are_mapped_by_name(tmp_path):
    fill(tmp_path / "train", ["a", "b", "c"])
    fill(tmp_path / "val", ["c"], 2)
    (tmp_path / "val" / "b").mkdir()
    data = made(tmp_path)
    assert data.sources["val"].targets.tolist() == [2, 2]
    assert any("no validation image of a, b" in note for note in data.notes)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_does_not_have_is_named(tmp_path, split):
    fill(tmp_path / "train", ["cats", "dogs"])
    fill(tmp_path / split, ["cat"])
    assert line_of(tmp_path) == f"train has no class for {tmp_path}/{split}/cat; did you mean 'cats'?"


def test_a_class_of_one_image_stays_in_train_and_is_told(tmp_path):
    fill(tmp_path, ["a", "b"], 10)
    write(tmp_path / "rare" / "only.png")
    data = made(tmp_path)
    assert data.class_counts == [9, 9, 1]
    assert any("no validation image of rare" in note for note in data.notes)


def test_a_limit_keeps_the_classes_in_proportion(tmp_path):
    fill(tmp_path, ["a", "b", "c"], 10)
    assert made(tmp_path, limit=6).class_counts == [2, 2, 2]


def test_suffixes_nesting_and_what_is_skipped(tmp_path):
    fill(tmp_path, ["b"])
    write(tmp_path / "a" / "deep" / "er" / "x.JPG")
    for suffix in ("jpeg", "PNG", "bmp", "gif", "webp", "tif", "TIFF", "ppm"):
        write(tmp_path / "a" / f"x.{suffix}")
    for skipped in ("a/.hidden.png", "a/.ipynb_checkpoints/x.png", "a/__MACOSX/x.png", ".git/x.png"):
        write(tmp_path / skipped)
    write(tmp_path / "__MACOSX" / "x.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no image")
    data = made(tmp_path, val_fraction=0.0)
    assert data.class_names == ["a", "b"]
    assert [n for n in data.sources["train"].names if n.startswith("a/")] == sorted(
        [
            "a/deep/er/x.JPG",
            *(f"a/x.{s}" for s in ("jpeg", "PNG", "bmp", "gif", "webp", "tif", "TIFF", "ppm")),
        ]
    )
    assert sum(len(b.index) for b in data.loader("train")) == 12


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_a_link_that_forms_a_loop_is_not_followed(tmp_path):
    fill(tmp_path, ["a", "b"], 2)
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert made(tmp_path, val_fraction=0.0).sizes["train"] == 4


def test_a_linked_class_folder_is_read(tmp_path):
    fill(tmp_path / "elsewhere", ["b"])
    fill(tmp_path / "root", ["a"])
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere" / "b", target_is_directory=True)
    assert made(tmp_path / "root", val_fraction=0.0).class_counts == [4, 4]


def test_small_files_of_one_size_decide_the_image_size(tmp_path):
    fill(tmp_path, ["a", "b"], size=(48, 48))
    data = made(tmp_path)
    assert data.img_size == 48
    assert "data.img_size=48, the size of the files" in data.notes
    assert made(tmp_path, img_size=20).img_size == 20


@pytest.mark.parametrize(
    ("side", "patch", "img_size"),
    [
        *[(28, 16, 32), (50, 16, 64), (75, 16, 80), (100, 16, 112), (150, 16, 160), (200, 16, 208)],
        *[
            (48, 16, 48),
            (28, 4, 28),
            (30, 7, 35),
            (224, 15, 225),
            (240, 15, 225),
            (240, 14, 224),
            (9, 16, 16),
        ],
    ],
)
def test_the_size_is_one_the_model_can_cut_into_patches(tmp_path, side, patch, img_size):
    fill(tmp_path, ["a", "b"], size=(side, side))
    data = made(tmp_path, patch_size=patch)
    assert data.img_size == img_size
    assert next(iter(data.loader("train"))).images.shape[-2:] == (img_size, img_size)
    (note,) = [note for note in data.notes if note.startswith(f"data.img_size={img_size}")]
    assert (f"is not a multiple of the model's patch of {patch}" in note) == (img_size not in (side, 224))
    assert made(tmp_path, patch_size=patch, img_size=side).img_size == side, "a typed size stays"


@pytest.mark.parametrize("odd", [(9, 9), (8, 9)])
def test_mixed_sizes_mean_224(tmp_path, odd):
    fill(tmp_path, ["a", "b"])
    write(tmp_path / "a" / "odd.png", size=odd)
    data = made(tmp_path)
    assert data.img_size == 224
    assert any(note.startswith("data.img_size=224:") for note in data.notes)


@pytest.mark.parametrize("size", [(240, 240), (40, 30)])
def test_large_or_oblong_files_mean_224(tmp_path, size):
    fill(tmp_path, ["a", "b"], 1, size=size)
    assert made(tmp_path).img_size == 224


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_mode_is_converted(tmp_path, mode, in_channels):
    fill(tmp_path, ["a", "b"], 2, mode=mode)
    data = made(tmp_path, in_channels=in_channels, val_fraction=0.0)
    assert next(iter(data.loader("train"))).images.shape == (4, in_channels, 8, 8)


def test_grey_normalisation_is_the_mean_of_imagenets(tmp_path):
    fill(tmp_path, ["a", "b"])
    assert made(tmp_path).mean == (0.485, 0.456, 0.406)
    assert made(tmp_path, in_channels=1).mean == (pytest.approx(0.449),)
    assert made(tmp_path, in_channels=1).std == (pytest.approx(0.226),)


def test_crop_keeps_the_centre_and_squash_keeps_everything(tmp_path):
    for name in ("a", "b"):
        stripes = np.zeros((32, 96, 3), dtype=np.uint8)
        stripes[:, 32:64] = 255  # white in the middle third
        (tmp_path / name).mkdir()
        Image.fromarray(stripes).save(tmp_path / name / "0.png")
    crop = next(iter(made(tmp_path, img_size=32, val_fraction=0.0).loader("train"))).images
    assert crop.min() == 255
    squash = next(iter(made(tmp_path, img_size=32, val_fraction=0.0, resize="squash").loader("train"))).images
    assert squash[:, :, :, 0].max() == 0
    assert squash[:, :, :, 16].min() == 255


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_off_jpeg_is_named_though_its_header_is_whole(tmp_path, capfd, num_workers, share):
    fill(tmp_path, ["a", "b"], size=(64, 64))
    path = tmp_path / "a" / "cut.jpg"
    write(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with Image.open(path) as image:
        assert image.size == (64, 64)
    data = made(tmp_path, num_workers=num_workers, val_fraction=0.0, batch_size=9, cache="none")
    with pytest.raises(DataError, match=rf"^{path} cannot be read \(.+\); repair or remove it$"):
        list(data.loader("train"))
    data.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_is_no_image_or_is_gone_is_named(tmp_path):
    fill(tmp_path, ["a", "b"])
    (tmp_path / "a" / "text.png").write_text("not an image")
    data = made(tmp_path, val_fraction=0.0, batch_size=9, cache="none")
    with pytest.raises(DataError, match=r"a/text.png is not an image Pillow can read"):
        list(data.loader("train"))
    (tmp_path / "a" / "text.png").unlink()
    with pytest.raises(DataError, match=r"a/text.png does not exist"):
        list(data.loader("train"))


def test_the_fingerprint_follows_names_and_sizes_but_not_the_place(tmp_path):
    fill(tmp_path / "one", ["a", "b"])
    before = made(tmp_path / "one").fingerprint()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert made(tmp_path / "two").fingerprint() == before
    with (tmp_path / "two" / "a" / "0.png").open("ab") as file:
        file.write(b"x")
    assert made(tmp_path / "two").fingerprint() != before
    write(tmp_path / "one" / "a" / "new.png")
    assert made(tmp_path / "one").fingerprint() != before


def test_the_fingerprint_is_what_stored_runs_hold(tmp_path):
    """Its definition, spelled out: a run of an earlier version must find its data unchanged."""
    fill(tmp_path / "train", ["b", "a"], 3)
    fill(tmp_path / "val", ["a"], 1)
    write(tmp_path / "train" / "a" / "0" / "deep.png")
    digest = hashlib.sha256(b'["a", "b"]')
    for split in ("train", "val"):
        digest.update(f"\0{split}\0".encode())
        for label in ("a", "b"):
            below = tmp_path / split / label
            for name in sorted(str(path.relative_to(tmp_path)) for path in below.rglob("*.png")):
                digest.update(f"{name}\0{(tmp_path / name).stat().st_size}\0".encode())
    assert made(tmp_path).fingerprint() == digest.hexdigest()


def test_root_not_set():
    with pytest.raises(DataError, match=r"data\.root is not set: type data.root=/path/to/your/folder"):
        ImageFolder().setup(device=torch.device("cpu"), rank=0, world_size=1)


def test_missing_root_suggests_a_neighbour(tmp_path):
    (tmp_path / "flowers").mkdir()
    expected = f"data.root={tmp_path}/flower does not exist; did you mean 'flowers'?"
    assert line_of(tmp_path / "flower") == expected
    assert line_of(tmp_path / "x" / "y") == f"data.root={tmp_path}/x/y does not exist"


def test_root_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is not a folder: type the folder" in line_of(tmp_path / "file")


def test_empty_root(tmp_path):
    expected = "expected <class>/<image> or train/<class>/<image> in it"
    assert line_of(tmp_path) == f"{tmp_path} holds no folders: {expected}"
    write(tmp_path / "loose.png")
    assert line_of(tmp_path).startswith(f"{tmp_path} holds 1 image but no class folders: {expected}")


def test_train_without_classes(tmp_path):
    write(tmp_path / "train" / "loose.png")
    assert f"{tmp_path}/train holds 1 image but no class folders" in line_of(tmp_path)
    (tmp_path / "train" / "loose.png").unlink()
    assert f"{tmp_path}/train holds no class folders" in line_of(tmp_path)


def test_splits_without_train(tmp_path):
    fill(tmp_path / "val", ["a", "b"])
    fill(tmp_path / "test", ["a", "b"])
    assert "holds test and val but no train/" in line_of(tmp_path)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_does_with_any_one_split(tmp_path, split):
    fill(tmp_path / split, ["b"])
    (tmp_path / split / "a").mkdir()
    data = ImageFolder(root=str(tmp_path), num_workers=0, val_fraction=0)
    data.setup(device=torch.device("cpu"), rank=0, world_size=1, training=False)
    assert [name for name, size in data.sizes.items() if size] == [split]
    assert data.class_names == ["a", "b"]
    assert set(data.sources[split].targets.tolist()) == {1}


def test_one_class_only(tmp_path):
    fill(tmp_path / "train", ["a"])
    assert f"{tmp_path}/train holds one class only (a)" in line_of(tmp_path)


def test_a_class_without_images(tmp_path):
    fill(tmp_path, ["a", "b"])
    (tmp_path / "c").mkdir()
    assert f"{tmp_path}/c holds no images (.jpg" in line_of(tmp_path)


def test_an_empty_validation_folder(tmp_path):
    fill(tmp_path / "train", ["a", "b"])
    (tmp_path / "val").mkdir()
    assert f"{tmp_path}/val holds no images" in line_of(tmp_path)


def test_two_validation_folders(tmp_path):
    for split in ("train", "val", "valid"):
        fill(tmp_path / split, ["a", "b"])
    assert "holds val and valid, and both names mean the validation split: keep only one of them" in line_of(
        tmp_path
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed(tmp_path):
    fill(tmp_path, ["a", "b"])
    (tmp_path / "a").chmod(0)
    try:
        assert f"{tmp_path}/a cannot be listed (Permission denied)" in line_of(tmp_path)
    finally:
        (tmp_path / "a").chmod(0o755)


def test_num_classes_that_do_not_fit(tmp_path):
    fill(tmp_path, ["a", "b"])
    assert line_of(tmp_path, num_classes=3).startswith(f"data.num_classes=3, but {tmp_path} has 2")
