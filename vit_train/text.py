"""How things are said: names safe for a terminal, counts, shares, times, lists that are cut short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

NAMED = 5  # of many alike
_LONGEST = 10_000  # characters of a message: a hostile file may put megabytes into one


def printable(text: str) -> str:
    """The same text, safe for a terminal: names of files and classes may hold escape sequences.

    What is not printable but for line ends is written as its Python escape, and what is too long is cut.
    """
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shown)


def one_line(text: str) -> str:
    """`printable`, with line ends escaped too."""
    return printable(text).replace("\n", "\\n")


def count(number: int, one: str, many: str = "") -> str:
    """`1 image`, `1,000 images`, `3 classes`; `many` where it is another word."""
    many = many or (f"{one}es" if one.endswith("s") else f"{one}s")
    return f"{number:,} {one if number == 1 else many}"


def some(names: Sequence[object], *, of: int | None = None) -> str:
    """`a, b, c` or `a, b, c, d, e and 7 more`; `of` is how many there are where these are the first."""
    hidden = (len(names) if of is None else of) - NAMED
    more = f" and {hidden:,} more" if hidden > 0 else ""
    return ", ".join(str(name) for name in names[:NAMED]) + more


def short(name: str, longest: int = 16) -> str:
    """The name, cut and marked as cut where it has more characters than `longest`."""
    return name if len(name) <= longest else f"{name[: longest - 1]}..."


def percent(value: float | None) -> str:
    """97.22 for 0.9722, a dash for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def duration(seconds: float) -> str:
    """1.2s, 3m04s, 2h05m."""
    seconds = max(0.0, seconds)  # a clock may say -0.0
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def suggest(word: str, choices: Iterable[str], *, inside: str = "") -> str:
    """`"; did you mean 'x'?"` when a close match exists, upper and lower case aside, else an empty string.

    Args:
        word: what the user typed.
        choices: what would have been accepted.
        inside: the node they are keys of, which stands before the one suggested.
    """
    folded = {choice.casefold(): choice for choice in choices}
    close = [folded[each] for each in difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)]
    meant = f"{inside}.{close[0]}" if close and inside else "".join(close)
    return f"; did you mean {meant!r}?" if close else ""
