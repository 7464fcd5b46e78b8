"""Stratified choices that never move: which images are held out for validation, which a limit keeps.

Seeded by a constant, not by the run's seed: every run of a sweep over `seed` trains and validates on the same
images, so their results compare. scikit-learn's splitter refuses a class of one image and fewer held-out
images than classes; a user's folder has both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPLIT_SEED = 20170612
Indices = NDArray[np.int64]


def stratified_order(targets: Indices) -> Indices:
    """A shuffled order of all samples whose every prefix has the classes in their proportions.

    The j-th image (in shuffled order) of a class with n images is placed at j / n. A prefix of at least K
    samples therefore holds every one of K classes, and a shorter prefix is part of a longer one.

    Args:
        targets: (n,) class ids.
    """
    # RandomState, not default_rng: numpy promises its stream never changes (NEP 19), so neither does a split.
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    classes = targets[by_class]
    counts = np.bincount(targets)
    rank = np.arange(len(targets)) - (np.cumsum(counts) - counts)[classes]
    order: Indices = by_class[np.argsort(rank / counts[classes], kind="stable")]
    return order


def hold_out(targets: Indices, fraction: float) -> tuple[Indices, Indices]:
    """Splits samples into those that stay and those held out, both in ascending order.

    Every class keeps at least one sample, so a class of one stays whole; every larger class gives at least
    one, so where there are many small classes more than `fraction` is held out.

    Args:
        targets: (n,) class ids.
        fraction: share of the samples to hold out, 0 to below 1; 0 holds out none.
    """
    if fraction == 0:
        return np.arange(len(targets)), np.empty(0, dtype=np.int64)
    order = stratified_order(targets)
    reversed_order = order[::-1]
    last_of_class = reversed_order[np.unique(targets[reversed_order], return_index=True)[1]]
    candidates = order[~np.isin(order, last_of_class)]
    giving_classes = int((np.bincount(targets) > 1).sum())
    size = max(round(fraction * len(targets)), giving_classes)
    held = np.sort(candidates[:size])
    return np.setdiff1d(np.arange(len(targets)), held), held


def keep(targets: Indices, limit: int) -> Indices:
    """The `limit` samples to keep, stratified, in ascending order.

    Raises:
        ValueError: `limit` is smaller than the number of classes.
    """
    num_classes = len(np.unique(targets))
    if limit < num_classes:
        raise ValueError(f"{limit} images cannot hold one of each of {num_classes} classes")
    return np.sort(stratified_order(targets)[:limit])
