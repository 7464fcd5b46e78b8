"""What is said may fail: stdout and stderr closed at the start, on a full disk, a pipe that nobody reads.

Training goes on and saves, with train.log alone; the other commands end with one line where one can be written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import EIGHTEEN, environment, vit_train_forked
from PIL import Image

pytestmark = pytest.mark.skipif(
    not os.path.exists("/dev/full") or shutil.which("bash") is None,  # noqa: PTH110
    reason="needs /dev/full and bash",
)

MODULES = {
    "vit-train": "vit_train",
    "vit-eval": "vit_train.cli.evaluate",
    "vit-predict": "vit_train.cli.predict",
    "vit-explain": "vit_train.cli.explain",
    "vit-export": "vit_train.cli.export",
    "vit-data": "vit_train.cli.data_command",
}
OTHERS = {
    "vit-eval": ("run", "data.num_workers=0"),
    "vit-predict": ("run", "photos/train/ash/0.png"),
    "vit-explain": ("run", "photos/train/ash/0.png", "--out", "maps"),
    "vit-export": ("run", "--format", "safetensors", "--out", "out.safetensors"),
    "vit-data": ("check", "photos", "--num-workers", "0"),
}
IN_MAKE_TEST = {
    ("vit-eval", "stdout", "full"),
    ("vit-predict", "stdout", "broken"),
    ("vit-explain", "stderr", "closed"),
    ("vit-export", "stdout", "closed"),
    ("vit-data", "stderr", "full"),
}
STREAMS = ("stdout", "stderr")
STATES = ("closed", "full", "broken")
REASONS = {"full": "No space left on device", "broken": "Broken pipe"}


def typed(command, arguments, broken, cwd):
    """The command as a process whose streams are as `broken` says: {"stdout": "full"}."""
    numbers, shut = {"stdout": 1, "stderr": 2}, []
    streams = dict.fromkeys(STREAMS, subprocess.PIPE)
    for name, state in broken.items():
        if state == "broken":
            read, streams[name] = os.pipe()
            os.close(read)
            shut.append(streams[name])
        elif state == "full":
            streams[name] = os.open("/dev/full", os.O_WRONLY)
            shut.append(streams[name])
    closing = "".join(f" {numbers[name]}>&-" for name, state in broken.items() if state == "closed")
    program = [sys.executable, "-m", MODULES[command], *arguments]
    done = subprocess.run(
        ["bash", "-c", f'exec "$@"{closing}', "bash", *program],
        cwd=cwd,
        env=environment(),
        text=True,
        timeout=300,
        check=False,
        **streams,
    )
    for descriptor in shut:
        os.close(descriptor)
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run and a folder of images."""
    folder, draws = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ash", "oak"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{i}.png")
    vit_train_forked(*EIGHTEEN, cwd=folder)
    return folder


@pytest.mark.parametrize(
    "broken",
    [
        {"stdout": "full", "stderr": "broken"},
        {"stdout": "closed", "stderr": "closed"},
        *(pytest.param({name: state}, marks=pytest.mark.faults) for name in STREAMS for state in STATES),
        pytest.param({"stdout": "broken", "stderr": "full"}, marks=pytest.mark.faults),
        pytest.param({"stdout": "full", "stderr": "closed"}, marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_training_finishes_and_says_once_in_the_log_which_stream_failed(tmp_path, broken):
    done = typed("vit-train", (*EIGHTEEN, "tracker.progress=true"), broken, tmp_path)
    assert done.returncode == 0
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text())["steps"] == 18
    assert (run / "checkpoints/last/model.safetensors").is_file()
    log = (run / "train.log").read_text()
    assert "epoch 3/3" in log
    assert "train longer" in log
    for name in STREAMS:
        reason = REASONS.get(broken.get(name))
        said = f"{name} cannot be written ({reason}): from here on its lines appear only in this log"
        assert log.count(f"{name} cannot be written") == log.count(said) == (reason is not None), log
    for said in (done.stdout, done.stderr):
        assert "Traceback" not in (said or "")


@pytest.mark.parametrize(
    ("command", "stream", "state"),
    [
        pytest.param(*case, marks=[] if case in IN_MAKE_TEST else pytest.mark.faults)
        for case in ((command, name, state) for command in OTHERS for name in STREAMS for state in STATES)
    ],
)
def test_another_command_ends_with_one_line(home, command, stream, state):
    done = typed(command, OTHERS[command], {stream: state}, home)
    full = (stream, state) == ("stdout", "full")
    assert done.returncode == (5 if full else 0), done.stderr
    if full:
        assert done.stderr.splitlines()[-1] == f"{command}: error: stdout cannot be written: {REASONS[state]}"
    for said in (done.stdout, done.stderr):
        assert "Traceback" not in (said or "")
        assert "Exception ignored" not in (said or "")
    assert not [path for path in home.rglob(".*") if path.is_file()], "a file half written was left"


@pytest.mark.parametrize("asked", ["--help", "--cfg"])
def test_help_that_cannot_be_written_is_an_error(tmp_path, asked):
    arguments = ["--cfg", "job"] if asked == "--cfg" else ["--help"]
    for state, code in (("full", 5), ("broken", 0), ("closed", 0)):
        done = typed("vit-train", arguments, {"stdout": state}, tmp_path)
        assert done.returncode == code, state
        expected = f"vit-train: error: stdout cannot be written: {REASONS[state]}\n" if code else ""
        assert done.stderr == expected, state


@pytest.mark.faults
@pytest.mark.parametrize("command", OTHERS)
def test_help_of_another_command_likewise(tmp_path, command):
    done = typed(command, ["--help"], {"stdout": "full"}, tmp_path)
    assert (done.returncode, done.stderr) == (
        5,
        f"{command}: error: stdout cannot be written: {REASONS['full']}\n",
    )
