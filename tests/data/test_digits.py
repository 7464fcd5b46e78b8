"""The embedded digits: sizes, the fixed test split, values."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vit_train.data import Digits


def made(**options) -> Digits:
    data = Digits(**options)
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    return data


def test_sizes_and_shape():
    data = made()
    assert data.sizes == {"train": 1292, "val": 145, "test": 360}
    assert (data.num_classes, data.img_size, data.in_channels) == (10, 8, 1)
    assert data.class_names == list("0123456789")
    assert sum(data.class_counts) == 1292
    assert data.num_workers == 0
    assert data.notes == ["data.cache=ram: 0.1 MiB of decoded images"]
    ids = [i for source in data.sources.values() for i in source.ids.tolist()]
    assert sorted(ids) == list(range(1797))
    assert data.source("test", 0) == f"digits image {data.sources['test'].ids[0]}"


def test_the_test_split_is_the_documented_one_and_never_moves():
    ids = made(seed=3, val_fraction=0.3).sources["test"].ids
    _, expected = train_test_split(
        np.arange(1797), test_size=360, stratify=load_digits().target, random_state=0
    )
    assert ids.tolist() == sorted(expected.tolist())
    assert hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest().startswith("2fbaae31b8c6aad1")
    assert np.bincount(made().sources["test"].targets).min() >= 34


def test_the_validation_split_is_the_same_for_every_seed():
    assert made(seed=0).fingerprint() == made(seed=1).fingerprint()


def test_pixels_span_the_byte_and_labels_fit():
    data, digits = made(), load_digits()
    for split, source in data.sources.items():
        assert np.array_equal(source.targets, digits.target[source.ids]), split
    batch = next(iter(data.loader("test")))
    original = digits.images[data.sources["test"].ids[:64]]
    assert np.array_equal(batch.images[:, 0].numpy(), np.round(original * 255 / 16))
    assert batch.images.max() == 255


def test_the_constants_are_those_of_the_images():
    pixels = load_digits().images / 16
    assert made().mean[0] == pytest.approx(pixels.mean(), abs=1e-4)
    assert made().std[0] == pytest.approx(pixels.std(), abs=1e-4)


def test_rgb_and_another_size():
    data = made(in_channels=3, img_size=32)
    batch = next(iter(data.loader("train")))
    assert batch.images.shape == (64, 3, 32, 32)
    assert len(data.mean) == len(data.std) == 3
