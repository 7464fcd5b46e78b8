"""What happens to one image on the CPU: PIL image in, uint8 (C, H, W) tensor out.

Every factory takes the image size first (it comes from the data) and scalars by keyword (they come from
`augment.sample`). Random draws come from torch's default generator, which the dataset seeds per sample.

What a factory returns also says how large it needs an image to be, `least_side`, so that `decode` may read a
large JPEG at a reduced size. A transform of your own need not say it, and then gets every pixel of the file;
it may return a PIL image as well.

Images are resized as uint8 tensors: torch's kernel computes in integers as Pillow's does, gives the same
within one level where a photograph is made smaller, and takes a fifth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Ge, Le
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vit_train.construct import Probability, Ratios, Shares
from vit_train.data.transforms.decode import EXTENT

SampleTransform: TypeAlias = Callable[[Image.Image], Image.Image | Tensor]

# Bicubic with antialiasing, in training and evaluation alike: what DeiT's and Swin's own recipes use.
_BICUBIC = v2.InterpolationMode.BICUBIC

_MOST_OBLONG = 16  # times as long as wide, far beyond what the centre crop keeps

# The share of the resized shorter side that the centre crop keeps (256 -> 224, as since AlexNet). Small
# images are cropped at their own size: at 32 pixels every one of them counts.
_CROP_FRACTION = 0.875
_CROP_FROM_SIZE = 64

# Pixels a side that an image is to keep, at least, for each of the result. A JPEG decoded at half its size is
# not one that the bicubic filter halved, but what passes both looks the same: at 224 pixels, against reading
# every pixel, the median PSNR over 16 photographs (and the least, of a painter's canvas) is 45 dB (35) with
# 1, 51 (41) with 1.5, 54 (44) with 2; bilinear instead of bicubic makes 47 (39) (scripts/bench_decode.py
# quality). Pillow's thumbnails keep 2 as well.
_REDUCING_GAP = 2

# What moves in from outside, by mode: ImageNet's mean, as in timm's and DeiT's recipes, and its grey
_FILL = {"RGB": (124, 116, 104), "L": (115,)}
_NUM_MAGNITUDES = 31  # of RandAugment: 0 changes nothing (but for operations without a strength), 30 most


@dataclass(frozen=True)
class Steps:
    """Transforms one after another.

    Args:
        transforms: in this order; the first takes a PIL image, the last returns a uint8 (C, H, W) tensor.
        least_side: pixels that the shorter side of an image should have at least. A larger image may come
            reduced, as long as it has these.
    """

    transforms: tuple[Callable[[Any], Any], ...]
    least_side: int

    def __call__(self, image: Image.Image) -> Tensor:
        result: Any = image
        for transform in self.transforms:
            result = transform(result)
        assert isinstance(result, Tensor), "the last one makes a tensor"
        return result


def plain(img_size: int, *, resize: Literal["crop", "squash"]) -> Steps:
    """No randomness: what evaluation sees, and training without augmentation.

    Args:
        img_size: side of the result in pixels.
        resize: "crop" scales the shorter side to img_size / 0.875 (below 64 pixels to img_size itself) and
            keeps the centre; "squash" scales both sides to img_size, changing the aspect ratio.
    """
    if resize == "squash":
        return Steps((partial(_resize, size=[img_size, img_size]),), _REDUCING_GAP * img_size)
    shorter = shorter_side(img_size)
    resize_whole = partial(_resize, size=[shorter])
    return Steps((_cut_ends, resize_whole, v2.CenterCrop(img_size)), _REDUCING_GAP * shorter)


def _resize(image: Image.Image, *, size: list[int]) -> Tensor:
    """v2.Resize, but of the picture alone where the image ends in padding (see `decode`)."""
    pixels, (width, height) = F.pil_to_tensor(image), image.info.get(EXTENT, image.size)
    if (width, height) == image.size:
        return F.resize(pixels, size, interpolation=_BICUBIC, antialias=True)
    to_width, to_height = size if len(size) == 2 else _whole(width, height, size[0])
    scales = to_height / height, to_width / width  # the same kernel, which would scale all that it is given
    return torch.ops.aten._upsample_bicubic2d_aa(pixels[None], (to_height, to_width), False, *scales)[0]


def _middle(width: float, height: float) -> tuple[int, int, float, float]:
    """Left, top, right, bottom of what is scaled: of 1 x 60,000 pixels all would be gigabytes, to be cut."""
    most = _MOST_OBLONG * min(width, height)
    left, top = (int(max(side - most, 0) // 2) for side in (width, height))
    return left, top, width - left, height - top  # as much from either end


def _cut_ends(image: Image.Image) -> Image.Image:
    left, top, right, bottom = _middle(*image.info.get(EXTENT, image.size))
    if not (left or top):
        return image
    part = image.crop((left, top, math.ceil(right), math.ceil(bottom)))
    part.info = {EXTENT: (right - left, bottom - top)}
    return part


def _whole(width: float, height: float, shorter: int) -> tuple[int, int]:
    """Width and height of a picture whose shorter side is resized, with the rounding of v2.Resize."""
    longer = int(shorter * max(width, height) / min(width, height))
    return (shorter, longer) if width <= height else (longer, shorter)


def shorter_side(img_size: int) -> int:
    return round(img_size / _CROP_FRACTION) if img_size >= _CROP_FROM_SIZE else img_size


def seen_box(
    width: int, height: int, *, img_size: int, resize: Literal["crop", "squash"]
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what `plain` shows to the model, in pixels of the image."""
    if resize == "squash":
        return 0.0, 0.0, float(width), float(height)
    first_x, first_y, last_x, last_y = _middle(width, height)
    seen_width, seen_height = last_x - first_x, last_y - first_y
    resized_width, resized_height = _whole(seen_width, seen_height, shorter_side(img_size))
    # and the rounding of v2.CenterCrop
    left, top = (round((side - img_size) / 2) for side in (resized_width, resized_height))
    x, y = seen_width / resized_width, seen_height / resized_height
    right, bottom = left + img_size, top + img_size
    return first_x + left * x, first_y + top * y, first_x + right * x, first_y + bottom * y


def resized_crop(
    img_size: int,
    *,
    scale: Shares,
    ratio: Ratios = (0.75, 1.3333),
    policy: Literal["rand", "trivial", "auto"] | None = None,
    num_ops: Annotated[int, Ge(0), Le(100)] = 2,
    magnitude: Annotated[int, Ge(0), Le(_NUM_MAGNITUDES - 1)] = 9,
    jitter: Probability = 0.0,
) -> Steps:
    """A random part of the image scaled to img_size (Szegedy et al. 2015), then a policy, then colour jitter.

    The policies are torchvision's, bilinear, with grey moving in from outside. On grey images they do the
    same, but for the operations on colour, which do nothing there.

    Args:
        img_size: side of the result in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height of the part.
        policy: "rand" is RandAugment (Cubuk et al. 2019), "trivial" TrivialAugmentWide (Mueller and Hutter
            2021), "auto" AutoAugment's policy for ImageNet (Cubuk et al. 2018).
        num_ops: operations per image of "rand".
        magnitude: their strength, 0 to 30.
        jitter: brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter.
    """
    crop = _CropToTensor(img_size, scale=scale, ratio=ratio, interpolation=_BICUBIC, antialias=True)
    transforms: list[Callable[[Any], Any]] = [crop]
    if policy is not None:
        transforms.append(_Policy(policy, num_ops=num_ops, magnitude=magnitude))
    if jitter:
        transforms.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    if len(transforms) > 1:  # both work on PIL images
        transforms = [crop, v2.ToPILImage(), *transforms[1:], v2.PILToTensor()]
    # The share of the shorter side that the smallest part can have: even that one needs no enlarging
    least_share = math.sqrt(scale[0] * min(ratio[0], 1 / ratio[1]))
    return Steps(tuple(transforms), max(_REDUCING_GAP * img_size, math.ceil(img_size / least_share)))


class _CropToTensor(v2.RandomResizedCrop):
    """Cuts the part out of the PIL image, so that nothing else is copied into a tensor, and scales that.

    A pixel that is partly padding is in no part.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        width, height = map(int, flat_inputs[0].info.get(EXTENT, flat_inputs[0].size))
        return super().make_params([torch.empty(height, width, device="meta")])

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Tensor:
        part = F.pil_to_tensor(F.crop(inpt, **params))
        return F.resize(part, self.size, interpolation=self.interpolation, antialias=self.antialias)


class _Policy:
    """One of torchvision's policies for PIL images of mode L and RGB.

    Bilinear. On PIL images, not on tensors: Pillow computes in integers, while torch's mean over the pixels
    (contrast) may differ in the last bit with the number of threads, so with the number of workers.
    """

    def __init__(self, policy: Literal["rand", "trivial", "auto"], *, num_ops: int, magnitude: int) -> None:
        make: Callable[..., Callable[[Image.Image], Image.Image]] = {
            "rand": partial(v2.RandAugment, num_ops, magnitude, num_magnitude_bins=_NUM_MAGNITUDES),
            "trivial": v2.TrivialAugmentWide,
            "auto": v2.AutoAugment,
        }[policy]
        bilinear = v2.InterpolationMode.BILINEAR
        self.by_mode = {mode: make(interpolation=bilinear, fill=fill) for mode, fill in _FILL.items()}

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.by_mode[image.mode](image)
