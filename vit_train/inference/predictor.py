"""A trained model in a notebook: images in, labels, probabilities or features out.

Shapes: N images, C channels, S side in pixels, K classes, D width of the features.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vit_train import checkpoint
from vit_train.data.transforms.decode import decode
from vit_train.errors import ConfigError
from vit_train.inference.trained import Trained, Weights, fits, from_checkpoint
from vit_train.precision import autocast
from vit_train.runs.stored import trusted
from vit_train.training.strategy import resolve_device

Picture: TypeAlias = str | Path | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Attributes:
        label: the likeliest class.
        probability: its probability.
        probabilities: (K,) of all classes, in the order of `class_names`.
    """

    label: str
    probability: float
    probabilities: Tensor


class Predictor:
    """A trained model that takes images as `vit-predict` does.

    An image is the path of a file, a PIL image, or a uint8 array (H, W) or (H, W, 3).

    Attributes:
        model: in evaluation mode, on its device.
        class_names: K names in the order of the logits.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.model = trained.model
        self.class_names = trained.class_names
        self.device = next(self.model.parameters()).device
        self._to_pixels = trained.sample_transform()
        self._normalize = trained.batch_transform().normalize

    def transform(self, image: Picture) -> Tensor:
        """(C, S, S): an image as the model gets it, normalised and on its device.

        Raises:
            DataError: it cannot be read.
        """
        trained = self.trained
        name = None if isinstance(image, str | Path) else "the image"
        picture = decode(
            _content(image),
            name=name,
            background=trained.background,
            least_side=self._to_pixels.least_side,
            value_range=trained.value_range,
        ).convert("L" if trained.in_channels == 1 else "RGB")
        return self._normalize(self._to_pixels(picture)[None].to(self.device))[0]

    def predict(self, images: Picture | Sequence[Picture], *, batch_size: int = 64) -> list[Answer]:
        """The answer for each image, in their order; of one image a list of one.

        Args:
            images: one or several.
            batch_size: images per forward pass.

        Raises:
            DataError: one cannot be read.
        """
        rows = self._ask(self.model, images, batch_size).softmax(1)
        best = zip(rows, *(column.tolist() for column in rows.max(1)), strict=True)
        return [Answer(self.class_names[index], probability, row) for row, probability, index in best]

    def features(self, images: Picture | Sequence[Picture], *, batch_size: int = 64) -> Tensor:
        """(N, D): what the head of the model sees of each image, on the CPU.

        Args:
            images: one or several.
            batch_size: images per forward pass.

        Raises:
            DataError: one cannot be read.
            ConfigError: the model, which is not one of vit-train's, has no `head`.
        """
        head = getattr(self.model, "head", None)
        if not isinstance(head, nn.Module):
            raise ConfigError(f"{type(self.model).__name__} has no head, whose input would be the features")
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        def before_the_head(batch: Tensor) -> Tensor:
            self.model(batch)
            return seen.pop()

        try:
            return self._ask(before_the_head, images, batch_size)
        finally:
            hook.remove()

    @torch.inference_mode()
    def _ask(self, question: Any, images: Picture | Sequence[Picture], batch_size: int) -> Tensor:
        one = isinstance(images, str | Path | Image.Image | np.ndarray)
        several: Sequence[Any] = [images] if one else images  # type: ignore[assignment]
        found = []
        for start in range(0, len(several), batch_size):
            batch = torch.stack([self.transform(image) for image in several[start : start + batch_size]])
            with autocast(self.trained.precision(), self.device):
                found.append(question(batch).float().cpu())
        return torch.cat(found) if found else torch.empty(0, len(self.class_names))


def _content(image: Picture) -> str | Path | bytes:
    """What `decode` takes: a path as it is, pixels as the PNG they would be in."""
    if isinstance(image, str | Path):
        return image
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    picture.save(file, "PNG", exif=picture.getexif())
    return file.getvalue()


def load(
    run: str | Path, *, trust: str | Sequence[str] = (), weights: Weights = "auto", device: str = "auto"
) -> Predictor:
    """The trained model of a run; see `vit_train.load`."""
    packages = trusted(trust)
    stored, _ = checkpoint.load_run(Path(run), partial(fits, trust=packages))
    try:
        place = resolve_device(device, advice='device="auto"')
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Predictor(from_checkpoint(stored, device=place, weights=weights, trust=packages))
