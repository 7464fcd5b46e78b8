"""From a file to the picture a person sees: what training, evaluation and prediction all read images with.

Pillow opens a file as it is stored. An image viewer shows it turned upright, transparency on white and every
depth within black and white, and so does `decode`:

    EXIF (or XMP) orientation      applied
    transparency of any kind       on `background`
    more than 8 bits               black and white are the data set's (`value_range`). Without: 0 and 65535 of
                                   16 bits; of 32 and of floats 0 and the least of 1, 255, 65535 that no pixel
                                   exceeds, or a picture's own extremes where it leaves that range
    16-bit colour                  as grey in a PNG; of a TIFF or PPM Pillow gives the high byte
    several pictures               the first: animations, pages, the pictures of an MPO
    CMYK, LAB, YCbCr, palettes     converted to RGB
    ICC profiles                   ignored, as in torchvision's and timm's training

A plain 8-bit file takes none of these ways and costs no more than Pillow alone. A JPEG that is much larger
than what it is read for costs less (`least_side`).
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base
from torchvision.io import ImageReadMode, decode_image

from vit_train.construct import Level
from vit_train.errors import DataError, passing_over, ran_out
from vit_train.system.places import open_plain

RGB: TypeAlias = tuple[Level, Level, Level]
ValueRange: TypeAlias = tuple[float, float]  # black, white
WHITE: RGB = (255, 255, 255)
EXTENT = "vit_train: extent"  # the key of what `decode` writes into Image.info

# By content, whatever the suffix says. Pillow knows more; but a .jpg that is EPS would start Ghostscript.
Image.init()
_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
    if name in Image.OPEN
)

HEIC = (".heic", ".heif")  # what phones write
NOT_READ = "is HEIC, which is not read: convert it to JPEG"
_HEIC_BRANDS = (b"hei", b"hev", b"mif1", b"msf1")  # ISO/IEC 23008-12; AVIF shares the last two

# What Pillow only warns of is either an error below or nothing a user can do anything about
warnings.filterwarnings("ignore", module=r"PIL\.")

# Where an orientation may stand in Image.info; TIFF is turned by Pillow
_ORIENTED = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A PNG names its transparent colour at the file's depth, Pillow expands the pixels to 8 bits and not the name
_COLOUR_KEY_SCALES = {"L;2": 255 / 3, "L;4": 255 / 15}
# The values white may have
_INTEGER_WHITES: tuple[int, ...] = (255, 1023, 4095, 16383, 65535)
_FLOAT_WHITES = (1, 255, 65535)


def decode(
    file: str | Path | bytes,
    *,
    name: str | None = None,
    background: RGB = WHITE,
    least_side: int | None = None,
    value_range: ValueRange | None = None,
) -> Image.Image:
    """The picture a person sees, as mode L where it is grey without transparency, else RGB.

    Converting between the two loses nothing that a model of 1 or 3 channels would see.

    With `least_side` a JPEG comes at 1/2, 1/4 or 1/8 of its size, the smallest of these whose shorter side
    still has that many pixels. The size of the file and `least_side` alone decide which, so training and
    prediction see the same pixels. JPEG's own transform does it (Pillow calls it draft mode), in a third to a
    half less time and with a fraction of the memory. A side that does not divide is rounded up, and its last
    pixel is partly padding: `info[EXTENT]` is the width and height of the picture itself, in these pixels. A
    picture that would be turned so that padding comes first is read whole.

    Args:
        file: a path, or what is in the file.
        name: for messages; the path where there is one.
        background: what is under transparency, 0 to 255.
        least_side: pixels the shorter side must keep; None keeps all.
        value_range: what is black and what is white in pictures deeper than 8 bits.

    Raises:
        DataError: it is missing, damaged, cut off, no image, or too large to be an honest one.
    """
    name = name or (str(file) if not isinstance(file, bytes) else "the image")
    try:
        with (
            io.BytesIO(file) if isinstance(file, bytes) else open_plain(file) as opened,
            Image.open(opened, formats=_FORMATS) as image,
        ):
            _check_size(image)
            if "transparency" in image.info and image.format == "PNG":
                _scale_colour_key(image)
            is_deep = _is_deep(image)
            # nothing but a JPEG can do it
            drafted = None if least_side is None else image.draft(None, (least_side, least_side))
            extent = image.size if drafted is None else drafted[1][2:]
            image.load()  # open reads the header only: a cut-off file fails here
            orientation = 1 if image.info.keys().isdisjoint(_ORIENTED) else _orientation(image)
            shown = _eight_bits(image, _deep_pixels(image, file), value_range) if is_deep else image
            if shown.has_transparency_data:
                under = Image.new("RGBA", shown.size, background)
                shown = Image.alpha_composite(under, shown.convert("RGBA")).convert("RGB")
            elif shown.mode not in ("L", "RGB"):
                shown = _convert(shown)
            if orientation in _UPRIGHT:
                if extent != image.size:
                    return decode(file, name=name, background=background)
                shown = shown.transpose(_UPRIGHT[orientation])
                extent = shown.size
            shown.info = {EXTENT: extent}
            return shown
    except FileNotFoundError:
        raise DataError("does not exist", where=name, advice="check its name, or put it back") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        if ran_out(error):
            raise
        raise _unreadable(error, file, name) from error


def _unreadable(error: Exception, file: str | Path | bytes, name: str) -> DataError:
    """What Pillow said of a file, in a line of ours."""
    if name.lower().endswith(HEIC) or _is_heic(file):
        return DataError(NOT_READ, where=name)
    reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    unknown = isinstance(error, UnidentifiedImageError)
    what = "is not an image Pillow can read" if unknown else f"cannot be read ({reason})"
    return DataError(what, where=name, advice="repair or remove it")


def _is_heic(file: str | Path | bytes) -> bool:
    """Whether a file that cannot be read is HEIC, whatever it is named."""
    head = file if isinstance(file, bytes) else b""
    if not isinstance(file, bytes):
        with suppress(OSError, ValueError), open_plain(file) as opened:
            head = opened.read(64)
    brands = head[8 : int.from_bytes(head[:4])]
    return head[4:8] == b"ftyp" and b"avif" not in brands and any(brand in brands for brand in _HEIC_BRANDS)


def _check_size(image: Image.Image) -> None:
    """A few bytes may claim gigapixels. Pillow warns of these, and refuses only twice as many."""
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {Image.MAX_IMAGE_PIXELS:,}")


def _scale_colour_key(image: Any) -> None:
    key = image.info["transparency"]
    scale = _COLOUR_KEY_SCALES.get(image.tile[0][3]) if image.tile else None
    if scale is not None:
        image.info["transparency"] = (
            tuple(int(v * scale) for v in key) if isinstance(key, tuple) else int(key * scale)
        )


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(Base.Orientation)
    except Exception:  # a damaged block turns nothing, and the pixels are whole
        return 1


def _is_deep(image: Any) -> bool:
    """Whether an image, not loaded yet, has more than 8 bits that can be had."""
    return image.mode[0] in "IF" or (image.format == "PNG" and ";16B" in str(image.tile))


def _deep_pixels(image: Image.Image, file: str | Path | bytes) -> NDArray[Any]:
    """(H, W); (H, W, C) of a PNG with 16 bits of colour or alpha, where Pillow has the high bytes only."""
    if image.mode[0] in "IF":
        return np.asarray(image)
    content = bytearray(file if isinstance(file, bytes) else Path(file).read_bytes())
    pixels = decode_image(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return pixels.permute(1, 2, 0).numpy()


def _eight_bits(image: Any, pixels: NDArray[Any], value_range: ValueRange | None) -> Image.Image:
    """As mode L, LA, RGB or RGBA."""
    key, alpha = image.info.get("transparency"), None
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels, alpha = pixels[..., :-1], pixels[..., -1] // 257
    elif key is not None:  # at full depth: a pixel that shares the high byte is opaque
        alpha = np.where((pixels.reshape(*pixels.shape[:2], -1) == key).all(2), 0, 255)
    values = np.nan_to_num(pixels.astype(np.float32), nan=0, posinf=0, neginf=0)
    sixteen = pixels.dtype.itemsize == 2 or image.format in ("PNG", "PPM")
    own = (0.0, 65535.0) if sixteen else _range(float(values.min()), float(values.max()), _FLOAT_WHITES)
    black, white = value_range or own
    levels = ((values - black) * (255 / ((white - black) or 1)) + 0.5).clip(0, 255).astype(np.uint8)
    if sixteen and image.format == "TIFF" and image.tag_v2.get(Base.PhotometricInterpretation) == 0:
        levels = 255 - levels  # "white is zero", which Pillow heeds up to 8 bits
    return Image.fromarray(levels if alpha is None else np.dstack([levels, alpha.astype(np.uint8)]))


def _range(least: float, largest: float, whites: tuple[int, ...]) -> ValueRange:
    if least < 0 or largest > whites[-1]:
        return least, largest
    return 0.0, float(next(white for white in whites if largest <= white))


def find_range(files: Sequence[str]) -> tuple[ValueRange | None, str]:
    """What is black and white in those of these files that are deeper than 8 bits; and a note about it.

    White is that of the fewest bits (8, 10, 12, 14, 16) that hold every value and that a TIFF states (PNGs
    are scaled to 16, whatever sBIT says); of floats the least of 1, 255, 65535. Beyond, or where a value is
    negative, they are the least and the largest value. Files that cannot be read are left out.
    """
    ends: list[float] = []
    bits, whites = 0, _INTEGER_WHITES
    for file in files:
        with passing_over(), open_plain(file) as opened, Image.open(opened, formats=_FORMATS) as image:
            if _is_deep(image):
                _check_size(image)
                pixels = _deep_pixels(image, file)
                pixels = pixels[np.isfinite(pixels)]
                ends += [float(pixels.min()), float(pixels.max())]
                bits = max(bits, *getattr(image, "tag_v2", {}).get(Base.BitsPerSample, (0,)))
                whites = _FLOAT_WHITES if image.mode == "F" else whites
    stated = 2**bits - 1 if bits < 16 and whites is _INTEGER_WHITES else 0
    black, white = _range(min(ends), max(*ends, stated), whites) if ends else (0, 0)
    if black == white:
        return None, ""
    note = f"deeper than 8 bits; the largest value of {len(ends) // 2} files is {max(ends):g}"
    return (black, white), f"data.value_range=[{black:g}, {white:g}]: {note}"


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "LAB":
        shown = ImageCms.applyTransform(image, _lab_to_srgb())
        assert shown is not None, "not in place"
        return shown
    return image.convert("RGB")


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
