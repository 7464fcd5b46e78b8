"""The change that CONTRIBUTING.md shows, made to a copy of the package: a new key takes three places."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import command, environment

REPOSITORY = Path(__file__).parent.parent


def shown_change() -> dict[str, list[list[str]]]:
    """File -> hunks, each a list of lines with their marks."""
    [diff] = re.findall(r"```diff\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)
    files: dict[str, list[list[str]]] = {}
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, again, *lines = part.splitlines()
        assert again == f"+++ {name}"
        files[name] = [hunk.strip("\n").split("\n") for hunk in "\n".join(lines).split("...")]
    return files


def applied(text: str, hunk: list[str]) -> str:
    before = "".join(f"{line[1:]}\n" for line in hunk if line[0] != "+")
    after = "".join(f"{line[1:]}\n" for line in hunk if line[0] != "-")
    assert text.count(before) == 1, f"{before!r} does not say where"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the package after the change."""
    copy = tmp_path_factory.mktemp("changed")
    for folder in ("vit_train", "configs"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, hunks in shown_change().items():
        text = (copy / name).read_text()
        for hunk in hunks:
            text = applied(text, hunk)
        (copy / name).write_text(text)
    return copy


def run_in(copy, *arguments):
    return subprocess.run(
        command("vit_train", *arguments),
        capture_output=True,
        text=True,
        cwd=copy,
        env={**environment(), "PYTHONPATH": str(copy)},
        check=False,
    )


def test_a_new_key_takes_one_class_and_one_yaml_file():
    assert list(shown_change()) == ["vit_train/data/image_data.py", "configs/images.yaml"]


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar10_folder", "imagefolder"])
def test_every_data_module_has_the_new_key(changed, data):
    done = run_in(changed, f"data={data}", "data.skip=5", "--cfg", "job", "--package", "data")
    assert done.returncode == 0, done.stderr
    assert "\nskip: 5\n" in done.stdout


@pytest.mark.parametrize(
    ("typed", "said"), [("x", "expected int or null, got 'x'"), ("0", "at least 1, got 0")]
)
def test_its_annotation_says_what_it_takes(changed, typed, said):
    done = run_in(changed, f"data.skip={typed}")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
