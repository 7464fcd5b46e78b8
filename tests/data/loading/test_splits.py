"""Stratified choices: proportions, small classes, and that they never move. Changes: tests/reference."""

import numpy as np

from vit_train.data.loading.splits import hold_out, keep, keep_share


def targets_of(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def keys(targets: np.ndarray) -> list[str]:
    return [f"{i}.jpg" for i in range(len(targets))]


def held_of(targets: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    return hold_out(targets, keys(targets), fraction)


def kept_of(targets: np.ndarray, limit: int) -> np.ndarray:
    return keep(targets, keys(targets), limit)


def test_every_limit_is_stratified():
    targets = targets_of(500, 300, 200)
    for size in (3, 10, 100, 777):
        expected = np.array([0.5, 0.3, 0.2]) * size
        assert np.abs(np.bincount(targets[kept_of(targets, size)], minlength=3) - expected).max() <= 2


def test_the_choice_is_shuffled_within_a_class():
    kept = kept_of(targets_of(1000), 100)
    assert kept.max() > 900


def test_hold_out_is_exact_for_equal_classes():
    stays, held = held_of(targets_of(*[50] * 10), 0.1)
    assert np.bincount(targets_of(*[50] * 10)[held]).tolist() == [5] * 10
    assert sorted([*stays, *held]) == list(range(500))
    assert np.all(np.diff(held) > 0)
    assert np.all(np.diff(stays) > 0)


def test_a_class_of_one_stays_and_every_larger_class_gives_one():
    targets = targets_of(1, 2, 100)
    stays, held = held_of(targets, 0.02)
    assert np.bincount(targets[stays], minlength=3).min() >= 1
    assert np.bincount(targets[held], minlength=3).tolist() == [0, 1, 2]


def test_many_small_classes_each_give_one_though_the_fraction_is_smaller():
    _, held = held_of(targets_of(*[3] * 10), 0.1)
    assert np.bincount(targets_of(*[3] * 10)[held]).tolist() == [1] * 10


def test_a_large_fraction_leaves_one_of_each_class():
    stays, _ = held_of(targets_of(5, 5), 0.99)
    assert np.bincount(targets_of(5, 5)[stays]).tolist() == [1, 1]


def test_half_an_image_is_rounded_up():
    targets = targets_of(5, 15, 50)
    assert np.bincount(targets[held_of(targets, 0.1)[1]]).tolist() == [1, 2, 5]
    assert np.bincount(targets[held_of(targets, 0.29)[1]]).tolist() == [1, 4, 15]  # 1.45, 4.35, 14.5


def test_a_class_without_images_takes_no_part():
    targets = np.array([0, 0, 2, 2])
    assert np.bincount(targets[held_of(targets, 0.5)[1]], minlength=3).tolist() == [1, 0, 1]
    assert len(kept_of(targets, 2)) == 2


def test_a_share_keeps_one_of_each_class_and_nests():
    targets = targets_of(1000, 10, 1)
    shares = [keep_share(targets, keys(targets), fraction) for fraction in (0.001, 0.25, 1.0)]
    assert [np.bincount(targets[kept]).tolist() for kept in shares] == [[1, 1, 1], [250, 3, 1], [1000, 10, 1]]
    assert set(shares[0]) < set(shares[1]) < set(shares[2])


def test_keep_holds_every_class_and_nests():
    targets = targets_of(1000, 10, 1)
    assert np.bincount(targets[kept_of(targets, 3)]).tolist() == [1, 1, 1]
    assert set(kept_of(targets, 50)) <= set(kept_of(targets, 100))
    assert len(kept_of(targets, 100)) == 100


def test_equal_names_stay_in_order():
    """Two spellings of one name in one folder."""
    targets = targets_of(6)
    assert hold_out(targets, ["same"] * 6, 0.5)[1].tolist() == [0, 1, 2]


def test_the_choice_is_the_same_everywhere():
    held = held_of(targets_of(70, 20, 10), 0.2)[1]
    assert held.tolist() == [0, 1, 7, 9, 10, 12, 19, 20, 25, 31, 38, 41, 47, 50, 70, 79, 83, 86, 95, 99]
