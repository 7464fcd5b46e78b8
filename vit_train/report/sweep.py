"""The jobs of a sweep side by side, as the user sees them at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vit_train.text import count, percent, printable

_FIGURES = {"best val": "best/val/top1", "last val": "last/val/top1", "test": "test/top1"}


class Job(NamedTuple):
    """One job of a sweep.

    Attributes:
        number: also the name of its folder.
        overrides: key to value, as typed.
        result: the figures of its result.json; None where it has none.
    """

    number: int
    overrides: Mapping[str, str]
    result: Mapping[str, Any] | None


def sweep_table(jobs: Sequence[Job]) -> Table:
    """Top-1 of each job, the best on validation first, then the means of what ran with several seeds."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    varied = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("job")
    for key in varied:
        table.add_column(printable(key), overflow="fold")
    for heading in _FIGURES:
        table.add_column(f"{heading} %", justify="right")
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in sorted(jobs, key=_rank):
        table.add_row(str(job.number), *_values(job, varied), *(percent(top1) for top1 in _figures(job)))
        if job.result is not None:
            groups.setdefault(tuple(_values(job, varied, seed="")), []).append(job)
    table.add_section()
    for same in groups.values():
        if "seed" in varied and len(same) > 1:
            spreads = map(_spread, zip(*map(_figures, same)))
            table.add_row("mean", *_values(same[0], varied, seed=f"{len(same)} seeds"), *spreads)
    lost = sum(job.result is None for job in jobs)
    table.caption = count(len(jobs), "job") + (f", {lost} without a result" if lost else "")
    return table


def _figures(job: Job) -> list[float | None]:
    return [None if job.result is None else job.result.get(key) for key in _FIGURES.values()]


def _rank(job: Job) -> float:
    top1 = _figures(job)[0]
    return 1.0 if top1 is None else -top1


def _values(job: Job, keys: Sequence[str], **instead: str) -> list[str]:
    return [printable({**job.overrides, **instead}.get(key, "")) for key in keys]


def _spread(top1: Sequence[float | None]) -> str:
    """Mean and sample deviation in percent, or a dash where one job has no figure."""
    known = [value for value in top1 if value is not None]
    return "-" if len(known) < len(top1) else f"{percent(mean(known))} +- {percent(stdev(known))}"
