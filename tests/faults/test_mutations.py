"""Every file of a run, damaged in a thousand ways: its reader answers, or ends in one of the documented errors.

What is damaged is drawn from a seed. The checksums of a checkpoint are made to fit what was damaged, or no
damage would reach the code behind them. A plain `pytest` runs a sample of 30 of each file.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import EIGHTEEN, vit_train_forked

from vit_train.checkpoint import checkpoint_directories, load
from vit_train.errors import VitTrainError
from vit_train.inference.trained import fits, from_checkpoint
from vit_train.report.history import draw_history, read_events
from vit_train.runs.record import read_facts
from vit_train.runs.stored import allowed, read_config
from vit_train.weights import read_pretrained

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set and read as Linux has them")

LONGEST_SECONDS = 20
MOST_BYTES = 2**30  # of memory, more than there are

# What a value of JSON or YAML can be replaced by
VALUES = [
    *(
        "null",
        "true",
        "-1",
        "0",
        "1e999",
        "NaN",
        "-0.0",
        "9" * 400,
        "1" + "0" * 18,
        "0x10",
        '"x"',
        '""',
        "[]",
        "{}",
    ),
    *('"\\ud800"', '"\\u0000"', "[[[[[[]]]]]]", '{"a": {"b": []}}', "~", ".inf", "2020-13-45", "!!int ''"),
    *(
        "!!python/object:os.system {}",
        "&a [*a]",
        "!!binary x",
        "'",
        '"',
        "- ",
        ": ",
        "%",
        "\t",
        "\r",
        "\x1b[2J",
    ),
]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The same bytes after one to three accidents or attacks."""
    for _ in range(draw.randint(1, 3)):
        at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        to = min(to, at + draw.choice((1, 8, 64, 4096)))
        kind = draw.randrange(7)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + draw.randbytes(to - at) + data[to:]
        elif kind == 2:
            data = data[:at] + data[to:]
        elif kind == 3:
            data = data[:to] + data[at:to] * draw.choice((1, 2, 50)) + data[to:]
        elif kind == 4:
            data = data[:at] + draw.choice(VALUES).encode("utf-8", "surrogatepass") + data[at:]
        else:  # a value for a value
            found = list(re.finditer(rb'(?<=[:\[, ])\s*("[^"\n]*"|[^\s,\]}":{\[]+)', data[: 2**18]))
            if found:
                value = draw.choice(found)
                data = data[: value.start(1)] + draw.choice(VALUES).encode() + data[value.end(1) :]
    return data


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """A run at its end."""
    folder = tmp_path_factory.mktemp("whole")
    vit_train_forked(*EIGHTEEN, cwd=folder)
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


def newest(run):
    return checkpoint_directories(run / "checkpoints")[0]


def config(run):
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # which hold copies
    stored, _ = read_config(run)
    allowed(stored, (), run)


def history(run):
    path = run / "metrics.jsonl"
    read_events(path)
    if path.stat().st_size % 20 == 0:  # a drawing takes a second
        draw_history(run)


def checkpoint(run):
    """As `vit-eval` reads it, which builds the model."""
    path = newest(run)
    from_checkpoint(load(path, partial(fits, trust=())), device=torch.device("cpu"), weights="auto")


def averaged_checkpoint(run):
    for weights in ("ema", "raw"):
        from_checkpoint(load(newest(run)), device=torch.device("cpu"), weights=weights)


def pretrained(run):
    read_pretrained(str(newest(run)))


READERS = [
    ("config.yaml", config),
    ("run.json", read_facts),
    ("metrics.jsonl", history),
    ("manifest.json", checkpoint),
    ("state.json", checkpoint),
    ("state.json", pretrained),
    ("model.safetensors", checkpoint),
    ("ema.safetensors", averaged_checkpoint),
    ("optimizer.safetensors", checkpoint),
]


@pytest.fixture
def limited():
    """A reader that is made to ask for a terabyte is refused here, and not by what else runs on the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.faults)])
@pytest.mark.parametrize(("name", "read"), READERS, ids=[f"{name}-{read.__name__}" for name, read in READERS])
def test_a_damaged_file_is_read_or_refused(run, limited, name, read, count) -> None:
    listed = (newest(run) / name).exists()
    path = newest(run) / name if listed else run / name
    data = path.read_bytes()
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    refused = 0
    for seed in range(count):
        draw = random.Random(seed)
        path.write_bytes(damaged(data, draw))
        if listed and name != "manifest.json" and draw.random() < 0.9:
            about = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            files = {**manifest["files"], name: about}
            (newest(run) / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        start, lines = time.monotonic(), 0
        try:
            read(run)
        except VitTrainError as error:
            refused += 1
            lines = str(error).count("\n")
        except BaseException as error:
            error.add_note(f"seed {seed}: {path.read_bytes()[:2000]!r}")
            raise
        assert time.monotonic() - start < LONGEST_SECONDS, f"seed {seed}"
        assert not lines, f"seed {seed}"
    if name not in ("run.json", "metrics.jsonl"):  # what is damaged in those is left out
        assert refused > count / 4
