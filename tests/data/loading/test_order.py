"""Which samples an epoch trains on."""

import numpy as np
import torch

from vit_train.data.loading.epoch_order import epoch_order

TARGETS = np.array([0] * 70 + [1] * 20 + [2] * 10)


def order(epoch=0, *, sampler="uniform", repeats=1, seed=0, targets=TARGETS):
    return epoch_order(targets, sampler=sampler, repeats=repeats, seed=seed, epoch=epoch)


def test_uniform_takes_every_sample_once():
    index, draw = order()
    assert sorted(index.tolist()) == list(range(100))
    assert not draw.any()


def test_it_is_a_function_of_seed_and_epoch():
    for sampler in ("uniform", "balanced"):
        first = order(3, sampler=sampler, repeats=2)
        again = order(3, sampler=sampler, repeats=2)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not torch.equal(first.index, order(4, sampler=sampler, repeats=2).index)
        assert not torch.equal(first.index, order(3, sampler=sampler, repeats=2, seed=1).index)


def test_balanced_takes_every_class_equally_often():
    index, draw = order(sampler="balanced")
    counts = np.bincount(TARGETS[index])
    assert len(index) == 100
    assert sorted(counts) == [33, 33, 34]
    # a large class gives as many different images as it can, a small one all of them, evenly
    times = np.bincount(index, minlength=100)
    assert times[:70].max() == 1
    assert set(times[70:90]) == {1, 2}
    assert set(times[90:]) <= {3, 4}
    # each time a sample comes it is another draw
    assert len({*zip(index.tolist(), draw.tolist())}) == 100


def test_over_epochs_balanced_uses_every_image_and_shares_what_does_not_divide():
    counts, seen = np.zeros(3, dtype=int), set()
    for epoch in range(60):
        index = order(epoch, sampler="balanced").index
        counts += np.bincount(TARGETS[index])
        seen |= {*index.tolist()}
    assert seen == set(range(100))
    assert counts.max() - counts.min() <= 1


def test_a_class_without_samples_takes_no_place():
    index, _ = order(sampler="balanced", targets=np.array([0, 0, 0, 2]))
    assert sorted(np.bincount(np.array([0, 0, 0, 2])[index]).tolist()) == [0, 2, 2]


def test_repeats_come_in_a_row_with_draws_of_their_own():
    index, draw = order(repeats=3)
    assert len(index) == 100
    rows = index[:99].view(33, 3)
    assert (rows == rows[:, :1]).all()
    assert torch.equal(draw[:99].view(33, 3), torch.arange(3).expand(33, 3))
    assert len(set(rows[:, 0].tolist())) == 33


def test_repeats_of_repeats_have_draws_of_their_own():
    index, draw = order(sampler="balanced", repeats=3)
    assert len({*zip(index.tolist(), draw.tolist())}) == 100
