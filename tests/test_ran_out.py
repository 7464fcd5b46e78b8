"""Where open files or memory ran out, whatever was to be read may be sound: it is not blamed."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from PIL import Image

from vit_train.data import Cifar10
from vit_train.data.transforms.decode import find_range
from vit_train.errors import CheckpointError, SaveError
from vit_train.inference.export import make_file
from vit_train.runs.stored import read_config
from vit_train.weights import read_pretrained


@pytest.fixture
def things(tmp_path):
    """A folder with a file of each kind that is read."""
    Image.new("I;16", (4, 4), 300).save(tmp_path / "deep.png")
    torch.save({"head.weight": torch.ones(2, 2)}, tmp_path / "w.pth")
    (tmp_path / "config.yaml").write_text("seed: 0")
    return tmp_path


READERS = {
    "range": lambda folder: find_range([str(folder / "deep.png")]),
    "weights": lambda folder: read_pretrained(str(folder / "w.pth")),
    "configuration": lambda folder: read_config(folder),
    "cifar": lambda folder: Cifar10(root=folder, batch_size=4)._open(train=True),
}


@pytest.mark.parametrize("reader", READERS)
def test_too_many_open_files_blame_no_file(things, no_more_files, reader) -> None:
    (things / "cifar-10-batches-py").mkdir()
    (things / "cifar-10-batches-py/data_batch_1").touch()
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        READERS[reader](things)


class Costly(torch.nn.Module):
    """Something that the machine has no memory for."""

    def forward(self, images):
        raise MemoryError


def test_memory_is_not_a_fault_of_a_model() -> None:
    with pytest.raises(MemoryError):
        make_file(Costly(), "pt2", images=torch.zeros(2, 1, 4, 4), about={})


class Refused(torch.nn.Module):
    def forward(self, images):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_other_errors_are(things) -> None:
    with pytest.raises(SaveError, match="torch cannot export this model as pt2: "):
        make_file(Refused(), "pt2", images=torch.zeros(2, 1, 4, 4), about={})
    (things / "w.pth").write_bytes((things / "w.pth").read_bytes()[:300])
    with pytest.raises(CheckpointError, match="is not a weight file, or it is incomplete"):
        read_pretrained(str(things / "w.pth"))
