"""Names: a sequence of str that is three tensors."""

import os
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from vit_train.data.folder.file_names import Names

ODD = [
    "plain.jpg",
    "",
    "two words.png",
    "\u00fcml\u00e4ut/\u732b.png",
    "line\nbreak",
    os.fsdecode(b"no\xfftext.jpg"),
]


def test_a_sequence_of_str():
    names = Names.of(ODD)
    assert len(names) == len(ODD)
    assert [names[i] for i in range(len(ODD))] == [*names] == ODD
    assert [*names.encoded()] == [os.fsencode(name) for name in ODD]
    assert "two words.png" in names
    with pytest.raises(IndexError):
        names[len(ODD)]


def test_none_at_all():
    names = Names.of([])
    assert (len(names), [*names]) == (0, [])


def test_a_selection_shares_the_bytes():
    names = Names.of(ODD)
    chosen = names.select(np.array([4, 0, 4]))
    assert [*chosen] == [chosen[i] for i in range(3)] == [ODD[4], ODD[0], ODD[4]]
    assert [*chosen.select(np.array([1]))] == [ODD[0]]
    assert chosen.buffer.data_ptr() == names.buffer.data_ptr()


def test_more_than_one_chunk():
    many = [f"{i}.png" for i in range(150_000)]
    assert [*Names.of(many)] == many


def test_spawned_workers_get_no_copy():
    """What multiprocessing sends is a few handles of shared memory, however many names there are."""
    names = Names.of(f"some/folder/{i}.jpg" for i in range(100_000))
    sent = bytes(ForkingPickler.dumps(names))
    assert len(sent) < 2_000
    assert len(pickle.dumps([*names])) > 1_000_000
