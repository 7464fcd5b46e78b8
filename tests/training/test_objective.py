"""The loss: smoothing, class weights, two heads, and that no cut of a batch changes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vit_train.training.objective import CrossEntropy

NAMES, COUNTS = ["cat", "dog", "owl"], [60, 30, 10]


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=generator), torch.arange(12) % 3


def test_smoothing_is_in_training_and_not_in_validation() -> None:
    logits, targets = logits_and_targets()
    objective = CrossEntropy(NAMES, COUNTS, label_smoothing=0.1)
    loss, _ = objective(lambda x: x, logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=0.1))
    torch.testing.assert_close(objective.per_sample(logits, targets).mean(), F.cross_entropy(logits, targets))


def test_auto_weights_average_to_one_over_the_training_set() -> None:
    weight = CrossEntropy(NAMES, COUNTS, class_weights="auto").weight
    torch.testing.assert_close((weight * torch.tensor(COUNTS)).sum() / sum(COUNTS), torch.tensor(1.0))
    torch.testing.assert_close(weight * torch.tensor(COUNTS), torch.full((3,), 100 / 3))


def test_named_weights() -> None:
    assert CrossEntropy(NAMES, COUNTS, class_weights={"owl": 5.0}).weight.tolist() == [1.0, 1.0, 5.0]


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [
        ({"owls": 2.0}, COUNTS, "names 'owls'"),
        ("auto", [1, 0, 1], "none of 'dog'"),
    ],
)
def test_wrong_weights_are_refused(weights, counts, message) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEntropy(NAMES, counts, class_weights=weights)


@pytest.mark.parametrize("weights", [None, "auto"])
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
def test_micro_batches_weighted_by_size_give_the_loss_of_the_batch(weights, kind) -> None:
    logits, targets = logits_and_targets()
    if kind == "probabilities":
        targets = F.one_hot(targets, 3).float() * 0.8 + 0.2 / 3
    objective = CrossEntropy(NAMES, COUNTS, label_smoothing=0.1, class_weights=weights)
    whole, _ = objective(lambda x: x, logits, targets)
    parts = [
        objective(lambda x: x, logits[a:b], targets[a:b])[0] * (b - a) / 12
        for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_two_heads_are_averaged() -> None:
    logits, targets = logits_and_targets()
    loss, answer = CrossEntropy(NAMES, COUNTS)(lambda x: (x, 3 * x), logits, targets)
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(3 * logits, targets)) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(answer, 2 * logits)
