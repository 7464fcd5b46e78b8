"""What happens to a whole batch on the device: uint8 images in, floats for the model out.

A batch transform is a module called `transform(batch, epoch, step) -> (images, targets)`: images float
(B, C, H, W), targets as in the batch or mixed to (B, K).

Every draw is a function of what it is for: those of a sample of (seed, epoch, index, draw), by integer
arithmetic that is the same on every device (`rng.uniform`); that of mixing of (seed, step). The functions
below do the same to every pixel as torchvision's do to one image, for parameters that differ by image.

Shapes: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train import rng
from vit_train.construct import NotNegative, NotNegativeFloat, Positive, Probability, Ratios, Seed, Shares
from vit_train.data.batch import Batch

_WHITE = 255.0


class Normalize(nn.Module):
    """(x / 255 - mean) / std per channel: all that evaluation does, and training without augmentation.

    Args:
        mean: per-channel mean on the 0 to 1 scale.
        std: per-channel standard deviation on the 0 to 1 scale.

    Raises:
        ValueError: different lengths, or a std that is not positive.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"expected one positive std for each mean, got mean {mean} and std {std}")
        # One multiply and one add per pixel: x * scale + bias with scale = 1 / (255 std), bias = -mean / std.
        mean_column = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        std_column = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("scale", (1 / (_WHITE * std_column)).float(), persistent=False)
        self.register_buffer("bias", (-mean_column / std_column).float(), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels of 0 to 255 (B, C, H, W), uint8 or float, become normalised float32."""
        return images.to(self.scale.dtype, copy=True).mul_(self.scale).add_(self.bias)

    def forward(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Images uint8 (B, C, H, W) become float32 (B, C, H, W); targets pass through."""
        return self.normalize(batch.images), batch.targets


class Augment(Normalize):
    """Shifts or crops, mirrors, normalises, erases and mixes.

    Args:
        mean, std: as for `Normalize`.
        seed: the run's seed.
        num_classes: K, of mixed targets.
        max_shift: largest shift as a fraction of the side, with black moving in: 0.125 is 4 pixels at 32.
        crop_scale: smallest and largest share of the image's area that is cut out and scaled to the whole
            (Szegedy et al. 2015), in place of shifts; null for no crops; `auto` is resolved before. Cuts
            from what the loader gives; `augment.sample` cuts from the file, where there are more pixels.
        crop_ratio: smallest and largest width / height of that part.
        hflip_prob: probability of mirroring left to right.
        erase_prob: probability of painting over a rectangle in one random colour (Zhong et al. 2017,
            arXiv 1708.04896), of the sizes DeiT uses, which paints noise.
        mixup_alpha: parameter of the Beta distribution of mixup (Zhang et al. 2017, arXiv 1710.09412); 0 for
            no mixup.
        cutmix_alpha: the same of CutMix (Yun et al. 2019, arXiv 1905.04899).
        mix_prob: probability that a batch is mixed.
        mix_switch_prob: where both are on, probability that it is CutMix.
        mix_off_epoch: from this epoch on (counted from 1) nothing is mixed; null for never.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        seed: Seed,
        num_classes: Positive,
        max_shift: Probability = 0.0,
        crop_scale: Shares | Literal["auto"] | None = None,
        crop_ratio: Ratios = (3 / 4, 4 / 3),
        hflip_prob: Probability = 0.0,
        erase_prob: Probability = 0.0,
        mixup_alpha: NotNegativeFloat = 0.0,
        cutmix_alpha: NotNegativeFloat = 0.0,
        mix_prob: Probability = 1.0,
        mix_switch_prob: Probability = 0.5,
        mix_off_epoch: NotNegative | None = None,
    ) -> None:
        super().__init__(mean, std)
        assert crop_scale != "auto", "config/parts.py resolves it"
        self.seed, self.num_classes = seed, num_classes
        self.max_shift, self.hflip_prob, self.erase_prob = max_shift, hflip_prob, erase_prob
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.mix_prob, self.mix_switch_prob = mix_prob, mix_switch_prob
        self.mix_off_epoch = math.inf if mix_off_epoch is None else mix_off_epoch

    def forward(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) become float32 (B, C, H, W); targets are ids (B,) or, mixed, (B, K)."""
        images, size = batch.images, batch.images.shape[-2:]
        draws = self._draws(batch, "augment", epoch, num=3)
        flip = draws[:, 0] < self.hflip_prob
        if self.crop_scale is not None:
            draws = self._draws(batch, "crop", epoch, num=BOX_DRAWS)
            boxes = random_boxes(draws, size, self.crop_scale, self.crop_ratio, erased=False)
            images = resized_crop(images, boxes, flip)
        elif self.max_shift or self.hflip_prob:
            most = round(self.max_shift * size[1])
            down, right = ((2 * most + 1) * draws[:, 1:].T).long() - most
            images = shift_flip(images, down, right, flip, most=most)
        floats = self.normalize(images)
        if self.erase_prob:
            draws = self._draws(batch, "erase", epoch, num=BOX_DRAWS + 1)
            boxes = random_boxes(draws[:, 1:], size, _ERASED_SCALE, _ERASED_RATIO, erased=True)
            boxes = torch.where(draws[:, :1] < self.erase_prob, boxes, 0)
            floats = erase(floats, boxes, self._colours(batch, epoch))
        if (self.mixup_alpha or self.cutmix_alpha) and epoch + 1 < self.mix_off_epoch:
            return self._mix(floats, batch.targets, step)
        return floats, batch.targets

    def _draws(self, batch: Batch, purpose: str, epoch: int, *, num: int) -> Tensor:
        return rng.uniform(batch.index, batch.draw, num, self.seed, purpose, epoch)

    def _colours(self, batch: Batch, epoch: int) -> Tensor:
        """(B, C): normally distributed, as normalised pixels nearly are."""
        draws = self._draws(batch, "colour", epoch, num=batch.images.shape[1])
        return math.sqrt(2) * torch.erfinv(2 * draws - 1 + 2.0**-24)  # symmetric, and never infinite

    def _mix(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        draws = Random(rng.mix(self.seed, "mix", step))
        if draws.random() >= self.mix_prob:
            return images, targets
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cuts = draws.random() < self.mix_switch_prob if both else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        share = draws.betavariate(alpha, alpha)  # of an image in its own mixture
        if cuts:
            images, share = cutmix(images, share, draws.random(), draws.random())
        else:
            images = images.lerp(images.flip(0), 1 - share)
        one_hot = F.one_hot(targets, self.num_classes).float()
        return images, one_hot.lerp(one_hot.flip(0), 1 - share)


def auto_crop_scale(img_size: int) -> list[float] | None:
    """The value of `crop_scale: auto`: the crops of `augment=medium` from 64 pixels on."""
    return [0.35, 1.0] if img_size >= 64 else None


# Of DeiT's recipe, which are timm's defaults
_ERASED_SCALE = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)

_TRIES = 10
BOX_DRAWS = 2 * _TRIES + 2  # area and ratio of each try, then the place


def random_boxes(
    draws: Tensor,
    size: Sequence[int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    erased: bool,
) -> Tensor:
    """Rectangles of random area, aspect ratio and place: as torchvision's, the first of ten tries that fits.

    Args:
        draws: (B, BOX_DRAWS) in [0, 1).
        size: H, W of the image.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height; evenly distributed in its logarithm.
        erased: False as `RandomResizedCrop`: the middle, in the nearest ratio, where no try fits. True as
            `RandomErasing`: shorter than the image both ways, and of height 0 where no try fits.

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    height, width = size
    areas, ratios, place = draws.split([_TRIES, _TRIES, 2], dim=1)
    side = ((scale[0] + (scale[1] - scale[0]) * areas) * (height * width)).sqrt()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    root = torch.exp((low + (high - low) * ratios) / 2)
    h, w = (side / root).round(), (side * root).round()
    fits = (h >= 1) & (h <= height - erased) & (w >= 1) & (w <= width - erased)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    top, left = (place[:, :1] * (height - h + 1)).floor(), (place[:, 1:] * (width - w + 1)).floor()
    nearest = min(height, round(width / ratio[0]) or 1), min(width, round(height * ratio[1]) or 1)
    most = (0, 0) if erased else nearest
    fallback = ((height - most[0]) // 2, (width - most[1]) // 2, *most)
    fits = fits.any(1, keepdim=True)
    columns = [torch.where(fits, drawn, other) for drawn, other in zip((top, left, h, w), fallback)]
    return torch.cat(columns, dim=1).long()


def shift_flip(images: Tensor, down: Tensor, right: Tensor, flip: Tensor, *, most: int) -> Tensor:
    """Moves each image, with black moving in, then mirrors it.

    Args:
        images: (B, C, H, W).
        down, right: (B,) int64, pixels, from -most to most.
        flip: (B,) bool, whether to mirror left to right.
        most: the largest shift.
    """
    b, c, h, w = images.shape
    # Every row of the result is a run of w bytes in the padded images or in their mirror images
    both = F.pad(torch.cat([images, images.flip(-1)]), (most,) * 4)
    height, width = both.shape[-2:]
    image = torch.arange(b, device=images.device) + b * flip
    first = (image * c * height + most - down) * width + most + torch.where(flip, right, -right)
    rows = torch.arange(c * height, device=images.device).view(c, height)[:, :h].flatten() * width
    starts = (first[:, None] + rows).flatten()
    return both.flatten().unfold(0, w, 1).index_select(0, starts).view(b, c, h, w)


def resized_crop(images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
    """Scales a part of each image to the whole, bicubic with antialiasing, then mirrors it.

    Resizing is a matrix from the left and one from the right, another pair for each image: the weights are
    those of torchvision's `resized_crop(..., BICUBIC, antialias=True)`, before it rounds to whole levels.

    Args:
        images: (B, C, H, W), 0 to 255.
        boxes: (B, 4) int64: top, left, height, width.
        flip: (B,) bool, whether to mirror left to right.

    Returns:
        float32 (B, C, H, W), 0 to 255.
    """
    top, left, height, width = boxes.unbind(1)
    vertical = _bicubic(top, height, images.shape[-2])[:, None]
    horizontal = _bicubic(left, width, images.shape[-1])
    horizontal = torch.where(flip[:, None, None], horizontal.flip(1), horizontal)[:, None]
    return (vertical @ images.float() @ horizontal.mT).clamp(0, _WHITE)


def _bicubic(first: Tensor, length: Tensor, side: int) -> Tensor:
    """(B, side, side): how much input pixel j counts in output pixel i, where [first, first + length) becomes
    [0, side). Keys' kernel with a = -0.5, widened where the image shrinks, as Pillow and torch have it."""
    step = (length / side)[:, None, None]
    pixel = torch.arange(side, device=first.device)
    centre = (pixel[:, None] + 0.5) * step
    inside = pixel - first[:, None, None]
    x = ((inside + 0.5 - centre) / step.clamp(min=1)).abs()
    weights = torch.where(
        x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0)
    )
    weights = weights * ((inside >= 0) & (inside < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def erase(images: Tensor, boxes: Tensor, colours: Tensor) -> Tensor:
    """Paints over a rectangle of each image.

    Args:
        images: (B, C, H, W).
        boxes: (B, 4) int64: top, left, height, width; nothing where the height is 0.
        colours: (B, C).
    """
    top, left, height, width = boxes[:, :, None].unbind(1)
    y = torch.arange(images.shape[-2], device=images.device) - top
    x = torch.arange(images.shape[-1], device=images.device) - left
    rows, columns = (y >= 0) & (y < height), (x >= 0) & (x < width)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], colours[:, :, None, None], images)


def cutmix(images: Tensor, share: float, y: float, x: float) -> tuple[Tensor, float]:
    """Every image with a rectangle of its partner in it; the partner of image b is image B - 1 - b.

    Args:
        images: (B, C, H, W).
        share: of the image's own area that should stay.
        y, x: centre of the rectangle as fractions of the sides; what sticks out is cut.

    Returns:
        The images, and the share of their own area that did stay.
    """
    height, width = images.shape[-2:]
    half = math.sqrt(1 - share) / 2
    top, bottom = (round(min(max(edge, 0), 1) * height) for edge in (y - half, y + half))
    left, right = (round(min(max(edge, 0), 1) * width) for edge in (x - half, x + half))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
