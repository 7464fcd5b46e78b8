"""One function over many files: every answer once, whatever happens to the processes."""

import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

import pytest
from PIL import Image

from vit_train.data.folder.bad_files import reason_unreadable
from vit_train.data.folder.pool import Crash, each_file

NAMES = [f"name {number}" for number in range(203)]


def answer(path):
    """What the tests apply; a name says what happens to the process that gets it."""
    if path.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if path.startswith("segfault"):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's handler would print a traceback
        os.kill(os.getpid(), signal.SIGSEGV)
    if path.startswith("exits"):
        os._exit(7)
    return path.upper()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 203])
def test_every_file_is_answered_once(num_workers, count):
    found = list(each_file(answer, NAMES[:count], num_workers=num_workers))
    assert len(found) == count
    assert dict(found) == {i: name.upper() for i, name in enumerate(NAMES[:count])}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_file_that_kills_its_process_is_an_answer_and_no_other_is_lost(num_workers):
    names = NAMES.copy()
    names[0], names[70], names[71], names[202] = "killed", "segfault", "exits", "killed too"
    found = dict(each_file(answer, names, num_workers=num_workers))
    assert {i: str(a) for i, a in found.items() if isinstance(a, Crash)} == {
        0: "crashes the process that reads it (SIGKILL: memory may have run out)",
        70: "crashes the process that reads it (SIGSEGV)",
        71: "crashes the process that reads it (exit code 7)",
        202: "crashes the process that reads it (SIGKILL: memory may have run out)",
    }
    assert {i: a for i, a in found.items() if not isinstance(a, Crash)} == {
        i: name.upper() for i, name in enumerate(names) if i not in (0, 70, 71, 202)
    }


def once(path, marker):
    if path == "name 40" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.upper()


def test_a_process_that_dies_by_chance_costs_nothing(tmp_path):
    found = dict(each_file(functools.partial(once, marker=tmp_path / "died"), NAMES, num_workers=2))
    assert (tmp_path / "died").exists()
    assert found == {i: name.upper() for i, name in enumerate(NAMES)}


def without_files(path):
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return reason_unreadable(path)


def test_a_sound_file_is_not_said_to_end_its_process_where_too_many_files_are_open(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "sound.png")
    with pytest.raises(OSError, match="Too many open files"):
        list(each_file(without_files, [str(tmp_path / "sound.png")] * 5, num_workers=2))
    assert not multiprocessing.active_children()


class Asked(Sequence):
    """Very many paths, each made when it is asked for."""

    def __init__(self):
        self.most = 0

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        self.most = max(self.most, index)
        return f"name {index}"


def test_very_many_paths_are_not_queued():
    paths = Asked()
    answers = each_file(answer, paths, num_workers=2)
    start = time.monotonic()
    for _ in range(100):
        next(answers)
    assert paths.most < 1000
    assert time.monotonic() - start < 5
    answers.close()


def alive(pids):
    living = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            living.append(pid)
    return living


def own_process(path):
    return os.getpid()


def test_workers_end_with_the_loop():
    answers = each_file(own_process, NAMES, num_workers=2)
    pids = {next(answers)[1] for _ in range(120)}
    assert os.getpid() not in pids
    assert alive(pids) == list(pids)
    answers.close()
    assert alive(pids) == []


def test_workers_ignore_ctrl_c_and_end_soon_after_a_main_process_that_is_killed(tmp_path):
    main = os.fork()
    if main == 0:
        seen = set()
        for _, pid in each_file(own_process, Asked(), num_workers=2):
            if pid not in seen:
                os.kill(pid, signal.SIGINT)
                seen.add(pid)
                (tmp_path / str(pid)).touch()
        os._exit(1)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert sorted(alive(pids)) == sorted(pids)
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(pids)
    for pid in left:  # or they would keep pytest waiting
        os.kill(pid, signal.SIGKILL)
    assert left == []
