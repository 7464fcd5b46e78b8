"""Figures, charts and page of an evaluation, from made-up predictions."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console

from vit_train.report.evaluation_charts import confusion_chart, reliability_chart
from vit_train.report.evaluation_figures import calibration, evaluated, evaluation_json, evaluation_tables
from vit_train.report.evaluation_files import draw, write_report
from vit_train.report.evaluation_page import evaluation_page
from vit_train.report.pictures import mistake_sheet
from vit_train.training.evaluation import Evaluation, Predictions

HOSTILE = '<b>&"x'
ABOUT = {
    "split": "test",
    "data": "photos",
    "checkpoint": "run/checkpoints/step_00000010",
    "step": 10,
    "weights": "ema",
    "tta": None,
    "overrides": [],
    "notes": [],
    "device": "cpu",
    "precision": "bf16",
    "time": "2026-01-01T00:00:00+00:00",
    "dataset_fingerprint": "0" * 64,
}


def report_on(targets, predicted, names, confidence=None):
    targets, predicted = np.asarray(targets), np.asarray(predicted)
    number = len(targets)
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (targets, predicted), 1)
    confidence = np.linspace(0.5, 1, number) if confidence is None else np.asarray(confidence)
    right = float((targets == predicted).mean())
    return evaluated(
        Evaluation(loss=0.5, top1=right, top5=None, confusion=torch.tensor(counts), images=number),
        Predictions(np.arange(number), targets, predicted, confidence, 1 - confidence, 100.0),
        class_names=names,
        files=[f"photos/{names[target]}/{i}.jpg" for i, target in enumerate(targets)],
        about={**ABOUT},
    )


def made_up(classes, count=500):
    generator = np.random.default_rng(classes)
    targets = generator.integers(0, classes, count)
    predicted = np.where(generator.random(count) < 0.7, targets, generator.integers(0, classes, count))
    return report_on(targets, predicted, [f"class {i}" for i in range(classes)])


# ------------------------------------------------------------------------------------------------ the figures
def test_calibration_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(400, 4, generator=generator, dtype=torch.float64).mul(4).softmax(1)
    targets = torch.randint(4, (400,), generator=generator)
    confidence, predicted = probabilities.max(1)
    found = calibration(confidence.numpy(), (predicted == targets).numpy())
    expected = multiclass_calibration_error(probabilities, targets, num_classes=4, n_bins=15, norm="l1")
    assert found.ece == pytest.approx(expected.item(), abs=1e-6)
    assert found.ece > 0.05
    assert found.images.sum() == 400


def test_certainty_and_rounding_have_a_bin() -> None:
    found = calibration(np.array([1.0, 1.0000001, 0.0]), np.array([True, False, False]))
    assert (found.images[0], found.images[-1]) == (1, 2)
    assert found.ece == pytest.approx(2 / 3 * 0.5)
    assert np.isnan(found.accuracy[1:-1]).all()


def test_a_class_without_images_has_no_figures_and_lowers_no_mean() -> None:
    report = report_on([0, 0, 1, 1], [0, 0, 1, 2], ["a", "b", "absent", "never"])
    a, b, absent, never = report.classes
    assert (a.precision, a.recall, a.f1, a.mistaken_for) == (1, 1, 1, None)
    assert (b.precision, b.recall, b.mistaken_for) == (1, 0.5, ("absent", 1))
    for entry in (absent, never):
        assert (entry.images, entry.precision, entry.recall, entry.f1) == (0, None, None, None)
    assert report.macro == pytest.approx((1, 0.75, (1 + 2 / 3) / 2))
    assert evaluation_json(report)["per_class"]["absent"]["f1"] is None


def test_a_class_never_predicted_has_precision_0() -> None:
    report = report_on([0, 1], [0, 0], ["a", "b"])
    assert (report.classes[1].precision, report.classes[1].recall) == (0, 0)
    assert report.macro[0] == pytest.approx(0.25)


def test_the_most_confident_mistakes_come_first() -> None:
    report = report_on([0] * 60, [0, 1] * 30, ["a", "b"])
    assert report.mistakes == list(range(59, 9, -2))
    assert [entry["file"] for entry in evaluation_json(report)["mistakes"]][:2] == [
        "photos/a/59.jpg",
        "photos/a/57.jpg",
    ]


def shown(report):
    console = Console(width=110, record=True, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        for table in evaluation_tables(report):
            console.print(table)
    return capture.get()


def test_of_many_classes_the_table_shows_the_ends() -> None:
    report = made_up(40, 2000)
    text = shown(report)
    assert len(re.findall(r"^ ?class \d+", text, flags=re.MULTILINE)) == 20
    assert "the worst 15 and the best 5 of 40 classes" in text
    ordered = sorted(report.classes, key=lambda entry: entry.recall)
    for entry in (ordered[0], ordered[-1]):
        assert f"{entry.name} " in text
    assert len(re.findall(r"^ ?class \d+", shown(made_up(30)), flags=re.MULTILINE)) == 30


# ----------------------------------------------------------------------------------------------- the pictures
@pytest.mark.parametrize("classes", [2, 10, 31, 100])
def test_a_confusion_matrix_of_any_size_is_drawn(classes) -> None:
    picture = confusion_chart(np.eye(classes, dtype=np.int64), [f"class {i}" for i in range(classes)])
    assert min(picture.shape[:2]) > 300
    assert max(picture.shape) < 3000
    assert len(np.unique(picture)) > 20


def test_one_mistake_among_a_thousand_classes_can_be_seen() -> None:
    counts, names = np.eye(1000, dtype=np.int64) * 50, ["class"] * 1000
    right = confusion_chart(counts, names)
    counts[0, -1] = 1
    wrong = confusion_chart(counts, names)
    assert right.shape == wrong.shape
    changed = wrong[(right != wrong).any(-1)]
    assert len(changed) >= 4
    assert changed[:, 0].min() < 180, "hardly a shade"


@pytest.mark.parametrize("names", [["$x_y$", r"$\nosuch{$"], ["\U0010fffd", "b"], ["m" * 300, "\x1b[2J\n\n"]])
def test_names_are_drawn_as_they_are(names) -> None:
    picture = confusion_chart(np.eye(2, dtype=np.int64), names)
    assert max(picture.shape) < 1200
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert mistake_sheet(images, [0, 1], [1, 0], [0.9, 0.8], names).shape == (314, 528, 3)


def test_reliability_of_one_bin() -> None:
    picture = reliability_chart(calibration(np.ones(3), np.ones(3, dtype=bool)))
    assert min(picture.shape[:2]) > 500


# --------------------------------------------------------------------------------------------------- the page
class Page(HTMLParser):
    """Tags that are open, and everything the browser would fetch."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.addresses, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(report):
    return evaluation_page(
        report, {f"{name}.png": b"png" for name in ("confusion", "reliability", "mistakes")}
    )


def test_the_page_is_whole_and_fetches_nothing() -> None:
    text = page_of(made_up(40))
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) == 3
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert base64.b64decode(page.addresses[0].partition(",")[2]) == b"png"
    assert not {"script", "link", "iframe", "object", "base"} & {*page.tags}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "cpu, bf16" in page.text
    assert page.tags.count("details") == 2, "40 classes are not folded up"


def test_names_cannot_become_html() -> None:
    report = report_on([0, 1, 1], [1, 0, 0], [HOSTILE, "\x1b[2J\u202eb"])
    page = Page(page_of(report))
    assert page.open == []
    assert "b" not in page.tags
    assert f"{HOSTILE}/0.jpg" in page.text
    assert not {"\x1b", "\u202e"} & {*page.text}


def test_a_page_to_mail_does_not_say_where_things_lie() -> None:
    report = report_on([0, 1, 1], [0, 0, 1], ["a", "b"])
    report.about.update(
        checkpoint="/home/me/secret/run/checkpoints/step_00000010",
        data="/home/me/secret/photos",
        overrides=["data.root=/home/me/secret/photos"],
        notes=["/home/me/secret/photos has no test or val split"],
    )
    report.files[:] = [f"/home/me/secret/{file}" for file in report.files]
    page = Page(page_of(report))
    assert "secret" not in page.text
    assert page.text.count("run/checkpoints/step_00000010") == 2
    assert "data.root=photos" in page.text
    assert "photos has no test" in page.text
    assert "b/1.jpg" in page.text
    assert evaluation_json(report)["checkpoint"].startswith("/home/me/secret/run")
    report.about["checkpoint"] = "/home/me/secret/step_00000010"
    assert "secret" not in Page(page_of(report)).text


def test_which_classes_a_mean_is_of_is_said() -> None:
    report = report_on([0, 0], [0, 2], ["a", "b", "c"])
    assert "mean of the classes that have images" in Page(page_of(report)).text
    assert "macro F1: mean of the classes that have images" in shown(report)


def test_a_report_without_mistakes(tmp_path) -> None:
    report = report_on([0, 1], [0, 1], ["a", "b"])
    write_report(tmp_path / "new" / "report", report, draw(report, None))
    assert not (tmp_path / "new" / "report" / "mistakes.png").exists()
    assert "There are none" in Page((tmp_path / "new" / "report" / "report.html").read_text()).text


def test_answers_that_are_not_numbers_keep_the_report_json(tmp_path) -> None:
    report = report_on([0, 1], [0, 0], ["a", "b"])
    broken = Evaluation(float("nan"), 0.5, None, report.evaluation.confusion, 2)
    report = evaluated(broken, report.predictions, class_names=["a", "b"], files=report.files, about=ABOUT)
    text = json.dumps(evaluation_json(report), allow_nan=False)
    assert json.loads(text)["loss"] is None
