"""A trained model in a notebook: images in, labels, probabilities or features out.

Shapes: N images, C channels, S side in pixels, K classes, D width of the features.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vit_train import checkpoint
from vit_train.errors import CheckpointError, ConfigError, DataError
from vit_train.inference.trained import Trained, Weights, fits, from_checkpoint
from vit_train.runs.stored import trusted
from vit_train.system.precision import autocast
from vit_train.training.strategy import resolve_device

Picture: TypeAlias = str | Path | Image.Image | NDArray[np.uint8]

_BATCH = 64  # images per forward pass
_CHANNELS = (3, 4)
_DEEP = ("I", "F")  # nothing says what is white
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


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
    """A trained model that reads images as evaluation does.

    An image is the path of a file, a PIL image, or a uint8 array: (H, W), (H, W, 3), or (H, W, 4) with
    transparency.

    Attributes:
        model: in evaluation mode, on its device.
        class_names: K names in the order of the logits.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.model = trained.model
        self.class_names = trained.class_names
        self.device = next(self.model.parameters()).device
        self._normalize = trained.batch_transform().normalize

    def __repr__(self) -> str:
        side, name = self.trained.img_size, type(self.model).__name__
        return f"Predictor({name}, {len(self.class_names)} classes, {side} x {side} pixels, {self.device})"

    def transform(self, image: Picture) -> Tensor:
        """(C, S, S): an image as the model gets it, normalised and on its device.

        Raises:
            DataError: it cannot be read.
        """
        pixels = self.trained.read(_content(image))
        return self._normalize(pixels[None].to(self.device))[0]

    def predict(self, images: Picture | Iterable[Picture]) -> list[Answer]:
        """The answer for each image, in their order; of one image a list of one.

        Raises:
            DataError: one cannot be read.
        """
        logits = self._ask(self.model, images)
        return [
            Answer(self.class_names[int(row.argmax())], float(row.max()), row) for row in logits.softmax(1)
        ]

    def features(self, images: Picture | Iterable[Picture]) -> Tensor:
        """(N, D): what the head of the model sees of each image, on the CPU.

        Of a DeiT with two heads it is what the head of the labels sees.

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
            return self._ask(before_the_head, images)
        finally:
            hook.remove()

    @torch.no_grad()  # not inference mode: features may be trained on
    def _ask(self, question: Any, images: Picture | Iterable[Picture]) -> Tensor:
        one = isinstance(images, str | Path | Image.Image | np.ndarray)
        several: list[Any] = [images] if one or not isinstance(images, Iterable) else list(images)
        if not several:
            raise DataError("there is not one image")
        found = []
        for start in range(0, len(several), _BATCH):
            batch = torch.stack([self.transform(image) for image in several[start : start + _BATCH]])
            with autocast(self.trained.precision(), self.device):
                found.append(question(batch).float().cpu())
        return torch.cat(found)


def _content(image: Any) -> str | Path | bytes:
    """What `decode` takes: a path as it is, pixels as the PNG they would be in.

    Raises:
        DataError: it is not an image in one of the forms of `Predictor`.
    """
    if isinstance(image, str | Path):
        if Path(image).is_dir():
            raise DataError(f"{image} is a folder: give its files, such as Path(FOLDER).glob('*.jpg')")
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in _CHANNELS)
        image = Image.fromarray(image) if shaped else image
    if not isinstance(image, Image.Image) or image.mode in _DEEP:
        about = f" of mode {image.mode}" if isinstance(image, Image.Image) else ""
        if hasattr(image, "dtype"):
            about = f" of {image.dtype} and shape {tuple(image.shape)}"
        raise DataError(
            f"{type(image).__name__}{about} is not an image that can be used: give a path, a PIL image of 8 "
            "or 16 bits, or a uint8 array (H, W), (H, W, 3) or (H, W, 4)"
        )
    file = io.BytesIO()
    try:
        exif = image.getexif()  # it may turn the picture
        shown = image if image.mode in _IN_PNG else image.convert("RGB")
        shown.save(file, "PNG", exif=exif, compress_level=0)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"the PIL image cannot be used ({' '.join(str(error).split())})") from error
    return file.getvalue()


def load(
    run: str | Path, *, trust: str | Sequence[str] = (), weights: Weights = "auto", device: str = "auto"
) -> Predictor:
    """The trained model of a run; see `vit_train.load`."""
    if weights not in get_args(Weights):
        raise ConfigError(f"weights={weights!r} is not one of {', '.join(get_args(Weights))}")
    try:
        place = resolve_device(device, advice='device="auto"')
    except ValueError as error:
        raise ConfigError(str(error)) from error
    packages = trusted(trust, hydra=True)
    stored, problems = checkpoint.load_run(Path(run), partial(fits, trust=packages, hydra=True))
    for problem in problems:
        warnings.warn(f"{problem}; {stored.path.name} is used", stacklevel=3)
    try:
        return Predictor(from_checkpoint(stored, device=place, weights=weights, trust=packages))
    except CheckpointError as error:
        raise error.reworded(advice='give weights="raw"' if error.advice else "") from error
