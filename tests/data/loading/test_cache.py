"""A cache moves storage, never pixels."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vit_train.data import ArraySource, Digits, Found, ImageFolder
from vit_train.data.loading import cache
from vit_train.data.loading.cache import CachedLoader
from vit_train.data.loading.loaders import SampleLoader
from vit_train.data.transforms.sample_transforms import resized_crop
from vit_train.errors import DataError
from vit_train.system.memory import available_memory

CPU = torch.device("cpu")
CROP = partial(resized_crop, scale=(0.3, 1.0))


@pytest.fixture
def photos(tmp_path):
    """Two classes of images of several sizes."""
    generator = np.random.default_rng(0)
    for name, number in (("cat", 30), ("dog", 20)):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        (tmp_path / "photos" / "test" / name).mkdir(parents=True)
        for i in range(number):
            pixels = generator.integers(0, 256, (10 + i % 3, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / "train" / name / f"{i}.png")
        Image.fromarray(pixels).save(tmp_path / "photos" / "test" / name / "0.png")
    return tmp_path / "photos"


@pytest.fixture
def folder(photos):
    """Makes and sets up an `ImageFolder` of them, and ends its workers afterwards."""
    modules = []

    def make(**options):
        should_stop = options.pop("should_stop", lambda: False)
        settings = {
            "root": str(photos),
            "batch_size": 8,
            "img_size": 8,
            "num_workers": 0,
            "val_fraction": 0.2,
        }
        data = ImageFolder(**{**settings, **options})
        modules.append(data)
        data.setup(device=CPU, rank=0, world_size=1, should_stop=should_stop)
        return data

    yield make
    for data in modules:
        data.close()


def batches(data, split="train", epoch=1):
    loader = data.loader(split)
    if split == "train":
        loader.set_position(epoch, 1)
    return list(loader)


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) for x, y in zip(some, others) for a, b in zip(x, y)
    )


@pytest.mark.parametrize("settings", [{}, {"sampler": "balanced"}, {"repeats": 2}, {"in_channels": 1}])
def test_finished_images_are_the_batches_of_no_cache(folder, settings):
    plain, cached = folder(cache="none", **settings), folder(cache="ram", **settings)
    assert isinstance(plain.loader("train"), SampleLoader)
    assert isinstance(cached.loader("train"), CachedLoader)
    assert isinstance(cached.loader("val"), CachedLoader)
    for split in ("train", "val", "test"):
        assert same(batches(plain, split), batches(cached, split))
    assert same(list(plain.eval_loader("train")), list(cached.eval_loader("train")))
    assert plain.fingerprint() == cached.fingerprint()
    assert plain.source("train", 3) == cached.source("train", 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoded_files_are_the_batches_of_no_cache(folder, num_workers):
    plain = folder(cache="none", sample_transform=CROP)
    cached = folder(cache="ram", sample_transform=CROP, num_workers=num_workers)
    assert isinstance(cached.loader("train"), SampleLoader)
    assert isinstance(cached.loader("val"), CachedLoader)
    for split in ("train", "val", "test"):
        assert same(batches(plain, split), batches(cached, split))
    assert same(list(plain.eval_loader("train")), list(cached.eval_loader("train")))
    assert plain.fingerprint() == cached.fingerprint()
    assert torch.equal(plain.examples("train", 5).images, cached.examples("train", 5).images)


@pytest.mark.parametrize("transform", [None, CROP])
def test_after_the_first_pass_no_file_is_read(folder, photos, transform):
    data = folder(cache="ram", sample_transform=transform)
    first = batches(data)
    for file in (photos / "train").rglob("*.png"):
        file.write_bytes(b"gone")
    assert same(batches(data), first)
    assert len(batches(data, "val")) == 2


def test_every_bad_file_is_named_before_step_1(folder, photos):
    bad = sorted((photos / "train").rglob("*.png"))[3:40:12]
    for file in bad:
        file.write_bytes(file.read_bytes()[:60])
    for transform in (None, CROP):
        with pytest.raises(DataError) as raised:
            folder(cache="ram", sample_transform=transform, num_workers=2, val_fraction=0.0)
        lines = str(raised.value).splitlines()
        assert lines[0] == "4 images cannot be used:"
        assert [line.split(" cannot be read")[0].strip() for line in lines[1:-1]] == [
            str(path) for path in bad
        ]
        assert lines[-1].strip() == "repair or remove them"  # more than data.on_bad_image=skip leaves out


def test_one_bad_file_is_one_line(folder, photos):
    bad = photos / "train/dog/3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"^{bad} [^\n]+$"):
        folder(cache="ram")


def test_a_signal_leaves_the_cache_empty_and_the_data_usable(folder):
    data = folder(cache="ram", should_stop=lambda: True)
    assert isinstance(data.loader("train"), SampleLoader)
    assert same(batches(data), batches(folder(cache="none")))


def test_auto_takes_memory_where_there_is_enough(folder, monkeypatch):
    data = folder()
    needed = 50 * 3 * 8 * 8
    assert isinstance(data.loader("train"), CachedLoader)
    assert any(note.startswith("data.cache=ram: ") for note in data.notes)
    monkeypatch.setattr(cache, "available_memory", lambda device: 4 * needed - 1)
    data = folder()
    assert isinstance(data.loader("train"), SampleLoader)
    advice = "(type data.cache=ram to cache them anyway)"
    assert any(note.startswith("data.cache=none: ") and advice in note for note in data.notes)
    assert isinstance(folder(cache="ram").loader("train"), CachedLoader)
    monkeypatch.setattr(cache, "available_memory", lambda device: needed - 1)
    with pytest.raises(DataError, match=r"data.cache=ram: .* do not fit into .*; type data.cache=auto"):
        folder(cache="ram")


def test_the_device_may_be_the_processor(folder):
    data = folder(cache="device")
    assert isinstance(data.loader("train"), CachedLoader)
    assert any(note.startswith("data.cache=ram, because the device is the CPU: ") for note in data.notes)


def test_memory_is_what_the_system_says():
    free = available_memory(CPU)
    assert 10 * 2**20 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_evaluation_alone_caches_nothing(photos):
    data = ImageFolder(root=str(photos), img_size=8, num_workers=0, cache="ram")
    data.setup(device=CPU, rank=0, world_size=1, training=False)
    assert isinstance(data.loader("test"), SampleLoader)


def test_arrays_are_used_as_they_are():
    data = Digits(cache="ram")
    data.setup(device=CPU, rank=0, world_size=1)
    for split in ("train", "val", "test"):
        loader = data.loader(split)
        assert isinstance(loader, CachedLoader)
        assert loader._pixels.data_ptr() == data.sources[split].images.data_ptr(), "they were copied"


def test_arrays_of_another_size_are_resized_once():
    plain, cached = Digits(cache="none", img_size=12, in_channels=3), Digits(img_size=12, in_channels=3)
    for data in (plain, cached):
        data.setup(device=CPU, rank=0, world_size=1)
    assert isinstance(cached.loader("train"), CachedLoader)
    for split in ("train", "val", "test"):
        assert same(batches(plain, split), batches(cached, split))


class Slow(ArraySource):
    """Reads for itself: a cache must ask it."""

    def read(self, index):
        image = super().read(index)
        return Image.eval(image, lambda value: 255 - value)

    def select(self, indices):
        return Slow(**vars(super().select(indices)))


class Inverted(Digits):
    def load(self):
        found = super().load()
        return Found(found.name, found.class_names, {k: Slow(**vars(v)) for k, v in found.sources.items()}, 8)


def test_a_source_that_reads_for_itself_is_asked():
    data = Inverted(cache="ram")
    data.setup(device=CPU, rank=0, world_size=1)
    batch = next(iter(data.loader("val")))
    assert torch.equal(batch.images, 255 - data.sources["val"].images[batch.index])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_device_the_batches_are_the_same(photos):
    there, here = (
        ImageFolder(root=str(photos), img_size=8, num_workers=0, batch_size=8, cache=place)
        for place in ("device", "none")
    )
    for data in (there, here):
        data.setup(device=torch.device("cuda"), rank=0, world_size=1)
    assert next(iter(there.loader("train"))).images.device.type == "cuda"
    moved = [type(batch)(*(tensor.cpu() for tensor in batch)) for batch in batches(there)]
    assert same(moved, batches(here))
