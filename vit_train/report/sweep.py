"""The jobs of a sweep in one table, as the user sees them at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vit_train.text import count, one_line, percent

_FIGURES = {"best val": "best/val/top1", "last val": "last/val/top1", "test": "test/top1"}


class Job(NamedTuple):
    """One job of a sweep.

    Attributes:
        number: its place in the sweep; unless told otherwise also the name of its folder.
        overrides: key to value, as the sweeper wrote them.
        result: the figures of its result.json; None where it has none.
    """

    number: int
    overrides: Mapping[str, str]
    result: Mapping[str, Any] | None


def sweep_table(jobs: Sequence[Job]) -> Table:
    """Top-1 of each job, the best on validation first, then the means of what ran with several seeds."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    varied = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("job", no_wrap=True)
    table.add_column("values", overflow="fold")
    for heading in _FIGURES:
        table.add_column(f"{heading} %", justify="right", no_wrap=True)
    by_seed: dict[str, dict[str, Job]] = {}
    for job in sorted(jobs, key=_rank):
        table.add_row(str(job.number), _values(job, varied), *map(percent, _figures(job)))
        if job.result is not None and "seed" in job.overrides:
            same = by_seed.setdefault(_values(job, [key for key in varied if key != "seed"]), {})
            same.setdefault(job.overrides["seed"], job)
    table.add_section()
    for values, same in by_seed.items():
        if len(same) > 1:
            what = ", ".join(filter(None, [values, f"{len(same)} seeds"]))
            table.add_row("mean", what, *map(_spread, zip(*map(_figures, same.values()))))
    lost = sum(job.result is None for job in jobs)
    table.caption = count(len(jobs), "job") + (f", {lost} without a result" if lost else "")
    return table


def _rank(job: Job) -> tuple[bool, bool, float]:
    top1 = _figures(job)[0]
    return job.result is None, top1 is None, -(top1 or 0)


def _figures(job: Job) -> list[float | None]:
    return [None if job.result is None else job.result.get(key) for key in _FIGURES.values()]


def _values(job: Job, keys: Sequence[str]) -> str:
    return " ".join(one_line(f"{key}={job.overrides[key]}") for key in keys if key in job.overrides)


def _spread(top1: Sequence[float | None]) -> str:
    """Mean and sample deviation in percent, or a dash where one job has no figure."""
    known = [value for value in top1 if value is not None]
    return "-" if len(known) < len(top1) else f"{percent(mean(known))} +- {percent(stdev(known))}"
