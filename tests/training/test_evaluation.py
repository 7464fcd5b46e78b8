"""Evaluation: the figures of scikit-learn and torch, every image once, and a model left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    recall_score,
    top_k_accuracy_score,
)
from torch import nn

from vit_train.data import Batch, Digits
from vit_train.data.loading.chosen import Chosen
from vit_train.data.transforms.batch_transforms import Normalize
from vit_train.training.evaluation import Collector, Evaluation, MirrorMean, evaluate, hits
from vit_train.training.objective import CrossEntropy
from vit_train.training.strategy import DataParallel, SingleDevice

CPU = torch.device("cpu")
N = 101


def random_logits(classes, count=N):
    generator = torch.Generator().manual_seed(classes)
    targets = torch.randint(classes, (count,), generator=generator)
    # nearer to the truth than chance, so that no figure is 0
    return torch.randn(count, classes, generator=generator) + F.one_hot(targets, classes), targets


def batches(targets, size):
    for index in torch.arange(len(targets)).split(size):
        images = torch.zeros(len(index), 1, 1, 1, dtype=torch.uint8)
        yield Batch(images, targets[index], index, torch.zeros_like(index))


def figures(
    logits, targets, *, model=None, size=16, smoothing=0.0, strategy=None, **settings
) -> Evaluation | None:
    """`evaluate` where each sample's image is its row of logits."""
    classes = logits.shape[1]
    return evaluate(
        model or nn.Identity(),
        batches(targets, size),
        objective=CrossEntropy([str(i) for i in range(classes)], [1] * classes, label_smoothing=smoothing),
        transform=lambda batch, epoch, step: (logits[batch.index], batch.targets),
        strategy=strategy or SingleDevice(device="cpu"),
        precision="fp32",
        num_classes=classes,
        **settings,
    )


@pytest.mark.parametrize("classes", [6, 10])
@pytest.mark.parametrize("size", [1, 16, N, 1000])
def test_the_figures_are_those_of_scikit_learn_and_torch(classes, size) -> None:
    logits, targets = random_logits(classes)
    found = figures(logits, targets, size=size, smoothing=0.1)  # smoothing is no part of the validation loss
    predicted, labels = logits.argmax(1), list(range(classes))
    assert found.images == N
    assert found.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert found.top1 == pytest.approx(accuracy_score(targets, predicted), abs=1e-12)
    assert found.top5 == pytest.approx(top_k_accuracy_score(targets, logits, k=5, labels=labels), abs=1e-12)
    assert found.top1 < found.top5 < 1
    assert found.confusion.tolist() == confusion_matrix(targets, predicted, labels=labels).tolist()
    assert found.confusion.dtype == torch.int64
    assert found.per_class() == pytest.approx(recall_score(targets, predicted, average=None, labels=labels))


@pytest.mark.parametrize("classes", [2, 5])
def test_top5_of_fewer_than_six_classes_says_nothing(classes) -> None:
    found = figures(*random_logits(classes))
    assert found.top5 is None
    assert set(found.metrics("val")) == {"val/loss", "val/top1", "val/macro_top1"}


def test_metrics_carry_their_split() -> None:
    logits, targets = random_logits(6)
    found = figures(logits, targets)
    assert found.metrics("test") == {
        "test/loss": found.loss,
        "test/top1": found.top1,
        "test/macro_top1": pytest.approx(balanced_accuracy_score(targets, logits.argmax(1))),
        "test/top5": found.top5,
    }


def test_a_class_without_images_has_no_recall() -> None:
    logits, _ = random_logits(6)
    found = figures(logits, torch.full((N,), 2))
    assert [recall is None for recall in found.per_class()] == [True, True, False, True, True, True]


def test_top1_and_confusion_agree_where_logits_tie() -> None:
    logits, targets = random_logits(50)
    tied = logits.round()  # as coarse as low precision makes them, so that many share the highest value
    assert (tied.topk(5).indices[:, 0] != tied.argmax(1)).any(), "topk breaks ties as argmax does"
    found = figures(tied, targets)
    assert (
        found.top1 == found.confusion.diagonal().sum().item() / N == accuracy_score(targets, tied.argmax(1))
    )


@pytest.mark.parametrize("classes", [6, 10, 50, 1000])
def test_of_equal_logits_the_first_five_are_the_top_five(classes) -> None:
    """Those that argmax would take one after another: a head that starts at zero tells no class from another."""
    found = figures(torch.zeros(12, classes), torch.arange(12) % 6)
    assert (found.top1, found.top5) == (2 / 12, 10 / 12)
    assert found.confusion.diagonal().tolist() == [2] + [0] * (classes - 1)


def test_hits_of_mixed_targets_count_the_likeliest_class() -> None:
    logits, targets = random_logits(7)
    mixed = 0.7 * F.one_hot(targets, 7) + 0.3 / 7
    assert torch.equal(hits(logits, mixed), hits(logits, targets))


def test_class_map_translates_the_datas_ids() -> None:
    logits, targets = random_logits(10)
    order = torch.tensor([7, 0, 3, 1, 9, 2, 8, 4, 6, 5])  # the model's id of each of the data's
    right = figures(logits, targets)
    # the same logits, with the model's columns in its own order
    columns = torch.empty_like(logits)
    columns[:, order] = logits
    found = figures(columns, targets, class_map=order)
    assert (found.top1, found.top5) == (right.top1, right.top5)
    assert found.loss == pytest.approx(right.loss)
    assert torch.equal(found.confusion[order][:, order], right.confusion)
    assert figures(columns, targets).top1 < right.top1, "the map changes nothing here"


def test_class_map_of_fewer_classes_than_the_model_has() -> None:
    logits, targets = random_logits(10)
    found = figures(logits, targets % 3, class_map=torch.tensor([4, 9, 0]))
    assert found.confusion.shape == (10, 10)
    assert found.confusion.sum(1).nonzero().flatten().tolist() == [0, 4, 9]


@pytest.mark.parametrize("size", [1, 7, 64, 360, 1000])
def test_every_image_of_a_real_split_counts_once(size) -> None:
    data = Digits(batch_size=size, num_workers=0)
    data.setup(device=CPU, rank=0, world_size=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    found = evaluate(
        model,
        data.loader("test"),
        objective=CrossEntropy(data.class_names, data.class_counts),
        transform=Normalize(data.mean, data.std),
        strategy=SingleDevice(device="cpu"),
        precision="fp32",
        num_classes=10,
    )
    assert found.images == data.sizes["test"] == 360
    assert found.confusion.sum(1).tolist() == torch.bincount(
        torch.from_numpy(data.sources["test"].targets), minlength=10
    ).tolist()  # fmt: skip
    whole = Normalize(data.mean, data.std)(data.examples("test", 360), 0, 0)
    with torch.no_grad():
        logits = model(whole[0])
    assert found.loss == pytest.approx(F.cross_entropy(logits, whole[1]).item(), rel=1e-5)


def test_asked_to_stop_it_gives_no_figures() -> None:
    asked = []

    def third_time():
        asked.append(1)
        return len(asked) == 3

    assert figures(*random_logits(6), should_stop=third_time) is None
    assert len(asked) == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ending", ["end", "stop", "error"])
def test_the_mode_of_the_model_is_restored(training, ending) -> None:
    logits, targets = random_logits(6)
    model = nn.Sequential(nn.Dropout(0.9)).train(training)
    if ending == "error":
        with pytest.raises(IndexError):
            figures(logits[:5], targets, model=model)
    else:
        found = figures(logits, targets, model=model, should_stop=lambda: ending == "stop")
        if found is not None:  # dropout would have changed every figure
            assert found.loss == pytest.approx(F.cross_entropy(logits, targets).item())
    assert model.training == model[0].training == training


def test_no_gradient_is_kept() -> None:
    logits, targets = random_logits(6)
    linear = nn.Linear(6, 6)
    figures(logits, targets, model=linear)
    assert linear.weight.grad is None


def test_an_empty_split_is_an_error() -> None:
    logits, targets = random_logits(6)
    with pytest.raises(ValueError, match="there is no image to evaluate"):
        figures(logits, targets[:0])


# -------------------------------------------------------------------------------------------- image by image
@pytest.mark.parametrize("size", [1, 16, 1000])
@pytest.mark.parametrize("strategy", [SingleDevice(device="cpu"), DataParallel(devices=("cpu", "cpu"))])
def test_collected_predictions_are_those_of_torch(size, strategy) -> None:
    logits, targets = random_logits(6)
    collector = Collector()
    found = figures(logits, targets, size=size, collect=collector, strategy=strategy)
    each = collector.finish()
    confidence, predicted = logits.softmax(1).max(1)
    assert each.index.tolist() == list(range(N))
    assert each.targets.tolist() == targets.tolist()
    assert each.predicted.tolist() == predicted.tolist()
    assert each.confidence == pytest.approx(confidence.numpy())
    assert each.loss == pytest.approx(F.cross_entropy(logits, targets, reduction="none").numpy(), abs=1e-6)
    assert each.loss.mean() == pytest.approx(found.loss)
    assert each.images_per_second > 0


def test_collected_ties_agree_with_the_confusion_matrix() -> None:
    logits, targets = random_logits(50)
    collector = Collector()
    found = figures(logits.round(), targets, collect=collector)
    each = collector.finish()
    assert (
        confusion_matrix(each.targets, each.predicted, labels=range(50)).tolist() == found.confusion.tolist()
    )


def test_no_confidence_in_answers_that_are_not_numbers() -> None:
    logits, targets = random_logits(6)
    logits[3] = float("nan")
    collector = Collector()
    figures(logits, targets, collect=collector)
    confidence = collector.finish().confidence
    assert confidence[3] == 0
    assert confidence.min() == 0 < confidence[4]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_training_image_once_and_as_evaluation_sees_it(split) -> None:
    data = Digits(batch_size=100, num_workers=0)  # no part of 1292, 145 or 360
    data.setup(device=CPU, rank=0, world_size=1)
    batches = list(data.eval_loader(split))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(data.sizes[split]))
    whole = torch.cat([batch.images for batch in batches])
    assert torch.equal(whole, data.examples(split, data.sizes[split]).images)
    chosen = Chosen(data, ["val", split])
    assert sum(len(batch.index) for batch in chosen) == 145 + data.sizes[split]
    assert torch.equal(chosen.images([145]), whole[:1])


def test_the_mean_of_an_image_and_its_mirror_image() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    images = torch.randn(7, 3, 2, 2)
    both = MirrorMean(model)(images)
    mean = (model(images).softmax(1) + model(images.flip(-1)).softmax(1)) / 2
    torch.testing.assert_close(both.softmax(1), mean)
    torch.testing.assert_close(both, mean.log())
    torch.testing.assert_close(MirrorMean(model)(images.flip(-1)), both)
    assert not torch.allclose(mean, model(images).softmax(1))
