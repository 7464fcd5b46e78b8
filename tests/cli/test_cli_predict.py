"""`vit-predict`: what evaluation would say, every input form, every format, and broken images named."""

import csv
import functools
import io
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import TINY, command, environment, everything_in, typed_here, vit_train_here
from odd_images import EACH, KINDS, heic, picture, saved

from vit_train.cli import command as shared
from vit_train.cli import data_command as data_command
from vit_train.cli import predict
from vit_train.errors import ConfigError

SMALL = (
    "model=vit_digits",
    "model.depth=1",
    "augment=none",
    "data.num_workers=0",
    "data.batch_size=16",
    "data.limit=600",
    "trainer.epochs=3",
    "trainer.precision=fp32",
    "tracker.tensorboard=false",
    "run_dir=run",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits as an image folder."""
    root = tmp_path_factory.mktemp("folder") / "digits"
    assert data_command.main(["digits", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):
    """Runs on that folder, in grey and in colour."""
    found = {}
    for channels in (1, 3):
        home = tmp_path_factory.mktemp(f"channels_{channels}")
        data = ("data=imagefolder", f"data.root={folder}", f"data.in_channels={channels}")
        done = vit_train_here(*data, *SMALL, cwd=home)
        assert done.code == 0, done.err
        found[channels] = home / "run"
    return found


@pytest.fixture
def typed(in_tmp):
    """`vit-predict` in this process, in an empty directory."""
    return functools.partial(typed_here, predict.main, cwd=in_tmp)


@pytest.fixture
def images(in_tmp):
    """Four images in photos/, one of them below."""
    for name in ("b.png", "a.PNG", "sub/d.jpg", "c.webp"):
        path = in_tmp / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(picture(len(name)), {"jpg": "JPEG", "webp": "WEBP"}.get(name[-3:], "PNG")))
    (in_tmp / "photos" / "notes.txt").write_text("no image")
    (in_tmp / "photos" / ".hidden.png").write_bytes(b"")
    return [f"photos/{name}" for name in ("a.PNG", "b.png", "c.webp", "sub/d.jpg")]


def objects(done):
    return [json.loads(line) for line in done.out.splitlines()]


def files(done):
    return [each["file"] for each in objects(done)]


# ------------------------------------------------------------------------------------------------ the answers
@pytest.mark.parametrize("channels", [1, 3])
def test_it_says_what_evaluation_says(typed, runs, folder, channels):
    done = typed(runs[channels], folder / "test", "--num-workers", 2, "--batch-size", 16)
    assert (done.code, done.err) == (0, "")
    answers = objects(done)
    names = [each["file"] for each in answers]
    assert names == sorted(str(path) for path in (folder / "test").rglob("*.png"))
    hits = sum(each["predictions"][0]["class"] == Path(each["file"]).parent.name for each in answers)
    result = json.loads((runs[channels] / "result.json").read_text())
    assert hits == round(result["test/top1"] * len(names))
    assert 0.2 * len(names) < hits, "the run learnt nothing to tell apart"
    for each in answers:
        probabilities = [p["probability"] for p in each["predictions"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.00001


def test_batches_and_workers_change_nothing(typed, runs, folder):
    images = [str(path) for path in sorted((folder / "val").rglob("*.png"))[:41]]
    images.insert(20, "missing.png")
    results = [
        objects(typed(runs[1], *images, "--batch-size", size, "--num-workers", workers))
        for size, workers in ((41, 0), (1, 0), (7, 2))
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a["file"] == b["file"]
            assert a.get("error") == b.get("error")
            for p, q in zip(a.get("predictions", []), b.get("predictions", []), strict=True):
                assert p["probability"] == pytest.approx(q["probability"], abs=1e-4)


def test_top_k_is_at_most_the_number_of_classes(typed, runs, images):
    (one,) = objects(typed(runs[3], images[0], "--top-k", 1))
    (many,) = objects(typed(runs[3], images[0], "--top-k", 99))
    assert len(one["predictions"]) == 1
    assert len(many["predictions"]) == 10
    assert sum(p["probability"] for p in many["predictions"]) == pytest.approx(1, abs=1e-4)


def test_every_odd_kind_of_file(runs, in_tmp):
    """180 files at once, through the real command: the bad are named, the good answered, in order."""
    folder = in_tmp / "odd"
    folder.mkdir()
    bad = set()
    for name, kind in KINDS.items():
        for number in range(EACH):
            suffix, data, _, limit = kind(picture(number), number)
            path = folder / f"{name}_{number}{suffix}"
            path.write_bytes(data)
            if limit is None:
                bad.add(f"odd/{path.name}")
    done = subprocess.run(
        command("vit_train.cli.predict", str(runs[3]), "odd", "--num-workers", "2", "--batch-size", "16"),
        cwd=in_tmp,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["file"] for each in answers] == sorted(f"odd/{path.name}" for path in folder.iterdir())
    assert {each["file"] for each in answers if "error" in each} == bad
    assert all(len(each["predictions"]) == 5 for each in answers if each["file"] not in bad)
    *named, last = done.stderr.splitlines()
    assert (
        last
        == f"vit-predict: error: {len(bad)} of {len(answers)} images could not be read: each is named above"
    )
    errors = [each["error"] for each in answers if "error" in each]
    assert named == [f"vit-predict: skipped: {error}" for error in errors]


# ------------------------------------------------------------------------------------------------- the inputs
def test_folders_files_and_patterns_in_the_order_typed(typed, runs, images, in_tmp):
    assert files(typed(runs[3], "photos")) == images
    assert files(typed(runs[3], "photos/sub/", images[1])) == ["photos/sub/d.jpg", images[1]]
    assert files(typed(runs[3], "photos/**/*.[jp]*g")) == ["photos/b.png", "photos/sub/d.jpg"]
    assert files(typed(runs[3], images[0], "--top-k", 2, in_tmp / "photos")) == [
        images[0],
        *(str(in_tmp / name) for name in images),
    ]
    shutil.copy(images[1], "photos/[x].png")  # the file itself, though it reads like a pattern
    assert files(typed(runs[3], "photos/[x].png")) == ["photos/[x].png"]


def test_a_list_on_stdin(typed, runs, images):
    done = typed(runs[3], "-", images[0], stdin=b"photos/sub\r\n\nphotos/b.png")
    assert files(done) == ["photos/sub/d.jpg", "photos/b.png", images[0]]


def test_what_is_missing_is_named_and_the_rest_goes_on(typed, runs, images):
    done = typed(runs[3], "no/such.png", images[0], "none*.png")
    assert done.code == 3
    assert ["error" in each for each in objects(done)] == [True, False, True]
    assert "skipped: no/such.png does not exist; check its name, or put it back\n" in done.err
    assert done.err.endswith("error: 2 of 3 images could not be read: each is named above\n")


def test_pictures_of_a_phone(typed, runs, in_tmp):
    (in_tmp / "phone").mkdir()
    (in_tmp / "phone/IMG_1.heic").write_bytes(heic())
    done = typed(runs[3], "phone/IMG_1.heic")
    assert done.code == 3
    skipped = "vit-predict: skipped: phone/IMG_1.heic is HEIC, which is not read: convert it to JPEG\n"
    assert done.err.startswith(skipped)
    done = typed(runs[3], "phone")
    assert "; .heic is HEIC, which is not read: convert it to JPEG)\n" in done.err


def test_nothing_to_predict(typed, runs, in_tmp):
    (in_tmp / "empty").mkdir()
    for arguments, words in ((["empty"], "no image in empty"), (["-"], "the list on stdin is empty")):
        done = typed(runs[3], *arguments)
        assert (done.code, done.out) == (3, "")
        assert re.fullmatch(rf"vit-predict: error: there are no images: {words} \(.*\)\n", done.err)


@pytest.fixture
def address(images, monkeypatch):
    """Of a server that offers the working directory."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls(typed, runs, images, address):
    url = f"{address}/photos/b.png"
    of_url, of_file, gone, page = objects(
        typed(runs[3], url, images[1], f"{address}/gone.png", f"{address}/")
    )
    assert of_url["file"] == url
    assert of_url["predictions"] == of_file["predictions"]
    assert "HTTP Error 404" in gone["error"]
    assert "it is text/html, not an image" in page["error"]

    refused = typed(runs[3], "-", stdin=url.encode())
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == f"vit-predict: error: the list holds the URL {url}: type --allow-url to fetch it\n"
    allowed = typed(runs[3], "-", "--allow-url", stdin=url.encode())
    assert (allowed.code, files(allowed)) == (0, [url])


# ------------------------------------------------------------------------------------------------ the formats
def test_csv(typed, runs, images):
    done = typed(runs[3], images[0], "missing.png", "--format", "csv", "--top-k", 2)
    good, bad = csv.DictReader(io.StringIO(done.out))
    assert [*good] == ["file", "class_1", "probability_1", "class_2", "probability_2", "error"]
    (expected,) = objects(typed(runs[3], images[0], "--top-k", 2))
    for rank, p in enumerate(expected["predictions"], start=1):
        assert good[f"class_{rank}"] == p["class"]
        assert float(good[f"probability_{rank}"]) == p["probability"]
    assert (good["error"], bad["class_1"]) == ("", "")
    assert bad["error"].startswith("missing.png does not exist")


def test_the_table(typed, runs, images):
    done = typed(runs[3], *images[:2], "missing.png", "--format", "table", "--top-k", 3)
    lines = [line for line in done.out.splitlines() if line.strip()]
    assert lines[0].split() == ["file", "class", "%", "then"]
    (best, *others) = objects(typed(runs[3], images[0], "--top-k", 3))[0]["predictions"]
    row = lines[2]
    assert row.split()[:3] == [images[0], best["class"], f"{100 * best['probability']:.1f}"]
    assert row.rstrip().endswith(", ".join(f"{p['class']} {100 * p['probability']:.1f}" for p in others))
    assert lines[4].split() == ["missing.png", "not", "read"]
    assert "\x1b" not in done.out
    assert max(map(len, lines)) <= 110


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals to make")
def test_a_terminal_gets_the_table_and_no_escape_sequence_of_a_name(runs, images, in_tmp):
    evil = "photos/\x1b[2Jclear\n.png"
    shutil.copy(images[0], evil)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("vit_train.cli.predict", str(runs[3]), evil, "gone\x1b]0;x.png"),
        env={**environment(), "COLUMNS": "100", "TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    assert process.wait() == 3
    assert b"class" in said
    assert b"\x1b[2J" not in said
    assert b"\x1b]0" not in said
    assert rb"photos/\x1b[2Jclear\n.png" in said


def test_an_output_file_is_whole_or_not_there(typed, runs, images, in_tmp):
    assert typed(runs[3], *images, "--out", "p.csv") == (0, "", "")
    assert len(Path("p.csv").read_text().splitlines()) == 1 + len(images)
    assert typed(runs[3], *images, "missing.png", "--out", "p.jsonl").code == 3
    assert len([json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]) == len(images) + 1
    before = everything_in(in_tmp)
    for out, words in (("p.csv/p.csv", "cannot be made in"), ("photos", "is not a plain file")):
        done = typed(runs[3], *images, "--out", out)
        assert (done.code, done.out) == (2, "")
        assert re.fullmatch(rf"vit-predict: error: --out {out} .*{words}.*\n", done.err)
    assert typed("no_run", images[0], "--out", "p.csv").code == 4
    assert everything_in(in_tmp) == before
    assert typed(runs[3], images[0], "--out", "new/folder/p.csv").code == 0
    assert len(Path("new/folder/p.csv").read_text().splitlines()) == 2


def test_an_output_replaces_neither_an_image_nor_a_run(typed, runs, images, in_tmp):
    shutil.copytree(runs[3], "run", symlinks=True)
    before = everything_in(in_tmp)
    for out in (images[0], "new.JPG"):
        done = typed("run", *images, "--out", out)
        assert done == (2, "", f"vit-predict: error: --out {out} names an image; type another name\n")
    (checkpoint, *_) = (path for path in Path("run/checkpoints").iterdir() if not path.is_symlink())
    names = ("run/config.yaml", "run/run.json", f"{checkpoint}/model.safetensors", f"{checkpoint}/new.csv")
    for out in (*names, "run/checkpoints/best/state.json"):
        done = typed("run", *images, "--out", out)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"vit-predict: error: --out {out} is a file of a run, which would be lost")
    assert everything_in(in_tmp) == before


def test_files_that_ran_out_are_not_blamed_on_the_output(in_tmp, no_more_files):
    Path("read").touch()
    with pytest.raises(OSError, match="Too many open files"), shared.writing("--out p.csv"), no_more_files():
        Path("read").read_bytes()
    refused = pytest.raises(ConfigError, match=r"--out p\.csv cannot be written: Is a directory")
    with refused, shared.writing("--out p.csv"):
        in_tmp.write_bytes(b"")


def test_names_that_are_not_text(typed, runs, images):
    name = os.fsdecode(b"photos/caf\xe9.png")
    shutil.copy(images[0], name)
    done = typed(runs[3], "-", stdin=b"photos/caf\xe9.png\n")
    assert (done.code, files(done)) == (0, [name])
    assert "caf\\udce9.png" in typed(runs[3], name, "--format", "csv").out


# ------------------------------------------------------------------------------------------------ the command
def test_a_run_on_arrays(typed, images, in_tmp):
    """Its sample transform squashes and its names are digits."""
    assert vit_train_here(*TINY, "run_dir=run", "trainer.epochs=1", cwd=in_tmp).code == 0
    answers = objects(typed("run", *images, "--weights", "raw"))
    assert all(p["class"] in "0123456789" for each in answers for p in each["predictions"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "IMAGE"),
        (["run", "a.png", "--top-k", "0"], "--top-k: expected a whole number of 1 to 2147483647, got '0'"),
        (["run", "a.png", "--num-workers", "x"], "--num-workers: expected a whole number"),
        (["run", "a.png", "--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_what_is_typed_wrong(capsys, arguments, words):
    assert predict.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_device_that_is_not_there_and_a_run_that_is_not_there(typed, runs, images):
    done = typed(runs[3], images[0], "--device", "tpu")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("vit-predict: error: device 'tpu'")
    assert typed("nowhere", images[0]).err.startswith("vit-predict: error: nowhere does not exist")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have names")
def test_nobody_waits_for_a_pipe_or_a_socket_among_the_images(typed, runs, images):
    os.mkfifo("photos/pipe.png")
    Path("photos/zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("photos/socket.png")
        done = typed(runs[3], "photos")
    assert done.code == 3
    answers = {answer["file"]: answer for answer in objects(done)}
    assert [name for name, answer in answers.items() if "error" not in answer] == images
    for name in ("pipe", "zero"):
        assert "it is not a plain file" in answers[f"photos/{name}.png"]["error"]
    assert "cannot be read" in answers["photos/socket.png"]["error"]


def test_a_reader_that_goes_away(runs, images):
    """`| head`: no traceback, nothing said."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("vit_train.cli.predict", str(runs[3]), "photos"),
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_imports_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vit_train.cli.predict", "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, flags=re.MULTILINE))
    assert "vit_train.errors" in imported, "importtime says nothing"
    assert not {"torch", "rich", "PIL", "numpy"} & imported
    assert "--allow-url" in done.stdout
