"""A power failure at any moment leaves a valid checkpoint: the newest one whose save had returned, or a newer.

What a sequence of saves does to the file system is recorded (Python's audit events, and what each fsync
brought to disk) and replayed on a model of a disk, which keeps only what POSIX promises: the contents of a
file once that file was synced, a name in a folder once that folder was synced after it. After every entry of
the record the power fails. Of the names that were not synced, any number of each folder's may have arrived,
in their order; of the contents that were not synced nothing, a half or all.

The count is (moment, outcome) pairs; `pytest -rP` prints it. A plain `pytest` runs all of it: it takes seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import stat
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from conftest import stale_files

from vit_train.checkpoint import Checkpointer, Snapshot, load_run, newest_valid, resolve_link
from vit_train.errors import CheckpointError
from vit_train.runs.record import open_run_dir, write_facts
from vit_train.system import durable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the record needs /proc/self/fd")

RUN = Path("runs/vit-digits/run")


# ----------------------------------------------------------------------------------------------- the record
def record(work, folder):
    """What `work(mark)` does below `folder`, entry by entry; `mark` adds one of its own.

    In a forked process, because an audit hook stays for good.
    """
    result = folder.with_name(f"{folder.name}.record")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            entries = []
            _listen(folder, entries)
            work(lambda label: entries.append(("mark", label)))
            result.write_bytes(pickle.dumps(list(entries)))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return pickle.loads(result.read_bytes())


def _listen(folder, entries):
    real_fsync = os.fsync

    def place(path, base=-1):
        path = os.fsdecode(path)
        if base >= 0:
            path = Path(f"/proc/self/fd/{base}").readlink() / path
        path = Path(os.path.normpath(folder / path))
        return path.relative_to(folder).parts if path.is_relative_to(folder) else None

    def hook(event, args):
        entry = None
        if event == "open" and isinstance(args[0], str | bytes) and args[2] & (os.O_WRONLY | os.O_RDWR):
            entry = ("create", place(args[0]))
        elif event == "os.mkdir":
            entry = ("mkdir", place(args[0], args[2]))
        elif event == "os.rename":
            entry = ("rename", place(args[0], args[2]), place(args[1], args[3]))
        elif event == "os.symlink":
            entry = ("symlink", place(args[1], args[2]), os.fsdecode(args[0]))
        elif event in ("os.remove", "os.rmdir"):
            entry = ("remove", place(args[0], args[1]))
        elif event in ("os.link", "os.truncate"):
            raise AssertionError(f"the model does not know {event}")
        if entry is not None and None not in entry:
            entries.append(entry)

    def fsync(descriptor):
        real_fsync(descriptor)
        path = place(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path is not None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            data = None if is_folder else Path(f"/proc/self/fd/{descriptor}").read_bytes()
            entries.append(("sync", path, data))

    os.fsync = fsync
    sys.addaudithook(hook)


# ------------------------------------------------------------------------------------------------- the disk
class File:
    """`data` is what was synced, `coming` what is being written."""

    def __init__(self, coming):
        self.data, self.coming = None, coming


class Folder:
    """`synced` are the names on disk, `pending` the changes since: (name, node), the node None if removed."""

    def __init__(self):
        self.now, self.synced, self.pending = {}, {}, []

    def change(self, **names):
        """One change of one or two names, which arrives as a whole."""
        self.pending.append(names)
        self.now = _changed(self.now, names)


def _changed(names, change):
    return {name: node for name, node in {**names, **change}.items() if node is not None}


class Disk:
    """A folder tree in memory, before and after its syncs."""

    def __init__(self):
        self.top = Folder()

    def at(self, path):
        node = self.top
        for name in path:
            node = node.now.get(name) if isinstance(node, Folder) else None
        return node

    def do(self, entry, coming=b""):
        kind, path = entry[:2]
        if kind == "mark":
            return
        if kind == "sync":
            node = self.at(path)
            if isinstance(node, Folder):
                node.synced, node.pending = dict(node.now), []
            else:
                node.data = entry[2]
            return
        parent, name = self.at(path[:-1]), path[-1]
        known = parent is not None and name in parent.now
        if kind == "create":
            parent.change(**{name: File(coming)})
        elif kind == "mkdir" and not known:  # what the operating system refused did not happen
            if parent is not None:
                parent.change(**{name: Folder()})
        elif kind == "symlink":
            parent.change(**{name: entry[2]})
        elif kind == "remove" and known:
            parent.change(**{name: None})
        elif kind == "rename":
            assert entry[2][:-1] == path[:-1], "between folders a rename is two changes"
            parent.change(**{name: None, entry[2][-1]: parent.now[name]})

    def outcomes(self):
        """What may be found after a power failure, as nested tuples."""
        for share in (0, 1, 2):
            yield from _outcomes(self.top, share)


def _outcomes(node, share):
    if isinstance(node, str):
        yield ("link", node)
    elif isinstance(node, File):
        whole = node.coming
        unsynced = (b"", whole[: len(whole) // 2], whole)[share]
        yield ("file", unsynced if node.data is None else node.data)
    else:
        for count in range(len(node.pending) + 1):
            names = node.synced
            for change in node.pending[:count]:
                names = _changed(names, change)
            inside = [[(name, o) for o in _outcomes(names[name], share)] for name in sorted(names)]
            for chosen in itertools.product(*inside):
                yield ("folder", chosen)


def materialise(outcome, path):
    kind, content = outcome
    if kind == "link":
        path.symlink_to(content)
    elif kind == "file":
        path.write_bytes(content)
    else:
        path.mkdir()
        for name, inside in content:
            materialise(inside, path / name)


def power_failures(entries, folder):
    """(labels marked so far, the next label, a real folder as it may be found) for each moment and outcome.

    An outcome that an earlier moment had with the same labels is counted, and not looked at again.
    """
    counted, seen, disk, marked = 0, set(), Disk(), []
    labels = [entry[1] for entry in entries if entry[0] == "mark"]
    for i in range(len(entries) + 1):
        for outcome in disk.outcomes():
            counted += 1
            if (len(marked), outcome) not in seen:
                seen.add((len(marked), outcome))
                here = folder / str(len(seen))
                materialise(outcome, here)
                yield marked, labels[len(marked) : len(marked) + 1], here
                shutil.rmtree(here)
        if i < len(entries):
            entry = entries[i]
            if entry[0] == "mark":
                marked.append(entry[1])
            later = (e[2] for e in entries[i:] if e[0] == "sync" and e[1] == entry[1])
            disk.do(entry, next(later, None) or b"")
    print(f"{len(entries) + 1} moments, {counted} outcomes, {len(seen)} of them different: all recovered")


# ---------------------------------------------------------------------------------------------- checkpoints
# (step, best): the second is saved again, as when the continuation closes its epoch; the fourth removes the
# first, the fifth keeps the best one
SAVES = ((4, True), (6, False), (6, True), (8, False), (12, False))


def contents(number):
    """Tensors and state of one save, unlike those of any other."""
    values = torch.arange(4.0) + 10 * number
    tensors = {"model/w": values, "ema/w": values / 2, "optimizer/w/exp_avg": values / 4}
    return tensors, {"train": {"step": SAVES[number][0]}, "number": number}


def save_all(mark):
    open_run_dir(RUN, {"seed": 0})
    checkpointer = Checkpointer(RUN)
    for number, (step, best) in enumerate(SAVES):
        tensors, state = contents(number)
        checkpointer.save(Snapshot(tensors, state, step=step, best=best, keep=2))
        mark(number)


def number_of(found):
    """Which save a checkpoint is, once it is equal to it in every bit."""
    number = found.state["number"]
    tensors, state = contents(number)
    assert {k: v for k, v in found.state.items() if k in state} == state
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    return number


def best_of(numbers):
    return max((n for n in numbers if SAVES[n][1]), default=None)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    entries = record(save_all, folder)
    assert sum(entry[0] == "sync" for entry in entries) > 30, "the record is not complete"
    return entries


@pytest.fixture
def in_memory(tmp_path):
    """A folder for what is found after each power failure: nothing is gained by syncing that to a real disk."""
    where = Path("/dev/shm")
    with TemporaryDirectory(dir=where if os.access(where, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_the_last_save_that_returned_or_a_newer_one_is_found(saves, in_memory) -> None:
    check_saves(saves, in_memory)


# what must not be left out: the contents of the files, the names in the new folder, its own name
@pytest.mark.parametrize("what", ["files", "checkpoint", "checkpoints", "run"])
def test_a_sync_left_out_is_noticed(saves, in_memory, what) -> None:
    """The negative control: the model is able to lose something."""
    kinds = {
        "files": lambda path, data: data is not None,
        "checkpoint": lambda path, data: "".join(path[-1:]).startswith(".partial_step"),
        "checkpoints": lambda path, data: path[-1:] == ("checkpoints",),
        "run": lambda path, data: path[-1:] == ("run",),
    }
    fewer = [entry for entry in saves if entry[0] != "sync" or not kinds[what](*entry[1:])]
    assert len(fewer) < len(saves)
    with pytest.raises((AssertionError, CheckpointError)):
        check_saves(fewer, in_memory)


def check_saves(entries, folder):
    for returned, coming, found_in in power_failures(entries, folder):
        run = found_in / RUN
        if returned:  # vit-eval and the test at the end read this one
            assert number_of(load_run(run)[0]) in {best_of(returned), best_of([*returned, *coming])}
        found, _ = newest_valid(run)
        number = None if found is None else number_of(found)
        assert number in {returned[-1] if returned else None, *coming}, (returned, coming)
        # and the run goes on from there
        checkpointer = Checkpointer(run)
        checkpointer.remove_partial()
        step = 0 if number is None else SAVES[number][0]
        checkpointer.finish_interrupted(step=step, keep=2, kept=())
        assert stale_files(run / "checkpoints") == []
        if number is not None:
            assert resolve_link(run / "checkpoints/last") == found.path.resolve()
            assert number_of(load_run(run)[0]) == best_of(range(number + 1))
        tensors, state = contents(4)
        checkpointer.save(Snapshot(tensors, state, step=20, best=False, keep=2))
        assert newest_valid(run)[0].path.name == "step_00000020"


# ------------------------------------------------------------------------------------- the run's other files
SHORT, LONG = {"trainer": {"epochs": 3}, "seed": 0}, {"trainer": {"epochs": 6}, "seed": 0}


def write_run(mark):
    open_run_dir(RUN, SHORT)
    mark("config")
    about = {"device": "cpu", "fingerprint": "f", "world_size": 1}
    write_facts(RUN, config=SHORT, **about)
    mark("facts")
    durable.replace(RUN / "result.json", json.dumps({"steps": 18}))
    mark("result")
    open_run_dir(RUN, LONG)  # the finished run goes on with more epochs
    write_facts(RUN, config=LONG, **about)
    mark("grown")


def test_the_small_files_of_a_run_are_old_or_new_and_agree(tmp_path, in_memory) -> None:
    for marked, _, folder in power_failures(record(write_run, tmp_path), in_memory):
        run = folder / RUN
        config = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").exists() else None
        allowed = (LONG,) if "grown" in marked else (SHORT, LONG) if "result" in marked else (SHORT,)
        assert config in (allowed if marked else (*allowed, None))
        facts, result = run / "run.json", run / "result.json"
        if facts.exists() or "facts" in marked:
            assert json.loads(facts.read_text())["config"] in (SHORT, LONG)
        if result.exists():
            assert json.loads(result.read_text()) == {"steps": 18}
            assert config == SHORT, "a run that goes on looks finished"
        named = {path for path in run.glob("*") if not path.name.startswith(".")}
        assert named <= {run / "config.yaml", facts, result}
