"""What `check_folder` and `bad_files` find, and what they leave alone."""

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import EACH, KINDS, heic, picture
from PIL import Image

from vit_train.data import ImageFolder
from vit_train.data.folder.bad_files import bad_files
from vit_train.data.folder.check import _look, check_folder
from vit_train.errors import DataError


def write(path, *, size=(8, 8), mode="RGB", value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(value).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """Three classes in three splits, every image another one."""
    value = 0
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label in ("a", "b", "c"):
            for i in range(count):
                write(tmp_path / split / label / f"{i}.png", value=value)
                value += 1
    return tmp_path


def checked(root, **options):
    return check_folder(str(root), **{"num_workers": 0, **options})


def found(findings):
    """kind -> [files ... -> detail]."""
    return {
        finding.kind: {" = ".join(item.files): item.detail for item in finding.items} for finding in findings
    }


def test_a_good_folder(root):
    report = checked(root)
    assert report.problems == report.warnings == []
    assert report.counts == {
        split: dict.fromkeys("abc", count) for split, count in (("train", 4), ("val", 2), ("test", 2))
    }
    assert report.num_images == 24
    assert report.num_bytes == sum(path.stat().st_size for path in root.rglob("*.png"))
    assert report.smallest == report.largest == (8, 8)
    assert report.shorter_sides == {"below 32": 24}
    assert report.modes == {"RGB": 24}
    patches = "data.img_size=16: 8 (the size of the files) is not a multiple of the model's patch of 16"
    assert patches in report.notes


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_300_good_and_180_odd_files_of_36_kinds(tmp_path):
    """Every bad one is found, no false alarm."""
    for i in range(300):
        suffix, mode = ((".png", "RGB"), (".jpg", "L"), (".jpg", "RGB"))[i % 3]
        write(tmp_path / "train" / "ab"[i % 2] / f"good_{i}{suffix}", size=(16, 12), mode=mode, value=i)
    bad = {}
    for kind, make in KINDS.items():
        for number in range(EACH):
            suffix, data, seen, limit = make(picture(number), number)
            name = f"train/{'ab'[number % 2]}/{kind}_{number}{suffix}"
            (tmp_path / name).write_bytes(data)
            if limit is None:
                bad[name] = seen
    assert len(bad) == 25
    report = checked(tmp_path, num_workers=2)
    assert report.num_images == 480
    assert sum(report.modes.values()) == 455
    [finding] = [finding for finding in report.problems if finding.kind == "unreadable"]
    assert finding.text == "25 images cannot be read: repair or remove"
    details = {item.files[0]: item.detail for item in finding.items}
    assert details.keys() == bad.keys()
    for name, words in bad.items():
        assert all(word in details[name] for word in words), details[name]
        assert str(tmp_path) not in details[name]
        assert "repair" not in details[name]
    assert [*details] == sorted(details)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_waits_for_nothing_and_names_everything(root, num_workers):
    os.mkfifo(root / "pipe.jpg")
    (root / "empty.jpg").write_bytes(b"")
    (root / "zero.jpg").symlink_to("/dev/zero")
    (root / "nowhere.jpg").symlink_to(root / "nothing")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    (root / "good.jpg").symlink_to(root / "train/a/0.png")
    (root / "text: colon\n.jpg").write_text("text")
    names = ["train/a/0.png", "pipe.jpg", "empty.jpg", "zero.jpg", "gone.jpg", "nowhere.jpg", "self.jpg"]
    names += ["good.jpg", "train", "text: colon\n.jpg", "n\0ul.jpg"]
    done = []
    start = time.monotonic()
    bad = bad_files([f"{root}/{name}" for name in names], num_workers=num_workers, progress=done.append)
    assert time.monotonic() - start < 20
    assert sum(done) == len(names)
    assert list(bad) == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    plain = "cannot be read (it is not a plain file)"
    assert bad[1] == bad[3] == plain
    assert bad[8] == "cannot be read (Is a directory)"
    assert bad[2] == bad[9] == "is not an image Pillow can read"
    assert bad[4] == bad[5] == "does not exist"
    assert bad[6].startswith("cannot be read (Too many levels of symbolic links")
    assert bad[10].startswith("cannot be read (")


def test_what_progress_raises_ends_the_work_and_the_workers(root):
    def stop(num_done):
        raise KeyboardInterrupt

    paths = [str(root / "train/a/0.png")] * 100_000
    before = children()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        bad_files(paths, num_workers=2, progress=stop)
    assert time.monotonic() - start < 5
    assert children() == before


def children():
    with contextlib.suppress(OSError):  # not Linux
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return []


def test_it_lists_what_training_lists(root):
    write(root / "train" / "a" / "deep" / "er" / "x.JPG", value=100)
    write(root / "elsewhere" / "d" / "0.png", value=101)
    for split in ("train", "val", "test"):
        (root / split / "d").symlink_to(root / "elsewhere" / "d", target_is_directory=True)
    for other in ("train/a/.hidden.png", "train/a/__MACOSX/x.png", "train/a/notes.txt"):
        write(root / other.replace(".txt", ".png"))
    data = ImageFolder(root=str(root), num_workers=0, cache="none")
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    report = checked(root)
    assert {split: sum(counts.values()) for split, counts in report.counts.items()} == data.sizes
    assert report.counts["train"] == dict(zip(data.class_names, data.class_counts))


def test_classes_without_training_images_and_classes_train_does_not_know(root):
    shutil.rmtree(root / "train" / "b")
    (root / "train" / "b").mkdir()
    (root / "train" / "e").mkdir()
    (root / "val" / "c").rename(root / "val" / "C")
    write(root / "test" / "cc" / "0.png", value=200)
    report = checked(root)
    assert found(report.problems) == {
        "unknown_class": {"val/C": "train has 'c'", "test/cc": "not in train; did you mean 'c'?"},
        "empty_class": {"train/b": "no images", "train/e": "no images"},
    }
    assert found(report.warnings) == {"missing_class": {"val/c": "no such folder"}}
    assert report.notes == []


def test_classes_that_val_and_test_lack(root):
    shutil.rmtree(root / "val" / "b")
    shutil.rmtree(root / "test" / "c")
    (root / "test" / "c").mkdir()
    report = checked(root)
    assert report.problems == []
    assert found(report.warnings) == {"missing_class": {"val/b": "no such folder", "test/c": "no images"}}


def test_equal_files(root):
    shutil.copy(root / "train/a/0.png", root / "test/a/same.png")
    shutil.copy(root / "train/a/0.png", root / "val/b/same.png")
    shutil.copy(root / "train/b/1.png", root / "train/c/same.png")
    shutil.copy(root / "train/a/3.png", root / "train/a/4.png")
    shutil.copy(root / "train/a/3.png", root / "train/a/5.png")
    report = checked(root, num_workers=2)
    assert report.problems == []
    three = "train/a/0.png = val/b/same.png = test/a/same.png"
    assert found(report.warnings) == {
        "leak": {three: "train and val and test"},
        "contradiction": {"train/b/1.png = train/c/same.png": "b or c", three: "a or b"},
        "copy": {"train/a/3.png = train/a/4.png = train/a/5.png": ""},
    }
    [copies] = [finding for finding in report.warnings if finding.kind == "copy"]
    assert copies.text == "2 files are copies of another one of the same class"


def test_copies_where_validation_is_held_out(tmp_path):
    for i, label in enumerate("aabb"):
        write(tmp_path / label / f"{i}.png", value=i)
    shutil.copy(tmp_path / "a/0.png", tmp_path / "a/9.png")
    [copies] = checked(tmp_path).warnings
    assert (
        copies.text
        == "1 file is a copy of another one of the same class; held-out validation images may be among them"
    )


def test_what_is_not_used(root):
    others = {
        "train/.DS_Store": "left by macOS",
        "train/a/._0.png": "left by macOS",
        "__MACOSX/": "left by macOS",
        "val/Thumbs.db": "left by Windows",
        "train/b/.ipynb_checkpoints/": "left by Jupyter",
        ".git/": "hidden",
        "train/a/.0.png": "hidden",
        "train/loose.png": "in no class folder",
        "more.jpg": "in no class folder",
        "train/a/photo.heic": "is HEIC, which is not read: convert it to JPEG",
        "readme.txt": "not an image by its name",
        "train/a/up/": "linked folder, not followed",
    }
    for name in others:
        path = root / name
        if name.endswith("/") and not name.startswith("train/a"):
            path.mkdir()
            write(path / "inside.png")
        elif not name.endswith("/"):
            path.write_text("")
    (root / "train/a/up").symlink_to(root, target_is_directory=True)
    report = checked(root)
    assert report.problems == []
    assert found(report.warnings) == {"stray": others}


def test_a_linked_class_is_searched_for_what_is_not_used(root):
    write(root / "else" / "d" / "0.png", value=300)
    (root / "else" / "d" / "notes.txt").write_text("")
    (root / "train" / "d").symlink_to(root / "else" / "d", target_is_directory=True)
    strays = found(checked(root).warnings)["stray"]
    assert strays["train/d/notes.txt"] == "not an image by its name"


def test_classes_that_differ_in_case_only(root):
    if (root / "train" / "A").exists():
        pytest.skip("this file system does not tell a from A")
    for split in ("train", "val", "test"):
        (root / split / "b").rename(root / split / "A")
    assert found(checked(root).warnings) == {"alike": {"train/A = train/a": ""}}


def test_a_layout_that_training_refuses(tmp_path):
    write(tmp_path / "only" / "0.png")
    [problem] = checked(tmp_path).problems
    assert problem.kind == "layout"
    assert "holds one class only (only)" in problem.text
    shutil.rmtree(tmp_path / "only")
    write(tmp_path / "loose.png")
    report = checked(tmp_path)
    assert [finding.kind for finding in report.problems] == ["layout"]
    assert found(report.warnings) == {"stray": {"loose.png": "in no class folder"}}
    assert (report.counts, report.shorter_sides, report.smallest) == ({}, {}, None)


def test_training_stops_at_an_empty_file_which_is_told_once(root):
    (root / "train/a/empty.png").write_bytes(b"")
    report = checked(root)
    assert found(report.problems) == {"unreadable": {"train/a/empty.png": "is not an image Pillow can read"}}


def test_a_phone_s_picture_is_told_how_to_be_read(root):
    (root / "train/a/IMG_1.jpg").write_bytes(heic())
    detail = "is HEIC, which is not read: convert it to JPEG"
    assert found(checked(root).problems) == {"unreadable": {"train/a/IMG_1.jpg": detail}}


def test_a_pipe_among_the_images(root):
    os.mkfifo(root / "train/a/pipe.png")
    report = checked(root)
    assert "it is not a plain file" in found(report.problems)["unreadable"]["train/a/pipe.png"]


def test_sizes_and_modes(root):
    write(root / "train/a/large.png", size=(640, 400), value=400)
    write(root / "train/a/grey.png", size=(31, 300), mode="L", value=401)
    write(root / "train/a/clear.png", size=(64, 1000), mode="RGBA", value=402)
    report = checked(root)
    assert report.modes == {"RGB": 25, "L": 1, "RGBA": 1}
    assert report.shorter_sides == {
        "below 32": 25,
        "32 to 63": 0,
        "64 to 127": 1,
        "128 to 223": 0,
        "224 to 383": 0,
        "384 to 767": 1,
    }
    assert (report.smallest, report.largest) == ((8, 8), (640, 400))


def test_workers_and_progress_change_nothing(root):
    (root / "train/a/bad.jpg").write_text("bad")
    done = []

    def start(total):
        assert total == 25
        return done.append

    report = checked(root)
    assert check_folder(str(root), num_workers=3, start=start) == report
    assert sum(done) == 25
    assert json.loads(json.dumps(asdict(report)))["problems"][0]["items"] == [
        {"files": ["train/a/bad.jpg"], "detail": "is not an image Pillow can read"}
    ]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed(root):
    (root / "train" / "a").chmod(0)
    try:
        report = checked(root)
    finally:
        (root / "train" / "a").chmod(0o755)
    assert found(report.problems)["refused"] == {"train/a": "cannot be listed (Permission denied)"}
    assert report.counts["train"] == {"a": 0, "b": 4, "c": 4}


def test_no_such_folder(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match="does not exist; did you mean 'flowers'"):
        checked(tmp_path / "flower")


def test_a_sound_file_is_not_a_problem_where_too_many_files_are_open(root, no_more_files):
    path = str(root / "train" / "a" / "0.png")
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        _look(path, value_range=None)
    assert _look(path, value_range=None).num_bytes == (root / "train" / "a" / "0.png").stat().st_size
