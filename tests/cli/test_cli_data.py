"""`vit-data check` and `vit-data stats` as typed: what they print, write and exit with."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console
from conftest import command, compose, environment, everything_in, typed_here
from PIL import Image

from vit_train.cli.data_command import main
from vit_train.data.folder.check import check_folder
from vit_train.report.dataset import check_tables


def write(path, value=0, size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(value).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    for i in range(60):
        write(tmp_path / "photos" / ("train", "val", "test")[i % 3] / "ab"[i % 2] / f"{i:02}.png", value=i)
    return tmp_path / "photos"


def test_a_good_folder(root, tmp_path):
    before = everything_in(root)
    done = typed_here(main, "check", root, cwd=tmp_path)
    assert done.code == 0, done
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "nothing would break training, no warnings"
    assert lines[1].startswith(f"{root}: 60 images in 2 classes, ")
    assert re.search(r"^class +train +val +test", done.out, re.MULTILINE)
    assert re.search(r"^a +10 +10 +10 ", done.out, re.MULTILINE)
    assert re.search(r"^all +20 +20 +20", done.out, re.MULTILINE)
    assert "all are 12 x 12 pixels" in done.out
    assert everything_in(root) == before


def test_the_verdict_comes_first_then_problems_then_warnings(root, tmp_path):
    (root / "train/a/bad.jpg").write_text("text")
    (root / "train/c").mkdir()
    (root / "train/notes.txt").write_text("")
    done = typed_here(main, "check", "photos", "--num-workers", "2", cwd=tmp_path)
    assert (done.code, done.err) == (3, "")
    assert done.out.startswith("2 problems would break training, 1 warning\n")
    assert "train/a/bad.jpg  is not an image Pillow can read" in done.out
    assert "train/notes.txt  not an image by its name" in done.out
    assert done.out.index("problem") < done.out.index("warning  ") < done.out.index("shorter side")


def test_hostile_names_do_nothing_to_the_terminal(root, tmp_path):
    label = "\x1b[31mred\n[bold]:smile:"
    for i, split in enumerate(("train", "val", "test")):
        write(root / split / label / "0.png", value=100 + i)
    (root / "train" / label / "\x1b]0;title\x07.jpg").write_text("text")
    (root / "train" / label / os.fsdecode(b"\xff.jpg")).write_text("text")
    done = typed_here(main, "check", root, "--json", tmp_path / "report.json", cwd=tmp_path)
    assert done.code == 3
    assert "\x1b" not in done.out
    assert "\x07" not in done.out
    assert r"\x1b[31mred\n[bold]:smile:" in done.out
    report = json.loads((tmp_path / "report.json").read_text(encoding="ascii"))
    assert report["counts"]["train"] == {label: 3, "a": 10, "b": 10}
    assert {each["files"][0] for each in report["problems"][0]["items"]} == {
        f"train/{label}/\x1b]0;title\x07.jpg",
        f"train/{label}/\udcff.jpg",
    }


def test_only_the_command_speaks_of_a_damaged_file(root, tmp_path, capfd):
    """libtiff, which Pillow reads such files with, writes to stderr by itself."""
    bad = root / "train/a/bad.tif"
    noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad, compression="tiff_lzw")
    data = bytearray(bad.read_bytes())
    data[8:-300:37] = b"\xff" * len(data[8:-300:37])
    bad.write_bytes(data)
    with pytest.raises(OSError, match="decoder error"):
        Image.open(bad).load()
    assert "not yet in table" in capfd.readouterr().err
    done = typed_here(main, "check", "photos", "--num-workers", "2", cwd=tmp_path)
    assert (done.code, done.err, capfd.readouterr().err) == (3, "", "")
    assert "train/a/bad.tif" in done.out


def test_long_lists_are_cut_on_the_screen_and_whole_in_json(root, tmp_path):
    for i in range(152):
        (root / "train/a" / f"bad_{i:03}.jpg").write_text("text")
    for i in range(30):
        write(root / "train" / f"class_{i:02}" / "0.png", value=1000 + i)
    done = typed_here(main, "check", root, "--json", "deep/report.json", cwd=tmp_path)
    assert done.code == 3
    assert "bad_019" in done.out
    assert "bad_020" not in done.out
    assert "and 132 more (--json lists all)" in done.out
    assert "12 classes between" in done.out
    assert re.search(r"^a +162 ", done.out, re.MULTILINE)  # the largest is among those shown
    report = json.loads((tmp_path / "deep/report.json").read_text())
    assert len(report["problems"][0]["items"]) == 152
    assert len(report["counts"]["train"]) == 32


def test_json_on_stdout_is_all_there_is(root, tmp_path):
    done = typed_here(main, "check", root, "--json", "-", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["problems"] == []
    assert report["num_images"] == 60
    done = typed_here(main, "stats", root, "--json", "-", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["num_images"] == 20


def test_a_place_that_cannot_be_written_is_told_before_the_work(root, tmp_path):
    for name in ("photos", "photos/train/a/00.png", "photos/train/a/00.png/x.json"):
        for work in ("check", "stats"):
            done = typed_here(main, work, root, "--json", name, cwd=tmp_path)
            assert done.code == 2
            assert done.out == ""
            assert done.err.startswith(f"vit-data: error: --json {name} ")
            assert done.err.count("\n") == 1


def test_a_name_that_no_file_can_have_is_one_line(tmp_path):
    done = typed_here(main, "check", "x" * 300, cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"vit-data: error: {'x' * 300}: File name too long\n"


def test_a_folder_that_is_not_there(root, tmp_path):
    for work in ("check", "stats"):
        done = typed_here(main, work, "photo", cwd=tmp_path)
        assert (done.code, done.out) == (3, "")
        assert done.err == "vit-data: error: photo does not exist; did you mean 'photos'?\n"


def test_eighty_columns_are_enough(root):
    """Rendered as a terminal of that width would get it."""
    (root / "train/a" / f"{'long ' * 20}.jpg").write_text("text")
    for i in range(12):
        write(root / "train" / f"{'class ' * 6}{i}" / "0.png", value=i)
    console = rich.console.Console(file=io.StringIO(), width=80, highlight=False, emoji=False)
    for table in check_tables(check_folder(str(root), num_workers=0)):
        console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    rows = [line for line in lines if line.startswith("class class")]
    assert len(rows) == 12
    assert all(re.search(r" 1 +0 +0 ", row) for row in rows), rows


def test_stats_prints_what_a_shell_and_vit_train_take(root, tmp_path):
    done = typed_here(main, "stats", root, "--json", "stats.json", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "stats.json").read_text())
    images = [np.asarray(Image.open(path)) for path in sorted(root.glob("train/*/*.png"))]
    pixels = np.stack(images) / 255
    assert figures["mean"] == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist(), abs=1e-9)
    assert figures["std"] == pytest.approx(pixels.std(axis=(0, 1, 2)).tolist(), abs=1e-9)
    assert (figures["img_size"], figures["split"]) == (12, "train")
    [line] = [line for line in done.out.splitlines() if "data.mean=" in line]
    overrides = shlex.split(line.split("add: ")[1])
    assert overrides == figures["overrides"]
    data = compose("data=imagefolder", f"data.root={root}", *overrides).data
    assert [*data.mean] == pytest.approx(figures["mean"], abs=6e-5)
    assert [*data.std] == pytest.approx(figures["std"], abs=6e-5)
    less = [f"{mean - usual:+.4f}" for mean, usual in zip(figures["mean"], (0.485, 0.456, 0.406))]
    assert re.search(r"less ImageNet's +" + " +".join(map(re.escape, less)), done.out)


def test_stats_takes_what_training_takes(root, tmp_path):
    done = typed_here(
        main, "stats", root, "--channels", "1", "--img-size", "10", "--resize", "squash", "--split", "val",
        "--num-workers", "1", "--json", "-", cwd=tmp_path,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    figures = json.loads(done.out)
    assert len(figures["mean"]) == 1
    assert (figures["img_size"], figures["resize"], figures["split"]) == (10, "squash", "val")
    done = typed_here(main, "stats", root, "--channels", "1", cwd=tmp_path)
    assert re.search(r"20 train images +grey", done.out)


def test_stats_names_a_file_that_cannot_be_read_and_where_to_look(root, tmp_path):
    (root / "train/a/bad.jpg").write_text("text")
    done = typed_here(main, "stats", root, cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        f"vit-data: error: {root}/train/a/bad.jpg is not an image Pillow can read; repair or remove it; "
        f"vit-data check {root} lists all\n"
    )


def test_stats_of_one_colour_have_nothing_to_divide_by(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "white" / label).mkdir(parents=True)
        Image.new("L", (8, 8), 255).save(tmp_path / "white" / label / "0.png")
    done = typed_here(main, "stats", "white", cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert "white: all train images are of one colour" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", "x", "--num-workers", "-1"),
        ("stats", "x", "--resize", "fit"),
        ("stats", "x", "--img-size", "0"),
        ("stats", "x", "--channels", "2"),
        ("chek", "x"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, tmp_path):
    assert typed_here(main, *arguments, cwd=tmp_path).code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_it_with_130_and_leaves_no_process(root, tmp_path):
    large = root / "train/a/large.png"
    write(large, size=(1500, 1500))
    for i in range(2000):
        (root / "train/a" / f"link_{i}.png").symlink_to(large)
    process = subprocess.Popen(
        command("vit_train.cli.data_command", "check", str(root), "--num-workers", "2"),
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    workers = []
    while len(workers) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:  # noqa: PTH123
            workers = [int(pid) for pid in file.read().split()]
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "")
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_help_answers_at_once():
    code = (
        "import sys; from vit_train.cli.data_command import main\n"
        "try: main(['check', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'rich' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False False"
    assert "of 100 with one flipped bit 98 do" in " ".join(done.stdout.split())
