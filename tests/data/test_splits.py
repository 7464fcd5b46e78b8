"""Stratified choices: proportions, small classes, and that they never move."""

import hashlib

import numpy as np
import pytest

from vit_train.data.splits import hold_out, keep, stratified_order


def targets_of(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def test_every_prefix_of_the_order_is_stratified():
    targets = targets_of(500, 300, 200)
    order = stratified_order(targets)
    assert sorted(order) == list(range(1000))
    for size in (3, 10, 100, 777):
        expected = np.array([0.5, 0.3, 0.2]) * size
        assert np.abs(np.bincount(targets[order[:size]], minlength=3) - expected).max() <= 2


def test_the_choice_is_shuffled_within_a_class():
    kept = keep(targets_of(1000), 100)
    assert kept.max() > 900


def test_hold_out_is_exact_for_equal_classes():
    stays, held = hold_out(targets_of(*[50] * 10), 0.1)
    assert np.bincount(targets_of(*[50] * 10)[held]).tolist() == [5] * 10
    assert sorted([*stays, *held]) == list(range(500))
    assert np.all(np.diff(held) > 0)
    assert np.all(np.diff(stays) > 0)


def test_a_class_of_one_stays_and_every_larger_class_gives_one():
    targets = targets_of(1, 2, 100)
    stays, held = hold_out(targets, 0.02)
    assert np.bincount(targets[stays], minlength=3).min() >= 1
    assert np.bincount(targets[held], minlength=3)[:2].tolist() == [0, 1]


def test_many_small_classes_each_give_one_though_the_fraction_is_smaller():
    _, held = hold_out(targets_of(*[3] * 10), 0.1)
    assert np.bincount(targets_of(*[3] * 10)[held]).tolist() == [1] * 10


def test_a_large_fraction_leaves_one_of_each_class():
    stays, _ = hold_out(targets_of(5, 5), 0.99)
    assert np.bincount(targets_of(5, 5)[stays]).tolist() == [1, 1]


def test_nothing_is_held_out_at_zero():
    stays, held = hold_out(targets_of(3, 3), 0.0)
    assert len(stays) == 6
    assert len(held) == 0


def test_keep_holds_every_class_and_nests():
    targets = targets_of(1000, 10, 1)
    assert np.bincount(targets[keep(targets, 3)]).tolist() == [1, 1, 1]
    assert set(keep(targets, 50)) <= set(keep(targets, 100))
    assert len(keep(targets, 100)) == 100


def test_keep_refuses_fewer_images_than_classes():
    with pytest.raises(ValueError, match="2 images cannot hold one of each of 3 classes"):
        keep(targets_of(5, 5, 5), 2)


def test_the_order_is_the_same_everywhere():
    digest = hashlib.sha256(stratified_order(targets_of(70, 20, 10)).astype(np.int64).tobytes()).hexdigest()
    assert digest.startswith("db2878fd04584922")
