"""Pictures of what the model sees and says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TINY, build, with_trained_head

from vit_train.cli.train import pictured
from vit_train.data import Batch
from vit_train.data.transforms.batch_transforms import Normalize
from vit_train.report.fonts import fonts_for
from vit_train.report.pictures import batch_grid, prediction_sheet, sheet_of_predictions

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
NAMES = ["cat", "dog", "owl"]
PRIVATE = "\U0010fffd"  # the last private-use character: no font has it


def normalised(count, side=8, channels=3):
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    zeros = torch.zeros(count, dtype=torch.int64)
    images, _ = Normalize(MEAN[:channels], STD[:channels])(Batch(pixels, zeros, zeros, zeros), 0, 0)
    return images, pixels


# ------------------------------------------------------------------------------------------- a training batch
@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_the_pixels_of_before_normalisation(channels) -> None:
    images, pixels = normalised(1, channels=channels)
    assert images.min() < -1
    grid = batch_grid(images, MEAN[:channels], STD[:channels])
    assert grid.shape == (3, 64, 64)
    expected = (pixels[0].float() / 255).expand(3, -1, -1)
    enlarged = expected.repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(grid, enlarged, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (5, 1, 5), (9, 2, 8), (64, 8, 8), (100, 8, 8)]
)
def test_the_grid_holds_up_to_64_images(count, rows, columns) -> None:
    images, pixels = normalised(count, side=64)
    grid = batch_grid(images, MEAN, STD)
    border = 0 if count == 1 else 2
    assert grid.shape == (3, rows * (64 + border) + border, columns * (64 + border) + border)
    assert 0 <= grid.min() <= grid.max() <= 1
    shown = min(count, 64) - 1
    row, column = divmod(shown, 8)
    top, left = (border + i * (64 + border) for i in (row, column))
    last = grid[:, top : top + 64, left : left + 64]
    torch.testing.assert_close(last, pixels[shown].float() / 255, rtol=0, atol=1e-5)


def test_what_normalisation_cannot_have_made_is_clamped() -> None:
    grid = batch_grid(torch.tensor([-100.0, 100.0]).reshape(2, 1, 1, 1), (0.5,), (0.5,))
    assert grid.min() == 0
    assert grid.max() == 1


def test_bfloat16_batches_are_shown() -> None:
    images, _ = normalised(2)
    assert batch_grid(images.bfloat16(), MEAN, STD).dtype == torch.float32


# -------------------------------------------------------------------------------------- a sheet of predictions
def sheet(count, names=NAMES, right=None):
    images, _ = normalised(count)
    targets = torch.arange(count) % len(names)
    predicted = targets.clone()
    if right is not None:
        predicted[right:] = (targets[right:] + 1) % len(names)
    probabilities = torch.full((count, len(names)), 0.1).scatter_(1, predicted[:, None], 0.8)
    return prediction_sheet(images, targets, probabilities, names, MEAN, STD)


@pytest.mark.parametrize(
    ("count", "width", "height"), [(1, 150, 225), (5, 750, 225), (9, 1200, 410), (64, 1200, 1520), (70, 1200, 1520)]
)  # fmt: skip
def test_the_sheet_has_a_place_for_each_of_up_to_64_images(count, width, height) -> None:
    picture = sheet(count)
    assert picture.dtype == np.uint8
    assert picture.shape == (height, width, 3)


def titles(picture):
    """The part of a sheet with one row that is above the images and below the heading."""
    return picture[38:76].astype(int)


def test_right_is_green_and_wrong_is_red() -> None:
    def coloured(picture):
        red, green, _ = titles(picture).reshape(-1, 3).T
        return int((green > red + 60).sum()), int((red > green + 60).sum())

    right, wrong, mixed = (coloured(sheet(5, right=n)) for n in (5, 0, 3))
    assert right[0] > mixed[0] > wrong[0] == 0
    assert wrong[1] > mixed[1] > right[1] == 0


def test_each_image_is_where_it_belongs() -> None:
    images = torch.zeros(3, 1, 8, 8)
    images[1] = 1
    probabilities = torch.eye(3)
    picture = prediction_sheet(images, torch.arange(3), probabilities, NAMES, (0.0,), (1.0,))
    middles = [picture[130, 75 + 150 * i].tolist() for i in range(3)]
    assert middles == [[0, 0, 0], [255, 255, 255], [0, 0, 0]]


def test_names_without_glyphs_become_numbers() -> None:
    assert fonts_for([f"cat{PRIVATE}"]) is None
    strange = sheet(6, [f"{name}{PRIVATE}" for name in NAMES])
    assert np.array_equal(strange, sheet(6, ["0", "1", "2"]))
    assert not np.array_equal(strange, sheet(6))


def test_names_with_glyphs_have_fonts() -> None:
    assert fonts_for(["cat", "größe", "with space"]) == ["DejaVu Sans"]
    assert fonts_for([]) is not None


@pytest.mark.parametrize(
    "names", [["$x_y$", "$$", "a$b"], [r"$\nosuch{$", "_^_", "$"], ["<b>", "%d {}", "\\n"]]
)
def test_names_are_not_parsed(names) -> None:
    """As mathematics the first would be typeset and the second an error."""
    assert sheet(3, names, right=1).shape == (225, 450, 3)


def test_a_name_in_dollars_is_as_wide_as_typed() -> None:
    """Parsed, `$mmmm_m$` would lose its dollars and its underscore."""
    dark = [np.argwhere((titles(sheet(1, [name, "b"])) < 200).any(-1))[:, 1] for name in ("$mmm_m$", "mmm_m")]
    widths = [int(columns.max() - columns.min()) for columns in dark]
    assert widths[0] > widths[1] + 6


def test_long_names_are_cut() -> None:
    assert np.array_equal(sheet(3, ["m" * 15 + "xyz", "b", "c"]), sheet(3, ["m" * 15 + "other", "b", "c"]))


@pytest.mark.parametrize(("settings", "count"), [((), 64), (("data.val_fraction=0",), 64)])
def test_the_sheet_of_a_run(in_tmp, settings, count) -> None:
    run = build(*TINY, *settings, "run_dir=run", "trainer.max_steps=1")
    picture = sheet_of_predictions(*pictured(run.trainer))
    assert picture.shape == (1520, 1200, 3)


def test_the_sheet_of_a_run_shows_the_averaged_weights(in_tmp) -> None:
    run = build(*TINY, "run_dir=run", "trainer.max_steps=1")
    with_trained_head(run.trainer.ema.module)
    before = sheet_of_predictions(*pictured(run.trainer))
    with torch.no_grad():
        run.trainer.model.head.weight.mul_(-5)
    assert np.array_equal(sheet_of_predictions(*pictured(run.trainer)), before)
    with torch.no_grad():
        run.trainer.ema.module.head.weight.mul_(-5)
    assert not np.array_equal(sheet_of_predictions(*pictured(run.trainer)), before)
