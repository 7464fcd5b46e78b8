"""Pictures of where a model looks: a map laid over the image it belongs to, alone or on a sheet.

A map covers only what the model saw of an image; the rest is shown dark. Every map has its own scale, from
its smallest to its largest value: the more, the more it covers of the image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vit_train.report.fonts import fonts_for, with_glyphs
from vit_train.text import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_MAX_WIDTH = 4096  # pixels of all panels of a row: a photograph beside its overlay keeps up to 2,048
_ENLARGED = 256  # pixels of the shorter side that a small image is enlarged towards, by a whole number
_TILE = 144  # side of an image on a sheet
_COLORS = "viridis"  # perceptually uniform, and told apart by the colour-blind
_COVER = 0.8  # opacity of the largest value; the smallest is transparent
_GREY = 0.8  # brightness the image keeps under a map, so that yellow stands out from white
_UNSEEN = "dark: not seen by the model"
INK, _FAINT = "#1f2328", "#59636e"
RIGHT, WRONG = "#1a7f37", "#cf222e"  # titles, as on the sheet of predictions
_TEXT = 1 / 24  # height of text over the width of a panel; all distances are multiples of it
SHEET = 64  # images a sheet holds


@dataclass(frozen=True)
class Explained:
    """An image and what was found in it.

    Attributes:
        image: of any size, mode L or RGB.
        box: the part of it that the model saw.
        maps: (h, w) each, spread over that part, under the names they are shown by, of one or more lines;
            the first one counts.
        title: what was predicted.
        note: a second, fainter line.
        color: of the title.
    """

    image: Image.Image
    box: Box
    maps: Mapping[str, NDArray[np.float32]]
    title: str
    note: str = ""
    color: str = INK


def place(values: NDArray[np.float32], size: tuple[int, int], box: Box) -> NDArray[np.float32]:
    """A map in the coordinates of its image, interpolated bilinearly between the centres of its cells.

    Args:
        values: (h, w).
        size: width and height of the image.
        box: the part of the image that the map covers.

    Returns:
        (height, width), NaN outside the box.
    """
    placed = np.full((size[1], size[0]), np.nan, dtype=np.float32)
    x0, y0, x1, y1 = _pixels(size, box)
    cells = []
    for first, last, start, end, number in zip((x0, y0), (x1, y1), box[:2], box[2:], values.shape[::-1]):
        per_pixel = number / (end - start)
        cells.append((max((first - start) * per_pixel, 0.0), min((last - start) * per_pixel, number)))
    (left, right), (top, bottom) = cells
    inside = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    resized = inside.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    placed[y0:y1, x0:x1] = np.asarray(resized)
    return placed


def _pixels(size: tuple[int, int], box: Box) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels whose centres are inside the box, at least one."""
    spans = []
    for start, end, side in zip(box[:2], box[2:], size):
        first = min(max(math.ceil(start - 0.5), 0), side - 1)
        spans.append((first, max(min(math.ceil(end - 0.5), side), first + 1)))
    (x0, x1), (y0, y1) = spans
    return x0, y0, x1, y1


def overlay(image: Image.Image, values: NDArray[np.float32], box: Box) -> NDArray[np.uint8]:
    """The image in grey under the colours of the map, dark where the model did not look: (height, width, 3).

    `values` (h, w) are spread over the box, the part of the image that the model saw.
    """
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    placed = place(values, image.size, box)
    low, high = float(values.min()), float(values.max())
    level = (placed - low) / (high - low) if high > low else np.where(np.isnan(placed), np.nan, 0.0)
    seen = ~np.isnan(level)
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    painted = np.where(seen[:, :, None], _painted(grey, np.nan_to_num(level)), 0.25 * grey[:, :, None] + 10)
    return painted.round().astype(np.uint8)


def _painted(grey: NDArray[np.float32], level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Levels between 0 and 1 over a grey image up to 255, (h, w) -> (h, w, 3); the smallest is clear."""
    from matplotlib import colormaps

    table = 255 * colormaps[_COLORS](np.arange(256))[:, :3].astype(np.float32)
    colors = table[(255 * level).round().clip(0, 255).astype(np.uint8)]
    cover = _COVER * level[:, :, None]
    return (1 - cover) * _GREY * grey[:, :, None] + cover * colors


def _framed(image: Image.Image, box: Box) -> NDArray[np.uint8]:
    """The image in RGB with a thin frame around what the model saw, where that is not all of it."""
    shown = image.convert("RGB")
    x0, y0, x1, y1 = inside = _pixels(image.size, box)
    if inside != (0, 0, *image.size):
        line = max(1, min(image.size) // 250)
        paper = ImageDraw.Draw(shown)  # dark beside light: one of them stands out from any picture
        paper.rectangle((x0, y0, x1 - 1, y1 - 1), outline="black", width=line)
        if min(x1 - x0, y1 - y0) > 4 * line:  # of a very long picture the model sees a few pixels
            inner = (x0 + line, y0 + line, x1 - 1 - line, y1 - 1 - line)
            paper.rectangle(inner, outline="white", width=line)
    return np.asarray(shown)


def picture(explained: Explained) -> NDArray[np.uint8]:
    """The image beside its overlays, (height, width, 3), at the image's own size.

    Small images are enlarged by a whole number, very large ones reduced: a row of panels has 4,096 pixels.
    """
    number = 1 + len(explained.maps)
    columns = number if number < 4 else math.ceil(math.sqrt(number))
    width, height = _panel_size(explained.image.size, columns)
    image, box = _resized(explained.image, explained.box, (width, height))
    panels = [("image", _framed(image, box))]
    panels += [(name, overlay(image, values, box)) for name, values in explained.maps.items()]
    if len(panels) > 1 and _pixels(image.size, box) != (0, 0, *image.size):
        name, first = panels[1]
        panels[1] = f"{name}\n{_UNSEEN}", first
    lines = max(name.count("\n") + 1 for name, _ in panels)

    text = max(13, round(_TEXT * min(width, 1.5 * height)))
    across, down = max(width, 14 * text), height + round((0.8 + 1.2 * lines) * text)
    page = Page(columns * (across + text) + text, round(4.4 * text) + -(-number // columns) * down)
    legend = page.legend(page.width - text, round(1.5 * text), size=0.85 * text)
    page.write(
        explained.title, text, 1.5 * text, size=1.3 * text, room=legend - 2 * text, color=explained.color
    )
    page.write(explained.note, text, 2.9 * text, size=0.85 * text, room=page.width - 2 * text, color=_FAINT)
    for i, (name, panel) in enumerate(panels):
        row, column = divmod(i, columns)
        x, y = text + column * (across + text), 4 * text + row * down
        page.put(panel, x, y)
        for number, line in enumerate(name.split("\n")):
            below = y + height + (0.9 + 1.2 * number) * text
            page.write(line, x, below, size=0.85 * text, room=across, color=_FAINT)
    return page.draw()


class Sheet:
    """Up to 64 images, each beside its overlay, on one picture; keeps them small as they come."""

    def __init__(self) -> None:
        self.tiles: list[tuple[NDArray[np.uint8], NDArray[np.uint8], Explained]] = []

    def add(self, explained: Explained) -> None:
        """One more; none after the 64th."""
        if len(self.tiles) == SHEET:
            return
        factor = _TILE / max(explained.image.size)
        width, height = (max(1, round(side * factor)) for side in explained.image.size)
        image, box = _resized(explained.image, explained.box, (width, height))
        values = next(iter(explained.maps.values()))
        about = Explained(image, box, {}, explained.title, explained.note, explained.color)
        self.tiles.append((_framed(image, box), overlay(image, values, box), about))

    def draw(self, heading: str) -> NDArray[np.uint8]:
        """The sheet, (height, width, 3), with a heading above all."""
        columns = min(4, len(self.tiles))
        across, down, gap = 2 * _TILE + 4, _TILE + 40, 20
        page = Page(columns * (across + gap) + gap, 44 + -(-len(self.tiles) // columns) * (down + 10) + 6)
        legend = page.legend(page.width - gap, 22, size=11) if columns > 1 else page.width
        if any(_pixels(a.image.size, a.box) != (0, 0, *a.image.size) for _, _, a in self.tiles):
            heading += f" ({_UNSEEN})"
        page.write(heading, gap, 22, size=15, room=legend - 2 * gap, color=INK)
        for i, (image, painted, about) in enumerate(self.tiles):
            row, column = divmod(i, columns)
            x, y = gap + column * (across + gap), 44 + row * (down + 10)
            page.write(about.title, x, y + 8, size=13, room=across, color=about.color)
            page.write(about.note, x, y + 25, size=11, room=across, color=_FAINT)
            width = image.shape[1]
            x, y = x + (_TILE - width) // 2, y + 38
            page.put(image, x, y)
            page.put(painted, x + _TILE + 4, y)
        return page.draw()


@dataclass
class Page:
    """White paper for pictures at exact pixels, and text."""

    width: int
    height: int
    texts: list[tuple[str, float, float, float, float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = np.full((self.height, self.width, 3), 255, dtype=np.uint8)

    def put(self, picture: NDArray[np.uint8], x: int, y: int) -> None:
        self.pixels[y : y + picture.shape[0], x : x + picture.shape[1]] = picture

    def write(self, text: str, x: float, y: float, *, size: float, room: float, color: str) -> None:
        """One line `size` pixels high, centred at height y; cut where it is wider than `room`."""
        self.texts.append((printable(" ".join(text.split())), x, y, size, room, color))

    def legend(self, right: int, y: int, *, size: float) -> float:
        """The colours from less to more, ending at `right`; returns where it starts."""
        width, height = round(9 * size), round(0.8 * size)
        level = np.linspace(0, 1, width, dtype=np.float32)[None].repeat(height, 0)
        bar = _painted(np.full_like(level, 200), level)
        start = right - width - 3 * size
        self.put(bar.round().astype(np.uint8), round(start), y - height // 2)
        self.write("more", right - 2.6 * size, y, size=size, room=3 * size, color=_FAINT)
        self.write("less", start - 2.5 * size, y, size=size, room=3 * size, color=_FAINT)
        return start - 2.5 * size

    def draw(self) -> NDArray[np.uint8]:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        dpi = 64  # a power of two: pixels / dpi * dpi is exact
        figure = Figure(figsize=(self.width / dpi, self.height / dpi), dpi=dpi)
        canvas = FigureCanvasAgg(figure)
        figure.figimage(self.pixels, 0, 0, origin="upper")
        for text, x, y, size, room, color in self.texts:
            shown = with_glyphs(text)
            line = figure.text(
                x / self.width,
                1 - y / self.height,
                shown,
                fontsize=size * 72 / dpi,
                color=color,
                va="center_baseline",
                family=fonts_for([shown]),
                parse_math=False,
            )
            while (wide := line.get_window_extent(canvas.get_renderer()).width) > room and len(shown) > 4:
                shown = shown[: max(1, min(len(shown) - 4, int(len(shown) * room / wide) - 3))]
                line.set_text(shown := f"{shown.rstrip()}...")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _panel_size(size: tuple[int, int], columns: int) -> tuple[int, int]:
    """Width and height an image is shown at."""
    longest = _MAX_WIDTH // columns
    if max(size) > longest:
        width, height = (max(1, round(side * longest / max(size))) for side in size)
        return width, height
    factor = max(1, min(_ENLARGED // min(size), longest // max(size)))
    return size[0] * factor, size[1] * factor


def _resized(image: Image.Image, box: Box, size: tuple[int, int]) -> tuple[Image.Image, Box]:
    """The image at another size, and the box there."""
    if image.size == size:
        return image, box
    larger = size[0] > image.width
    resized = image.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)
    x, y = size[0] / image.width, size[1] / image.height
    return resized, (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def png(picture: NDArray[np.uint8]) -> bytes:
    """The picture (height, width, 3) as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def shown_name(name: str, class_id: int) -> str:
    """A class's name as a picture can show it: its number where no installed font has the glyphs."""
    return name if fonts_for([name]) else f"class {class_id}"
