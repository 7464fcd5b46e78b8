"""Checkpoint directories: whole or absent, verified, kept and found; and the table of resuming."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import traceback

import pytest
import torch
from conftest import everything_in

from vit_train.checkpoint import (
    Checkpointer,
    Snapshot,
    checkpoint_directories,
    load,
    load_run,
    newest_valid,
    resolve_link,
)
from vit_train.errors import CheckpointError, SaveError
from vit_train.runs.resume import compare

STATE = {"train": {"step": 3, "sums": [0.1, 2.0, 1e300, 5e-324]}, "config": {"name": "größe"}}


def tensors(seed=0, size=1000):
    """One tensor of every kind that is saved, with the values that are easily lost."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator)
    values[:6] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45])
    return {
        "model/weight": values.reshape(-1, 2),
        "model/half": values.bfloat16(),
        "model/buffer": torch.tensor([2**62 + 1, -3]),
        "model/empty": torch.empty(0, 4),
        "ema/weight": values.flip(0).reshape(-1, 2),
        "optimizer/weight/step": torch.tensor(3.0),
        "optimizer/weight/exp_avg": values.square(),
    }


def save(run_dir, step, best=False, keep=2, **settings):
    return Checkpointer(run_dir).save(
        Snapshot(tensors(step, **settings), STATE, step=step, best=best, keep=keep)
    )


def names(run_dir):
    return [path.name for path in checkpoint_directories(run_dir / "checkpoints")]


def in_child(work):
    """What `work` returns, or the error it ends in, in a forked process; and how that process ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            try:
                said = str(work())
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ------------------------------------------------------------------------------------- writing and reading
def test_a_round_trip_keeps_every_bit(tmp_path) -> None:
    saved = tensors()
    loaded = load(Checkpointer(tmp_path).save(Snapshot(saved, STATE, step=3, best=False, keep=1)))
    assert set(loaded.tensors) == set(saved)
    for name, tensor in saved.items():
        other = loaded.tensors[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert loaded.state == {"format": 1, **STATE, "best": None}


def test_the_files_are_those_promised_and_nothing_else(tmp_path) -> None:
    path = save(tmp_path, 1234, best=True)
    assert path == tmp_path / "checkpoints" / "step_00001234"
    assert {p.name for p in path.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    assert {p.name for p in path.parent.iterdir()} == {"step_00001234", "last", "best"}
    for name, entry in json.loads((path / "manifest.json").read_text())["files"].items():
        assert entry["sha256"] == hashlib.sha256((path / name).read_bytes()).hexdigest()


def test_without_an_average_there_is_no_ema_file(tmp_path) -> None:
    raw = {name: tensor for name, tensor in tensors().items() if not name.startswith("ema/")}
    path = Checkpointer(tmp_path).save(Snapshot(raw, STATE, step=1, best=False, keep=1))
    assert not (path / "ema.safetensors").exists()
    assert set(load(path).tensors) == set(raw)


# ------------------------------------------------------------------------------------- saves that go wrong
def full_disk(run_dir):
    """The third file no longer fits: the kernel refuses the write midway."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    big = {**tensors(2), "optimizer/big": torch.zeros(100_000)}
    return Checkpointer(run_dir).save(Snapshot(big, STATE, step=2, best=True, keep=1))


def test_a_save_that_fails_midway_leaves_the_earlier_checkpoints(tmp_path) -> None:
    earlier = save(tmp_path, 1, best=True)
    before = everything_in(tmp_path)
    said, code = in_child(lambda: full_disk(tmp_path))
    assert code == 0
    assert said.startswith("SaveError: ")
    assert "step_00000002 could not be written: File too large" in said
    assert everything_in(tmp_path) == before
    for link in ("last", "best"):
        assert load(resolve_link(tmp_path / "checkpoints" / link)).path == earlier.resolve()


def test_a_process_killed_midway_leaves_the_earlier_checkpoints(tmp_path) -> None:
    earlier = save(tmp_path, 1)
    before = everything_in(tmp_path)

    def killed():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the limit then ends the process inside the write
        return full_disk(tmp_path)

    assert in_child(killed) == ("", -signal.SIGXFSZ)
    leftover = [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".partial_")]
    assert leftover, "nothing was cut off midway"
    assert names(tmp_path) == ["step_00000001"]
    found, problems = newest_valid(tmp_path)
    assert (found.path, problems) == (earlier, [])
    Checkpointer(tmp_path).remove_partial()
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("where", ["checkpoints", "checkpoints/.partial_step_00000002_PID"])
def test_a_file_in_the_way_is_a_save_error(tmp_path, where) -> None:
    if "/" in where:
        save(tmp_path, 1)
    (tmp_path / where.replace("PID", str(os.getpid()))).write_text("mine")
    before = everything_in(tmp_path)
    with pytest.raises(SaveError, match=r"step_00000002 could not be written: File exists"):
        save(tmp_path, 2)
    assert everything_in(tmp_path) == before


def test_the_same_step_saved_twice_is_the_second_one(tmp_path) -> None:
    save(tmp_path, 5)
    other = tensors(99)
    path = Checkpointer(tmp_path).save(Snapshot(other, STATE, step=5, best=False, keep=2))
    assert torch.equal(
        load(path).tensors["optimizer/weight/exp_avg"][6:], other["optimizer/weight/exp_avg"][6:]
    )
    assert {p.name for p in path.parent.iterdir()} == {"step_00000005", "last"}


def test_remove_partial_takes_nothing_else(tmp_path) -> None:
    Checkpointer(tmp_path).remove_partial()  # nothing is there yet
    save(tmp_path, 1, best=True)
    before = everything_in(tmp_path)
    for name in (".partial_step_00000002_1", ".partial_replaced_step_00000001_1"):
        shutil.copytree(tmp_path / "checkpoints/step_00000001", tmp_path / "checkpoints" / name)
    Checkpointer(tmp_path).remove_partial()
    assert everything_in(tmp_path) == before


# ---------------------------------------------------------------------------------------------- verification
def rewrite(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest))


def listed(path):
    return json.loads((path / "manifest.json").read_text())["files"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def link_away(file):
    """The same bytes, in a file outside."""
    outside = file.parent.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)


def climb(path):
    """A file above the checkpoint that the manifest lists with its true hash."""
    outside = path.parent / "secret"
    outside.write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    rewrite(path, files={**listed(path), "../secret": entry})


def honest(path, name, data):
    """Replaced content with a manifest that agrees."""
    (path / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(path, files={**listed(path), name: entry})


DAMAGE = {
    "flipped byte of tensors": (lambda p: flip(p / "optimizer.safetensors"), r"optimizer\.safetensors is damaged: its SHA-256"),
    "flipped byte of the state": (lambda p: flip(p / "state.json"), r"state\.json is damaged: its SHA-256"),
    "flipped byte of the manifest": (lambda p: (p / "manifest.json").write_bytes(b"{" + (p / "manifest.json").read_bytes()), r"manifest\.json is damaged"),
    "truncated": (lambda p: os.truncate(p / "ema.safetensors", 100), r"ema\.safetensors is damaged: its size is 100 bytes"),
    "longer": (lambda p: os.truncate(p / "ema.safetensors", 10**5), r"ema\.safetensors is damaged: its size is 100000"),
    "missing file": (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "a folder": (lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir()), r"state\.json"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), r"it has no manifest\.json"),
    "foreign file": (lambda p: honest(p, "code.py", b"print()"), r"manifest\.json lists 'code\.py'"),
    "climbing name": (climb, r"manifest\.json lists '\.\./secret'"),
    "absolute name": (lambda p: rewrite(p, files={**listed(p), "/etc/passwd": {}}), r"lists '/etc/passwd'"),
    "symbolic link": (lambda p: link_away(p / "model.safetensors"), r"model\.safetensors cannot be read: it is a link"),
    "future format": (lambda p: rewrite(p, format=2), r"step_00000001 has checkpoint format 2; this vit-train reads 1"),
    "no state listed": (lambda p: rewrite(p, files={k: v for k, v in listed(p).items() if k != "state.json"}), r"manifest\.json does not list state\.json"),
    "entry of another type": (lambda p: rewrite(p, files={**listed(p), "state.json": 3}), r"state\.json is damaged"),
    "no tensors inside": (lambda p: honest(p, "model.safetensors", b"\x80\x04pickle"), r"model\.safetensors is damaged: it is not a safetensors file"),
    "no object inside": (lambda p: honest(p, "state.json", b"[1]"), r"state\.json is damaged: expected an object"),
    "deeply nested": (lambda p: honest(p, "state.json", b"[" * 10**6), r"state\.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path, kind) -> None:
    path = save(tmp_path, 1)
    assert load(path).state["train"] == STATE["train"]
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_every_single_byte_counts(tmp_path) -> None:
    path = save(tmp_path, 1, size=8)
    for name in ("model.safetensors", "state.json"):
        intact = (path / name).read_bytes()
        for position in range(len(intact)):
            damaged = bytearray(intact)
            damaged[position] ^= 0x80
            (path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load(path)
        (path / name).write_bytes(intact)
    load(path)


def test_a_missing_directory_is_said(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing is not a complete checkpoint"):
        load(tmp_path / "nothing")


def test_newest_valid_goes_back_and_names_each_damaged_one(tmp_path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=4)
    root = tmp_path / "checkpoints"
    flip(root / "step_00000004/model.safetensors")
    (root / "step_00000003/manifest.json").unlink()
    found, problems = newest_valid(tmp_path)
    assert found.path == root / "step_00000002"
    assert len(problems) == 2
    assert "step_00000004/model.safetensors" in problems[0]
    assert "step_00000003" in problems[1]
    for step in (1, 2):
        flip(root / f"step_0000000{step}/state.json")
    found, problems = newest_valid(tmp_path)
    assert found is None
    assert len(problems) == 4


def test_nothing_there_is_no_problem(tmp_path) -> None:
    assert newest_valid(tmp_path) == (None, [])


# -------------------------------------------------------------------------------------- links and retention
def test_links_are_relative_and_swapped(tmp_path) -> None:
    root = tmp_path / "run/checkpoints"

    def link(name):
        return str((root / name).readlink())

    save(tmp_path / "run", 1, best=True)
    assert link("last") == link("best") == "step_00000001"
    save(tmp_path / "run", 2)
    assert (link("last"), link("best")) == ("step_00000002", "step_00000001")
    assert {p.name for p in root.iterdir()} == {"step_00000001", "step_00000002", "last", "best"}
    (tmp_path / "run").rename(tmp_path / "moved")
    assert found(tmp_path / "moved") == tmp_path / "moved/checkpoints/step_00000001"


def test_a_pointer_may_be_a_small_file(tmp_path) -> None:
    save(tmp_path, 1)
    last = tmp_path / "checkpoints/last"
    last.unlink()
    last.write_text("step_00000001\n")
    assert resolve_link(last) == last.parent / "step_00000001"
    last.write_text("step_00000009")
    assert resolve_link(last) is None


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_are_kept(tmp_path, monkeypatch, keep, relative) -> None:
    monkeypatch.chdir(tmp_path)
    checkpointer = Checkpointer(tmp_path.relative_to(tmp_path) / "run" if relative else tmp_path / "run")
    for step in range(1, 7):
        checkpointer.save(Snapshot(tensors(size=8), STATE, step=step, best=step == 2, keep=keep))
    newest = [f"step_{step:08d}" for step in (6, 5)[:keep]]
    assert names(tmp_path / "run") == [*newest, "step_00000002"]
    assert resolve_link(checkpointer.root / "best") == tmp_path / "run/checkpoints/step_00000002"
    checkpointer.save(Snapshot(tensors(size=8), STATE, step=7, best=True, keep=1))
    assert names(tmp_path / "run") == ["step_00000007"]


def test_damaged_newer_checkpoints_never_cost_the_one_just_saved(tmp_path) -> None:
    """A run that went back to an older checkpoint, because those after it were damaged, saves again."""
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    for step in (20, 30):
        flip(tmp_path / f"checkpoints/step_000000{step}/model.safetensors")
    for keep in (2, 1):
        path = save(tmp_path, 15, keep=keep)
        assert resolve_link(tmp_path / "checkpoints/last") == path.resolve()
        assert newest_valid(tmp_path)[0].path == path


# --------------------------------------------------------------------------------------------------- finding
def found(run):
    """The checkpoint that is loaded for RUN, where nothing is damaged."""
    checkpoint, problems = load_run(run)
    assert problems == []
    return checkpoint.path


def test_a_damaged_best_is_named_and_the_last_is_used(tmp_path) -> None:
    best, last = save(tmp_path, 1, best=True), save(tmp_path, 2)
    flip(best / "model.safetensors")
    checkpoint, problems = load_run(tmp_path)
    assert checkpoint.path == last.resolve()
    assert len(problems) == 1
    assert "step_00000001" in problems[0]
    with pytest.raises(CheckpointError, match="step_00000001"):  # named itself: no other will do
        load_run(best)
    flip(last / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step_00000001.*; .*step_00000002"):
        load_run(tmp_path)


def test_a_kill_between_the_renames_of_a_step_saved_twice_loses_nothing(tmp_path) -> None:
    path = save(tmp_path, 7)
    before = save(tmp_path, 6)
    path.rename(path.with_name(f".partial_replaced_{path.name}_123"))
    held = everything_in(tmp_path)
    checkpoint, problems = newest_valid(tmp_path)
    assert (checkpoint.path, problems) == (path, [])
    assert everything_in(tmp_path) == held, "moved while another process may be between the renames"
    Checkpointer(tmp_path).remove_partial()
    assert newest_valid(tmp_path)[0].path == path
    assert {folder.name for folder in (tmp_path / "checkpoints").glob("[s.]*")} == {before.name, path.name}


def test_a_best_one_that_a_kill_left_between_its_renames_is_still_meant(tmp_path) -> None:
    path, _ = save(tmp_path, 5, best=True), save(tmp_path, 6)
    path.rename(path.with_name(f".partial_replaced_{path.name}_123"))
    held = everything_in(tmp_path)
    checkpoint, problems = load_run(tmp_path)
    assert (checkpoint.path, problems) == (path, [])
    assert torch.equal(checkpoint.tensors["model/buffer"], tensors(5)["model/buffer"])
    assert torch.equal(checkpoint.tensors["model/half"].nan_to_num(), tensors(5)["model/half"].nan_to_num())
    assert everything_in(tmp_path) == held


def test_find_takes_a_run_its_best_or_last_or_a_checkpoint(tmp_path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert found(tmp_path) == second.resolve()
    assert found(first) == first
    save(tmp_path, 1, best=True)
    assert found(tmp_path) == first.resolve()
    assert found(tmp_path / "checkpoints/last") == tmp_path / "checkpoints/last"
    for link in ("last", "best"):
        (tmp_path / "checkpoints" / link).unlink()
    assert found(tmp_path) == second.resolve()


def test_find_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; give a run directory"):
        found(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint"):
        found(tmp_path)


def test_find_passes_over_a_link_to_nothing(tmp_path) -> None:
    first, second = save(tmp_path, 1, best=True), save(tmp_path, 2)
    shutil.rmtree(first)
    assert found(tmp_path) == second.resolve()


# -------------------------------------------------------------------------------------------------- resuming
STORED = {
    "seed": 0,
    "run_dir": None,
    "resume": None,
    "name": "a",
    "model": {"depth": 2, "patch_embed": {"patch_size": 2}},
    "data": {"root": "a", "num_workers": 0, "mean": [0.5], "batch_size": 16},
    "strategy": {"_target_": "vit_train.training.strategy.auto", "device": "cpu"},
    "tracker": {"tensorboard": True},
    "trainer": {"epochs": 3, "max_steps": None, "stop_at_step": None, "eval_every_epochs": 1, "precision": "fp32"},
}  # fmt: skip


def changed(key, value):
    new = json.loads(json.dumps(STORED))
    *path, name = key.split(".")
    node = new
    for part in path:
        node = node.setdefault(part, {})
    node[name] = value
    return new


def test_the_same_configuration_differs_in_nothing() -> None:
    same = compare(STORED, json.loads(json.dumps(STORED)), cadence_matters=True)
    assert same["identity"] == same["grown"] == same["hardware"] == []
    assert compare(STORED, changed("data.mean", (0.5,)), cadence_matters=True) == same


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("seed", 1, "seed: 0 -> 1"),
        ("model.depth", 3, "model.depth: 2 -> 3"),
        ("model.patch_embed.patch_size", 4, "model.patch_embed.patch_size: 2 -> 4"),
        ("data.batch_size", 32, "data.batch_size: 16 -> 32"),
        ("data.rooted", "b", "data.rooted: (absent) -> b"),  # a prefix of letters is not a prefix of keys
        ("trainer.precision", "bf16", "trainer.precision: fp32 -> bf16"),
        ("model.extra", None, "model.extra: (absent) -> null"),
    ],
)
def test_identity_must_be_equal(key, value, line) -> None:
    found = compare(STORED, changed(key, value), cadence_matters=False)
    assert (found["identity"], found["grown"], found["hardware"]) == ([line], [], [])


def test_a_key_that_vanished_is_identity() -> None:
    found = compare(changed("model.extra", 1), STORED, cadence_matters=False)
    assert found["identity"] == ["model.extra: 1 -> (absent)"]


@pytest.mark.parametrize("key", ["trainer.epochs", "trainer.max_steps"])
def test_a_budget_may_grow(key) -> None:
    found = compare(STORED, changed(key, 9), cadence_matters=True)
    assert found["identity"] == found["hardware"] == []
    assert [line.split(":")[0] for line in found["grown"]] == [key]


@pytest.mark.parametrize(
    "key",
    ["run_dir", "resume", "name", "tracker.tensorboard", "tracker.new", "data.root", "data.num_workers"]
    + [f"trainer.{key}" for key in ("stop_at_step", "stop_after_minutes", "save_every_steps")]
    + ["trainer.save_every_epochs", "trainer.keep_checkpoints"],
)
def test_free_keys_are_not_mentioned(key) -> None:
    found = compare(STORED, changed(key, 7), cadence_matters=True)
    assert found["identity"] == found["grown"] == found["hardware"] == []


def test_hardware_may_change_and_is_told() -> None:
    found = compare(STORED, changed("strategy.device", "cuda"), cadence_matters=True)
    assert found["identity"] == found["grown"] == []
    assert found["hardware"] == ["strategy.device: cpu -> cuda"]


def test_the_evaluation_cadence_is_free_unless_something_listens() -> None:
    new = changed("trainer.eval_every_epochs", 2)
    assert compare(STORED, new, cadence_matters=False)["identity"] == []
    assert compare(STORED, new, cadence_matters=True)["identity"] == ["trainer.eval_every_epochs: 1 -> 2"]


def test_a_sound_checkpoint_is_not_passed_over_where_too_many_files_are_open(tmp_path, no_more_files) -> None:
    """An older one would be continued, and what is newer overwritten."""
    path = save(tmp_path, step=1)
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        load(path)
    assert load(path).path == path
