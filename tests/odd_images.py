"""Image files of every odd kind, each with the picture a person sees in it, computed without Pillow's help.

`KINDS` is the table: name -> a function of a picture that returns suffix, bytes, and what is seen: an array (H,
W, 3) with the largest difference allowed, or words that the report about the file must hold.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

ORIENTATION = 0x0112
WHITE = 255

# What a camera held at that orientation stores of an upright picture
STORED = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


def picture(number, height=24, width=36):
    """A smooth colour picture without any symmetry: uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([255 * y, 255 * x, 40 * number + 90 * (1 - x) * y], axis=2).astype(np.uint8)


def grey(seen):
    """Three equal channels of a (H, W) array."""
    return np.repeat(np.asarray(seen, dtype=np.uint8)[:, :, None], 3, axis=2)


def saved(pixels, format_, **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    image.save(file, format_, **options)
    return file.getvalue()


def heic(brand=b"heic", *compatible):
    """The first bytes of what a phone writes (ISO/IEC 14496-12, 4.3), and no picture."""
    body = b"ftyp" + brand + struct.pack(">I", 0) + b"".join(compatible or (b"mif1", b"heic"))
    return struct.pack(">I", 4 + len(body)) + body + bytes(200)


def oriented(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png(bits, color, rows, width, transparent):
    """A PNG that Pillow cannot write: any depth, with a transparent colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def tiff16(values, *, order, photometric):
    """A TIFF of 16-bit grey (H, W), which Pillow writes in one way only."""
    height, width = values.shape
    data = values.astype(f"{order}u2").tobytes()
    tags = {
        256: width,
        257: height,
        258: 16,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
    }
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()]  # 4: 32 bits
    start = struct.pack(f"{order}2sHI", {">": b"MM", "<": b"II"}[order], 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)


def over_white(colour, alpha):
    """Colour (H, W, 3) with alpha (H, W) of 0 to 255 on white."""
    a = alpha[:, :, None] / 255
    return np.round(colour * a + WHITE * (1 - a)).astype(np.uint8)


def jpeg_oriented(p, i):
    stored = STORED[2 + i](p)
    return ".jpg", saved(stored, "JPEG", quality=98, subsampling=0, exif=oriented(2 + i)), p, 8


def png_oriented(p, i):
    return ".png", saved(STORED[4 + i](p), "PNG", exif=oriented(4 + i)), p, 0


def webp_oriented(p, i):
    return ".webp", saved(STORED[4 + i](p), "WEBP", lossless=True, exif=oriented(4 + i)), p, 0


def tiff_oriented(p, i):
    return ".tif", saved(STORED[2 + i](p), "TIFF", exif=oriented(2 + i)), p, 0


def xmp_oriented(p, i):
    xmp = f'<x:xmpmeta xmlns:tiff="t"><rdf:Description tiff:Orientation="{3 + i}"/></x:xmpmeta>'.encode()
    return ".jpg", saved(STORED[3 + i](p), "JPEG", quality=98, subsampling=0, xmp=xmp), p, 8


def exif_damaged(p, i):
    block = (b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
             b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0")[i]  # fmt: skip
    return ".jpg", saved(p, "JPEG", quality=98, subsampling=0, exif=block), p, 8


def grey_16(p, i):
    values = (p[:, :, 0] * 257.0 - 100 * i * (p[:, :, 0] > 1)).astype(np.uint16)
    return ".png", saved(values, "PNG"), grey(values // 256), 1


def grey_16_big_endian(p, i):
    values = p[:, :, 1].astype(np.uint16) * 256 + 10 * i
    return ".tif", tiff16(values, order=">", photometric=1), grey(values // 256), 1


def grey_16_white_is_zero(p, i):
    values = p[:, :, 1].astype(np.uint16) * 256 + 10 * i
    return ".tiff", tiff16(values, order="<", photometric=0), grey(255 - values // 256), 1


def pgm_16(p, i):
    values = p[:, :, 0].astype(np.uint16) * 257
    return ".ppm", saved(values, "PPM"), grey(p[:, :, 0]), 0


def integers_32(p, i):
    values = (p[:, :, 0].astype(np.int64) - 100) * 10 ** (2 + i)  # negative: stretched from least to greatest
    low, high = values.min(), values.max()
    return ".tif", saved(values.astype(np.int32), "TIFF"), grey(255 * (values - low) / (high - low)), 1


def floats(p, i):
    """To 1, to 255, to 65535; beyond: stretched; not a number: black."""
    unit = p[:, :, 0] / 255
    values = (unit * (1, 255, 65535, 1e6, 1)[i]).astype(np.float32)
    seen = 255 * (unit / unit.max() if i == 3 else unit)
    if i == 4:
        values[:3], seen[:3] = (np.nan,), 0
    return ".tiff", saved(values, "TIFF"), grey(seen), 1


def palette(p, i):
    colours = np.random.RandomState(i).randint(0, 256, (16, 3), dtype=np.uint8)
    ids = (p[:, :, 0] // 16).astype(np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette(colours.tobytes())
    return ".png", saved(image, "PNG"), colours[ids], 0


def palette_transparent(p, i):
    colours = np.random.RandomState(i).randint(0, 256, (16, 3), dtype=np.uint8)
    ids = (p[:, :, 0] // 16).astype(np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette(colours.tobytes())
    alpha = np.arange(0, 256, 17, dtype=np.uint8)
    return ".png", saved(image, "PNG", transparency=alpha.tobytes()), over_white(colours[ids], alpha[ids]), 1


def rgb_key(p, i):
    p = p.copy()
    p[: 4 + i, :5] = (200, 0, 10 * i)
    seen = p.copy()
    seen[: 4 + i, :5] = WHITE
    return ".png", saved(p, "PNG", transparency=(200, 0, 10 * i)), seen, 0


def rgb_16_key(p, i):
    wide = (p.astype(np.int64) * 257).astype(">u2")
    wide[: 4 + i, :5] = (60000, 0, 300 * i)
    seen = (wide // 256).astype(np.uint8)
    seen[: 4 + i, :5] = WHITE
    key = struct.pack(">HHH", 60000, 0, 300 * i)
    return ".png", png(16, 2, [row.tobytes() for row in wide], p.shape[1], key), seen, 0


def grey_4_bit_key(p, i):
    values = p[:, :, 1] // 16
    rows = [(row[0::2] * 16 + row[1::2]).astype(np.uint8).tobytes() for row in values]
    seen = np.where(values == i + 2, WHITE, values * 17)
    return ".png", png(4, 0, rows, p.shape[1], struct.pack(">H", i + 2)), grey(seen), 0


def grey_alpha(p, i):
    level, alpha = p[:, :, 0], p[:, :, 1]
    image = Image.merge("LA", [Image.fromarray(level), Image.fromarray(alpha)])
    return ".png", saved(image, "PNG"), over_white(grey(level), alpha), 1


def rgb_alpha(p, i):
    alpha = np.roll(p[:, :, 1], i)
    alpha[0] = 0
    format_, suffix = (
        ("PNG", ".png"),
        ("TIFF", ".tif"),
        ("WEBP", ".webp"),
        ("PNG", ".png"),
        ("TIFF", ".tiff"),
    )[i]
    options = {"lossless": True, "exact": True} if format_ == "WEBP" else {}
    return suffix, saved(np.dstack([p, alpha]), format_, **options), over_white(p, alpha), 1


def cmyk(p, i):
    """Adobe's inverted CMYK, black left at none."""
    image = Image.merge("CMYK", [*Image.fromarray(255 - p).split(), Image.new("L", (p.shape[1], p.shape[0]))])
    return ".jpg", saved(image, "JPEG", quality=98, subsampling=0), p, 12


def lab(p, i):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    convert = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    p = (p // 2 + 64).astype(np.uint8)  # well inside what both can hold
    return ".tif", saved(ImageCms.applyTransform(Image.fromarray(p), convert), "TIFF"), p, 14


def ycbcr(p, i):
    return ".tif", saved(Image.fromarray(p).convert("YCbCr"), "TIFF"), p, 3


def one_bit(p, i):
    bits = p[:, :, 0] > 60 + 10 * i
    suffix, format_ = ((".png", "PNG"), (".tif", "TIFF"), (".bmp", "BMP"), (".gif", "GIF"), (".png", "PNG"))[
        i
    ]
    return suffix, saved(bits, format_), grey(255 * bits), 0


def frames(p, i, format_, suffix, **options):
    others = [Image.fromarray(255 - np.roll(p, n)) for n in range(1, 3)]
    return suffix, saved(p, format_, save_all=True, append_images=others, duration=50, **options), p, 0


def gif_animated(p, i):
    """Few colours, one of them transparent, and frames that differ."""
    colours = np.random.RandomState(i).randint(0, 256, (8, 3), dtype=np.uint8)
    ids = (p[:, :, 0] // 32).astype(np.uint8)
    stack = []
    for shift in range(3):
        image = Image.fromarray(np.roll(ids, shift, axis=1), "P")
        image.putpalette(colours.tobytes())
        stack.append(image)
    data = saved(stack[0], "GIF", save_all=True, append_images=stack[1:], transparency=2, disposal=2, loop=0)
    return ".gif", data, np.where((ids == 2)[:, :, None], WHITE, colours[ids]).astype(np.uint8), 0


def png_animated(p, i):
    return frames(p, i, "PNG", ".png")


def webp_animated(p, i):
    return frames(p, i, "WEBP", ".webp", lossless=True)


def tiff_pages(p, i):
    suffix, data, seen, limit = frames(p, i, "TIFF", ".tiff", compression=(None, "tiff_lzw")[i % 2])
    return suffix, data, seen, limit


def progressive(p, i):
    return ".jpeg", saved(p, "JPEG", quality=98, subsampling=0, progressive=True), p, 8


def upper_case(p, i):
    suffix, format_ = ((".PNG", "PNG"), (".TIFF", "TIFF"), (".BMP", "BMP"), (".PPM", "PPM"), (".Png", "PNG"))[
        i
    ]
    return suffix, saved(p, format_), p, 0


def wrong_suffix(p, i):
    format_, suffix = (("PNG", ".jpg"), ("BMP", ".png"), ("TIFF", ".gif"), ("PPM", ".webp"), ("PNG", ".tif"))[
        i
    ]
    return suffix, saved(p, format_), p, 0


def icc_profile(p, i):
    """Ignored, as in training."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return ".png", saved(p, "PNG", icc_profile=profile), p, 0


def cut_jpeg(p, i):
    data = saved(p, "JPEG", quality=95)
    return ".jpg", data[: len(data) * (50 + 10 * i) // 100], ("cannot be read (",), None


def cut_png(p, i):
    data = saved(p, "PNG")
    return ".png", data[: len(data) * (50 + 10 * i) // 100], ("cannot be read (",), None


def no_image(p, i):
    data = (b"", b"hello\n", b"\x89PNG\r\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n")[i]
    return (".png", ".jpg", ".png", ".gif", ".tif")[i], data, ("is not an image Pillow can read",), None


def too_many_pixels(p, i):
    """Gigapixels in a few bytes: Pillow only warns of the first ones."""
    side = (9_500, 12_000, 13_300, 20_000, 60_000)[i]
    info = PngImagePlugin.PngInfo()
    info.add_text("made", "by hand")
    data = bytearray(saved(p, "PNG", pnginfo=info))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return ".png", bytes(data), ("cannot be read (", "pixels"), None


def postscript(p, i):
    """Would start another program, Ghostscript."""
    return (
        (".jpg", ".png", ".tif", ".gif", ".bmp")[i],
        saved(p, "EPS"),
        ("is not an image Pillow can read",),
        None,
    )


KINDS = {
    kind.__name__: kind
    for kind in (
        jpeg_oriented,
        png_oriented,
        webp_oriented,
        tiff_oriented,
        xmp_oriented,
        exif_damaged,
        grey_16,
        grey_16_big_endian,
        grey_16_white_is_zero,
        pgm_16,
        integers_32,
        floats,
        palette,
        palette_transparent,
        rgb_key,
        rgb_16_key,
        grey_4_bit_key,
        grey_alpha,
        rgb_alpha,
        cmyk,
        lab,
        ycbcr,
        one_bit,
        gif_animated,
        png_animated,
        webp_animated,
        tiff_pages,
        progressive,
        upper_case,
        wrong_suffix,
        icc_profile,
        cut_jpeg,
        cut_png,
        no_image,
        too_many_pixels,
        postscript,
    )
}
EACH = 5
