"""What `vit-data` says about a folder of images: the verdict, what is wrong, and what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vit_train.data import DataModule
from vit_train.data.folder.check import Finding, Item, Report
from vit_train.data.transforms.stats import ChannelStats
from vit_train.text import count, one_line

_MOST_ITEMS = 20  # of one finding; and classes
_MOST_FILES = 3  # of one item
_BAR_WIDTH = 24
_INDENT = len("problem  ")

_MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey, transparency",
    "I;16": "grey, 16 bits",
    "I;16B": "grey, 16 bits",
    "I": "grey, 32 bits",
    "F": "grey, floats",
    "P": "palette",
    "PA": "palette, transparency",
    "RGB": "colour",
    "RGBA": "colour, transparency",
    "CMYK": "print colours",
    "YCbCr": "video colours",
    "LAB": "Lab colours",
}


def check_tables(report: Report) -> Iterator[RenderableType]:
    """What `vit-data check` prints, the most important first."""
    yield _verdict(report)
    num_classes = len(next(iter(report.counts.values()), {}))
    yield Text(
        f"{one_line(report.root)}: {count(report.num_images, 'image')} in "
        f"{count(num_classes, 'class')}, {decimal(report.num_bytes)}"
    )
    for finding in report.problems:
        yield _finding("problem", "bold red", finding)
    for finding in report.warnings:
        yield _finding("warning", "bold yellow", finding)
    if report.notes:
        notes = Finding("note", "training would say", tuple(Item((note,)) for note in report.notes))
        yield _finding("note", "bold", notes)
    if report.counts:
        yield Text()
        yield _class_table(report.counts)
    if report.shorter_sides:
        yield _histogram("shorter side", report.shorter_sides, lambda label: label, _extremes(report))
    if report.modes:
        yield _histogram("stored as", report.modes, lambda mode: f"{mode}  {_MODES.get(mode, '')}".rstrip())


def stats_table(stats: ChannelStats, split: str, data: DataModule) -> Table:
    """What `vit-data stats` prints: of a split, beside what `data` uses where nothing is typed."""
    names = ("grey",) if len(stats.mean) == 1 else ("red", "green", "blue")
    table = _table(f"{stats.num_images:,} {split} images")
    for name in names:
        table.add_column(name, justify="right")
    for label, own, default in (("mean", stats.mean, data.mean), ("std", stats.std, data.std)):
        table.add_row(label, *(f"{value:.4f}" for value in own))
        difference = [value - usual for value, usual in zip(own, default)]
        table.add_row("  less ImageNet's", *(f"{value:+.4f}" for value in difference), style="dim")
    return table


def _verdict(report: Report) -> Text:
    problems = count(len(report.problems), "problem")
    warnings = count(len(report.warnings), "warning")
    if report.problems:
        return Text(f"{problems} would break training, {warnings}", style="bold red")
    if report.warnings:
        return Text(f"nothing would break training, {warnings}", style="bold yellow")
    return Text("nothing would break training, no warnings", style="bold green")


def _finding(label: str, style: str, finding: Finding) -> RenderableType:
    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_column(width=_INDENT - 2)
    head.add_row(Text(label, style=style), Text(one_line(finding.text)))
    items = Table.grid(padding=(0, 2, 0, 0))
    items.add_column(overflow="fold")
    if any(item.detail for item in finding.items):
        items.add_column(overflow="fold", style="dim")
    for item in finding.items[:_MOST_ITEMS]:
        items.add_row(*(Text(text) for text in (_files(item), one_line(item.detail)) if text))
    hidden = len(finding.items) - _MOST_ITEMS
    if hidden > 0:
        items.add_row(Text(f"and {hidden:,} more (--json lists all)"))
    return Group(Text(), head, Padding(items, (0, 0, 0, _INDENT), expand=False))


def _files(item: Item) -> str:
    shown = " = ".join(one_line(file) for file in item.files[:_MOST_FILES])
    hidden = len(item.files) - _MOST_FILES
    return f"{shown} = {hidden:,} more" if hidden > 0 else shown


def _class_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    splits = list(counts)
    bar_of = splits[0]
    labels = list(counts[bar_of])
    if len(labels) > _MOST_ITEMS:
        labels.sort(key=lambda label: -counts[bar_of][label])
        half = _MOST_ITEMS // 2
        rows: Sequence[str | None] = [*labels[:half], None, *labels[-half:]]
    else:
        rows = labels
    table = _table("class")
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
    table.add_column(f"in {bar_of}" if len(splits) > 1 else "", width=_BAR_WIDTH)
    most = max(counts[bar_of].values(), default=0)
    for label in rows:
        if label is None:
            table.add_row(Text(f"{len(labels) - _MOST_ITEMS:,} classes between", style="dim"))
            continue
        numbers = [f"{counts[split][label]:,}" for split in splits]
        table.add_row(Text(one_line(label)), *numbers, _bar(counts[bar_of][label], most))
    if len(labels) > 1:
        table.add_section()
        table.add_row(
            Text("all", style="bold"),
            *(Text(f"{sum(counts[split].values()):,}", style="bold") for split in splits),
        )
    return table


def _histogram(
    title: str, counts: Mapping[str, int], label: Callable[[str], str], extra: str = ""
) -> RenderableType:
    table = _table(title)
    table.add_column("images", justify="right")
    table.add_column("", width=_BAR_WIDTH)
    most = max(counts.values())
    for key, number in counts.items():
        table.add_row(label(key), f"{number:,}", _bar(number, most))
    return Group(Text(), table, Text(extra)) if extra else Group(Text(), table)


def _table(title: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(title, overflow="fold")
    return table


def _bar(value: int, most: int) -> Bar:
    return Bar(max(most, 1), 0, value, width=_BAR_WIDTH, color="cyan")


def _extremes(report: Report) -> str:
    assert report.smallest is not None
    assert report.largest is not None
    low, high = (" x ".join(f"{side:,}" for side in size) for size in (report.smallest, report.largest))
    return f"all are {low} pixels" if low == high else f"from {low} to {high} pixels"
