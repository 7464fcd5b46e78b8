from __future__ import annotations

import itertools

import numpy as np
import pytest
from rich.console import Console

from vit_train.report.sweep import Job, sweep_table

KEYS = ("best/val/top1", "last/val/top1", "test/top1")


def job(number, result=None, **overrides):
    return Job(number, overrides, None if result is None else dict(zip(KEYS, result)))


def lines_of(jobs, width=110):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(sweep_table(jobs))
    return [line.split() for line in captured.get().splitlines() if line.strip()]


def test_the_best_comes_first_and_the_lost_last():
    jobs = [
        job(0, None, lr="1"),
        job(1, (None, None, 0.3), lr="2"),
        job(2, (0.81234, 0.7, 0.9), lr="3"),
        job(3, None, lr="4"),
        job(4, (None, None, 0.4), lr="5"),
        job(5, (0.9, 0.75, 1.0), lr="6"),
    ]
    head, _, *rows, end = lines_of(jobs)
    assert head == ["job", "values", "best", "val", "%", "last", "val", "%", "test", "%"]
    assert rows == [
        ["5", "lr=6", "90.00", "75.00", "100.00"],
        ["2", "lr=3", "81.23", "70.00", "90.00"],
        ["1", "lr=2", "-", "-", "30.00"],
        ["4", "lr=5", "-", "-", "40.00"],
        ["0", "lr=1", "-", "-", "-"],
        ["3", "lr=4", "-", "-", "-"],
    ]
    assert " ".join(end) == "6 jobs, 2 without a result"


@pytest.mark.parametrize("width", [80, 110])
def test_means_over_seeds(width):
    """Of what has the same values; a seed counts once, and a missing figure is not averaged."""
    rng = np.random.default_rng(0)
    figures = {pair: rng.random(3) for pair in itertools.product("ab", (3, 7, 11))}
    figures["b", 7][2] = np.nan
    jobs = [
        job(
            i,
            [None if np.isnan(x) else float(x) for x in figures[name, seed]],
            n=name,
            same="x",
            seed=str(seed),
        )
        for i, (name, seed) in enumerate([*figures, ("a", 7)])
    ]
    jobs += [job(7, None, n="c", same="x", seed="3"), job(8, (0.5, 0.5, 0.5), n="d", same="x", seed="3")]
    text = " ".join(word for line in lines_of(jobs, width) for word in line)
    means = text[text.index("mean") : text.index("9 jobs")].split("mean")[1:]
    expected = set()
    for name in "ab":
        top1 = 100 * np.stack([figures[name, seed] for seed in (3, 7, 11)])
        cells = [f"{m:.2f} +- {s:.2f}" for m, s in zip(top1.mean(axis=0), top1.std(axis=0, ddof=1))]
        expected.add(f"n={name}, 3 seeds {' '.join(cells)}".replace("nan +- nan", "-"))
    assert {mean.strip() for mean in means} == expected


def test_seeds_alone():
    *_, mean, end = lines_of([job(0, (0.5, 0.5, 0.5), seed="0"), job(1, (0.7, 0.5, 0.5), seed="1")])
    assert " ".join(mean) == "mean 2 seeds 60.00 +- 14.14 50.00 +- 0.00 50.00 +- 0.00"
    assert end == ["2", "jobs"]
    assert lines_of([job(0, (0.5,) * 3, seed="0"), job(1, (0.5,) * 3, seed="0")])[-2][0] == "1"


def test_many_long_values_fold_and_leave_the_figures_whole():
    jobs = [
        job(i, (0.97, 0.96, 1.0), **{f"trainer.some_long_key_{k}": f"value_{i}\n{k}" for k in range(9)})
        for i in range(12)
    ]
    rows = lines_of(jobs, width=70)
    assert sum(row[0].isdecimal() and row[-3:] == ["97.00", "96.00", "100.00"] for row in rows) == 12
