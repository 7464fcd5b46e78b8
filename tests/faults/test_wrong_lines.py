"""Command lines with a value that makes no sense, drawn from a seed, over every key there is.

It ends with exit code 2 or 3 (4 where it is to name a run) and one line for each mistake, and leaves nothing on
disk; or the value happens to be fine, and the run begins. 400 lines with `-m ""`, of which a plain `pytest` runs 20.
"""

from __future__ import annotations

import random
import re
import signal
from functools import partial

import pytest
from conftest import TINY, compose, everything_in, vit_train_forked
from omegaconf import OmegaConf
from PIL import Image

LONGEST_SECONDS = 20  # on a machine that does other things as well
CHOICES = [
    (),
    (
        "model=vit_tiny",
        "model.depth=2",
        "data.img_size=32",
        "augment=deit",
        "optimizer=sgd",
        "schedule=plateau",
    ),
    ("model=swin_cifar", "data.img_size=32", "augment=medium", "schedule=multistep"),
    ("objective=distill", "objective.teacher=RUN", "strategy=data_parallel"),
    ("model=hybrid_cifar", "data.img_size=32", "optimizer=muon", "trainer=cifar"),
    ("data=imagefolder", "data.root=PHOTOS", "model=resnet_cifar", "data.img_size=16"),
]
VALUES = {
    "wrong kind": ("word", "'3'", "1.5", "true", "0x1F", "2026-01-01", "-", "\\u00e9"),
    "null": ("null",),
    "negative": ("-1", "-0.5", "-1e-9", "-9223372036854775809"),
    "huge": ("1e30", "99999999999999999999", "1e999", "inf", "-inf", "nan", "2147483648", "1000001"),
    "list": ("[]", "[1,2,3]", "[null]", "[[[]]]", "[a,b]"),
    "mapping": ("{}", "{a:1}", "{_target_:os.system}", "{_target_:vit_train.models.ViT}", "{1:2}"),
    "empty": ("", "''", '""', "' '"),
    "interpolation": ("${nothing}", "${oc.env:NOTHING_OF_THAT_NAME}", "${seed}", "${.a}", "${", "${data}"),
}


def keys_of(config, prefix=""):
    """Every key, of nodes too."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


def wrong_line(seed):
    """The groups that are chosen, and `key=value`."""
    draw = random.Random(seed)
    chosen = draw.choice(CHOICES)
    keys = list(keys_of(OmegaConf.to_container(compose(*chosen), resolve=False)))
    return chosen, f"{draw.choice(keys)}={draw.choice(draw.choice(list(VALUES.values())))}"


@pytest.fixture(scope="module")
def there(warm, tmp_path_factory):
    """A run and a folder of images, for lines that name one."""
    folder = tmp_path_factory.mktemp("there")
    vit_train_forked(*TINY, "trainer.epochs=1", "run_dir=run", cwd=folder)
    for i in range(40):
        (folder / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (i, 5 * i, 100)).save(folder / "train" / "ab"[i % 2] / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=() if i % 20 == 7 else pytest.mark.faults) for i in range(400)]
)
def test_a_wrong_value_is_one_line(there, tmp_path, seed) -> None:
    chosen, wrong = wrong_line(seed)
    chosen = [each.replace("=RUN", f"={there / 'run'}").replace("=PHOTOS", f"={there}") for each in chosen]
    small = [each for each in TINY if not each.startswith("model.") or not any("model=" in c for c in chosen)]
    key = wrong.partition("=")[0]
    typed = [each for each in (*small, *chosen, "trainer.stop_at_step=0") if each.partition("=")[0] != key]
    done = vit_train_forked(
        *typed, wrong, cwd=tmp_path, check=False, prepare=partial(signal.alarm, LONGEST_SECONDS)
    )
    shown = f"{wrong}: exit {done.code}: {done.err}"
    assert done.code in (0, 2, 3, *([4] if key in ("init_from", "objective.teacher", "resume") else [])), (
        shown
    )
    if done.code:
        first, *mistakes = done.err.removesuffix("\n").split("\n")
        said = re.fullmatch(r"vit-train: error: (\d+) errors in the configuration:", first)
        assert len(mistakes) == (int(said[1]) if said else 0), shown
        assert first.startswith("vit-train: error: "), shown
        assert everything_in(tmp_path) == {}, shown
