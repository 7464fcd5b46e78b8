"""A data worker that dies, hangs or fails ends the run in one line that names the cause and the file.

Every case also shows that nothing is left running, and that the run goes on bit for bit once the cause is gone.
39 cases: 19 in `CASES` by number of workers, 8 damaged files, 12 more below. The sample that `make test` runs is
4 of them, `make test-faults` runs the other 35.

The images are files of 8 pixels: 48 of them, 5 steps an epoch, 2 epochs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY, Forked, command, environment, stale_files, vit_train_forked, whole_state
from PIL import Image
from test_signals import Descendants, children_of, paused, until

from vit_train.data import ImageFolder
from vit_train.data.folder.image_folder import FileSource
from vit_train.data.transforms.sample_transforms import resized_crop
from vit_train.errors import DataError
from vit_train.training.objective import CrossEntropy

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")

PHOTOS = (
    *(setting for setting in TINY if not setting.startswith("data.limit")),
    "run_dir=run",
    "data=imagefolder",
    "data.root=photos",
    "data.in_channels=1",
    "data.batch_size=8",
    "data.cache=none",
    "augment=medium",
    "model=vit_digits",
    "trainer.epochs=2",
    "trainer.async_save=false",  # the first epoch is on disk before anything of the second is read
)
IMAGES_A_CLASS = 24
# The split holds out cat and dog 12 and 16; the third batch of the second epoch holds dog 18
TRAINED_ON, VALIDATED_WITH = "photos/dog/18.png", "photos/dog/16.png"
LAST = Path("run/checkpoints/last")


# --------------------------------------------------------------------------------------------- what goes wrong
def break_down(where: str, path: str) -> None:
    """Does what the file `fault` says, at the file it says, once there is a checkpoint: `source killed PATH`."""
    order = Path("fault")
    if not order.exists() or not LAST.exists():
        return
    wanted, what, file = order.read_text().split()
    if wanted != where or not path.endswith(file):
        return
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "leaves":
        os._exit(3)
    elif what == "hangs":
        time.sleep(600)
    elif what == "exits":
        sys.exit("enough")
    elif what == "raises":
        raise KeyError("no such thing")
    elif what == "refuses":
        raise DataError(f"{path} is not mine")
    elif what == "waits":  # until the main process computes, and dies then
        until(Path("computing").exists)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class FaultySource(FileSource):
    """Files, one of which may be trouble. Tells the transform which one it is."""

    def read(self, index):
        path = self.name(index)
        break_down("source", path)
        image = super().read(index)
        image.info["path"] = path
        return image

    def select(self, indices):
        return FaultySource(**vars(super().select(indices)))


class FaultyFolder(ImageFolder):
    def load(self):
        found = super().load()
        for split, source in found.sources.items():
            found.sources[split] = FaultySource(**vars(source))
        return found


class FaultyCrop:
    def __init__(self, *settings, **more):
        self.crop = resized_crop(*settings, **more)

    def __call__(self, image):
        break_down("transform", image.info["path"])
        return self.crop(image)


def faulty_crop(
    img_size: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    policy: None,
    num_ops: int,
    magnitude: int,
    jitter: float,
):
    return FaultyCrop(img_size, scale=scale, ratio=ratio)


class Computes(CrossEntropy):
    """Takes long over a step of the second epoch: until the exception of a lost worker ends it."""

    def forward(self, model, images, targets):
        result = super().forward(model, images, targets)
        if Path("fault").exists() and LAST.exists():
            Path("computing").touch()
            until(lambda: False, seconds=60)
        return result


FAULTY = (
    *PHOTOS,
    "data._target_=test_workers.FaultyFolder",
    "augment.sample._target_=test_workers.faulty_crop",
)


# ------------------------------------------------------------------------------------------------------ checks
def make_photos(folder) -> None:
    for number, name in enumerate(("cat", "dog")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(IMAGES_A_CLASS):
            Image.new("L", (8, 8), 10 * i + 5 * number).save(folder / "photos" / name / f"{i}.png")


@pytest.fixture(scope="module")
def unbroken(warm, tmp_path_factory):
    """The state after the 10 steps when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("unbroken")
    make_photos(folder)
    vit_train_forked(*PHOTOS, cwd=folder)
    return whole_state(folder / "run")


@pytest.fixture
def home(tmp_path):
    """A working directory with the images; nothing that runs there outlives the test."""
    make_photos(tmp_path)
    with Descendants() as descendants:
        yield tmp_path
        ended = until(lambda: not descendants.left(), seconds=15)
        left = descendants.left()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert ended, f"still there: {left}"


def failed(done, code, *said):
    """It ended with one line that says all this, on the screen and in the log."""
    assert done.code == code, done
    assert done.err.count("\n") == 1, done
    assert done.err.startswith("vit-train: error: "), done
    for text in said:
        assert text in done.err, done
    return done.err


def continues(*arguments, home, to):
    """Once the cause is gone."""
    assert (home / LAST).is_dir(), "there is nothing to continue from"
    vit_train_forked(*arguments, cwd=home)
    assert whole_state(home / "run") == to
    assert stale_files(home / "run") == []


# ------------------------------------------------------------------------------------------------------- cases
KILLED = "is killed by signal: Killed"
DIED = "DataLoader worker "  # how, is not known where a batch was on its way
HANGS = "no data worker has answered for 3 s while reading "
RAISES = ("cannot be used: KeyError: 'no such thing' (test_workers.py, line ", ")")
CASES = {
    # what happens, where, at which file; exit code and what is said; numbers of workers
    ("source", "killed", TRAINED_ON): (8, (DIED, f"while reading {TRAINED_ON}:"), (1, 2)),
    ("source", "killed", VALIDATED_WITH): (8, (DIED, f"while reading {VALIDATED_WITH}:"), (2,)),
    ("transform", "killed", TRAINED_ON): (8, (DIED, f"while reading {TRAINED_ON}:"), (2,)),
    ("source", "leaves", TRAINED_ON): (8, (DIED, f"while reading {TRAINED_ON}:"), (1, 2)),
    ("transform", "leaves", TRAINED_ON): (8, (DIED, f"while reading {TRAINED_ON}:"), (2,)),
    ("source", "hangs", TRAINED_ON): (8, (HANGS,), (1, 2)),
    ("source", "hangs", VALIDATED_WITH): (8, (HANGS,), (2,)),
    ("source", "refuses", TRAINED_ON): (3, (" is not mine",), (0, 2)),
    ("source", "raises", TRAINED_ON): (3, RAISES, (0, 2)),
    ("transform", "raises", TRAINED_ON): (3, RAISES, (0, 2)),
    ("transform", "exits", TRAINED_ON): (3, ("cannot be used: SystemExit: enough",), (0, 2)),
    ("source", "raises", VALIDATED_WITH): (3, RAISES, (2,)),
}
SAMPLE = [("source", "killed", 2), ("transform", "raises", 2)]


@pytest.mark.parametrize(
    ("order", "num_workers"),
    [
        pytest.param(
            order,
            number,
            marks=() if (*order[:2], number) in SAMPLE and order[2] == TRAINED_ON else pytest.mark.faults,
            id=f"{order[1]}-in-{order[0]}-{Path(order[2]).stem}-{number}",
        )
        for order, (*_, numbers) in CASES.items()
        for number in numbers
    ],
)
def test_the_first_cause_is_said_with_the_file(home, unbroken, order, num_workers) -> None:
    code, said, _ = CASES[order]
    settings = (*FAULTY, f"data.num_workers={num_workers}", "data.worker_timeout_seconds=3.0")
    (home / "fault").write_text(" ".join(order))
    done = vit_train_forked(*settings, cwd=home, check=False)
    line = failed(done, code, *said, order[2])
    assert line.removeprefix("vit-train: ").strip() in (home / "run/train.log").read_text()
    (home / "fault").unlink()
    continues(*settings, home=home, to=unbroken)


DAMAGES = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:50]), "cannot be read"),
    "overwritten": (lambda path: path.write_bytes(b"x" * path.stat().st_size), "is not an image"),
    "removed": (Path.unlink, "does not exist"),
}


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_damaged_while_training_is_named(home, unbroken, damage, num_workers) -> None:
    act, said = DAMAGES[damage]
    settings = (*PHOTOS, f"data.num_workers={num_workers}")
    file = home / TRAINED_ON
    good = file.read_bytes()
    run = paused(*settings, cwd=home, at="save.end:1")
    act(file)
    os.kill(run.pid, signal.SIGCONT)
    failed(
        run.wait(check=False),
        3,
        said,
        TRAINED_ON,
        "put it back" if act is Path.unlink else "repair or remove it",
    )
    file.write_bytes(good)
    continues("resume=run", home=home, to=unbroken)


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_was_damaged_before_is_named(home, unbroken, num_workers) -> None:
    good = (home / TRAINED_ON).read_bytes()
    (home / TRAINED_ON).write_bytes(b"no image")
    settings = (*PHOTOS, f"data.num_workers={num_workers}")
    done = vit_train_forked(*settings, cwd=home, check=False)
    failed(done, 3, f"{TRAINED_ON} is not an image Pillow can read; repair or remove it")
    (home / TRAINED_ON).write_bytes(good)
    vit_train_forked(*settings, cwd=home)
    assert whole_state(home / "run") == unbroken


@pytest.mark.faults
def test_a_worker_that_dies_while_the_main_process_computes(home, unbroken) -> None:
    settings = (*FAULTY, "data.num_workers=2", "objective._target_=test_workers.Computes")
    (home / "fault").write_text(f"source waits {TRAINED_ON}")
    done = vit_train_forked(*settings, cwd=home, check=False)
    assert (home / "computing").exists(), "nobody was computing"
    failed(done, 8, DIED, f"while reading {TRAINED_ON}:", "data.num_workers=0")
    (home / "fault").unlink()
    continues(*settings, home=home, to=unbroken)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(2))
def test_an_idle_worker_that_the_system_kills(home, unbroken, number) -> None:
    """Between two epochs, in a save: there is no file to name."""
    run = paused(*PHOTOS, "data.num_workers=2", cwd=home, at="save.end:1")
    workers = sorted(children_of(run.pid))
    os.kill(workers[number], signal.SIGKILL)
    assert until(lambda: workers[number] not in children_of(run.pid))
    os.kill(run.pid, signal.SIGCONT)
    line = failed(run.wait(check=False), 8, f"(pid {workers[number]}) {KILLED}: memory may have run out")
    assert "reading" not in line
    continues("resume=run", home=home, to=unbroken)


@pytest.mark.faults
def test_all_workers_are_killed_at_once(home, unbroken) -> None:
    """Those of training and of validation; none is forgotten, and one is enough to say."""
    run = paused(*PHOTOS, "data.num_workers=2", cwd=home, at="save.end:1")
    workers = children_of(run.pid)
    assert len(workers) == 4
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: not children_of(run.pid))
    os.kill(run.pid, signal.SIGCONT)
    failed(run.wait(check=False), 8, KILLED)
    continues("resume=run", home=home, to=unbroken)


@pytest.mark.faults
def test_workers_end_when_the_run_is_killed(home, unbroken) -> None:
    run = paused(*PHOTOS, "data.num_workers=2", cwd=home, at="save.end:1")
    workers = children_of(run.pid)
    assert len(workers) >= 2
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(check=False).code == -signal.SIGKILL
    assert until(lambda: not set(workers) & set(children_of(os.getpid())), seconds=15)
    continues("resume=run", home=home, to=unbroken)


@pytest.mark.faults
def test_every_worker_hangs(home, unbroken) -> None:
    """A disk that is gone: all are named, and ended, at once."""
    settings = (*FAULTY, "data.num_workers=3", "data.worker_timeout_seconds=3.0")
    (home / "fault").write_text("source hangs .png")
    run = Forked(*settings, cwd=home)
    line = failed(run.wait(check=False), 8, "no data worker has answered for 3 s while reading ")
    assert line.count(".png") == 3
    (home / "fault").unlink()
    continues(*settings, home=home, to=unbroken)


SHARED, FILES = "no space left in shared memory (/dev/shm)", "too many open files (ulimit -n)"
SCARCE = {
    # a shell's line before the command -> what ran out: in the main process, at the start of workers, in one
    "mount -t tmpfs -o size=4k tmpfs /dev/shm": SHARED,
    "mount -t tmpfs -o size=32k tmpfs /dev/shm": SHARED,
    "mount -t tmpfs -o size=72k tmpfs /dev/shm": SHARED,
    "ulimit -n 16": FILES,
    "ulimit -n 24": FILES,
    "ulimit -n 32": FILES,
}


@pytest.mark.parametrize(
    "line",
    [pytest.param(x, marks=[] if "4k" in x or "16" in x[-2:] else pytest.mark.faults) for x in SCARCE],
)
def test_what_the_processes_run_out_of_is_named(home, unbroken, line):
    """Not the run directory, whose disk is fine; and nobody waits for a batch that cannot come."""
    shell = ["unshare", "--map-root-user", "--mount", "sh", "-c"] if "mount" in line else ["sh", "-c"]
    if not shutil.which(shell[0]) or subprocess.run([*shell, line], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    done = subprocess.run(
        [*shell, f'{line} && exec "$@"', "sh", *command("vit_train", *PHOTOS, "data.num_workers=2")],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 8, done.stderr
    said = f"vit-train: error: data workers: {SCARCE[line]}; type data.num_workers=0 or a smaller number\n"
    assert done.stderr == said
    vit_train_forked(*PHOTOS, "data.num_workers=2", cwd=home)
    assert whole_state(home / "run") == unbroken
