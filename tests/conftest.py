"""Shared by all tests: real commands in real processes, and runs built inside this one."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Two pytest workers on two cores: one thread each, so that they do not wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run of seconds that still has everything that draws or remembers: dropout, drop path, augmentation, EMA,
# accumulation, clipping. 5 steps an epoch.
TINY = (
    "data.limit=80",
    "data.batch_size=16",
    "data.num_workers=0",
    "model.depth=2",
    "model.embed_dim=32",
    "model.num_heads=2",
    "model.drop_rate=0.1",
    "model.attn_drop_rate=0.1",
    "model.drop_path_rate=0.2",
    "trainer.epochs=3",
    "trainer.grad_accum_steps=2",
    "trainer.eval_every_epochs=1",
    "trainer.save_every_epochs=1",
    "tracker.tensorboard=false",
)


def environment() -> dict[str, str]:
    """The environment of a user's shell, with one thread."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC", "HYDRA_"))}
    return {**clean, "OMP_NUM_THREADS": "1"}


def command(module: str, *arguments: str) -> list[str]:
    """The command line of `vit-train`, `vit-eval` ... as this interpreter runs it."""
    return [sys.executable, "-m", module, *arguments]


@pytest.fixture
def vit_train(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `vit-train` to its end in an empty working directory, as a process of its own."""

    def run(*arguments: str, cwd: Path = tmp_path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command("vit_train", *arguments),
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def vit_eval(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `vit-eval` likewise."""

    def run(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("vit_train.cli.evaluate", *arguments),
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


class Done(NamedTuple):
    code: int
    out: str
    err: str


def everything_in(folder):
    """Path -> content of all files (None for folders), to see whether anything changed."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def vit_train_here(*arguments, cwd, **variables):
    """`vit-train` as if typed in `cwd`: its entry point, in this process."""
    from vit_train.cli.train import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        for name in list(os.environ):
            if name.startswith(("SLURM_", "TORCHELASTIC", "HYDRA_")):
                patch.delenv(name)
        patch.delenv("HYDRA_FULL_ERROR", raising=False)  # the command sets it: undone at the end
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["vit-train", *arguments])
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    return Done(code, out.getvalue(), err.getvalue())


def vit_train_forked(*arguments, cwd, check=True):
    """`vit-train` in a new process forked from this warm one: without the seconds that imports take."""
    import vit_train.trainer  # noqa: F401 - so that the child has it
    from vit_train.cli.train import main

    out, err = cwd / f"out_{os.urandom(4).hex()}", cwd / f"err_{os.urandom(4).hex()}"
    child = os.fork()
    if child == 0:
        code: Any = 70  # a bug in this very function
        try:
            for path, descriptor in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment())
            sys.argv = ["vit-train", *arguments]
            try:
                main()
                code = 0
            except SystemExit as stopped:
                code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    _, status = os.waitpid(child, 0)
    done = Done(os.waitstatus_to_exitcode(status), out.read_text(), err.read_text())
    out.unlink()
    err.unlink()
    if check:
        assert done.code == 0, done
    return done


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory for code that runs inside this process."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    return tmp_path


def compose(*overrides: str) -> Any:
    """The configuration the command line would compose."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from vit_train.build import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra_compose("train", overrides=list(overrides))


def build(*overrides: str) -> Any:
    """A run built inside this process, as `vit-train` would build it, that logs nothing."""
    from vit_train.build import Launch, build_run
    from vit_train.tracker import NullTracker

    run = build_run(compose(*overrides), Launch(overrides=list(overrides), choices={}))
    run.trainer.tracker = NullTracker()
    return run


def checkpoint_hashes(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every tensor in the last checkpoint of a run."""
    from vit_train.checkpoint import load, resolve_link

    path = resolve_link(run_dir / "checkpoints" / "last")
    assert path is not None, f"{run_dir} has no last checkpoint"
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in load(path).tensors.items()
    }
