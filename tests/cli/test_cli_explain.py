"""`vit-explain`: a picture for every family and every kind of file, clear refusals, and training left as it was."""

from __future__ import annotations

import io
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, checkpoint_hashes, everything_in, load_trained, typed_here, vit_train_here
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_train.cli import explain

ONE_STEP = (
    "data.limit=32",
    "data.batch_size=16",
    "data.num_workers=0",
    "trainer.max_steps=1",
    "trainer.precision=fp32",
    "trainer.ema_decay=null",
    "tracker.tensorboard=false",
    "run_dir=run",
)
SMALL = ("model.depth=2", "model.embed_dim=32", "model.num_heads=2")
SWIN = (
    "model=swin_cifar",
    "model.embed_dim=16",
    "model.depths=[1,1]",
    "model.num_heads=[1,2]",
    "model.window_size=2",
)
FAMILIES = {
    "vit_mean": ("model=vit_digits", *SMALL),
    "vit_cls": ("model=vit_digits", "model.pool=cls", *SMALL),
    "vit_post_norm": ("model=vit_digits", "model.norm_first=false", *SMALL),
    "deit": ("model=deit_cifar", *SMALL),
    "hybrid": ("model=hybrid_cifar", *SMALL),
    "swin": SWIN,
    "resnet": ("model=resnet_cifar", "model.widths=[8,16]"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one step of each family, made when it is first asked for."""
    made = {}

    def run(family):
        if family not in made:
            home = tmp_path_factory.mktemp(family)
            done = vit_train_here(*FAMILIES[family], *ONE_STEP, cwd=home)
            assert done.code == 0, done.err
            made[family] = home / "run"
        return made[family]

    return run


@pytest.fixture
def home(tmp_path):
    """Two photographs of one name, a grey one, and a file that is none."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(noise).save(tmp_path / folder / "one.png")
    Image.fromarray(noise[:, :60, 0]).save(tmp_path / "grey.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    return tmp_path


@pytest.fixture
def typed(home, runs):
    """`vit-explain RUN ...` in that folder, with the run of a family."""
    return lambda family, *arguments: typed_here(explain.main, str(runs(family)), *arguments, cwd=home)


def assert_refused(done, code, *words):
    assert (done.code, done.out) == (code, "")
    assert re.fullmatch(r"vit-explain: error: [^\n]+\n", done.err), done.err
    for word in words:
        assert word in done.err, f"{word!r} is not said in: {done.err}"


# ---------------------------------------------------------------------------------------------- what it draws
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_drawn(family, typed, home) -> None:
    done = typed(family, "a/one.png", "grey.png", "--out", "out")
    assert (done.code, done.err) == (0, "")
    method = "gradcam" if family in ("swin", "resnet") else "rollout"
    assert sorted(p.name for p in (home / "out").iterdir()) == [f"grey_{method}.png", f"one_{method}.png"]
    for line, name in zip(done.out.splitlines(), ("a/one.png", "grey.png"), strict=True):
        assert re.fullmatch(rf"{name}  \d \d+\.\d%  out/\w+_{method}.png", line)
    # 150 x 90 is shown at twice its size, 60 x 90 at four times; Swin has a panel for each of two stages
    for name, width, height in (("one", 300, 180), ("grey", 240, 360)):
        with Image.open(home / "out" / f"{name}_{method}.png") as picture:
            across, down = (2, 2) if family == "swin" else (2, 1)
            assert across * width < picture.width < across * (width + 20) + 20
            assert down * height < picture.height < down * (height + 40) + 80


def test_by_default_the_pictures_are_in_the_run(typed, runs) -> None:
    before = everything_in(runs("vit_cls"))
    done = typed("vit_cls", "a/one.png", "--sheet")
    assert done.code == 0, done.err
    folder = runs("vit_cls") / "explain"
    assert sorted(p.name for p in folder.iterdir()) == ["one_rollout.png", "sheet.png"]
    shutil.rmtree(folder)
    assert everything_in(runs("vit_cls")) == before


def test_a_checkpoint_keeps_its_own_files_only(runs, home) -> None:
    done = typed_here(explain.main, str(runs("vit_cls") / "checkpoints/last"), "a/one.png", cwd=home)
    assert done.code == 0, done.err
    assert (home / "explain/one_rollout.png").is_file()


def test_files_of_one_name_do_not_overwrite_each_other(typed, home) -> None:
    Image.new("RGB", (9, 9)).save(home / "b" / "ONE.bmp")
    done = typed("vit_cls", "a", "b", "*/one.png", "--out", "out")
    assert done.code == 0, done.err
    names = sorted(p.name for p in (home / "out").iterdir())
    assert names == ["a_one_rollout.png", "b_ONE_rollout.png", "b_one_2_rollout.png"]


def test_each_head_has_its_panel(typed, home) -> None:
    assert typed("vit_cls", "a/one.png", "--heads", "--out", "out").code == 0
    assert typed("vit_cls", "a/one.png", "--method", "attention", "--out", "plain").code == 0
    with (
        Image.open(home / "out/one_attention.png") as heads,
        Image.open(home / "plain/one_attention.png") as mean,
    ):
        assert heads.height > 1.7 * mean.height


def test_another_class_is_another_picture(typed, home) -> None:
    pictures = set()
    for name in ("0", "7"):
        done = typed("swin", "a/one.png", "--class", name, "--out", name)
        assert done.code == 0, done.err
        pictures.add((home / name / "one_gradcam.png").read_bytes())
    assert len(pictures) == 2


def test_a_broken_image_is_named_and_the_rest_goes_on(typed, home) -> None:
    done = typed("vit_cls", "broken.jpg", "missing.png", "grey.png", "--out", "out")
    assert done.code == 3
    assert [line.split(":")[1] for line in done.err.splitlines()] == [" skipped", " skipped", " error"]
    assert "broken.jpg is not an image" in done.err
    assert "missing.png" in done.err
    assert "2 of 3 images could not be read" in done.err
    assert [p.name for p in (home / "out").iterdir()] == ["grey_rollout.png"]


def test_a_long_picture_is_drawn_and_so_is_what_follows(typed, home) -> None:
    """The model sees a square of the middle: of 5,000 x 100 pixels fewer than a frame has lines."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 5000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(home / "wide.png")
    Image.fromarray(noise.transpose(1, 0, 2)).save(home / "high.png")
    Image.fromarray(noise[:1, :50]).save(home / "line.png")
    done = typed("vit_cls", "wide.png", "high.png", "line.png", "grey.png", "--sheet", "--out", "out")
    assert (done.code, done.err) == (0, "")
    drawn = sorted(path.stem.partition("_")[0] for path in (home / "out").iterdir())
    assert drawn == ["grey", "high", "line", "sheet", "wide"]
    with Image.open(home / "out/wide_rollout.png") as picture:
        assert picture.width > 20 * picture.height


def test_long_names_are_cut_and_the_next_image_is_drawn(typed, home) -> None:
    """Of up to 255 bytes, which a file system takes as a name, but not with `_rollout.png` behind it."""
    for stem in ("n" * 250, "n" * 249 + "m", "\u5b57" * 80):
        shutil.copy(home / "grey.png", home / f"{stem}.png")
    done = typed("vit_cls", "n*.png", "\u5b57*.png", "a/one.png", "--out", "out")
    assert (done.code, done.err) == (0, "")
    names = sorted(p.name for p in (home / "out").iterdir())
    assert len(names) == 4
    assert "one_rollout.png" in names
    assert names[-1] == "\u5b57" * 50 + "_rollout.png"


def test_a_link_in_a_run_leads_nowhere(runs, home) -> None:
    """A run can come from somebody else, and with it a link to a folder that is none of its own."""
    run, outside = home / "run", home / "outside"
    shutil.copytree(runs("vit_cls"), run)
    outside.mkdir()
    (run / "explain").symlink_to(outside)
    done = typed_here(explain.main, str(run), "a/one.png", cwd=home)
    assert_refused(done, 2, "explain is a link", "--out")
    assert not list(outside.iterdir())


def test_a_list_on_stdin_and_no_stdin(runs, home) -> None:
    run = str(runs("vit_cls"))
    for stdin, code in ((b"a/one.png\n", 0), (None, 3)):
        done = typed_here(explain.main, run, "-", "--out", "out", cwd=home, stdin=stdin)
        assert done.code == code, done.err
        named = typed_here(explain.main, run, "a/one.png", "--out", "out", cwd=home, stdin=stdin)
        assert named.code == 0
    assert "the list on stdin is empty" in done.err


def test_a_url_in_a_list_needs_leave(runs, home) -> None:
    """With it, it is fetched, or reported as an image that is not there."""
    run, url = runs("vit_cls"), b"http://127.0.0.1:9/x.png"
    refused = typed_here(explain.main, run, "-", cwd=home, stdin=url)
    assert_refused(refused, 2, "the list holds the URL", "type --allow-url")
    allowed = typed_here(explain.main, run, "-", "--allow-url", "--out", "out", cwd=home, stdin=url)
    assert allowed.code == 3
    assert "cannot be fetched" in allowed.err


def test_a_class_that_was_asked_for_is_in_the_headline(runs, home) -> None:
    import torch

    from vit_train.cli.explain import explain_image

    trained = load_trained(runs("swin"), device=torch.device("cpu"))
    own = explain_image(trained, str(home / "grey.png"), method="gradcam", target=None, heads=False)
    other = explain_image(trained, str(home / "grey.png"), method="gradcam", target=3, heads=False)
    assert re.fullmatch(r"\d \d+\.\d%", own.title)
    assert re.fullmatch(r"explained: 3 \d+\.\d%", other.title)
    assert other.note == f"predicted: {own.title}, {own.note}"
    assert next(iter(other.maps)).startswith("Grad-CAM for 3")


def test_a_map_of_nothing_says_so(runs, home) -> None:
    import torch

    from vit_train.cli.explain import explain_image

    trained = load_trained(runs("swin"), device=torch.device("cpu"))
    torch.nn.init.zeros_(trained.model.head.weight)
    found = explain_image(trained, str(home / "grey.png"), method="gradcam", target=3, heads=False)
    assert found.note.startswith("nothing speaks for it here, ")
    assert all(name.endswith("\nnothing speaks for it here") for name in found.maps)


def test_help_says_what_heads_and_sheet_do(capsys) -> None:
    with pytest.raises(SystemExit):
        explain.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "alone it means --method attention" in said
    assert "every image beside its map" in said


def test_drawing_twice_gives_the_same_bytes(typed, home) -> None:
    for out in ("first", "second"):
        assert typed("vit_cls", "a/one.png", "--out", out).code == 0
    assert (home / "first/one_rollout.png").read_bytes() == (home / "second/one_rollout.png").read_bytes()


# ------------------------------------------------------------------------------------------------ what it refuses
@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("swin", ("--method", "rollout"), ("shifted windows", "--method gradcam")),
        ("resnet", ("--method", "rollout"), ("no attention", "--method gradcam")),
        ("swin", ("--heads",), ("--heads", "leave it out for Swin")),
        ("swin", ("--class", "77"), ("no such class", "0, 1, 2")),
        ("vit_cls", ("--method", "gradcam"), ("whole image", "--method rollout")),
        ("vit_cls", ("--class", "7"), ("same for every class",)),
        ("vit_cls", ("--method", "rollout", "--heads"), ("--method attention",)),
        ("vit_cls", ("--out", "grey.png"), ("grey.png cannot be written", "--out DIR")),
        ("vit_cls", ("--device", "warp"), ("warp",)),
    ],
)
def test_what_makes_no_sense_is_one_line(typed, home, family, arguments, words) -> None:
    before = everything_in(home)
    assert_refused(typed(family, "a/one.png", *arguments), 2, *words)
    assert everything_in(home) == before


def test_no_images_and_no_run(typed, home) -> None:
    (home / "empty").mkdir()
    assert_refused(typed("vit_cls", "empty"), 3, "empty")
    assert_refused(typed_here(explain.main, "nowhere", "a/one.png", cwd=home), 4, "nowhere")


# -------------------------------------------------------------------------------------------- while training
@pytest.mark.parametrize("model", [(), SWIN], ids=["vit", "swin"])
def test_pictures_of_attention_change_no_bit_of_the_training(tmp_path, model) -> None:
    settings = [s for s in TINY if not model or s not in SMALL]
    settings = [s for s in settings if not s.startswith("tracker.")]
    settings.append("trainer.ema_decay=null")  # the pictures are then of the very weights that are trained
    for name, every in (("without", "null"), ("with", "1")):
        done = vit_train_here(
            *model, *settings, f"tracker.attention_every_epochs={every}", f"run_dir={name}", cwd=tmp_path
        )
        assert done.code == 0, done.err
        assert "no picture" not in done.out
    hashes = checkpoint_hashes(tmp_path / "without")
    assert len(hashes) > 20
    assert checkpoint_hashes(tmp_path / "with") == hashes
    assert attention_steps(tmp_path / "with") == [5, 10, 15, 15]
    assert attention_steps(tmp_path / "without") == [15]


def attention_steps(run: Path) -> list[int]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    return [image.step for image in events.Images("attention")]


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path) -> None:
    from vit_train.report.console import Console
    from vit_train.report.tracker import Tracker
    from vit_train.training.tracker import Plan

    def fails():
        raise RuntimeError("out of\nmemory")

    tracker = Tracker(tmp_path, Console(), attention_every_epochs=2)
    tracker.start(Plan(0, 0, 40, 10, 16, 30, (0.5,), (0.5,), draw_attention=fails))
    out = io.StringIO()
    with redirect_stdout(out):
        for epoch in range(4):
            tracker.after_epoch(10 * (epoch + 1), epoch, {})
    tracker.close()
    assert out.getvalue().count("no picture of attention in TensorBoard: RuntimeError: out of memory") == 2


def test_how_often_is_free_to_change_on_a_resume() -> None:
    from vit_train.runs.resume import compare

    found = compare({"tracker": {}}, {"tracker": {"attention_every_epochs": 3}}, cadence_matters=True)
    assert not found["identity"] + found["grown"] + found["hardware"]
