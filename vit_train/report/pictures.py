"""Pictures of what the model sees and says: a training batch, its predictions, where it looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from vit_train.inference.attention import NAMES, explain, methods, unchanged
from vit_train.report.fonts import shown_names
from vit_train.report.overlay import INK, RIGHT, WRONG, Explained, Page, Sheet, shown_name
from vit_train.system.precision import Precision, autocast
from vit_train.text import printable, short

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vit_train.data import DataModule, Split
    from vit_train.training.state import Transform
    from vit_train.training.strategy import SingleDevice

_SHOWN, _EXPLAINED = 64, 8
_MIN_SIDE = 64  # pixels a picture is enlarged to, so that 8-pixel digits can be looked at


def _as_shown(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised (B, C, H, W) -> (B, 3, h, w) in [0, 1], enlarged without smoothing."""
    images = images.float().cpu()
    offset, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    pixels = (images * scale + offset).clamp(0, 1)
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    factor = max(1, -(-_MIN_SIDE // pixels.shape[-1]))
    return F.interpolate(pixels, scale_factor=factor, mode="nearest") if factor > 1 else pixels


def batch_grid(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The first 64 of a training batch (B, C, H, W), exactly as the model gets it: (3, H, W) in [0, 1]."""
    return make_grid(_as_shown(images[:_SHOWN], mean, std), nrow=8, padding=2)


@torch.no_grad()
def sheet_of_predictions(
    model: nn.Module, data: DataModule, transform: Transform, strategy: SingleDevice, precision: Precision
) -> NDArray[np.uint8] | None:
    """`prediction_sheet` of test (else validation) images; None without any.

    Args:
        model: the weights that are shown.
        data: of the run.
        transform: of evaluation.
        strategy: brings the images to the model.
        precision: of the forward pass.
    """
    split = _first_of(data, "test", "val")
    if split is None:
        return None
    batch = strategy.to_device(data.examples(split, _SHOWN))
    images, targets = transform(batch, 0, 0)
    with autocast(precision, strategy.device):
        logits = model.eval()(images)
    probabilities = logits.float().softmax(1)
    return prediction_sheet(images, targets, probabilities, data.class_names, data.mean, data.std)


def sheet_of_attention(
    model: nn.Module, data: DataModule, transform: Transform, strategy: SingleDevice, precision: Precision
) -> NDArray[np.uint8] | None:
    """Where the model looks in up to 8 validation (else test) images, always the same ones.

    Args: as of `sheet_of_predictions`. None without such images, or for a family unknown to `methods`.
    """
    split = _first_of(data, "val", "test")
    if split is None or not methods(model):
        return None
    batch = data.examples(split, _EXPLAINED)
    images, targets = transform(strategy.to_device(batch), 0, 0)
    method, *_ = methods(model)
    sheet = Sheet()
    # one at a time: this runs beside a training that may have left little memory
    for pixels, single, truth in zip(batch.images, images.split(1), targets.tolist()):
        with unchanged(model), torch.no_grad(), autocast(precision, strategy.device):
            confidence, predicted = model.forward(single).float().softmax(1).max(1)
        values = explain(model, single, predicted, method=method).whole[0].cpu().numpy()
        image, guess, share = to_pil_image(pixels), int(predicted), float(confidence)
        right = guess == truth
        sheet.add(
            Explained(
                image,
                (0.0, 0.0, image.width, image.height),
                {"": values},
                title=f"{shown_name(data.class_names[guess], guess)} {share:.0%}",
                note="" if right else f"is {shown_name(data.class_names[truth], truth)}",
                color=RIGHT if right else WRONG,
            )
        )
    return sheet.draw(f"{NAMES[method]}, {split} split")


def _first_of(data: DataModule, *splits: Split) -> Split | None:
    """The first of these splits that has images."""
    return next((split for split in splits if data.sizes[split]), None)


def prediction_sheet(
    images: Tensor,
    targets: Tensor,
    probabilities: Tensor,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.uint8]:
    """Up to 64 images titled with what was predicted: green where right, red (with the truth) where not.

    The picture is (height, width, 3).

    Args:
        images: (B, C, H, W) normalised.
        targets: (B,) class ids.
        probabilities: (B, K).
        class_names: in any script; numbers are shown where no installed font has the glyphs.
        mean, std: per channel, as used for normalisation.
    """
    names, captions, hits = shown_names(class_names), [], 0
    confidence, predicted = (x.tolist() for x in probabilities[:_SHOWN].float().cpu().max(1))
    for truth, guess, share in zip(targets.tolist(), predicted, confidence):
        hits += truth == guess
        lines = [f"{short(names[guess])} {share:.0%}"] + [f"is {short(names[truth])}"] * (truth != guess)
        captions.append([(line, RIGHT if truth == guess else WRONG) for line in lines])
    heading = f"{hits} of {len(captions)} right. Green: right, red: wrong, with the true class below."
    pixels = _as_shown(images[:_SHOWN], mean, std)
    return _sheet(pixels, captions, columns=8, cell=(150, 185), size=11, heading=heading)


def mistake_sheet(
    images: Tensor,
    targets: Sequence[int],
    predicted: Sequence[int],
    confidence: Sequence[float],
    class_names: Sequence[str],
) -> NDArray[np.uint8]:
    """Wrong answers, numbered from 1: five in a row, each with what was predicted and what it is.

    The picture is (height, width, 3).

    Args:
        images: uint8 (B, C, H, W).
        targets, predicted: B class ids.
        confidence: of the predictions, 0 to 1.
        class_names: in any script; numbers are shown where no installed font has the glyphs.
    """
    channels, names = images.shape[1], shown_names([*map(printable, class_names)])
    captions = [
        [(f"{i}. {short(names[guess])} {share:.1%}", "#b3400a"), (f"is {short(names[truth])}", "#24292f")]
        for i, (truth, guess, share) in enumerate(zip(targets, predicted, confidence), start=1)
    ]
    pixels = _as_shown(images / 255, (0.0,) * channels, (1.0,) * channels)
    return _sheet(pixels, captions, columns=5, cell=(264, 314), size=16)


def _sheet(
    pixels: Tensor,
    captions: Sequence[Sequence[tuple[str, str]]],
    *,
    columns: int,
    cell: tuple[int, int],
    size: int,
    heading: str = "",
) -> NDArray[np.uint8]:
    """Pictures (B, 3, h, w) in [0, 1] in rows, each with lines of text in a colour above it.

    Args:
        pixels, captions: what is shown.
        columns: most of a row.
        cell: width and height of a picture with its lines.
        size: height of a line.
        heading: stands above all.
    """
    columns, rows = min(columns, len(pixels)), -(-len(pixels) // columns)
    margin, above = cell[0] // 20, 40 if heading else 0
    side = cell[0] - 2 * margin
    page = Page(columns * cell[0], rows * cell[1] + above)
    page.write(heading, margin, 20, size=12.5, room=page.width - 2 * margin, color=INK)
    scaled = (255 * F.interpolate(pixels, size=(side, side))).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (picture, lines) in enumerate(zip(scaled, captions)):
        row, column = divmod(i, columns)
        x, y = column * cell[0] + margin, above + (row + 1) * cell[1] - side - margin
        page.put(picture, x, y)
        for number, (line, color) in enumerate(reversed(lines)):
            page.write(line, x, y - (0.85 + 1.25 * number) * size, size=size, room=math.inf, color=color)
    return page.draw()
