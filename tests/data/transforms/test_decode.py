"""A file becomes the picture a person sees, or one clear line: 36 odd kinds, five of each."""

import io
import struct

import numpy as np
import pytest
from odd_images import EACH, KINDS, STORED, heic, oriented, picture, saved
from PIL import Image

from vit_train.data.folder.file_names import Names
from vit_train.data.folder.image_folder import FileSource
from vit_train.data.transforms.decode import decode
from vit_train.data.transforms.sample_transforms import plain, shorter_side
from vit_train.errors import DataError


# decode turns Pillow's warnings off when it is imported, and pytest turns them on again
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(EACH))
def test_every_odd_kind(tmp_path, kind, number):
    suffix, data, seen, limit = KINDS[kind](picture(number), number)
    (tmp_path / f"{kind}{suffix}").write_bytes(data)
    nothing = np.zeros(1, dtype=np.int64)
    source = FileSource(str(tmp_path), Names.of([f"{kind}{suffix}"]), targets=nothing, sizes=nothing)
    if limit is None:
        with pytest.raises(DataError) as raised:
            source.read(0)
        line = str(raised.value)
        assert line.startswith(f"{tmp_path}/{kind}{suffix} ")
        assert "\n" not in line
        assert all(word in line for word in seen), line
        with pytest.raises(DataError, match=r"^here "):
            decode(data, name="here")
        return
    read = source.read(0)
    assert read.mode in ("L", "RGB")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(read))
    pixels = np.asarray(read.convert("RGB")).astype(int)
    assert pixels.shape == seen.shape
    assert np.abs(pixels - seen).max() <= limit
    # a grey model's picture is the luma of the colours, whichever mode was read
    luma = np.asarray(Image.fromarray(seen).convert("L")).astype(int)
    assert np.abs(np.asarray(read.convert("L")) - luma).max() <= limit


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "BMP", "PPM", "WEBP"])
def test_plain_files_are_what_pillow_reads(mode, format_):
    data = saved(Image.fromarray(picture(1)).convert(mode), format_)
    with Image.open(io.BytesIO(data)) as image:
        expected = image.copy()
    read = decode(data)
    assert read.mode == expected.mode
    assert np.array_equal(np.asarray(read), np.asarray(expected))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(
        DataError, match=rf"^{tmp_path}/x.png does not exist; check its name, or put it back$"
    ):
        decode(tmp_path / "x.png")
    with pytest.raises(DataError, match=rf"^{tmp_path} cannot be read \(Is a directory\)"):
        decode(tmp_path)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (124, 116, 104)])
def test_the_background_shows_where_nothing_is(background):
    pixels = np.dstack([picture(1), np.zeros((24, 36), dtype=np.uint8)])
    pixels[:12, :, 3] = 255
    read = np.asarray(decode(saved(pixels, "PNG"), background=background))
    assert np.array_equal(read[:12], picture(1)[:12])
    assert (read[12:] == background).all()


# ---------------------------------------------------------------------------------------------------- reduced JPEG
def grainy(width, height, seed=0):
    """As rough as photographs are: the amplitude of every frequency is inversely proportional to it."""
    random_state = np.random.RandomState(seed)
    y, x = np.meshgrid(np.fft.fftfreq(height) * height, np.fft.rfftfreq(width) * width, indexing="ij")
    falling = 1 / np.maximum(np.hypot(x, y), 1)
    noise = [np.fft.rfft2(random_state.randn(height, width)) for _ in range(2)]
    layers = [np.fft.irfft2(spectrum * falling, (height, width)) for spectrum in noise]
    levels = [128 + 50 * layer / layer.std() for layer in (layers[0], layers[0] + layers[1] / 4, layers[0])]
    return np.stack(levels, axis=2).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("least_side", "size"),
    [
        (None, (400, 301)),
        (302, (400, 301)),
        (151, (400, 301)),
        (150, (200, 151)),
        (76, (200, 151)),
        (75, (100, 76)),
        (38, (100, 76)),
        (37, (50, 38)),
        (1, (50, 38)),
    ],
)
def test_a_jpeg_keeps_its_least_side(least_side, size, turned):
    width, height = (301, 400) if turned else (400, 301)
    read = decode(saved(grainy(width, height), "JPEG"), least_side=least_side)
    assert read.size == (size[::-1] if turned else size)


JPEGS = {
    **{
        f"orientation {i}": lambda p, i=i: saved(STORED[i](p), "JPEG", quality=95, exif=oriented(i))
        for i in STORED
    },
    "grey": lambda p: saved(Image.fromarray(p).convert("L"), "JPEG", quality=95),
    "cmyk": lambda p: saved(
        Image.merge("CMYK", [*Image.fromarray(255 - p).split(), Image.new("L", p.shape[1::-1])]),
        "JPEG",
        quality=95,
    ),
    "progressive": lambda p: saved(p, "JPEG", quality=95, progressive=True),
    "full chroma": lambda p: saved(p, "JPEG", quality=95, subsampling=0),
    "several pictures": lambda p: saved(
        p, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(255 - p)]
    ),
}


@pytest.mark.parametrize("least_side", [20, 40, 75])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_reduced_jpeg_is_the_same_picture(kind, least_side):
    turned = kind.startswith("orientation") and not kind.endswith("1")
    height, width = (152, 224) if turned else (150, 225)  # one that is turned must divide, or is read whole
    p = picture(2, height=height, width=width)
    data = JPEGS[kind](p)
    reduced, whole = decode(data, least_side=least_side), decode(data)
    assert min(reduced.size) == -(-height // {20: 4, 40: 2, 75: 2}[least_side])
    assert reduced.mode == whole.mode == ("L" if kind == "grey" else "RGB")
    small = np.asarray(whole.resize(reduced.size, Image.Resampling.BOX)).astype(int)
    difference = np.abs(np.asarray(reduced) - small)
    assert difference.mean() < 1.5
    assert difference.max() <= 12


@pytest.mark.parametrize("format_", ["PNG", "BMP", "PPM", "WEBP", "GIF", "TIFF"])
def test_nothing_but_a_jpeg_is_reduced(format_):
    data = saved(Image.fromarray(grainy(160, 120)), format_)
    assert np.array_equal(np.asarray(decode(data, least_side=10)), np.asarray(decode(data)))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cut_off_jpeg_is_an_error_at_any_size(share):
    data = saved(grainy(400, 300), "JPEG")
    with pytest.raises(DataError, match=r"^the image cannot be read "):
        decode(data[: int(len(data) * share)], least_side=10)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_counted_before_they_are_reduced():
    data = bytearray(saved(grainy(64, 64), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 9500, 9500)
    with pytest.raises(DataError, match="9500 x 9500 pixels"):
        decode(bytes(data), least_side=10)


@pytest.mark.parametrize("img_size", [32, 96])
@pytest.mark.parametrize("times", [2, 4])
def test_the_model_sees_a_reduced_photograph_as_a_whole_one(img_size, times):
    """At the worst size: a larger `least_side` by one, and it would be reduced half as much."""
    transform = plain(img_size, resize="crop")
    side = times * transform.least_side
    data = saved(grainy(side * 3 // 2, side), "JPEG", quality=90)

    def seen(least_side):
        return transform(decode(data, least_side=least_side)).numpy().astype(int)

    kept = np.abs(seen(transform.least_side) - seen(None))
    assert kept.mean() < 1.6
    assert kept.max() <= 10
    assert 10 * np.log10(255**2 / (kept**2).mean()) > 42
    # it is the factor of 2 in least_side that keeps it so
    assert np.abs(seen(shorter_side(img_size)) - seen(None)).mean() > 2 * kept.mean()


@pytest.mark.parametrize(
    "data",
    [heic(), heic(b"heix"), heic(b"mif1"), heic(b"msf1", b"hevc"), heic(b"mif1", b"MiHB", b"heic")],
)
@pytest.mark.parametrize("kept", ["in a file", "in memory"])
def test_heic_is_told_by_its_first_bytes(tmp_path, data, kept):
    (tmp_path / "IMG_1.jpg").write_bytes(data)
    file, name = (tmp_path / "IMG_1.jpg",) * 2 if kept == "in a file" else (data, "the image")
    with pytest.raises(DataError) as raised:
        decode(file)
    assert str(raised.value) == f"{name} is HEIC, which is not read: convert it to JPEG"


@pytest.mark.parametrize("data", [heic(b"mif1", b"avif"), heic(b"avif", b"mif1"), heic(b"isom", b"mp42")])
def test_other_boxes_are_not_heic(data):
    with pytest.raises(DataError, match="is not an image Pillow can read"):
        decode(data)


def test_a_name_alone_says_heic_only_of_what_cannot_be_read(tmp_path):
    (tmp_path / "cut.HEIF").write_bytes(b"x")
    (tmp_path / "renamed.heic").write_bytes(saved(picture(0), "JPEG"))
    with pytest.raises(DataError, match=r"cut\.HEIF is HEIC, which is not read: convert it to JPEG$"):
        decode(tmp_path / "cut.HEIF")
    with pytest.raises(DataError, match=r"gone\.heic does not exist"):
        decode(tmp_path / "gone.heic")
    assert decode(tmp_path / "renamed.heic").size == (36, 24)


def test_a_sound_file_is_not_called_damaged_where_too_many_files_are_open(tmp_path, no_more_files):
    Image.new("RGB", (8, 8)).save(tmp_path / "sound.png")
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        decode(tmp_path / "sound.png")
    assert decode(tmp_path / "sound.png").size == (8, 8)
