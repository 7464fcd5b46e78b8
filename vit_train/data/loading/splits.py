"""Stratified choices that hardly move: which images are held out for validation, which a limit keeps.

Within a class, samples are ordered by a keyed hash of their names (`Source.keys`), and the first are chosen:
a file that is added or removed moves at most one other, of its class. Shuffled, many that a run has trained
on would become validation images. The key is a constant, not the run's seed: every run of a sweep over `seed`
trains and validates on the same images, so their results compare. scikit-learn's splitter refuses a class of
one image and fewer held-out images than classes; a user's folder has both.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_KEY = b"vit-train split"
Indices = NDArray[np.int64]


def hold_out(targets: Indices, keys: Iterable[str], fraction: float) -> tuple[Indices, Indices]:
    """Splits samples into those that stay and those held out, both in ascending order.

    Every class keeps at least one sample, so a class of one stays whole; every larger class gives at least
    one, so where there are many small classes more than `fraction` is held out.

    Args:
        targets: (n,) class ids.
        keys: what each sample is called within its class.
        fraction: share of each class to hold out, above 0 and below 1; half a sample is rounded up.
    """
    order, rank, counts = _by_class(targets, keys)
    held = rank < np.minimum(_share(counts, fraction), counts - 1)
    return np.sort(order[~held]), np.sort(order[held])


def keep_share(targets: Indices, keys: Iterable[str], fraction: float) -> Indices:
    """A share of each class, at least one sample, in ascending order; arguments as for `hold_out`."""
    order, rank, counts = _by_class(targets, keys)
    return np.sort(order[rank < _share(counts, fraction)])


def keep(targets: Indices, keys: Iterable[str], limit: int) -> Indices:
    """The `limit` samples to keep, stratified, in ascending order; arguments as for `hold_out`.

    The j-th of the n samples of a class is placed at j / n, and a prefix is kept: of K samples, all K
    classes. By Adams' method, which this is, a class that grows by one gains at most one place of another.
    """
    order, rank, counts = _by_class(targets, keys)
    return np.sort(order[np.argsort(rank / counts, kind="stable")[:limit]])


def _by_class(targets: Indices, keys: Iterable[str]) -> tuple[Indices, Indices, Indices]:
    """All samples, class after class; for each of these places the rank in its class, and its size."""
    encoded = (key.encode(errors="surrogatepass") for key in keys)
    digests = (blake2b(name, digest_size=8, key=_KEY).digest() for name in encoded)
    hashes = np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64, len(targets))
    order = np.lexsort((hashes, targets))  # stable: equal names stay in the order of the samples
    counts, classes = np.bincount(targets), targets[order]
    return order, np.arange(len(targets)) - (np.cumsum(counts) - counts)[classes], counts[classes]


def _share(counts: Indices, fraction: float) -> NDArray[np.float64]:
    return np.maximum(np.floor(np.round(fraction * counts, 6) + 0.5), 1)  # 0.29 * 50 is 14.499999999999998
