"""A checkpoint that the operating system refuses costs nothing but itself, and is never reported as saved.

The count: 8 persistent errors (no space at 5 offsets, EACCES, EROFS, EIO) and 4 more that come once the new
checkpoint is in place; 9 transient errors, one of them at the end and two where the save of the best
checkpoint fails; 2 runs that are stopped while nothing can be saved; 16 real file systems that are full, small
or read-only; 2 run directories that go away; a quota; a result that does not fit; an error elsewhere. 44 in all
with `-m ""`, of which a plain `pytest` runs 8.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EIGHTEEN, environment, everything_in, stale_files, vit_train_forked, whole_state

from vit_train.checkpoint import MANIFEST, checkpoint_directories, directory_name, load, newest_valid
from vit_train.system import durable
from vit_train.training.objective import CrossEntropy

SETTINGS = (*EIGHTEEN, "trainer.save_every_steps=4")
SAVED = (4, 6, 8, 12, 16, 18)
FAILED = "Saving is tried again at the next interval"


@pytest.fixture(scope="module")
def unbroken(warm, tmp_path_factory):
    """The run that nothing disturbs, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("unbroken")
    vit_train_forked(*SETTINGS, "trainer.keep_checkpoints=9", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def begun(warm, tmp_path_factory):
    """The same run stopped after step 6, with the checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("begun")
    vit_train_forked(*SETTINGS, "trainer.stop_at_step=6", cwd=folder)
    return folder / "run"


@pytest.fixture
def offset(unbroken):
    """Where in the bytes of a save a place is: the files one after the other, the manifest last."""
    order = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", MANIFEST)

    def find(place):
        sizes = {}
        for step in SAVED[2:]:  # the texts differ by some digits from save to save
            folder = unbroken / "checkpoints" / directory_name(step)
            sizes = {name: max(sizes.get(name, 0), (folder / name).stat().st_size) for name in order}
        before = sum(sizes[name] for name in order[: order.index(place)]) if place else 0
        return before + 40 if place else 0

    return find


def error_lines(text):
    return [line for line in text.splitlines() if line.startswith("vit-train: error: ")]


def case(name, point, error, *, sample=False):
    return pytest.param(point, error, id=name, marks=() if sample else pytest.mark.faults)


FULL = "No space left on device"
ERRORS = [
    case("full-at-the-first-byte", "write:1:0:ENOSPC", FULL),
    case("full-in-the-first-file", "write:1:model.safetensors:ENOSPC", FULL),
    case("full-in-the-second-file", "write:1:ema.safetensors:ENOSPC", FULL, sample=True),
    case("full-in-the-state", "write:1:state.json:ENOSPC", FULL),
    case("full-in-the-manifest", f"write:1:{MANIFEST}:ENOSPC", FULL),
    case("EACCES", "save.begin:1:EACCES", "Permission denied"),
    case("EROFS", "save.made:1:EROFS", "Read-only file system"),
    case("EIO", "save.synced:1:EIO", "Input/output error"),
]


def placed(fault, offset):
    """The fault with a number for the name of a file."""
    return ":".join(
        str(offset(part)) if "." in part and i == 2 else part for i, part in enumerate(fault.split(":"))
    )


@pytest.mark.parametrize(("fault", "reason"), ERRORS)
def test_three_in_a_row_end_the_run(eighteen, begun, offset, tmp_path, fault, reason) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run, symlinks=True)
    before = everything_in(run / "checkpoints")
    done = vit_train_forked("resume=run", cwd=tmp_path, fault=placed(fault, offset), check=False)
    assert done.code == 5, done
    assert everything_in(run / "checkpoints") == before
    assert done.out.count(FAILED) == 3, "each failed save is said at once"
    assert done.out.count(reason) == 3
    assert error_lines(done.err) == [line for line in done.err.splitlines() if line], "one line"
    assert (
        f"3 saves in a row failed: checkpoint run/checkpoints/step_00000012 could not be written: {reason}"
        in done.err
    )
    assert "is saved" not in done.out + done.err
    assert not (run / "result.json").exists()
    vit_train_forked("resume=run", cwd=tmp_path)
    assert whole_state(run) == eighteen
    assert stale_files(run) == []


@pytest.mark.faults
@pytest.mark.parametrize("point", ["renamed", "durable", "linked_last", "last"])
def test_an_error_after_the_checkpoint_is_in_place_loses_none_either(
    eighteen, begun, tmp_path, point
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run, symlinks=True)
    names = [directory_name(step) for step in SAVED[:2]]
    before = [everything_in(run / "checkpoints" / name) for name in names]
    done = vit_train_forked("resume=run", cwd=tmp_path, fault=f"save.{point}:1:EIO", check=False)
    assert (done.code, done.out.count(FAILED)) == (5, 3), done
    assert [everything_in(run / "checkpoints" / name) for name in names] == before
    assert newest_valid(run)[1] == [], "a checkpoint that is there is whole"
    vit_train_forked("resume=run", cwd=tmp_path)
    assert whole_state(run) == eighteen
    assert stale_files(run) == []


# a save inside an epoch, one at its end which is the best so far
TRANSIENT = [
    ("write:1:0:ENOSPC:1", 1),
    ("write:2:ema.safetensors:ENOSPC:1", 1),
    ("write:3:state.json:EIO:1", 1),
    ("write:4:manifest.json:ENOSPC:1", 1),
    ("write:3:model.safetensors:EIO:2", 2),
    # the second time it is the same save, once an older checkpoint gave way
    ("write:3:model.safetensors:EDQUOT:2", 1),
]


@pytest.mark.parametrize(
    ("fault", "times"),
    [pytest.param(*c, id=c[0], marks=pytest.mark.faults if i != 1 else ()) for i, c in enumerate(TRANSIENT)],
)
def test_a_run_goes_on_and_saves_at_the_next_interval(eighteen, offset, tmp_path, fault, times) -> None:
    done = vit_train_forked(*SETTINGS, cwd=tmp_path, fault=placed(fault, offset))
    assert done.out.count(FAILED) == times
    assert error_lines(done.err) == []
    assert whole_state(tmp_path / "run") == eighteen
    assert stale_files(tmp_path / "run") == []


@pytest.fixture(scope="module")
def best_is_12(warm, tmp_path_factory):
    """Settings whose second epoch is the best, its checkpoint the fourth to be saved; and how such a run ends.

    Which seed does it depends on the processor.
    """
    for seed in range(30):
        folder = tmp_path_factory.mktemp("seed")
        settings = ("optimizer.lr=0.05", f"seed={seed}", "trainer.precision=fp32")
        vit_train_forked(*SETTINGS, *settings, cwd=folder)
        state = whole_state(folder / "run")
        if state["best/name"] == directory_name(12):
            return settings, state
    return pytest.fail("no seed has its best epoch in the middle")


@pytest.mark.faults
@pytest.mark.parametrize("times", [1, 2])
def test_the_best_checkpoint_is_written_once_that_works_again(best_is_12, offset, tmp_path, times) -> None:
    settings, expected = best_is_12
    fault = placed(f"write:4:ema.safetensors:ENOSPC:{times}", offset)
    done = vit_train_forked(*SETTINGS, *settings, cwd=tmp_path, fault=fault)
    assert done.out.count(FAILED) == times
    assert whole_state(tmp_path / "run") == expected


@pytest.mark.faults
def test_a_failure_at_the_end_is_an_error_that_a_continuation_mends(eighteen, tmp_path) -> None:
    done = vit_train_forked(*SETTINGS, cwd=tmp_path, fault="write:6:0:ENOSPC:1", check=False)
    assert done.code == 5, done
    assert "step_00000018 could not be written: No space left on device" in done.err
    assert len(error_lines(done.err)) == 1
    assert not (tmp_path / "run/result.json").exists()
    vit_train_forked("resume=run", cwd=tmp_path)
    assert whole_state(tmp_path / "run") == eighteen


@pytest.mark.parametrize(
    "stop", [pytest.param(10, id="in an epoch"), pytest.param(12, id="at its end", marks=pytest.mark.faults)]
)
def test_a_stop_that_could_not_be_saved_does_not_say_it_was(eighteen, begun, tmp_path, stop) -> None:
    shutil.copytree(begun, tmp_path / "run", symlinks=True)
    settings = (f"trainer.stop_at_step={stop}", "trainer.save_every_steps=100")
    done = vit_train_forked("resume=run", *settings, cwd=tmp_path, fault="save.files:1:ENOSPC", check=False)
    assert done.code == 5, done
    assert "is saved" not in done.out + done.err
    assert f"step_{stop:08d} could not be written: No space left on device" in done.err
    vit_train_forked("resume=run", "trainer.save_every_steps=4", cwd=tmp_path)
    assert whole_state(tmp_path / "run") == eighteen


# -------------------------------------------------------------------------------------------- somebody else
class Moves(CrossEntropy):
    """Moves the run directory away once there is a checkpoint, as long as there is a file `fault`."""

    def forward(self, model, images, targets):
        if Path("fault").exists() and Path("run/checkpoints/last").exists():
            Path("run").rename("elsewhere")
        return super().forward(model, images, targets)


class Deletes(CrossEntropy):
    def forward(self, model, images, targets):
        if Path("run/checkpoints/last").exists():
            shutil.rmtree("run")
        return super().forward(model, images, targets)


class Fills(CrossEntropy):
    """Leaves 100 KB of the disk from the third checkpoint on."""

    def forward(self, model, images, targets):
        if Path("run/checkpoints", directory_name(8)).exists() and not Path("filler").exists():
            Path("filler").write_bytes(b"x" * (shutil.disk_usage(".").free - 100_000))
        return super().forward(model, images, targets)


class NeedsAFile(CrossEntropy):
    def forward(self, model, images, targets):
        Path("elsewhere/scale.json").read_text()


@pytest.mark.parametrize("kind", ["Moves", pytest.param("Deletes", marks=pytest.mark.faults)])
def test_a_run_directory_that_goes_away_ends_the_run_and_is_not_made_anew(eighteen, tmp_path, kind) -> None:
    settings = (*SETTINGS, "trainer.async_save=false", f"objective._target_=test_save_errors.{kind}")
    (tmp_path / "fault").touch()
    done = vit_train_forked(*settings, cwd=tmp_path, check=False)
    assert done.code == 5, done
    said = "could not be written: run/checkpoints was moved or deleted"
    assert done.err.count("\n") == 1, done
    assert done.err.startswith(
        "vit-train: error: 3 saves in a row failed: checkpoint run/checkpoints/step_"
    ), done
    assert done.err.endswith(f"{said}\n"), done
    assert done.out.count(said) == 3, done
    assert not (tmp_path / "run").exists()
    if kind == "Moves":
        (tmp_path / "fault").unlink()
        (tmp_path / "elsewhere").rename(tmp_path / "run")
        vit_train_forked(*settings, cwd=tmp_path)
        assert whole_state(tmp_path / "run") == eighteen


def test_an_older_checkpoint_gives_way_where_a_quota_is_used_up(eighteen, tmp_path) -> None:
    settings = (*SETTINGS, "trainer.keep_checkpoints=5")
    done = vit_train_forked(*settings, cwd=tmp_path, fault="write:4:0:EDQUOT:1")
    assert FAILED not in done.out, done
    assert whole_state(tmp_path / "run") == eighteen
    steps = [path.name for path in checkpoint_directories(tmp_path / "run/checkpoints")]
    assert directory_name(SAVED[0]) not in steps, "nothing gave way"


def a_full_disk_for_the_result():
    replace = durable.replace

    def refused(path, content):
        if path.name == "result.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace(path, content)

    durable.replace = refused


def test_a_full_disk_is_not_blamed_on_workers(tmp_path) -> None:
    """Shared memory that is full is the same error of the operating system."""
    settings = (*EIGHTEEN, "trainer.epochs=1", "data.num_workers=2")
    done = vit_train_forked(*settings, cwd=tmp_path, check=False, prepare=a_full_disk_for_the_result)
    assert (done.code, done.err) == (5, "vit-train: error: run cannot be written: No space left on device\n")


def test_an_error_elsewhere_is_not_blamed_on_the_run_directory(tmp_path) -> None:
    settings = (*EIGHTEEN, "objective._target_=test_save_errors.NeedsAFile")
    done = vit_train_forked(*settings, cwd=tmp_path, check=False)
    assert (done.code, done.err) == (1, "vit-train: error: elsewhere/scale.json: No such file or directory\n")


# ---------------------------------------------------------------------------------------- real file systems
FILLED = f"""
    PYTHONPATH={Path(__file__).parent}:{Path(__file__).parents[1]} \\
        VIT_TRAIN SETTINGS objective._target_=test_save_errors.Fills trainer.keep_checkpoints="""


@pytest.fixture
def sealed(tmp_path):
    """Runs a shell script where it may mount: in a mount namespace of its own, which ends with it."""
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs Linux and unshare(1) to mount a small file system")
    probe = subprocess.run(
        [*inside, f"mount -t tmpfs -o size=64k tmpfs {disk}"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"this machine does not let a test mount a file system: {probe.stderr.strip()}")

    def run(script):
        vit_train = f"{sys.executable} -m vit_train"
        settings = " ".join((*SETTINGS, "trainer.async_save=false"))
        return subprocess.run(
            [*inside, script.replace("VIT_TRAIN", vit_train).replace("SETTINGS", settings)],
            cwd=disk,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.mark.faults
def test_a_file_system_that_is_really_full(eighteen, unbroken, sealed, tmp_path) -> None:
    """Somebody else fills it after the third checkpoint, and none can give way; then it grows."""
    done = sealed(f"""
        mount -t tmpfs -o size=20m tmpfs . && cd "$PWD" || exit 99
        {FILLED}2; echo "code $?"
        cp -a run ../full
        mount -o remount,size=50m . || exit 98
        echo "now it is larger"
        {FILLED}2; echo "code $?"
        cp -a run ../run
    """)
    assert done.returncode == 0, done
    first, second = done.stdout.split("now it is larger")
    assert "code 5" in first, done
    assert first.count(FAILED) == 3, done
    assert len(error_lines(done.stderr)) == 1, done
    assert FULL in error_lines(done.stderr)[0], done
    kept = checkpoint_directories(tmp_path / "full/checkpoints")
    assert [path.name for path in kept] == [directory_name(step) for step in (8, 6)]
    for path in kept:
        load(path)
        for file in path.glob("*.safetensors"):
            assert file.read_bytes() == (unbroken / "checkpoints" / path.name / file.name).read_bytes()
    assert "code 0" in second, done
    assert whole_state(tmp_path / "run") == eighteen
    assert stale_files(tmp_path / "run") == []


@pytest.mark.faults
def test_a_file_system_that_is_really_read_only(eighteen, begun, sealed, tmp_path) -> None:
    shutil.copytree(begun, tmp_path / "disk/run", symlinks=True)
    before = everything_in(begun / "checkpoints")
    done = sealed("""
        mount --bind run/checkpoints run/checkpoints || exit 99
        mount -o remount,bind,ro run/checkpoints || exit 98
        VIT_TRAIN resume=run; echo "code $?"
    """)
    assert done.returncode == 0, done
    assert "code 5" in done.stdout, done
    assert done.stdout.count("Read-only file system") == done.stdout.count(FAILED) == 3, done
    assert len(error_lines(done.stderr)) == 1, done
    assert everything_in(tmp_path / "disk/run/checkpoints") == before
    vit_train_forked("resume=run", cwd=tmp_path / "disk")
    assert whole_state(tmp_path / "disk/run") == eighteen


@pytest.mark.faults
def test_too_little_space_is_said_before_the_first_step(eighteen, sealed, tmp_path) -> None:
    """One checkpoint would fit, but not two that are kept, the best and the one being written."""
    done = sealed("""
        mount -t tmpfs -o size=500k tmpfs . && cd "$PWD" || exit 99
        VIT_TRAIN SETTINGS; echo "code $?"
        cp -a run ../small
        mount -o remount,size=50m . || exit 98
        echo "now it is larger"
        VIT_TRAIN SETTINGS; echo "code $?"
        cp -a run ../run
    """)
    assert done.returncode == 0, done
    first, second = done.stdout.split("now it is larger")
    assert "code 5" in first, done
    assert "epoch 1/3" not in first, done
    assert [line for line in done.stderr.splitlines() if line] == error_lines(done.stderr)
    assert len(error_lines(done.stderr)) == 1, done
    assert "but 4 more checkpoints of this run will take" in done.stderr
    assert "; free some space or type run_dir=..." in done.stderr
    assert not (tmp_path / "small/checkpoints").exists()
    assert not (tmp_path / "small/metrics.jsonl").exists()
    assert "code 0" in second, done
    assert whole_state(tmp_path / "run") == eighteen


def test_a_run_that_can_go_on_with_room_for_one_checkpoint_goes_on(eighteen, sealed, tmp_path) -> None:
    """The one before the newest gives way."""
    done = sealed("""
        mount -t tmpfs -o size=50m tmpfs . && cd "$PWD" || exit 99
        VIT_TRAIN SETTINGS trainer.stop_at_step=8; echo "code $?"
        one=$(du -sk run/checkpoints/step_00000008 | cut -f1)
        mount -o remount,size=$(($(du -sk . | cut -f1) + one + one / 2))k . || exit 98
        VIT_TRAIN SETTINGS; echo "code $?"
        cp -a run ../run
    """)
    assert done.stdout.count("code 0") == 2, done
    assert FAILED not in done.stdout, done
    assert whole_state(tmp_path / "run") == eighteen


def test_older_checkpoints_give_way_where_a_disk_fills_up(eighteen, sealed, tmp_path) -> None:
    done = sealed(f"""
        mount -t tmpfs -o size=20m tmpfs . && cd "$PWD" || exit 99
        {FILLED}5
        echo "code $?"
        cp -a run ../run
        ls -la . ../run/checkpoints
    """)
    assert "code 0" in done.stdout, done
    assert "filler" in done.stdout, "the disk was not full"
    assert FAILED not in done.stdout, done
    assert whole_state(tmp_path / "run") == eighteen
    saved = [path.name for path in checkpoint_directories(tmp_path / "run/checkpoints")]
    assert len(saved) < 5, saved
    assert stale_files(tmp_path / "run") == []


@pytest.mark.faults
@pytest.mark.parametrize("kilobytes", range(400, 2800, 200))
def test_what_can_start_on_a_small_disk_can_finish(eighteen, sealed, tmp_path, kilobytes) -> None:
    done = sealed(f"""
        mount -t tmpfs -o size={kilobytes}k tmpfs . && cd "$PWD" || exit 99
        VIT_TRAIN SETTINGS; echo "code $?"
        cp -a run ../run
    """)
    if "code 5" in done.stdout:
        assert "epoch 1/3" not in done.stdout, done
        assert kilobytes < 2200, "four would have fitted"
        assert "more checkpoints of this run will take" in error_lines(done.stderr)[0], done
        return
    assert "code 0" in done.stdout, done
    assert FAILED not in done.stdout, done
    assert whole_state(tmp_path / "run") == eighteen
    assert not (tmp_path / "run/.history.png").exists()
