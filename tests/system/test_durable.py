"""Files that are whole or not there, and synced before they have a name."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path
from threading import Event, Thread

import pytest

from vit_train.system import durable


@pytest.fixture
def synced(monkeypatch):
    """What was synced, in order: the contents of each file, the names in each folder."""
    seen, fsync = [], os.fsync

    def watch(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            seen.append((path.name, sorted(p.name for p in path.iterdir())))
        else:
            seen.append((path.name, path.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_file_is_synced_whole_then_named_then_its_folder_synced(tmp_path, synced) -> None:
    home = tmp_path / "home"
    home.mkdir()
    durable.replace(home / "x.json", "new")
    assert synced == [(".x.json", "new"), ("home", ["x.json"])]
    synced.clear()
    durable.write(home / "y", b"bytes")
    assert synced == [("y", "bytes")]


def test_what_was_there_is_replaced(tmp_path) -> None:
    path = tmp_path / "x.json"
    for text in ("a long first version", "short", "", "Umlaute: \u00e4\u00f6\u00fc"):
        durable.replace(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_the_old_text_or_the_new_one(tmp_path) -> None:
    path = tmp_path / "x.json"
    versions = ["a" * 100_000, "b" * 50_000]
    durable.replace(path, versions[0])
    done, seen = Event(), []

    def read():
        while not done.is_set():
            seen.append(path.read_text())

    reader = Thread(target=read)
    reader.start()
    for i in range(100):
        durable.replace(path, versions[i % 2])
    done.set()
    reader.join()
    assert seen
    assert set(seen) <= set(versions)


def test_where_the_system_refuses_the_old_file_stays_and_nothing_else(tmp_path) -> None:
    """A real refusal, half way through: this process may write files of 1,000 bytes at most."""
    path = tmp_path / "x.json"
    durable.replace(path, "old")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            durable.replace(path, "new" * 1000)
        except OSError as error:
            code = 0 if error.errno == errno.EFBIG else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_way_is_not_written_through(tmp_path) -> None:
    home, victim = tmp_path / "home", tmp_path / "victim"
    home.mkdir()
    victim.write_text("mine")
    (home / ".x.json").symlink_to(victim)
    durable.replace(home / "x.json", "new")
    assert (victim.read_text(), (home / "x.json").read_text()) == ("mine", "new")
    assert not (home / "x.json").is_symlink()
    (home / "y").symlink_to(victim)
    with pytest.raises(FileExistsError):
        durable.write(home / "y", b"new")
    assert victim.read_text() == "mine"


def test_a_name_that_is_taken_by_a_folder_is_an_error_that_leaves_nothing(tmp_path) -> None:
    (tmp_path / "x.json" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        durable.replace(tmp_path / "x.json", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.replace(tmp_path / "none" / "x.json", "new")
    with pytest.raises(FileNotFoundError):
        durable.sync_directory(tmp_path / "none")


def test_what_a_crash_left_behind_is_written_over(tmp_path) -> None:
    (tmp_path / ".x.json").write_text("half of an earlier, much longer version")
    durable.replace(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
