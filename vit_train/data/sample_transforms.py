"""What happens to one image on the CPU: PIL image in, PIL image or uint8 (C, H, W) tensor out.

Every factory takes the image size first (it comes from the data) and scalars by keyword (they come from
`augment.sample`). Random draws come from torch's default generator, which the dataset seeds per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

SampleTransform: TypeAlias = Callable[[Image.Image], Image.Image | Tensor]

# Bicubic with antialiasing, in training and evaluation alike: what DeiT's and Swin's own recipes use.
_BICUBIC = v2.InterpolationMode.BICUBIC

# The share of the resized shorter side that the centre crop keeps (256 -> 224, as since AlexNet). Small
# images are cropped at their own size: at 32 pixels every one of them counts.
_CROP_FRACTION = 0.875
_CROP_FROM_SIZE = 64


def plain(img_size: int, *, resize: Literal["crop", "squash"]) -> SampleTransform:
    """No randomness: what evaluation sees, and training without augmentation.

    Args:
        img_size: side of the result in pixels.
        resize: "crop" scales the shorter side to img_size / 0.875 (below 64 pixels to img_size itself) and
            keeps the centre; "squash" scales both sides to img_size, changing the aspect ratio.
    """
    if resize == "squash":
        return v2.Resize((img_size, img_size), interpolation=_BICUBIC, antialias=True)
    whole = v2.Resize(shorter_side(img_size), interpolation=_BICUBIC, antialias=True)
    return v2.Compose([whole, v2.CenterCrop(img_size)])


def shorter_side(img_size: int) -> int:
    return round(img_size / _CROP_FRACTION) if img_size >= _CROP_FROM_SIZE else img_size


def seen_box(
    width: int, height: int, *, img_size: int, resize: Literal["crop", "squash"]
) -> tuple[float, float, float, float]:
    """The part of an image that `plain` shows to the model, in pixels of that image.

    Args:
        width: of the image.
        height: of the image.
        img_size: side of what the model gets, in pixels.
        resize: as for `plain`.

    Returns:
        left, top, right, bottom.
    """
    if resize == "squash":
        return 0.0, 0.0, float(width), float(height)
    # the sizes and the rounding of v2.Resize and v2.CenterCrop
    shorter = shorter_side(img_size)
    longer = int(shorter * max(width, height) / min(width, height))
    resized_width, resized_height = (shorter, longer) if width <= height else (longer, shorter)
    left, top = (round((side - img_size) / 2) for side in (resized_width, resized_height))
    x, y = width / resized_width, height / resized_height
    return left * x, top * y, (left + img_size) * x, (top + img_size) * y


def shift_flip(img_size: int, *, max_shift: float, hflip_prob: float) -> SampleTransform:
    """Scales the shorter side to img_size, shifts at random with black moving in, mirrors at random.

    Args:
        img_size: side of the result in pixels.
        max_shift: largest shift as a fraction of the side: 0.125 is 4 pixels at 32.
        hflip_prob: probability of mirroring left to right.

    Raises:
        ValueError: a negative `max_shift`, or an `hflip_prob` outside 0 to 1.
    """
    if max_shift < 0:
        raise ValueError(f"max_shift must not be negative, got {max_shift}")
    _check_probability(hflip_prob)
    return v2.Compose(
        [
            v2.Resize(img_size, interpolation=_BICUBIC, antialias=True),
            v2.RandomCrop(img_size, padding=round(max_shift * img_size)),
            v2.RandomHorizontalFlip(hflip_prob),
        ]
    )


def resized_crop_flip(
    img_size: int, *, scale: tuple[float, float], ratio: tuple[float, float], hflip_prob: float
) -> SampleTransform:
    """A random part of the image scaled to img_size (Szegedy et al. 2015), mirrored at random.

    Args:
        img_size: side of the result in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height of the part.
        hflip_prob: probability of mirroring left to right.

    Raises:
        ValueError: a range that is not ascending within 0 < scale <= 1 or 0 < ratio, or an `hflip_prob`
            outside 0 to 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must ascend within 0 and 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio must ascend above 0, got {ratio}")
    _check_probability(hflip_prob)
    crop = v2.RandomResizedCrop(img_size, scale=scale, ratio=ratio, interpolation=_BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(hflip_prob)])


def _check_probability(hflip_prob: float) -> None:
    if not 0 <= hflip_prob <= 1:
        raise ValueError(f"hflip_prob must be within 0 and 1, got {hflip_prob}")
