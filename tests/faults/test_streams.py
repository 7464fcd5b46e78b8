"""What is said may fail: stdout and stderr closed at the start, on a full disk, a pipe that nobody reads.

Training goes on and saves, with train.log alone; the other commands end with one line where one can be written.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import EIGHTEEN, environment, vit_train_forked
from PIL import Image

MODULES = {
    "vit-train": "vit_train",
    "vit-eval": "vit_train.cli.evaluate",
    "vit-predict": "vit_train.cli.predict",
    "vit-explain": "vit_train.cli.explain",
    "vit-export": "vit_train.cli.export",
    "vit-data": "vit_train.cli.data",
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


@pytest.mark.faults
@pytest.mark.parametrize("command", OTHERS)
def test_help_of_another_command_likewise(tmp_path, command):
    done = typed(command, ["--help"], {"stdout": "full"}, tmp_path)
    assert (done.returncode, done.stderr) == (
        5,
        f"{command}: error: stdout cannot be written: {REASONS['full']}\n",
    )
