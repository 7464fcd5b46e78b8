"""CIFAR from small files in the true binary format, with checksums of their own."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from vit_train.data import Cifar10, Cifar100
from vit_train.errors import DataError

CPU = torch.device("cpu")


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_files(folder) -> None:
    """Two training files of 50 images, a test file of 20, and the class names."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, size in (("data_batch_1", 50), ("data_batch_2", 50), ("test_batch", 20)):
        entry = {
            "data": random.randint(0, 256, (size, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(size)],
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))


@pytest.fixture
def small(tmp_path):
    """A `Cifar10` whose torchvision class expects the small files; downloads meet a closed port."""
    made = tmp_path / "made"
    write_files(made / "cifar-10-batches-py")
    folder = made / "cifar-10-batches-py"
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="cifar-10-batches-py")

    class SmallDataset(CIFAR10):
        url = "http://127.0.0.1:1/small.tar.gz"
        filename = "small.tar.gz"
        tgz_md5 = md5(tmp_path / "archive.tar.gz")
        train_list = [[f"data_batch_{i}", md5(folder / f"data_batch_{i}")] for i in (1, 2)]  # noqa: RUF012
        test_list = [["test_batch", md5(folder / "test_batch")]]  # noqa: RUF012
        meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}  # noqa: RUF012

    class Small(Cifar10):
        dataset_class = SmallDataset

    return Small


def set_up(data):
    data.setup(device=CPU, rank=0, world_size=1)
    return data


def test_the_binary_files_become_splits(small, tmp_path):
    data = set_up(small(root=str(tmp_path / "made"), num_workers=0, batch_size=20))
    assert data.sizes == {"train": 90, "val": 10, "test": 20}
    assert data.class_counts == [9] * 10
    assert np.bincount(data.sources["val"].targets).tolist() == [1] * 10
    assert data.class_names[3] == "class 3"
    assert (data.img_size, data.in_channels) == (32, 3)
    with (tmp_path / "made" / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        entry = pickle.load(file)
    batch = next(iter(data.loader("test")))
    assert np.array_equal(batch.images.numpy(), entry["data"].reshape(20, 3, 32, 32))
    assert batch.targets.tolist() == entry["labels"]


def test_sources_name_the_position_in_the_files(small, tmp_path):
    data = set_up(small(root=str(tmp_path / "made"), num_workers=0))
    held = data.sources["val"].ids[0]
    assert data.source("val", 0) == f"cifar10 train image {held}"
    assert data.source("test", 17) == "cifar10 test image 17"


def test_without_a_validation_split(small, tmp_path):
    data = set_up(small(root=str(tmp_path / "made"), val_fraction=0.0))
    assert data.sizes == {"train": 100, "val": 0, "test": 20}
    assert any("no validation split" in note for note in data.notes)


def test_an_archive_put_there_by_hand_is_enough(small, tmp_path):
    (tmp_path / "by_hand").mkdir()
    (tmp_path / "archive.tar.gz").rename(tmp_path / "by_hand" / "small.tar.gz")
    assert set_up(small(root=str(tmp_path / "by_hand"))).sizes["test"] == 20


def test_no_network_says_what_to_fetch_and_where_to_put_it(small, tmp_path):
    with pytest.raises(DataError) as raised:
        set_up(small(root=str(tmp_path / "nothing")))
    line = str(raised.value)
    assert f"cifar10 is not in {tmp_path / 'nothing'} and the download failed (" in line
    assert "refused" in line
    assert "fetch http://127.0.0.1:1/small.tar.gz" in line
    assert f"put it at {tmp_path / 'nothing' / 'small.tar.gz'}" in line
    assert "\n" not in line


def test_a_wrong_checksum_is_not_read(small, tmp_path):
    damaged = tmp_path / "made" / "cifar-10-batches-py" / "data_batch_1"
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=r"the files in .*cifar-10-batches-py are damaged and the download"):
        set_up(small(root=str(tmp_path / "made")))


def test_cifar100_is_torchvisions():
    assert Cifar100.dataset_class.base_folder == "cifar-100-python"
    assert Cifar100().mean != Cifar10().mean
