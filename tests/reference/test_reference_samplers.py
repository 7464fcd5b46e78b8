"""Which samples an epoch takes, counted here: shares of classes, views of samples, and what ranks and steps cut."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vit_train.data.loading.epoch_order import epoch_order
from vit_train.data.loading.loaders import TrainSteps

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=7)  # images of each class
REPEATS, SEED, EPOCH = st.integers(1, 5), st.integers(0, 2**31), st.integers(0, 400)


def targets_of(sizes: list[int], seed: int) -> np.ndarray:
    """Class ids in any order. Class 1 has no images at all."""
    ids = [k if k == 0 else k + 1 for k in range(len(sizes))]
    return np.random.default_rng(seed).permutation(np.repeat(ids, sizes))


def pairs_of(targets, **settings) -> list[tuple[int, int]]:
    order = epoch_order(targets, **settings)
    return [*zip(order.index.tolist(), order.draw.tolist(), strict=True)]


@given(SIZES, REPEATS, SEED, EPOCH)
def test_balanced_gives_every_class_its_share_in_views_of_its_own(sizes, repeats, seed, epoch):
    targets = targets_of(sizes, seed)
    pairs = pairs_of(targets, sampler="balanced", repeats=repeats, seed=seed, epoch=epoch)

    # every class num // K times, some once more
    num, K = len(targets), len(sizes)
    taken = Counter(targets[index] for index, _ in pairs)
    assert len(pairs) == num
    assert sorted(taken.values()) == [num // K] * (K - num % K) + [num // K + 1] * (num % K)

    # an image is never augmented alike: its draws are 0, 1, 2 ...
    draws = defaultdict(list)
    for index, draw in pairs:
        draws[index].append(draw)
    assert all(sorted(of_one) == [*range(len(of_one))] for of_one in draws.values())

    # views come in a row: one that does not begin a row follows the view before it
    for (last, last_draw), (index, draw) in zip([(-1, -1), *pairs], pairs):
        assert draw % repeats == 0 or (index, draw) == (last, last_draw + 1)

    # all rows of a class are whole but one, and its images share them evenly
    rows = Counter(index for index, draw in pairs if draw % repeats == 0)
    for k, share in taken.items():
        of_class = [rows[index] for index in np.flatnonzero(targets == k).tolist()]
        assert sum(of_class) == -(-share // repeats)
        assert max(of_class) - min(of_class) <= 1


def test_the_case_that_came_216_172_186_210_216():
    targets = np.repeat(np.arange(5), [500, 300, 150, 40, 10])
    pairs = pairs_of(targets, sampler="balanced", repeats=3, seed=0, epoch=0)
    assert Counter(targets[index] for index, _ in pairs) == dict.fromkeys(range(5), 200)


@given(SIZES, REPEATS, SEED)
def test_what_does_not_divide_goes_to_the_classes_in_turn(sizes, repeats, seed):
    targets = targets_of(sizes, seed)
    taken = Counter(dict.fromkeys(targets.tolist(), 0))
    for epoch in range(2 * len(sizes)):
        pairs = pairs_of(targets, sampler="balanced", repeats=repeats, seed=seed, epoch=epoch)
        taken.update(targets[index] for index, _ in pairs)
        assert max(taken.values()) - min(taken.values()) <= 1
    assert set(taken.values()) == {2 * len(targets)}


@given(SIZES, REPEATS, SEED, EPOCH)
def test_uniform_takes_whole_rows_of_distinct_images(sizes, repeats, seed, epoch):
    targets = targets_of(sizes, seed)
    pairs = pairs_of(targets, sampler="uniform", repeats=repeats, seed=seed, epoch=epoch)
    firsts = [index for index, _ in pairs[::repeats]]
    assert len({*firsts}) == -(-len(targets) // repeats)
    assert pairs == [(index, draw) for index in firsts for draw in range(repeats)][: len(targets)]


def test_the_uniform_order_of_older_versions_is_kept():
    def order(repeats, seed, epoch):
        return pairs_of(np.zeros(7, dtype=int), sampler="uniform", repeats=repeats, seed=seed, epoch=epoch)

    assert order(1, 0, 0) == [(2, 0), (4, 0), (3, 0), (0, 0), (1, 0), (5, 0), (6, 0)]
    assert order(1, 5, 3) == [(3, 0), (2, 0), (4, 0), (5, 0), (0, 0), (6, 0), (1, 0)]
    assert order(3, 0, 2) == [(2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2), (6, 0)]


@given(SIZES, REPEATS, SEED, EPOCH, st.sampled_from(["uniform", "balanced"]), st.integers(1, 4), st.data())
def test_ranks_and_steps_cut_the_order(sizes, repeats, seed, epoch, sampler, world_size, data):
    targets = targets_of([size + 3 for size in sizes], seed)
    per_rank = data.draw(st.integers(1, max(1, len(targets) // world_size)))
    settings = {"sampler": sampler, "repeats": repeats, "seed": seed}
    ranks = [
        TrainSteps(targets, batch_size=per_rank * world_size, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    first = data.draw(st.integers(0, len(ranks[0])))
    for steps in ranks:
        steps.set_position(epoch, first)
    shares = [[(i, d) for part in parts for _, i, d in part] for parts in zip(*ranks, strict=True)]
    order = pairs_of(targets, epoch=epoch, **settings)
    size = per_rank * world_size
    assert len(shares) == len(targets) // size - first
    assert shares == [order[s * size : (s + 1) * size] for s in range(first, len(targets) // size)]
