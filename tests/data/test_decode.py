"""A file becomes the picture a person sees, or one clear line: 36 odd kinds, five of each."""

import io

import numpy as np
import pytest
from odd_images import EACH, KINDS, picture, saved
from PIL import Image

from vit_train.data.decode import decode
from vit_train.data.imagefolder import FileSource
from vit_train.errors import DataError


# decode turns Pillow's warnings off when it is imported, and pytest turns them on again
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(EACH))
def test_every_odd_kind(tmp_path, kind, number):
    suffix, data, seen, limit = KINDS[kind](picture(number), number)
    (tmp_path / f"{kind}{suffix}").write_bytes(data)
    source = FileSource(str(tmp_path), [f"{kind}{suffix}"], np.zeros(1, dtype=np.int64))
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
        DataError, match=rf"^{tmp_path}/x.png does not exist: check its name, or put it back$"
    ):
        decode(tmp_path / "x.png")
    with pytest.raises(DataError, match=rf"^{tmp_path} cannot be read \(Is a directory\)"):
        decode(tmp_path)
