"""Folders as people have them: each broken shape ends in one clear line, each odd one in the right result."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, checkpoint_hashes, vit_train_here
from odd_images import heic
from PIL import Image

from vit_train.data import ImageFolder
from vit_train.data.folder.check import check_folder
from vit_train.errors import DataError
from vit_train.inference.images import find_images

SETTINGS = (
    *(setting for setting in TINY if not setting.startswith("data.limit")),
    *("data=imagefolder", "data.root=photos", "data.in_channels=1", "model=vit_digits", "run_dir=run"),
)


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(value).randint(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def fill(folder, *classes, count=4):
    for name in classes:
        for i in range(count):
            write(folder / name / f"{i}.png", i)


def splits(root, *names, classes=("cat", "dog")):
    for name in names:
        fill(root / name, *classes)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


# ----------------------------------------------------------------------------------------- shapes that are errors
def an_empty_class(root):
    splits(root, "train")
    (root / "train" / "empty").mkdir()


def several_empty_classes(root):
    splits(root, "train")
    for i in range(7):
        (root / "train" / f"empty{i}").mkdir()


def a_class_of_heic_only(root):
    splits(root, "train")
    for i in range(3):
        (root / "train" / "fox").mkdir(exist_ok=True)
        (root / "train" / "fox" / f"{i}.HEIC").write_bytes(b"x")


def a_phone_s_picture_named_jpg(root):
    splits(root, "train")
    (root / "train" / "cat" / "IMG_1.jpg").write_bytes(heic())


def a_class_in_capitals_in_val(root):
    splits(root, "train", "val")
    (root / "val" / "cat").rename(root / "val" / "CAT")


def a_class_that_train_does_not_have(root):
    splits(root, "train", "val")
    fill(root / "val", "fox")


def some_classes_of_test_that_train_does_not_have(root):
    splits(root, "train", "test")
    fill(root / "test", "unknown")


def classes_of_test_in_capitals(root):
    splits(root, "train")
    splits(root, "test", classes=("CAT", "DOG"))


def val_without_labels(root):
    splits(root, "train")
    fill(root / "val", "unknown")


def images_in_val_and_no_class_folders(root):
    splits(root, "train")
    write(root / "val" / "0.png")


def a_class_that_is_a_link_to_its_parent(root):
    splits(root, "train")
    link(root / "train" / "loop", root / "train")


def a_class_that_is_a_link_to_the_root(root):
    splits(root, "train")
    link(root / "train" / "loop", "../..")


def a_class_that_is_a_link_to_itself(root):
    splits(root, "train")
    link(root / "train" / "loop", "loop")


def a_class_that_is_a_link_to_another(root):
    splits(root, "train")
    link(root / "train" / "kitten", "cat")


def a_class_that_is_a_link_into_another(root):
    splits(root, "train")
    fill(root / "train" / "cat", "small")
    link(root / "train" / "kitten", "cat/small")


def a_class_that_is_a_link_to_nothing(root):
    splits(root, "train")
    link(root / "train" / "fox", "/nowhere/fox")


def one_class_only(root):
    splits(root, "train", classes=["cat"])


def one_image_in_all(root):
    write(root / "cat" / "1.png")


def images_and_no_class_folders(root):
    for i in range(3):
        write(root / f"{i}.png")


def images_in_train_and_no_class_folders(root):
    for i in range(3):
        write(root / "train" / f"{i}.png")


def splits_by_other_names(root):
    splits(root, "training", "testing")


def a_split_beside_class_folders(root):
    fill(root, "cat", "dog")
    splits(root, "val")


def splits_in_capitals_beside_something(root):
    splits(root, "Train", "Test")
    (root / "annotations").mkdir()


def the_same_split_twice(root):
    splits(root, "train", "val", "valid")


def train_twice(root):
    splits(root, "train", "Train")


def no_train(root):
    splits(root, "val", "test")


def an_empty_val(root):
    splits(root, "train")
    (root / "val").mkdir()


def an_empty_test(root):
    splits(root, "train")
    (root / "test" / "cat").mkdir(parents=True)


def one_empty_file(root):
    splits(root, "train")
    (root / "train" / "cat" / "2.png").write_bytes(b"")


def empty_files_and_broken_links(root):
    splits(root, "train", "val")
    for i in range(6):
        (root / "train" / "cat" / f"empty{i}.jpg").write_bytes(b"")
    (root / "val" / "dog" / "gone.jpg").symlink_to("/nowhere/1.jpg")


def a_pipe_among_the_images(root):
    splits(root, "train")
    os.mkfifo(root / "train" / "cat" / "pipe.jpg")


def a_file(root):
    root.write_text("")


def an_archive(root):
    root.with_suffix(".zip").write_bytes(b"PK")


def missing(root):
    (root.parent / "photo").mkdir()


def a_link_to_nothing(root):
    root.symlink_to("/nowhere/photos")


def checked(root):
    return check_folder(str(root), num_workers=0)


ERRORS = {
    an_empty_class: ["photos/train/empty holds no images (.jpg ", "fill it or remove it"],
    several_empty_classes: ["photos/train/empty0, photos/train/empty1,", "empty4 and 2 more hold no images"],
    a_class_of_heic_only: [
        "photos/train/fox holds no images",
        "; 3 files are not images by name (.heic); .heic is HEIC, which is not read: convert it to JPEG\n",
    ],
    a_phone_s_picture_named_jpg: [
        "photos/train/cat/IMG_1.jpg is HEIC, which is not read: convert it to JPEG"
    ],
    a_class_in_capitals_in_val: ["train has no class for photos/val/CAT; did you mean 'cat'?"],
    a_class_that_train_does_not_have: [
        "train has no class for photos/val/fox: rename it, or move it elsewhere"
    ],
    some_classes_of_test_that_train_does_not_have: ["train has no class for photos/test/unknown: rename it"],
    classes_of_test_in_capitals: ["train has no class for photos/test/CAT; did you mean 'cat'?"],
    val_without_labels: ["train has no class for photos/val/unknown: rename it, or move it elsewhere"],
    images_in_val_and_no_class_folders: [
        "photos/val holds 1 image but no class folders: expected photos/val/<class>/<image>, or the images "
        "elsewhere: images without labels are for vit-predict RUN photos/val\n"
    ],
    a_class_that_is_a_link_to_its_parent: [
        "photos/train/loop is a link to ",
        "a folder that contains the link: remove the link",
    ],
    a_class_that_is_a_link_to_the_root: [
        "photos/train/loop is a link to ",
        "a folder that contains the link: remove the link",
    ],
    a_class_that_is_a_link_to_itself: ["photos/train/loop is a link to nothing: repair or remove it"],
    a_class_that_is_a_link_to_another: ["photos/train/cat and photos/train/kitten are the same folder"],
    a_class_that_is_a_link_into_another: ["photos/train/kitten lies in photos/train/cat", "two classes"],
    a_class_that_is_a_link_to_nothing: ["photos/train/fox is a link to nothing: repair or remove it"],
    one_class_only: ["photos/train holds one class only (cat): training needs two or more class folders"],
    one_image_in_all: ["photos holds one class only (cat)"],
    images_and_no_class_folders: [
        "photos holds 3 images but no class folders",
        "expected <class>/<image>",
        "move the images of each class into a folder of its own",
    ],
    images_in_train_and_no_class_folders: [
        "photos/train holds 3 images but no class folders: expected photos/train/<class>/<image>"
    ],
    splits_by_other_names: [
        "photos holds testing, training, which would become classes",
        "name the splits train, val and test",
    ],
    a_split_beside_class_folders: ["photos holds val beside cat, dog, which would become", "into train/"],
    splits_in_capitals_beside_something: ["photos holds Test, Train beside annotations, which would become"],
    the_same_split_twice: [
        "photos holds val and valid, and both names mean the validation split: keep only one of them"
    ],
    train_twice: [
        "photos holds Train and train, and both names mean the training split: keep only one of them"
    ],
    no_train: ["photos holds test and val but no train/: put the training images there"],
    an_empty_val: ["photos/val holds no images", "fill it or remove it"],
    an_empty_test: ["photos/test holds no images", "fill it or remove it"],
    one_empty_file: ["1 image file has no content", "photos/train/cat/2.png: repair or remove it"],
    empty_files_and_broken_links: [
        "7 image files have no content",
        "photos/train/cat/empty0.jpg, ",
        "empty4.jpg and 2 more: repair or remove them",
    ],
    a_pipe_among_the_images: ["1 image file has no content", "photos/train/cat/pipe.jpg"],
    a_file: ["data.root=photos is not a folder: type the folder that holds the class folders"],
    an_archive: ["data.root=photos.zip is an archive: unpack it"],
    missing: ["data.root=photos does not exist; did you mean 'photo'?"],
    a_link_to_nothing: ["data.root=photos is a link to /nowhere/photos, which does not exist"],
}


@pytest.mark.parametrize("shape", ERRORS, ids=lambda shape: shape.__name__)
def test_an_error(tmp_path, shape):
    shape(tmp_path / "photos")
    root = ("data.root=photos.zip",) if shape is an_archive else ()
    done = vit_train_here(*SETTINGS, *root, cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("vit-train: error: ")
    assert done.err.count("\n") == 1
    for words in ERRORS[shape]:
        assert words in done.err
    assert not (tmp_path / "run").exists()
    if (tmp_path / "photos").is_dir():
        assert checked(tmp_path / "photos").problems


def test_the_root_is_not_set(tmp_path):
    done = vit_train_here(*SETTINGS, "data.root=null", cwd=tmp_path)
    assert (done.code, done.err) == (
        3,
        "vit-train: error: data.root is not set: type data.root=/path/to/your/folder\n",
    )


# --------------------------------------------------------------------------------------- shapes that are results
def made(root, **options):
    usual = {"num_workers": 0, "batch_size": 4, "cache": "none", "patch_size": 16}
    data = ImageFolder(root=str(root), **usual | options)
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    report = checked(root)
    assert report.problems == []
    assert {*data.notes} & {*report.notes} or not data.notes
    return data


def note_with(data, words):
    return [note for note in data.notes if words in note]


def test_val_without_a_class_that_train_has(tmp_path):
    splits(tmp_path, "train", "val")
    fill(tmp_path / "train", "ape")
    data = made(tmp_path)
    assert data.sources["val"].targets.tolist() == [1] * 4 + [2] * 4
    assert note_with(data, "no validation image of ape")


def test_val_made_in_another_order(tmp_path):
    fill(tmp_path / "train", "ape", "bee", "cat")
    fill(tmp_path / "val", "cat", count=1)
    fill(tmp_path / "val", "ape", count=3)
    fill(tmp_path / "val", "bee", count=2)
    data = made(tmp_path)
    assert data.sources["val"].targets.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.source("val", 5) == f"{tmp_path}/val/cat/0.png"


def test_images_in_folders_inside_a_class(tmp_path):
    fill(tmp_path, "cat", "dog")
    fill(tmp_path / "cat", "2024/may", "2025")
    assert made(tmp_path, val_fraction=0).class_counts == [12, 4]


def test_a_loop_inside_a_class_is_not_followed_and_told(tmp_path):
    splits(tmp_path, "train")
    link(tmp_path / "train" / "cat" / "loop", tmp_path / "train" / "cat")
    data = made(tmp_path, val_fraction=0)
    assert data.class_counts == [4, 4]
    assert note_with(data, "linked folders inside class folders are not followed: train/cat/loop")


def test_classes_and_splits_that_are_links_to_elsewhere(tmp_path):
    fill(tmp_path / "elsewhere", "a", "b")
    fill(tmp_path / "more" / "val", "cat", "dog", count=2)
    link(tmp_path / "photos" / "train" / "cat", tmp_path / "elsewhere" / "a")
    link(tmp_path / "photos" / "train" / "dog", tmp_path / "elsewhere" / "b")
    link(tmp_path / "photos" / "val", tmp_path / "more" / "val")
    assert made(tmp_path / "photos").sizes == {"train": 8, "val": 4, "test": 0}


def test_one_image_in_each_class(tmp_path):
    fill(tmp_path, "cat", "dog", count=1)
    data = made(tmp_path)
    assert (data.class_counts, data.sizes["val"]) == ([1, 1], 0)
    assert note_with(data, "no validation split")
    assert len(list(data.loader("train"))) == 1


def test_images_beside_class_folders_are_told(tmp_path):
    splits(tmp_path, "train", "val")
    for i in range(3):
        write(tmp_path / "train" / f"{i}.png")
    data = made(tmp_path)
    assert data.sizes == {"train": 8, "val": 8, "test": 0}
    assert f"3 images directly in {tmp_path}/train, in no class folder: ignored" in data.notes


def test_splits_in_capitals_are_understood(tmp_path):
    splits(tmp_path, "Train", "VAL", "Test")
    data = made(tmp_path)
    assert data.sizes == {"train": 8, "val": 8, "test": 8}
    assert data.class_names == ["cat", "dog"]
    assert data.source("val", 0) == f"{tmp_path}/VAL/cat/0.png"


def test_a_class_may_be_named_like_a_split(tmp_path):
    fill(tmp_path, "Bus", "Car", "Train")
    assert made(tmp_path).class_names == ["Bus", "Car", "Train"]
    fill(tmp_path / "parts", "valid", "invalid")
    assert made(tmp_path / "parts").class_names == ["invalid", "valid"]


def test_folders_that_are_no_split_are_told(tmp_path):
    splits(tmp_path, "train", "val")
    (tmp_path / "annotations").mkdir()
    assert note_with(made(tmp_path), "ignored, not the name of a split: annotations/")


# as Synology, QNAP, Windows, ext4, macOS, image viewers and Jupyter name them
LEFT_BEHIND = (
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "$RECYCLE.BIN", "$Recycle.Bin"),
    *("System Volume Information", "lost+found", "__MACOSX", "Network Trash Folder", ".thumbnails"),
    ".ipynb_checkpoints",
)


def test_what_systems_leave_behind_is_not_even_counted(tmp_path):
    splits(tmp_path, "train", "val")
    (tmp_path / "train" / "empty").mkdir()
    for folder in ("", "train", "train/cat"):
        for name in ("._x.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (tmp_path / folder / name).write_bytes(b"")
        for name in LEFT_BEHIND:
            write(tmp_path / folder / name / "x.png" / "SYNOPHOTO_THUMB_XL.jpg")
    (tmp_path / "train" / "empty").rmdir()
    data = made(tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert data.sizes == {"train": 8, "val": 8, "test": 0}
    assert not note_with(data, "ignored")
    assert find_images([str(tmp_path)], stdin=(), allow_url=False) == sorted(
        f"{tmp_path}/{split}/{name}/{i}.png"
        for split in ("train", "val")
        for name in ("cat", "dog")
        for i in range(4)
    )
    report = checked(tmp_path)
    assert report.problems == []
    [strays] = [finding for finding in report.warnings if finding.kind == "stray"]
    assert {item.detail.split()[0] for item in strays.items} == {"left"}


def test_the_bin_of_a_file_system_is_not_even_opened(tmp_path):
    """Only the superuser may."""
    fill(tmp_path, "cat", "dog")
    (tmp_path / "lost+found").mkdir()
    opened = []
    sys.addaudithook(lambda event, names: opened.append(str(names[0])) if event == "os.scandir" else None)
    assert made(tmp_path).class_names == ["cat", "dog"]
    assert checked(tmp_path).problems == []
    assert f"{tmp_path}/cat" in opened
    assert f"{tmp_path}/lost+found" not in opened


def test_a_pattern_below_a_folder_with_brackets_in_its_name(tmp_path):
    files = [str(tmp_path / "Fotos [2024]" / name) for name in ("a [1]/0.png", "a [1]/1.png", "b/0.png")]
    for name in (*files, tmp_path / "Fotos 2" / "b" / "0.png"):
        write(Path(name))
    for pattern, matches in {
        "a [1]/*.png": files[:2],
        "*/0.png": files[::2],
        "[ab]/*.png": files[2:],
    }.items():
        typed = f"{tmp_path}/Fotos [2024]/{pattern}"
        assert find_images([typed], stdin=(), allow_url=False) == matches
    other = [f"{tmp_path}/Fotos 2/b/0.png"]
    assert find_images([f"{tmp_path}/Fotos [24]/b/*"], stdin=(), allow_url=False) == other


@pytest.mark.parametrize("names", [("0.png", "1.png"), ("unknown/0.png",), ("images/0.png", "more/0.png")])
def test_a_test_folder_without_labels_is_left_out(tmp_path, names):
    """As Kaggle has it."""
    root = tmp_path / "two words"
    splits(root, "train", "val")
    for name in names:
        write(root / "test" / name)
    data = made(root)
    assert (data.class_names, data.sizes) == (["cat", "dog"], {"train": 8, "val": 8, "test": 0})
    note = (
        f"{root}/test has none of the classes of train, so the test split is left out: images without labels "
        f"are for vit-predict RUN '{root}/test'"
    )
    assert note_with(data, "left out") == [note]
    report = checked(root)
    assert note in report.notes
    assert {*report.counts} == {"train", "val"}
    write(root / "loose.png")
    (stray,) = (finding for finding in checked(root).warnings if finding.kind == "stray")
    assert [item.files for item in stray.items] == [("loose.png",)]


def test_a_test_folder_with_the_classes_of_train_misspelt_is_no_such_folder(tmp_path):
    splits(tmp_path, "train", "val")
    fill(tmp_path / "test", "cats")
    with pytest.raises(DataError, match=r"train has no class for .*/test/cats; did you mean 'cat'\?"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        (("pets/cats", "pets/dogs", "other/thing"), "; did you mean {}/pets?"),
        (("pets/train/cats", "pets/train/dogs", "other/a", "other/b"), "; did you mean {}/pets?"),
        (("pets/cats", "pets/dogs", "other/a", "other/b"), ""),
        (("birds/owl", "mammals/cat"), ""),
    ],
)
def test_a_folder_too_high_is_told(tmp_path, shape, hint):
    fill(tmp_path, *shape)
    classes = sorted({name.split("/")[0] for name in shape})
    note = (
        f"the class folders ({', '.join(classes)}) contain folders instead of images; the images lie deeper"
    )
    data = made(tmp_path)
    assert data.class_names == classes
    assert note_with(data, "deeper") == [note + hint.format(tmp_path)]
    assert note + hint.format(tmp_path) in checked(tmp_path).notes
    write(tmp_path / classes[-1] / "0.png")
    assert not note_with(made(tmp_path), "deeper")


def test_files_that_are_no_images_by_name_are_counted(tmp_path):
    splits(tmp_path, "train", "val")
    for name in ("train/cat/1.heic", "train/dog/2.HEIC", "val/dog/notes.txt", "val/dog/README"):
        (tmp_path / name).write_bytes(b"x")
    data = made(tmp_path)
    assert data.sizes == {"train": 8, "val": 8, "test": 0}
    assert (
        "4 files are not images by name (no suffix, .heic, .txt): ignored; .heic is HEIC, which is not read: "
        "convert it to JPEG" in data.notes
    )
    (tmp_path / "train/cat/1.heic").unlink()
    (tmp_path / "train/dog/2.HEIC").unlink()
    assert "2 files are not images by name (no suffix, .txt): ignored" in made(tmp_path).notes


def test_every_suffix_that_can_be_read(tmp_path):
    splits(tmp_path, "train")
    picture = Image.open(tmp_path / "train" / "cat" / "0.png").copy()
    for suffix in ("avif", "jp2", "J2K", "pgm"):
        picture.save(tmp_path / "train" / "cat" / f"x.{suffix}", format=None)
    picture.save(tmp_path / "train" / "cat" / "x.jfif", format="JPEG")
    data = made(tmp_path, val_fraction=0, batch_size=13)
    assert data.class_counts == [9, 4]
    assert len(next(iter(data.loader("train"))).index) == 13


def test_names_in_capitals_with_spaces_and_of_no_alphabet(tmp_path):
    for name in ("\u732b", "two words", "na\u00efve", os.fsdecode(b"no\xfftext")):
        for file in ("A.PNG", "b \u00fc.Png", os.fsdecode(b"\xfe.png")):
            write(tmp_path / name / file)
    data = made(tmp_path, val_fraction=0, batch_size=12)
    assert data.class_counts == [3, 3, 3, 3]
    assert len(next(iter(data.loader("train"))).index) == 12


# ------------------------------------------------------------------------------------------- while training runs
VICTIM = "photos/train/cat/2.png"


class Removing:
    """A transform that is there when a file goes away, in the second epoch."""

    def __call__(self, image):
        if Path("run/checkpoints/last").exists() and Path("remove").exists():
            Path(VICTIM).unlink(missing_ok=True)
        return image


def removing(img_size):
    return Removing()


def test_a_file_that_is_removed_while_training(in_tmp):
    splits(in_tmp / "photos", "train", "val", classes=("cat", "dog", "fox"))
    content = (in_tmp / VICTIM).read_bytes()
    settings = (
        *SETTINGS,
        *("data.batch_size=4", "data.cache=none", "trainer.async_save=false"),
        "augment.sample={_target_: test_folder_shapes.removing, _partial_: true}",
    )
    done = vit_train_here(*settings, "run_dir=whole", cwd=in_tmp)
    assert done.code == 0, done.err
    (in_tmp / "remove").touch()
    done = vit_train_here(*settings, cwd=in_tmp)
    assert done.code == 3
    assert done.err.endswith(f"{VICTIM} does not exist; check its name, or put it back\n")
    (in_tmp / "remove").unlink()
    refused = vit_train_here(*settings, cwd=in_tmp)
    assert refused.code == 3
    told = "the data differs from the data that run was trained on (classes or files); restore it"
    assert told in refused.err
    (in_tmp / VICTIM).write_bytes(content)
    done = vit_train_here(*settings, cwd=in_tmp)
    assert done.code == 0, done.err
    assert checkpoint_hashes(in_tmp / "run") == checkpoint_hashes(in_tmp / "whole")
