"""The wheel that is built holds all that runs, and runs without the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import environment

HOUSE = Path(__file__).parents[1]

# Runs in a process that has only the unpacked wheel
COMPOSE_ALL = """
import sys
from pathlib import Path

import vit_train
from hydra import compose, initialize_config_dir
from vit_train.config.check import check_config, config_dir

home = Path(sys.argv[1])
assert Path(vit_train.__file__).is_relative_to(home), vit_train.__file__
assert config_dir().is_relative_to(home), config_dir()
count = 0
with initialize_config_dir(str(config_dir()), version_base="1.3"):
    for path in sorted(config_dir().glob("*/*.yaml")):
        check_config(compose("train", overrides=[f"{path.parent.name}={path.stem}"]))
        count += 1
ours = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "vit_train"]
assert all(Path(file).is_relative_to(home) for file in ours), ours
print(count)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as a release is, without asking the network."""
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(HOUSE)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    home = tmp_path_factory.mktemp("site").resolve()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home)
    return home


def in_the_wheel(unpacked, cwd, *arguments):
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=cwd,
        env={**environment(), "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vit_train"}
    assert not [name for name in names if "test" in Path(name).name or "scripts" in name]
    code = {
        path.relative_to(HOUSE).as_posix()
        for path in (HOUSE / "vit_train").rglob("*")
        if path.suffix in (".py", ".css", ".html")
    }
    configs = {
        f"vit_train/{path.relative_to(HOUSE).as_posix()}" for path in (HOUSE / "configs").rglob("*.yaml")
    }
    assert len(configs) > 50
    assert {name for name in names if ".dist-info/" not in name} == code | configs
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def test_every_config_composes_and_checks_from_it(unpacked, tmp_path):
    done = in_the_wheel(unpacked, tmp_path, "-c", COMPOSE_ALL, str(unpacked))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list((HOUSE / "configs").glob("*/*.yaml")))


def test_the_command_runs_from_it(unpacked, tmp_path):
    done = in_the_wheel(
        unpacked, tmp_path, "-m", "vit_train", "--cfg", "job", "model=swin_cifar", "data=cifar10"
    )
    assert done.returncode == 0, done.stderr
    assert "_target_: vit_train.models.Swin" in done.stdout
    # an error names the folder of the configs it searched, or the choices it found there
    typo = in_the_wheel(unpacked, tmp_path, "-m", "vit_train", "model=swim")
    assert typo.returncode == 2
    assert "swin_cifar" in typo.stderr
    assert list(tmp_path.iterdir()) == []
