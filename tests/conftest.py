"""Shared by all tests: real commands in real processes, and runs built inside this one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

# Two pytest workers on two cores: one thread each, so that they do not wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# tests/reference: what is drawn is the same on every machine, and a busy one is not a failure
settings.register_profile(
    "reference",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("reference")

# A shell starts jobs in the background with Ctrl-C ignored, and every process that the tests start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
# With TINY: a model without batch norms, whose statistics move at any rate and are those of micro-batches
PATCHES = ("model=vit_tiny", "model.patch_embed.patch_size=2")

# The same for tests/faults: 3 epochs of 6 steps, each image read by itself. `pytest.param(..., marks=pytest.mark.faults)` there is a case
# that only `make test-faults` runs.
EIGHTEEN = (*TINY, "data.limit=96", "data.cache=none", "run_dir=run")


def with_trained_head(model: Any) -> Any:
    """The model with heads of some size, however they start: at zero all answers would be the same."""
    for name, parameter in model.named_parameters():
        if name.startswith("head"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def load_trained(run: Path, *, device: torch.device, weights: str = "auto") -> Any:
    """A trained model as every command loads it."""
    from vit_train import checkpoint
    from vit_train.inference.trained import fits, from_checkpoint

    return from_checkpoint(checkpoint.load_run(run, fits)[0], device=device, weights=weights)


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


def typed_here(main, *arguments, cwd, stdin=b""):
    """A command as if typed in `cwd`: its entry point, in this process. `stdin=None` is a process without."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def everything_in(folder):
    """Path -> content of all files (None for folders), to see whether anything changed."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def change_states(run, change):
    """Changes the state.json of every checkpoint of a run, which stays valid."""
    for checkpoint in (run / "checkpoints").glob("step_*"):
        state = json.loads((checkpoint / "state.json").read_text())
        change(state)
        data = json.dumps(state).encode()
        (checkpoint / "state.json").write_bytes(data)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


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


class Forked:
    """`vit-train` in a new process forked from this warm one: without the seconds that imports take.

    It leads a process group of its own, as a command typed in a shell does.

    Args:
        arguments: as typed.
        cwd: where.
        fault: what VIT_TRAIN_FAULT would hold, see vit_train/system/faults.py.
        prepare: called in the child before anything else.
    """

    def __init__(self, *arguments, cwd, fault=None, prepare=lambda: None):
        import vit_train.checkpoint.saver
        import vit_train.training.trainer  # noqa: F401 - so that the child has them

        self.out, self.err = cwd / f"out_{os.urandom(4).hex()}", cwd / f"err_{os.urandom(4).hex()}"
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, cwd, fault, prepare)

    def _run(self, arguments, cwd, fault, prepare):
        from threading import RLock

        from tqdm import tqdm

        from vit_train.cli.train import main
        from vit_train.system import faults

        tqdm.set_lock(RLock())  # the one that all forks share would stay locked by one that is killed
        code: Any = 70  # a bug in this very function
        try:
            os.setpgid(0, 0)
            for path, descriptor in ((self.out, 1), (self.err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment())
            sys.argv = ["vit-train", *arguments]
            faults.arm(fault)
            prepare()
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

    def wait(self, check=True):
        """Its end: exit code (negative where a signal killed it) and what it printed."""
        _, status = os.waitpid(self.pid, 0)
        done = Done(os.waitstatus_to_exitcode(status), self.out.read_text(), self.err.read_text())
        self.out.unlink()
        self.err.unlink()
        if check:
            assert done.code == 0, done
        return done


def vit_train_forked(*arguments, cwd, check=True, **settings):
    """`vit-train` in a forked process, to its end."""
    return Forked(*arguments, cwd=cwd, **settings).wait(check)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Everything a run imports is imported in this process once, so that those forked from it need not."""
    settings = (*EIGHTEEN, "trainer.epochs=1", "tracker.tensorboard=true")
    done = vit_train_here(*settings, cwd=tmp_path_factory.mktemp("warm"))
    assert done.code == 0, done.err


@pytest.fixture(scope="session")
def eighteen(warm, tmp_path_factory):
    """The state after those 18 steps when nothing interrupts them."""
    folder = tmp_path_factory.mktemp("eighteen")
    vit_train_forked(*EIGHTEEN, cwd=folder)
    return whole_state(folder / "run")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory for code that runs inside this process."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def no_more_files() -> Callable[[], AbstractContextManager[None]]:
    """Within it this process can open no file."""
    import resource  # not on Windows

    @contextmanager
    def refused() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open(os.devnull, os.O_RDONLY)  # the number that the next file would get
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    return refused


def compose(*overrides: str) -> Any:
    """The configuration the command line would compose."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from vit_train.config.check import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra_compose("train", overrides=list(overrides))


def build(*overrides: str) -> Any:
    """A run built inside this process, as `vit-train` would build it, that logs nothing."""
    from vit_train.config.build import build_run
    from vit_train.config.check import Launch
    from vit_train.report.console import Console
    from vit_train.training.tracker import NullTracker

    run = build_run(compose(*overrides), Launch(overrides=list(overrides), choices={}), Console())
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


def whole_state(run_dir: Path) -> dict[str, Any]:
    """Everything two equal runs have in common: SHA-256 of every tensor of `last` and `best`, the training
    state, and every logged figure; less what depends on the clock."""
    from vit_train.checkpoint import load, resolve_link

    state: dict[str, Any] = {}
    for link in ("last", "best"):
        path = resolve_link(run_dir / "checkpoints" / link)
        checkpoint = load(path)
        state |= {
            f"{link}/{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            for name, tensor in checkpoint.tensors.items()
        }
        state[f"{link}/state"] = {k: v for k, v in checkpoint.state["train"].items() if k != "seconds"}
        state[f"{link}/name"] = path.name
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    # The running figures of a window are means since the last log or start: an interruption moves the windows
    epochs = [event for event in events if event["event"] != "step"]
    return state | {"events": epochs, "result": _result(run_dir)}


def _result(run_dir: Path) -> dict[str, Any]:
    result = json.loads((run_dir / "result.json").read_text())
    return {k: v for k, v in result.items() if k not in ("seconds", "images_per_second")}


def stale_files(run_dir: Path) -> list[str]:
    """What a crash left behind and a finished run must not hold any more."""
    hidden = [p for p in run_dir.rglob("*") if p.name.startswith(".")]
    return sorted(str(p.relative_to(run_dir)) for p in hidden)
