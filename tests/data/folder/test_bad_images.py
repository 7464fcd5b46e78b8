"""Images that cannot be read: all of them named, or left out where that was asked for, never replaced."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Forked, vit_train_here
from PIL import Image
from torch.utils.data import get_worker_info

from vit_train.data import ImageFolder
from vit_train.data.folder.image_folder import FileSource
from vit_train.errors import DataError

SETTINGS = (
    *(setting for setting in TINY if not setting.startswith(("data.limit", "data.batch_size"))),
    *("data=imagefolder", "data.root=photos", "data.in_channels=1", "data.batch_size=40", "trainer.epochs=1"),
    *("model=vit_digits", "run_dir=run"),
)


@pytest.fixture
def photos(in_tmp):
    """200 training images of two classes, 20 of each to validate and to test."""
    for split, number in (("train", 100), ("val", 10), ("test", 10)):
        for c, name in enumerate(("cat", "dog")):
            folder = in_tmp / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(np.full((8, 8), 2 * i + c, dtype=np.uint8)).save(folder / f"{i}.png")
    return in_tmp / "photos"


def damage(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:50])
    return [str(path) for path in paths]


def set_up(root, *, rank=0, world_size=1, **settings):
    data = ImageFolder(root=str(root), img_size=8, batch_size=40, num_workers=0, **settings)
    data.setup(device=torch.device("cpu"), rank=rank, world_size=world_size)
    return data


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_error_names_all_bad_images_of_all_splits(photos, in_tmp, cache):
    damage(
        photos / "train/cat/3.png",
        photos / "train/dog/70.png",
        photos / "val/cat/1.png",
        photos / "test/dog/9.png",
    )
    done = vit_train_here(*SETTINGS, f"data.cache={cache}", cwd=in_tmp)
    assert done.code == 3
    lines = done.err.splitlines()
    assert lines[0] == "vit-train: error: 4 images cannot be used:"
    names = [line.split(" cannot be read")[0].strip() for line in lines[1:-1]]
    assert names == [f"photos/{n}.png" for n in ("train/cat/3", "train/dog/70", "val/cat/1", "test/dog/9")]
    assert lines[-1].endswith("type data.on_bad_image=skip, which leaves out those of train")


def test_skip_leaves_out_the_bad_ones_and_says_so(photos, in_tmp):
    damage(photos / "train/cat/3.png", photos / "train/dog/70.png")
    done = vit_train_here(*SETTINGS, "data.on_bad_image=skip", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "train 198, val 20, test 20 images" in done.out
    said = " ".join(done.out.split())
    assert "leaves out 2 images of 200: photos/train/cat/3.png, photos/train/dog/70.png" in said


def test_skip_is_the_same_on_every_rank_and_with_every_number_of_workers(photos):
    damage(photos / "train/cat/3.png", photos / "train/dog/70.png")
    modules = [
        set_up(photos, on_bad_image="skip", **more)
        for more in ({"cache": "none"}, {"cache": "ram"}, {"rank": 1, "world_size": 2})
    ]
    names = [[data.source("train", i) for i in range(data.sizes["train"])] for data in modules]
    assert names[0] == names[1] == names[2]
    assert len({data.fingerprint() for data in modules}) == 1
    shutil.rmtree(photos / "test")
    several = ImageFolder(root=str(photos), img_size=8, num_workers=2, on_bad_image="skip", cache="none")
    several.setup(device=torch.device("cpu"), rank=0, world_size=1)
    assert [several.source("train", i) for i in range(several.sizes["train"])] == names[0]


def test_skip_leaves_out_at_most_one_percent(photos):
    damage(*(photos / "train/cat" / f"{i}.png" for i in range(10, 13)))
    with pytest.raises(DataError, match=r"3 images cannot(.|\n)*at most 1% of 200 training images"):
        set_up(photos, on_bad_image="skip")


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_leaves_nothing_out(photos, split):
    (name,) = damage(photos / split / "cat/1.png")
    with pytest.raises(DataError, match=rf"^{name} cannot be read .*on_bad_image=skip is for train only"):
        set_up(photos, on_bad_image="skip")


def held_out(root, **settings):
    """Names of the images held out where there is no val/, as training or evaluation sets the data up."""
    data = ImageFolder(root=str(root), img_size=8, num_workers=0, cache="none", **settings)
    data.setup(
        device=torch.device("cpu"), rank=0, world_size=1, training=settings.get("on_bad_image") == "skip"
    )
    return [data.source("val", i) for i in range(data.sizes["val"])]


def test_what_is_held_out_does_not_depend_on_what_is_left_out(photos):
    """Or evaluation, which leaves nothing out, would meet images that were trained on."""
    shutil.rmtree(photos / "val")
    whole = held_out(photos)
    damage(next(path for path in (photos / "train/cat").iterdir() if str(path) not in whole))
    assert held_out(photos, on_bad_image="skip") == held_out(photos) == whole


def test_a_bad_image_among_those_held_out_is_an_error(photos):
    shutil.rmtree(photos / "val")
    name = next(name for name in held_out(photos) if not name.endswith("/0.png"))
    damage(Path(name))
    with pytest.raises(DataError, match=rf"^{name} cannot be read .*on_bad_image=skip is for train only"):
        held_out(photos, on_bad_image="skip")


def test_a_bad_test_image_is_found_before_step_1(photos, in_tmp):
    damage(photos / "test/dog/9.png")
    done = vit_train_here(*SETTINGS, "data.cache=ram", cwd=in_tmp)
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "photos/test/dog/9.png cannot be read" in done.err
    assert not (in_tmp / "run").exists()


@pytest.mark.parametrize("settings", [("data.on_bad_image=skip",), ("data.cache=ram",)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_everything_is_read(photos, in_tmp, warm, settings, number):
    """One file is a pipe that a worker waits for: the command still ends, with the signal's exit code."""
    run = Forked(*SETTINGS, *settings, "data.num_workers=2", "data._target_=test_bad_images.Slow", cwd=in_tmp)
    while not (in_tmp / "reading").exists():
        time.sleep(0.05)
    os.kill(run.pid, number)
    done = run.wait(check=False)
    assert done.code == 128 + number, done
    if settings == ("data.on_bad_image=skip",):
        assert f"stopped by {signal.Signals(number).name} before the first step: nothing" in done.err
        assert not (in_tmp / "run").exists()
    else:  # the run is there, and can be continued
        assert "data.cache: not filled: a signal arrived" in done.out
        assert (in_tmp / "run/checkpoints/last").exists()


class Slow(ImageFolder):
    """Reads an image, and then another, for ever."""

    def usable(self, sources):
        Path("reading").touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vit_train.data.folder.bad_files.decode", _wait)
            return super().usable(sources)

    def load(self):
        found = super().load()
        for split, source in found.sources.items():
            found.sources[split] = SlowSource(**vars(source))
        return found


class SlowSource(FileSource):
    def read(self, index):
        if index == 20 and get_worker_info() is not None:
            Path("reading").touch()
            time.sleep(60)
        return super().read(index)


def _wait(path, **settings):
    time.sleep(60)


def test_nothing_bad_is_nothing_left_out(photos):
    plain, skipping = set_up(photos), set_up(photos, on_bad_image="skip")
    assert plain.fingerprint() == skipping.fingerprint()
    assert not any("leaves out" in note for note in skipping.notes)


def test_the_background_is_under_what_is_transparent_in_training_and_prediction(photos, in_tmp):
    from conftest import load_trained

    from vit_train.inference.prediction import Pictures

    clear = Image.new("LA", (8, 8), (200, 0))
    clear.save(photos / "train/cat/0.png")
    background = "data.background=[10,10,10]"
    assert vit_train_here(*SETTINGS, background, cwd=in_tmp).code == 0
    trained = load_trained(in_tmp / "run", device=torch.device("cpu"))
    assert trained.background == (10, 10, 10)
    read = Pictures(["photos/train/cat/0.png"], trained).read(0).convert("L")
    assert set(np.asarray(read).ravel().tolist()) == {10}
    data = set_up(photos, background=(10, 10, 10), in_channels=1)
    (index,) = [i for i in range(200) if data.source("train", i).endswith("train/cat/0.png")]
    assert set(data.pick("train", [index]).images.ravel().tolist()) == {10}


def test_large_jpegs_are_read_alike_in_training_evaluation_and_prediction(photos, in_tmp):
    """Reduced while decoding; the same pixels wherever the model sees the file."""
    from conftest import load_trained

    from vit_train.inference.prediction import Pictures

    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (20, 30), dtype=np.uint8))
    coarse.resize((600, 400)).save(photos / "test/cat/0.jpg", quality=90)
    assert vit_train_here(*SETTINGS, "data.img_size=8", cwd=in_tmp).code == 0
    trained = load_trained(in_tmp / "run", device=torch.device("cpu"))
    seen = trained.sample_transform()(Pictures(["photos/test/cat/0.jpg"], trained).read(0))
    assert Pictures(["photos/test/cat/0.jpg"], trained).read(0).size == (75, 50)
    data = set_up(photos, in_channels=1)
    (index,) = [i for i in range(data.sizes["test"]) if data.source("test", i).endswith("0.jpg")]
    assert torch.equal(data.pick("test", [index]).images[0], seen)
