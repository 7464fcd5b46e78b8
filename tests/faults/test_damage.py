"""A damaged checkpoint is found, named and passed over; one that was asked for by name is an error.

The count: a truncation, and 4 flipped bits, of each of the 5 files of a checkpoint, a missing file, two files
that changed places and a checkpoint of a later format make 28, with `-m ""`; a plain `pytest` runs 3 of them.
Beside them: all checkpoints damaged, and every single bit of a manifest.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from conftest import EIGHTEEN, everything_in, stale_files, vit_train_forked, whole_state

from vit_train.checkpoint import MANIFEST, Checkpointer, Snapshot, checkpoint_directories, load
from vit_train.cli import evaluate
from vit_train.errors import CheckpointError

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", MANIFEST)
NEWEST, BEFORE = "run/checkpoints/step_00000012", "step_00000008"


@pytest.fixture(scope="module")
def stopped(warm, tmp_path_factory):
    """A run stopped after 12 of its 18 steps, with the checkpoints 8 and 12."""
    folder = tmp_path_factory.mktemp("stopped")
    vit_train_forked(*EIGHTEEN, "trainer.save_every_steps=4", "trainer.stop_at_step=12", cwd=folder)
    names = [path.name for path in checkpoint_directories(folder / "run/checkpoints")]
    assert names == ["step_00000012", BEFORE]
    return folder / "run"


def truncate(folder, name, draw):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: draw.randrange(len(data))])


def flip(folder, name, draw):
    data = bytearray((folder / name).read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(data)


def remove(folder, name, draw):
    (folder / name).unlink()


def swap(folder, name, draw):
    """With the model, which has the same tensors and so the same size."""
    other = folder / "model.safetensors"
    first, second = other.read_bytes(), (folder / name).read_bytes()
    assert first != second
    assert len(first) == len(second)
    other.write_bytes(second)
    (folder / name).write_bytes(first)


def outdate(folder, name, draw):
    """As if a later vit-train had written it."""
    manifest = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**manifest, "format": manifest["format"] + 1}, indent=1))


DAMAGES = [
    *((truncate, name, 0) for name in FILES),
    *((flip, name, i) for name in FILES for i in range(4)),
    (remove, "optimizer.safetensors", 0),
    (swap, "ema.safetensors", 0),
    (outdate, MANIFEST, 0),
]
SAMPLE = (5, 17, 27)
REASONS = {
    truncate: "is damaged",
    flip: "is damaged",
    remove: "is missing",
    swap: "is damaged",
    outdate: "format 2",
}
assert len(DAMAGES) == 28


def cases():
    for i, (damage, name, number) in enumerate(DAMAGES):
        marks = () if i in SAMPLE else pytest.mark.faults
        yield pytest.param(damage, name, number, id=f"{damage.__name__}-{name}-{number}", marks=marks)


def check_one_line(err, command, path):
    """One line on stderr, which names a file of this checkpoint and says what is wrong with it."""
    assert err.startswith(f"{command}: error: {path}"), err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize(("damage", "name", "number"), cases())
def test_a_damaged_newest_checkpoint_is_passed_over(
    eighteen, stopped, tmp_path, monkeypatch, capsys, damage, name, number
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run, symlinks=True)
    damage(tmp_path / NEWEST, name, random.Random(f"{name} {number}"))
    before = everything_in(run)

    # asked for by name, nothing stands in for it
    named = vit_train_forked(f"resume={NEWEST}", cwd=tmp_path, check=False)
    assert named.code == 4, named
    check_one_line(named.err, "vit-train", NEWEST)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert evaluate.main([NEWEST]) == 4
    check_one_line(capsys.readouterr().err, "vit-eval", NEWEST)
    assert everything_in(run) == before, "a refusal changes nothing"

    done = vit_train_forked("resume=run", cwd=tmp_path)
    said = " ".join(done.out.split())
    assert f"checkpoint skipped: {NEWEST}" in said
    if name != MANIFEST:  # a manifest that lies about another file is noticed when that one is read
        about = said.partition("checkpoint skipped: ")[2][:200]
        # a bit of the header, which is read before the whole, may have made another name of a tensor's
        kind, unfit = name.partition(".")[0], f"{NEWEST} does not fit: "
        renamed = (f"{unfit}{kind}/", f"{unfit}it holds {kind}/") if damage is flip else ()
        assert about.startswith((f"{NEWEST}/{name} {REASONS[damage]}", *renamed)), about
    assert "after step 8," in said
    assert whole_state(run) == eighteen
    assert stale_files(run) == []


@pytest.mark.faults
def test_without_a_valid_checkpoint_there_is_nothing_to_continue(stopped, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run, symlinks=True)
    for i, folder in enumerate(checkpoint_directories(run / "checkpoints")):
        flip(folder, FILES[i], random.Random(i))
    before = everything_in(run)
    for again in (("resume=run",), (*EIGHTEEN, "trainer.save_every_steps=4")):
        done = vit_train_forked(*again, cwd=tmp_path, check=False)
        assert done.code == 4, done
        assert done.err.startswith("vit-train: error: run holds no valid checkpoint: ")
        assert done.err.count("\n") == 1
        assert f"{NEWEST}/model.safetensors is damaged" in done.err
        assert f"{BEFORE}/ema.safetensors is damaged" in done.err
    assert everything_in(run) == before, "the run did not start anew over what may still be saved"


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.faults), 7]
)  # 7: one or two in each byte
def test_every_bit_of_a_manifest_counts(tmp_path, every) -> None:
    tensors = {f"{kind}/w": torch.arange(3.0) + i for i, kind in enumerate(("model", "ema", "optimizer"))}
    path = Checkpointer(tmp_path).save(Snapshot(tensors, {"train": {"step": 1}}, step=1, best=True, keep=1))
    manifest = path / MANIFEST
    data = manifest.read_bytes()
    load(path)
    unnoticed = []
    for bit in range(0, 8 * len(data), every):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(changed)
        try:
            load(path)
        except CheckpointError:
            continue
        unnoticed.append((bit, bytes(changed[bit // 8 - 20 : bit // 8 + 20])))
    print(f"{-(-8 * len(data) // every)} bits flipped, each alone")
    assert unnoticed == []
