"""The figures of an evaluation against scikit-learn, torchmetrics and formulas in float64: what `evaluate` counts, what
the report makes of it, and what stands in the files of a real `vit-eval`, from the image files on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import typed_here, vit_train_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from vit_train.checkpoint import load_run
from vit_train.cli import evaluate as command
from vit_train.data import Batch
from vit_train.inference.trained import fits, from_checkpoint
from vit_train.report.evaluation_figures import evaluated, evaluation_json
from vit_train.training import evaluation as evaluation_module
from vit_train.training.evaluation import Collector, MirrorMean, evaluate
from vit_train.training.objective import CrossEntropy
from vit_train.training.strategy import SingleDevice

NUM_BINS, MISTAKES = 15, 25


def log_softmax(logits):
    """In float64."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def ranking(logits):
    """(n, K): classes from the highest logit to the lowest; of equal ones the first comes first."""
    return np.argsort(-logits, axis=1, kind="stable")


class Case:
    """Random logits of n images and K classes, cut into batches; what they should give, and what they give.

    The data knows some of the classes, in another order, and not each has images.
    """

    def __init__(self, seed, classes, images, size, spread, step):
        random = np.random.default_rng(seed)
        self.classes, self.images = classes, images
        known = random.permutation(classes)[: random.integers(1, classes + 1)]
        ids = random.integers(0, len(known), images)
        self.targets = known[ids]
        self.logits = (spread * random.standard_normal((images, classes))).astype(np.float32)
        self.logits[np.arange(images), self.targets] += spread
        if step:  # as low precision, or a head that starts at zero
            self.logits = (self.logits / step).round() * step
        self.ids, self.class_map, self.size = torch.from_numpy(ids), torch.from_numpy(known), size
        self.log_p = log_softmax(self.logits.astype(np.float64))
        self.order = ranking(self.logits)
        self.names = [f"class {i}" for i in range(classes)]

    def batches(self):
        for index in torch.arange(self.images).split(self.size):
            images = torch.zeros(len(index), 1, 1, 1, dtype=torch.uint8)
            yield Batch(images, self.ids[index], index, torch.zeros_like(index))

    def report(self):
        logits, collector = torch.from_numpy(self.logits), Collector()
        found = evaluate(
            nn.Identity(),
            self.batches(),
            objective=CrossEntropy(self.names, [1] * self.classes),
            transform=lambda batch, epoch, step: (logits[batch.index], batch.targets),
            strategy=SingleDevice(device="cpu"),
            precision="fp32",
            num_classes=self.classes,
            class_map=self.class_map,
            collect=collector,
        )
        files = [f"{i}.png" for i in range(self.images)]
        about = {"split": "test", "step": 1}
        return evaluated(found, collector.finish(), class_names=self.names, files=files, about=about)


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 5, 6, 7, 11, 23, 101]),
    images=st.integers(1, 97),
    size=st.sampled_from([1, 2, 7, 13, 64, 1000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 3.0, 30.0]),
    step=st.sampled_from([0, 0, 0.5, 4]),
)


def figures_of(targets, order, log_p, names):
    """What report.json should say, but for what is about the model: figures of scikit-learn and formulas."""
    predicted, labels, n = order[:, 0], np.arange(len(names)), len(targets)
    present = np.unique(targets)
    each = precision_recall_fscore_support(targets, predicted, labels=labels, zero_division=0)
    macro = precision_recall_fscore_support(
        targets, predicted, labels=present, average="macro", zero_division=0
    )
    confidence = np.exp(log_p[np.arange(n), predicted])
    right = predicted == targets
    bins = []
    for i in range(NUM_BINS):
        low, high = i / NUM_BINS, (i + 1) / NUM_BINS
        within = (confidence > low) & (confidence <= high)
        found = (confidence[within].mean(), right[within].mean()) if within.any() else (None, None)
        bins.append((low, high, within.sum(), *found))
    return {
        "images": n,
        "loss": -log_p[np.arange(n), targets].mean(),
        "top1": right.mean(),
        "top5": (order[:, :5] == targets[:, None]).any(1).mean() if len(names) > 5 else None,
        "macro": dict(zip(("precision", "recall", "f1"), macro[:3])),
        "ece": sum(number * abs(accuracy - mean) for _, _, number, mean, accuracy in bins if number) / n,
        "per_class": {
            name: {"images": support} | dict(zip(("top1", "precision", "recall", "f1"), (r, p, r, f)))
            if support
            else {"images": 0, "top1": None, "precision": None, "recall": None, "f1": None}
            for name, p, r, f, support in zip(names, *each)
        },
        "counts": confusion_matrix(targets, predicted, labels=labels).tolist(),
        "bins": bins,
    }


def near_an_edge(log_p, order):
    """Whether float32 may put a confidence into the bin beside the one float64 puts it in."""
    confidence = np.exp(log_p[np.arange(len(order)), order[:, 0]]) * NUM_BINS
    return (np.abs(confidence - confidence.round()) < 1e-4).any()


def check_figures(report, expected, *, calibration=True):
    """A report.json against `figures_of`."""
    assert report["images"] == expected["images"]
    assert report["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert report["top1"] == pytest.approx(expected["top1"], abs=1e-12)
    assert report["top5"] == (
        None if expected["top5"] is None else pytest.approx(expected["top5"], abs=1e-12)
    )
    assert report["macro"] == pytest.approx(expected["macro"], abs=1e-12)
    assert report["per_class"].keys() == expected["per_class"].keys()
    for name, values in expected["per_class"].items():
        assert report["per_class"][name] == pytest.approx(values, abs=1e-12), name
    assert report["confusion"]["counts"] == expected["counts"]
    if calibration:
        assert report["ece"] == pytest.approx(expected["ece"], abs=1e-5)
        for bin_, values in zip(report["calibration"], expected["bins"], strict=True):
            assert list(bin_) == ["from", "to", "images", "confidence", "accuracy"]
            assert list(bin_.values()) == pytest.approx(list(values), abs=1e-5)


# ----------------------------------------------------------------------------------------------- drawn predictions
@given(CASES)
@settings(max_examples=200)
def test_every_figure_of_the_report(case):
    report = case.report()
    expected = figures_of(case.targets, case.order, case.log_p, case.names)
    calibration = not near_an_edge(case.log_p, case.order)
    check_figures(evaluation_json(report), expected, calibration=calibration)
    metrics = report.evaluation.metrics("val")
    assert metrics["val/macro_top1"] == pytest.approx(expected["macro"]["recall"], abs=1e-12)
    assert metrics["val/loss"] == report.evaluation.loss
    assert metrics["val/top1"] == report.evaluation.top1 <= metrics.get("val/top5", 1.0)


@given(CASES)
def test_torchmetrics_finds_the_same(case):
    """Its calibration error and F1; its bins include their lower edge, ours the upper one."""
    report = case.report()
    logits, targets = torch.from_numpy(case.logits), torch.from_numpy(case.targets)
    if not near_an_edge(case.log_p, case.order):
        ece = multiclass_calibration_error(logits.double().softmax(1), targets, case.classes, NUM_BINS)
        assert report.calibration.ece == pytest.approx(ece.item(), abs=1e-5)
    f1 = multiclass_f1_score(logits.argmax(1), targets, case.classes, average="none")
    shown = [(entry.f1, value) for entry, value in zip(report.classes, f1.tolist()) if entry.images]
    assert [one for one, _ in shown] == pytest.approx([other for _, other in shown], abs=1e-6)


@given(CASES)
def test_what_is_said_of_each_image(case):
    report = case.report()
    found, rows = report.predictions, np.arange(case.images)
    assert found.index.tolist() == rows.tolist()
    assert found.targets.tolist() == case.targets.tolist()
    assert found.predicted.tolist() == case.order[:, 0].tolist()
    np.testing.assert_allclose(found.confidence, np.exp(case.log_p[rows, case.order[:, 0]]), atol=1e-6)
    np.testing.assert_allclose(found.loss, -case.log_p[rows, case.targets], rtol=1e-5, atol=1e-5)
    # the worst mistakes: wrong all of them, the most confident ones, from the most confident on
    wrong = np.flatnonzero(case.order[:, 0] != case.targets)
    assert len(report.mistakes) == len(set(report.mistakes)) == min(MISTAKES, len(wrong))
    assert set(report.mistakes) <= set(wrong.tolist())
    confidence = found.confidence[report.mistakes]
    assert (np.diff(confidence) <= 0).all()
    assert confidence.tolist() == sorted(found.confidence[wrong].tolist(), reverse=True)[:MISTAKES]
    # the class that others are most often taken for
    counts = confusion_matrix(case.targets, case.order[:, 0], labels=range(case.classes))
    np.fill_diagonal(counts, 0)
    for entry, others in zip(report.classes, counts):
        assert (entry.mistaken_for is None) == (others.sum() == 0)
        if entry.mistaken_for is not None:
            assert entry.mistaken_for == (case.names[others.argmax()], others.max())


@given(
    st.integers(1, 9),
    st.integers(2, 7),
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    st.sampled_from([0.1, 10.0, 200.0]),
)
def test_mirrored_images_count_as_much_as_the_others(images, classes, size, spread):
    torch.manual_seed(images)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size[0] * size[1], classes)).double()
    model[1].weight.data.mul_(spread)
    pictures = torch.randn(images, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        found = MirrorMean(model)(pictures)
        views = torch.stack([model(pictures), model(pictures[..., torch.arange(size[1] - 1, -1, -1)])])
        expected = views.softmax(2).mean(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.softmax(1).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.double().logsumexp(1), torch.zeros(images).double(), rtol=0, atol=1e-5)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 5)), min_size=1, max_size=9))
def test_images_a_second_leave_out_the_first_batch(batches):
    """Its workers start and its kernels warm up in that time; there may be no other batch."""
    clock = SimpleNamespace(now=100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_module.time, "perf_counter", lambda: clock.now)
        collector = Collector()
        for images, seconds in batches:
            clock.now += seconds
            index = torch.arange(images)
            collector(index, index % 3, torch.zeros(images, 3), torch.zeros(images))
        found = collector.finish().images_per_second
    counted = batches[1:] or batches
    assert found == pytest.approx(sum(n for n, _ in counted) / sum(s for _, s in counted))


# --------------------------------------------------------------------------------------------------- real files
NAMES = ["a, b", "c", 'd "e"', "f", "g", "h", "i"]  # comma and quotes: they stand in CSV files
SIDE = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps on noisy blobs of seven classes; of class f there is nothing to test on."""
    home, random = tmp_path_factory.mktemp("report"), np.random.default_rng(3)
    blobs = random.integers(60, 196, (len(NAMES), SIDE, SIDE))
    for split, number in (("train", 20), ("test", 11)):
        for i, name in enumerate(NAMES):
            if split == "test" and name == "f":
                continue
            (home / "images" / split / name).mkdir(parents=True)
            for j in range(number + i):
                noise = random.integers(-60, 61, (SIDE, SIDE))
                picture = Image.fromarray((blobs[i] + noise).clip(0, 255).astype(np.uint8))
                picture.save(home / "images" / split / name / f"{j}.png")
    done = vit_train_here(
        *("data=imagefolder", "data.root=images", "data.in_channels=1", f"data.img_size={SIDE}"),
        *("model=vit_digits", "model.depth=1", "augment=none", "data.num_workers=0", "data.batch_size=40"),
        *("trainer.max_steps=6", "optimizer.lr=0.003", "schedule=constant", "trainer.precision=fp32"),
        *("trainer.ema_decay=null", "tracker.tensorboard=false", "run_dir=run", "seed=3"),
        cwd=home,
    )
    assert done.code == 0, done.err
    return home / "run"


@pytest.mark.parametrize(("tta", "size"), [(None, 13), ("hflip", 1000)])
def test_every_figure_in_the_files_of_vit_eval(run, tta, size, tmp_path):
    """Recomputed from the image files: Pillow reads them, numpy normalises, the model answers in float64."""
    arguments = [run, "--out", tmp_path / "report", f"data.batch_size={size}"]
    done = typed_here(command.main, *arguments, *(["--tta", tta] if tta else []), cwd=run.parent)
    assert (done.code, done.err) == (0, "")
    trained = from_checkpoint(load_run(run, fits)[0], device=torch.device("cpu"))
    model, names = trained.model.double(), trained.class_names
    assert names == sorted(NAMES)
    files = sorted((run.parent / "images" / "test").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])[:, None] / 255
    images = torch.from_numpy((pixels - trained.mean[0]) / trained.std[0])
    with torch.no_grad():
        log_p = log_softmax(model(images).numpy())
        if tta:
            mirrored = log_softmax(model(images.flip(3)).numpy())
            log_p = np.log((np.exp(log_p) + np.exp(mirrored)) / 2)
    targets = np.array([names.index(file.parent.name) for file in files])
    order = ranking(log_p)
    assert 0.2 < (order[:, 0] == targets).mean() < 0.9, "a figure of 0 or 1 would tell little"
    assert not near_an_edge(log_p, order)

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    expected = figures_of(targets, order, log_p, names)
    check_figures(report, expected)
    assert (report["split"], report["tta"], report["step"]) == ("test", tta, trained.step)
    assert report["per_class"]["f"]["images"] == 0
    with (tmp_path / "report" / "confusion.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table == [
        ["true class", *names],
        *([name, *map(str, counts)] for name, counts in zip(names, expected["counts"])),
    ]
    confidence = np.exp(log_p.max(1))
    losses = -log_p[np.arange(len(files)), targets]
    with (tmp_path / "report" / "predictions.csv").open(newline="") as file:
        rows = {Path(row["file"]).resolve(): row for row in csv.DictReader(file)}
    assert sorted(rows) == [file.resolve() for file in files]
    for i, file in enumerate(files):
        row = rows[file.resolve()]
        assert (row["true"], row["predicted"]) == (names[targets[i]], names[order[i, 0]])
        assert float(row["confidence"]) == pytest.approx(confidence[i], abs=2e-6)
        assert float(row["loss"]) == pytest.approx(losses[i], rel=2e-5, abs=2e-6)
    wrong = [i for i in np.argsort(-confidence) if order[i, 0] != targets[i]][:MISTAKES]
    assert report["mistakes"] == [
        {
            "file": rows[files[i].resolve()]["file"],
            "true": names[targets[i]],
            "predicted": names[order[i, 0]],
            "confidence": pytest.approx(confidence[i], abs=1e-6),
        }
        for i in wrong
    ]
