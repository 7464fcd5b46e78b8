"""Which installed fonts show a text: names of classes and folders may be in any script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache


def fonts_for(texts: Iterable[str]) -> list[str] | None:
    """Font families that together have a glyph for every character, or None where none do."""
    missing = {ord(c) for text in texts for c in text if not c.isspace()} | {ord(".")}
    families = []
    for family, path in _installed_fonts():
        covered = missing & _glyphs(path)
        if covered:
            families.append(family)
            missing -= covered
        if not missing:
            return families
    return None


def with_glyphs(text: str) -> str:
    """The text with a question mark for each character that no installed font has."""
    if fonts_for([text]):
        return text
    missing = {c for c in set(text) if not fonts_for([c])}
    return "".join("?" if c in missing else c for c in text)


def shown_names(names: Sequence[str]) -> list[str]:
    """These names, or their numbers where the installed fonts lack a glyph."""
    return [*names] if fonts_for(names) else [*map(str, range(len(names)))]


@lru_cache(maxsize=1)
def _installed_fonts() -> list[tuple[str, str]]:
    from matplotlib import font_manager

    found: dict[str, str] = {}
    for entry in font_manager.fontManager.ttflist:
        # Last Resort covers all of Unicode with boxes that say nothing
        readable = "lastresort" not in entry.name.replace(" ", "").lower()
        if readable and entry.style == "normal" and entry.weight in (400, "normal", "regular", "book"):
            found.setdefault(entry.name, entry.fname)
    # matplotlib's own font first: most names need no other
    return sorted(found.items(), key=lambda item: (item[0] != "DejaVu Sans", item[0]))


@lru_cache(maxsize=64)
def _glyphs(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()
