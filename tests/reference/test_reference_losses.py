"""Class weights, smoothing, mixtures, accumulation and two heads, in all combinations, against a formula in float64
and torch's own cross entropy with probabilities."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vit_train.data.batch import Batch
from vit_train.data.transforms.batch_transforms import Augment
from vit_train.training.objective import CrossEntropy

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def written_out(heads: list[Tensor], targets: Tensor, weight: Tensor, smoothing: float) -> Tensor:
    """The mean over heads and samples of the sum over classes of weight x smoothed target x -log p, in float64."""
    K = len(weight)
    mixture = torch.eye(K, dtype=torch.float64)[targets] if targets.ndim == 1 else targets.double()
    smoothed = mixture * (1 - smoothing) + smoothing / K
    total = torch.zeros((), dtype=torch.float64)
    for head in heads:
        logits = head.double()
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        total = total - (weight.double() * smoothed * log_p).sum()
    return total / (len(heads) * len(targets))


@st.composite
def cases(draw):
    """Logits (heads, B, K), targets, weights or None, smoothing, and the borders of the micro-batches."""
    B, K = draw(st.integers(1, 33)), draw(st.integers(2, 23))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(draw(st.sampled_from([1, 2])), B, K, generator=generator)
    targets = torch.randint(K, (B,), generator=generator)
    if draw(st.booleans()):  # two or three classes in a mixture
        other = torch.randint(K, (2, B), generator=generator)
        share = torch.rand(3, B, 1, generator=generator)
        share = share / share.sum(0)
        targets = sum(part * F.one_hot(ids, K) for part, ids in zip(share, (targets, *other)))
    weight = draw(st.sampled_from([None, 1.0, 100.0]))  # how far they may lie apart
    if weight is not None:
        weight = weight ** torch.rand(K, generator=generator).mul(2).sub(1)
        weight[0] = draw(st.sampled_from([0.0, 1.0]))  # a class may count nothing at all
    borders = sorted({0, B, *draw(st.lists(st.integers(0, B), max_size=B))})
    return logits, targets, weight, draw(st.sampled_from([0.0, 0.1, 0.7])), borders


def objective_of(weight: Tensor | None, K: int, smoothing: float) -> CrossEntropy:
    names = [f"class {i}" for i in range(K)]
    weights = None if weight is None else dict(zip(names, weight.tolist()))
    return CrossEntropy(names, [1] * K, label_smoothing=smoothing, class_weights=weights)


@given(cases())
def test_every_combination_is_the_formula_and_torchs_own(case):
    logits, targets, weight, smoothing, borders = case
    K = logits.shape[-1]
    logits.requires_grad_()
    objective = objective_of(weight, K, smoothing)

    def model(rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (rows[:, 0], rows[:, 1]) if len(logits) == 2 else rows[:, 0]

    # as the trainer cuts and weighs: by the size of the micro-batch
    loss = torch.zeros(())
    for start, end in pairwise(borders):
        part, answer = objective(model, logits.transpose(0, 1)[start:end], targets[start:end])
        loss = loss + part * ((end - start) / len(targets))
        torch.testing.assert_close(answer, logits.detach().mean(0)[start:end])
    (gradient,) = torch.autograd.grad(loss, logits)

    ones = torch.ones(K) if weight is None else weight
    exact = logits.detach().double().requires_grad_()
    expected = written_out(list(exact), targets, ones, smoothing)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)

    mixture = F.one_hot(targets, K).float() if targets.ndim == 1 else targets
    torchs = [F.cross_entropy(head, mixture, ones, label_smoothing=smoothing) for head in logits]
    torch.testing.assert_close(loss, torch.stack(torchs).mean(), **CLOSE)


@given(st.integers(2, 9), st.integers(0, 2**31), st.sampled_from([0.0, 0.1]))
def test_a_mixture_of_one_class_is_its_id(K, seed, smoothing):
    generator = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(13, K, generator=generator), torch.randint(K, (13,), generator=generator)
    objective = objective_of(0.01 + torch.rand(K, generator=generator), K, smoothing)
    by_id, _ = objective(lambda x: x, logits, ids)
    by_mixture, _ = objective(lambda x: x, logits, F.one_hot(ids, K).float())
    torch.testing.assert_close(by_id, by_mixture, **CLOSE)


@pytest.mark.parametrize("mixing", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {}])
def test_a_class_a_hundred_times_rarer_is_corrected_a_hundredfold(mixing):
    # How much a class counts per image of it, read off loss and gradient. Where all logits are 0, the loss is ln K
    # times the sum of what all classes count, and the gradient of a class its part of that less what it counts.
    counts, batch = [1000, 10], 101
    targets = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat([0, 1], counts)))
    objective = CrossEntropy(["common", "rare"], counts, class_weights="auto")
    augment = Augment((0.5,), (0.5,), seed=3, num_classes=2, **mixing)
    counted, images_of = torch.zeros(2), torch.zeros(2)
    for step, ids in enumerate(torch.arange(len(targets)).split(batch)):
        batch_of = Batch(torch.zeros(len(ids), 1, 8, 8, dtype=torch.uint8), targets[ids], ids, 0 * ids)
        _, mixed = augment(batch_of, 0, step)
        assert mixed.ndim == (2 if mixing else 1)
        logits = torch.zeros(len(ids), 2, requires_grad=True)
        loss, _ = objective(lambda x: x, logits, mixed)
        (gradient,) = torch.autograd.grad(loss * len(ids), logits)
        counted += (loss.detach() * len(ids) / np.log(2) / 2) - gradient.sum(0)
        images_of += F.one_hot(mixed, 2).sum(0) if mixed.ndim == 1 else mixed.sum(0)
    torch.testing.assert_close(images_of, torch.tensor(counts).float())
    common, rare = (counted / images_of).tolist()
    assert rare / common == pytest.approx(100, rel=1e-3)
