"""What a user sees in TensorBoard: a real server on a real run that was interrupted once."""

from __future__ import annotations

import io
import json
import re
import select
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlencode

import pytest
from conftest import TINY, environment, vit_train_here
from PIL import Image

SCALARS = {
    *(f"train_step/{name}" for name in ("loss", "lr", "grad_norm", "images_per_second")),
    *(
        f"{split}/{name}"
        for split in ("train", "val", "val_raw", "test")
        for name in ("loss", "top1", "top5")
    ),
    *(f"{split}/macro_top1" for split in ("val", "val_raw", "test")),
    "epoch",
}
STARTED = r"http://127\.0\.0\.1:(\d+)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stopped in the middle of its second epoch, then finished."""
    home = tmp_path_factory.mktemp("tensorboard")
    settings = ("tracker.tensorboard=true", "tracker.log_every_steps=1", "optimizer.lr=0.001", "run_dir=run")
    first = vit_train_here(*TINY, *settings, "trainer.stop_at_step=7", cwd=home)
    assert first.code == 0, first.err
    second = vit_train_here("resume=run", cwd=home)
    assert second.code == 0, second.err
    assert len(list((home / "run/tensorboard").iterdir())) == 2, "not interrupted"
    return home / "run"


@pytest.fixture(scope="module")
def ask(run, tmp_path_factory):
    """Asks the server for a path below /data/plugin/; its answer parsed, or as bytes."""
    log = tmp_path_factory.mktemp("server")
    flags = ("--port", "0", "--host", "127.0.0.1", "--load_fast=false")
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), *flags],
        cwd=log,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = wait_for_port(server)

        def get(path, parse=True, **query):
            url = f"http://127.0.0.1:{port}/data/plugin/{path}" + (f"?{urlencode(query)}" if query else "")
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(url, timeout=30) as answer:
                content = answer.read()
            return json.loads(content) if parse else content

        wait_for_data(get)
        yield get
    finally:
        server.kill()
        server.wait()


def wait_for_port(server):
    said, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        ready, _, _ = select.select([server.stderr], [], [], 1.0)
        if ready:
            line = server.stderr.readline()
            said += line
            match = re.search(STARTED, line)
            if match:
                return int(match.group(1))
        assert server.poll() is None, said
    raise AssertionError(f"the server did not start: {said}")


def wait_for_data(get):
    """Event files are read in the background, the second one last: until its last tag is there."""
    deadline = time.monotonic() + 60
    tags = {}
    while time.monotonic() < deadline:
        tags = get("scalars/tags")
        if any("test/top1" in names for names in tags.values()):
            return
        time.sleep(0.3)
    raise AssertionError(f"no test/top1 after a minute: {tags}")


def test_every_scalar_is_there(ask):
    tags = ask("scalars/tags")
    assert list(tags) == ["tensorboard"]
    assert set(tags["tensorboard"]) == SCALARS


@pytest.mark.parametrize("tag", sorted(SCALARS))
def test_no_step_twice_and_none_back(ask, tag):
    points = ask("scalars/scalars", run="tensorboard", tag=tag)
    steps = [step for _, step, _ in points]
    expected = [15] if tag.startswith("test") else [5, 10, 15]
    assert steps == (list(range(1, 16)) if tag.startswith("train_step/") else expected)
    if tag == "epoch":
        assert [value for _, _, value in points] == [1, 2, 3]


def test_the_scalars_are_those_of_the_run(ask, run):
    result = json.loads((run / "result.json").read_text())
    ((_, step, value),) = ask("scalars/scalars", run="tensorboard", tag="test/top1")
    assert (step, value) == (15, pytest.approx(result["test/top1"]))


@pytest.mark.parametrize("tag", ["train_batch", "predictions", "attention"])
def test_images(ask, tag):
    (entry,) = ask("images/images", run="tensorboard", tag=tag, sample=0)
    with Image.open(io.BytesIO(ask(f"images/individualImage?{entry['query']}", parse=False))) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 8
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 5, "an empty picture"


def test_the_configuration_is_a_text(ask):
    (entry, *_) = ask("text/text", run="tensorboard", tag="config/text_summary")
    assert "vit_train.models.ViT" in entry["text"]
    assert "<code>" in entry["text"]


def test_the_graph(ask):
    graph = ask("graphs/graph", parse=False, run="tensorboard").decode()
    assert "blocks" in graph
    assert "patch_embed" in graph


def test_the_hyperparameters(ask, run):
    """The server's own table of runs: one run, with its learning rate and its figures."""
    experiment = ask("hparams/experiment", request=json.dumps({}))
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"optimizer.lr", "data.batch_size", "trainer.epochs", "seed"} <= names
    request = {
        "startIndex": 0,
        "sliceSize": 10,
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": info["name"]} for info in experiment["metricInfos"]],
    }
    (group,) = ask("hparams/session_groups", request=json.dumps(request))["sessionGroups"]
    assert group["hparams"]["optimizer.lr"] == 0.001
    assert group["hparams"]["data.batch_size"] == 16
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert values["test/top1"] == pytest.approx(json.loads((run / "result.json").read_text())["test/top1"])
