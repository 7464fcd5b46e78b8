"""Pictures of what the model sees and says: a training batch, a sheet of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from vit_train.errors import printable
from vit_train.report.fonts import fonts_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vit_train.trainer import Trainer

_SHOWN = 64
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
    """A training batch exactly as the model gets it, as one (3, H, W) image in [0, 1].

    Args:
        images: (B, C, H, W) normalised; the first 64 are shown.
        mean: per channel, as used for normalisation.
        std: per channel.
    """
    return make_grid(_as_shown(images[:_SHOWN], mean, std), nrow=8, padding=2)


@torch.no_grad()
def sheet_of_predictions(trainer: Trainer) -> NDArray[np.uint8] | None:
    """`prediction_sheet` of test (else validation) images, by the weights that were tested."""
    from vit_train.precision import autocast

    data, device = trainer.parts.data, trainer.strategy.device
    splits: tuple[Literal["test", "val"], ...] = ("test", "val")
    split = next((name for name in splits if data.sizes[name]), None)
    if split is None:
        return None
    model = (trainer.model if trainer.ema is None else trainer.ema.module).eval()
    batch = trainer.strategy.to_device(data.examples(split, _SHOWN))
    images, targets = trainer.parts.eval_transform(batch, 0, 0)
    with autocast(trainer.precision, device):
        logits = model(images)
    probabilities = logits.float().softmax(1)
    return prediction_sheet(images, targets, probabilities, data.class_names, data.mean, data.std)


def prediction_sheet(
    images: Tensor,
    targets: Tensor,
    probabilities: Tensor,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.uint8]:
    """Up to 64 images titled with what was predicted: green where right, red (with the truth) where not.

    Args:
        images: (B, C, H, W) normalised.
        targets: (B,) class ids.
        probabilities: (B, K).
        class_names: in any script; numbers are shown where no installed font has the glyphs.
        mean: per channel, as used for normalisation.
        std: per channel.

    Returns:
        The picture (height, width, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _as_shown(images[:_SHOWN], mean, std).permute(0, 2, 3, 1).numpy()
    count, columns = len(shown), min(8, len(images))
    rows = -(-count // columns)
    families = fonts_for(class_names)
    names = list(class_names) if families else [str(i) for i in range(len(class_names))]
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows + 0.4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    # one pair of axes for all: 64 of them would take a second to make
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    confidence, predicted = probabilities.float().cpu().max(1)
    truths = targets.tolist()
    for i, (image, guess, share) in enumerate(zip(shown, predicted.tolist(), confidence.tolist())):
        row, column = divmod(i, columns)
        right = truths[i] == guess
        top = row + 0.22 + 0.2  # below the heading and two lines of title
        axes.imshow(
            image,
            extent=(column + 0.09, column + 0.91, top + 0.76, top),
            interpolation="nearest",
            aspect="auto",
        )
        axes.text(
            column + 0.5,
            top - 0.015,
            f"{short(names[guess])} {share:.0%}" + ("" if right else f"\nis {short(names[truths[i]])}"),
            ha="center",
            va="bottom",
            fontsize=8,
            linespacing=0.95,
            color="#1a7f37" if right else "#cf222e",
            family=families or ["DejaVu Sans"],
            parse_math=False,
        )
    axes.set(xlim=(0, columns), ylim=(rows + 0.22, 0))
    hits = int((predicted[:count] == targets[:count].cpu()).sum())
    heading = f"{hits} of {count} right. Green: right, red: wrong, with the true class below."
    axes.text(columns / 2, 0.12, heading, ha="center", va="center", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def mistake_sheet(
    images: Tensor,
    targets: Sequence[int],
    predicted: Sequence[int],
    confidence: Sequence[float],
    class_names: Sequence[str],
) -> NDArray[np.uint8]:
    """Wrong answers, numbered from 1: five in a row, each with what was predicted and what it is.

    Args:
        images: uint8 (B, C, H, W).
        targets: B class ids.
        predicted: B class ids.
        confidence: of the predictions, 0 to 1.
        class_names: in any script; numbers are shown where no installed font has the glyphs.

    Returns:
        The picture (height, width, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    channels = images.shape[1]
    shown = _as_shown(images / 255, (0.0,) * channels, (1.0,) * channels).permute(0, 2, 3, 1).numpy()
    printed = [printable(name).replace("\n", " ") for name in class_names]
    families = fonts_for(printed)
    names = printed if families else [str(i) for i in range(len(printed))]
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.62 * rows), dpi=120)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    for i, image in enumerate(shown):
        row, column = divmod(i, columns)
        left, top = column + 0.06, row + 0.2
        axes.imshow(
            image, extent=(left, left + 0.88, top + 0.74, top), interpolation="nearest", aspect="auto"
        )
        says = f"{i + 1}. {short(names[predicted[i]])} {confidence[i]:.1%}"
        for line, color, height in (
            (says, "#b3400a", 0.09),
            (f"is {short(names[targets[i]])}", "#24292f", 0.02),
        ):
            axes.text(
                left,
                top - height,
                line,
                ha="left",
                va="bottom",
                fontsize=9.5,
                color=color,
                family=families or ["DejaVu Sans"],
                parse_math=False,
            )
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def short(name: str, longest: int = 16) -> str:
    """The name, cut and marked as cut where it has more characters than `longest`."""
    return name if len(name) <= longest else f"{name[: longest - 1]}..."
