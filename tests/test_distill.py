"""The losses of `Distill` against formulas written out in NumPy's terms, one head and two, loss and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vit_train.training.objective import Distill

K, B = 7, 13
NAMES, COUNTS = [f"class {k}" for k in range(K)], [10 * (k + 1) for k in range(K)]
WEIGHTS = {"class 2": 3.0, "class 5": 0.25}


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of two heads, of the teacher, class ids and mixed targets, in float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = 3 * torch.randn(2, B, K, generator=generator, dtype=torch.float64)
    wanted = 4 * torch.randn(B, K, generator=generator, dtype=torch.float64) + 2
    ids = torch.randint(K, (B,), generator=generator)
    share = torch.rand(B, 1, generator=generator, dtype=torch.float64)
    one_hot = torch.eye(K, dtype=torch.float64)
    return heads, wanted, ids, share * one_hot[ids] + (1 - share) * one_hot[ids.flip(0)]


def distill(wanted: Tensor, **options: object) -> Distill:
    return Distill(NAMES, COUNTS, lambda images: wanted[: len(images)], teacher="t", **options).double()


def probabilities(logits: Tensor) -> Tensor:
    """The softmax, by its definition."""
    powers = torch.exp(logits - logits.amax(1, keepdim=True))
    return powers / powers.sum(1, keepdim=True)


def on_labels(logits: Tensor, targets: Tensor, smoothing: float, weights: dict[str, float]) -> Tensor:
    """The mean over the samples of sum_k weight_k * target_k * -log p_k, of smoothed targets."""
    if targets.ndim == 1:
        targets = torch.eye(K, dtype=torch.float64)[targets]
    targets = (1 - smoothing) * targets + smoothing / K
    weight = torch.tensor([weights.get(name, 1.0) for name in NAMES], dtype=torch.float64)
    return -(weight * targets * probabilities(logits).log()).sum() / B


def lesson(kind: str, logits: Tensor, wanted: Tensor, T: float) -> Tensor:
    if kind == "hard":
        return (
            -torch.stack([probabilities(logits)[i, k].log() for i, k in enumerate(wanted.argmax(1))]).sum()
            / B
        )
    if kind == "zscore":
        logits, wanted = (
            torch.stack(
                [(row - row.sum() / K) / ((((row - row.sum() / K) ** 2).sum() / (K - 1)) ** 0.5) for row in z]
            )
            for z in (logits, wanted)
        )
    p, q = probabilities(wanted / T), probabilities(logits / T)
    return T**2 * (p * (p.log() - q.log())).sum() / B


@pytest.mark.parametrize("kind", ["soft", "hard", "zscore"])
@pytest.mark.parametrize("heads", ["one", "distill", "both"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("typed", [{}, {"alpha": 0.3, "temperature": 3.5}])
def test_loss_and_gradient_are_the_formula(
    kind: str, heads: str, mixed: bool, typed: dict[str, float]
) -> None:
    both, wanted, ids, mixture = drawn()
    targets = mixture if mixed else ids
    options = {k: v for k, v in typed.items() if kind != "hard" or k != "temperature"}
    alpha = options.get("alpha", 0.5 if kind == "hard" else 0.9)
    objective = distill(
        wanted,
        kind=kind,
        heads="both" if heads == "both" else "distill",
        label_smoothing=0.1,
        class_weights=WEIGHTS,
        **options,
    )
    logits = both.clone().requires_grad_()
    model = (lambda images: logits[0]) if heads == "one" else (lambda images: (logits[0], logits[1]))
    loss, answer, labels, taught, agreement = objective(model, torch.empty(B, 1), targets)
    (gradient,) = torch.autograd.grad(loss, logits)

    own = both.clone().requires_grad_()
    of = {"one": [0], "distill": [1], "both": [0, 1]}[heads]
    expected_labels = on_labels(own[0], targets, 0.1, WEIGHTS)
    expected_lesson = sum(lesson(kind, own[i], wanted, options.get("temperature", 2.0)) for i in of) / len(of)
    expected = (1 - alpha) * expected_labels + alpha * expected_lesson
    (expected_gradient,) = torch.autograd.grad(expected, own)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(gradient, expected_gradient, **close)
    torch.testing.assert_close(labels, expected_labels.detach(), **close)
    torch.testing.assert_close(taught, expected_lesson.detach(), **close)
    mean = both[0] if heads == "one" else (both[0] + both[1]) / 2
    torch.testing.assert_close(answer, mean)
    same = sum(int(a == b) for a, b in zip(mean.argmax(1).tolist(), wanted.argmax(1).tolist()))
    assert agreement.item() == pytest.approx(same / B)
    assert not any(tensor.requires_grad for tensor in (labels, taught, answer))


@pytest.mark.parametrize(
    ("T", "alpha", "squared"), [(2.0, 0.9, False), (2.0, 0.5, True)], ids=["first", "second"]
)
def test_the_tutorials_formulas_are_torchs_loss_as_they_write_it(
    T: float, alpha: float, squared: bool
) -> None:
    both, wanted, ids, _ = drawn(1)
    divergence = nn.KLDivLoss()  # its mean is over batch and classes
    expected = alpha * (T * T if squared else 1) * divergence(
        torch.log_softmax(both[0] / T, dim=1), torch.softmax(wanted / T, dim=1)
    ) + (1 - alpha) * nn.CrossEntropyLoss()(both[0], ids)
    options = {"square_temperature": squared, "mean_over_classes": True}
    loss = distill(wanted, alpha=alpha, temperature=T, **options)(
        lambda images: both[0], torch.empty(B, 1), ids
    )[0]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["soft", "hard", "zscore"])
def test_micro_batches_weighted_by_size_give_the_loss_of_the_batch(kind: str) -> None:
    both, wanted, ids, _ = drawn(2)
    rows = torch.arange(B)
    objective = Distill(NAMES, COUNTS, lambda images: wanted[images], teacher="t", kind=kind).double()
    whole = objective(lambda images: both[0][images], rows, ids)
    cuts = [(0, 4), (4, 5), (5, B)]
    parts = [objective(lambda images: both[0][images], rows[a:b], ids[a:b]) for a, b in cuts]
    for i in (0, 2, 3, 4):
        together = sum(part[i] * (b - a) / B for part, (a, b) in zip(parts, cuts))
        torch.testing.assert_close(together, whole[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["soft", "hard", "zscore"])
def test_half_precision_logits_are_widened_before_anything_is_computed(kind: str) -> None:
    both, wanted, ids, _ = drawn(3)
    half = both[0].to(torch.bfloat16)
    loss = distill(wanted, kind=kind).float()(lambda images: half, torch.empty(B, 1), ids)[0]
    exact = distill(wanted, kind=kind)(lambda images: half.double(), torch.empty(B, 1), ids)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_temperature_for_hard_labels() -> None:
    with pytest.raises(ValueError, match="kind=hard has no temperature, got 3"):
        Distill(NAMES, COUNTS, lambda images: images, teacher="t", kind="hard", temperature=3.0)


def test_equal_logits_are_not_divided_by_nothing() -> None:
    """As those of a head that starts at zero: the gradient is at most 1/0.01 of that of a deviation of 1."""
    _, wanted, ids, _ = drawn(4)
    logits = torch.zeros(B, K, dtype=torch.float64, requires_grad=True)
    loss = distill(wanted, kind="zscore", alpha=1.0)(lambda images: logits, torch.empty(B, 1), ids)[0]
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 < gradient.abs().max() < 100 * 2 / B


def test_two_classes_are_not_standardised() -> None:
    with pytest.raises(ValueError, match="with two classes, kind=zscore keeps only their order"):
        Distill(["a", "b"], [1, 1], lambda images: images, teacher="t", kind="zscore")
