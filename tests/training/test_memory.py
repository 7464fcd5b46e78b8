"""Out of memory: found a way around before the first step, and one line to act on after it.

A hook of torch's own makes the model refuse more than so many images at a time, as a full GPU would.
"""

from __future__ import annotations

import argparse
import errno
import functools
import re
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, build, vit_train_forked, vit_train_here, whole_state
from torch.nn.modules.module import register_module_forward_pre_hook

from vit_train.checkpoint import load, resolve_link
from vit_train.cli import command
from vit_train.errors import ran_out_of_memory
from vit_train.models import ViT
from vit_train.training import memory
from vit_train.training.memory import advice

PROBE = (*TINY, "trainer.grad_accum_steps=1", "trainer.epochs=1")  # 5 steps of 16 images
AUTO = (*PROBE, "trainer.auto_batch=true", "run_dir=run")


def small_memory(limit, after=0, diary=None, of_machine=False):
    """From now on a training pass of more than `limit` images finds the memory full.

    Args:
        limit: images.
        after: so many passes go through whatever their size.
        diary: a file that gets the size of each pass.
        of_machine: it is that of the machine, which says so in other words.
    """
    passes = 0

    def hook(module, arguments):
        nonlocal passes
        if not isinstance(module, ViT) or not module.training or arguments[0].is_meta:
            return
        passes += 1
        if diary is not None:
            with Path(diary).open("a") as file:
                file.write(f"{len(arguments[0])} ")
        if len(arguments[0]) > limit and passes > after:
            if of_machine:
                torch.empty(2**55)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd much more.")

    return register_module_forward_pre_hook(hook)


def on_small_device(*arguments, cwd, check=True, **settings):
    """`vit-train` where that is so, and the size of each of its training passes."""
    diary = cwd / "diary"
    diary.write_text("")
    hook = functools.partial(small_memory, diary=diary, **settings)
    done = vit_train_forked(*arguments, cwd=cwd, check=check, prepare=hook)
    return done, [int(size) for size in diary.read_text().split()]


# --------------------------------------------------------------------------------------- before the first step
@pytest.mark.parametrize("of_machine", [False, True])
def test_the_micro_batch_that_fits_is_found_and_kept(warm, tmp_path, of_machine) -> None:
    """As if the number had been typed; and looked for once."""
    small = {"limit": 5, "of_machine": of_machine}
    _, passes = on_small_device(*AUTO, "trainer.stop_at_step=2", cwd=tmp_path, **small)
    assert passes == [16, 8, 4, 4] + 2 * [4, 4, 4, 4]
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert stored["trainer"]["grad_accum_steps"] == 4
    state = load(resolve_link(tmp_path / "run/checkpoints/last")).state
    assert state["config"]["trainer"]["grad_accum_steps"] == 4
    assert state["train"]["step"] == 2

    # by either command, also where there is more memory now
    _, passes = on_small_device("resume=run", "trainer.stop_at_step=3", cwd=tmp_path, **small)
    assert passes == [4, 4, 4, 4]
    _, passes = on_small_device(*AUTO, cwd=tmp_path, limit=100)
    assert passes == 2 * [4, 4, 4, 4]

    vit_train_forked(*PROBE, "trainer.grad_accum_steps=4", "run_dir=typed", cwd=tmp_path)
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "typed")


def test_with_memory_enough_nothing_is_cut(warm, tmp_path) -> None:
    _, passes = on_small_device(*AUTO, cwd=tmp_path, limit=16)
    assert passes == [16] + 5 * [16]


def test_a_batch_that_halves_once_is_cut_further(warm, tmp_path) -> None:
    """18 images are not four pieces; six of three fit."""
    _, passes = on_small_device(*AUTO, "data.batch_size=18", "trainer.stop_at_step=1", cwd=tmp_path, limit=4)
    assert passes == [18, 9, 3, 3] + 6 * [3]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["grad_accum_steps"] == 6


def test_not_even_one_image_fits(warm, tmp_path) -> None:
    done, passes = on_small_device(*AUTO, cwd=tmp_path, check=False, limit=0)
    assert passes == [16, 8, 4, 2, 1]
    assert (done.code, done.err.count("\n")) == (7, 1), done
    assert "out of memory with micro-batches of one image" in done.err
    assert not (tmp_path / "run").exists()


def test_looking_for_it_changes_nothing(in_tmp) -> None:
    settings = (
        "model=hybrid_cifar",
        "model.embed_dim=16",
        "model.num_heads=2",
        "model.depth=1",
        "data.batch_size=16",
        "data.num_workers=0",
        "trainer.ema_decay=0.9",
    )
    usual = build(*settings, "run_dir=a").trainer
    handle = small_memory(4)
    try:
        probed = build(*settings, "run_dir=b", "trainer.auto_batch=true").trainer
    finally:
        handle.remove()
    assert (usual.grad_accum_steps, probed.grad_accum_steps) == (1, 4)
    for one, other in ((usual.model, probed.model), (usual.ema.module, probed.ema.module)):
        other_state = other.state_dict()
        assert [n for n, t in one.state_dict().items() if not torch.equal(t, other_state[n])] == []
    assert all(parameter.grad is None for parameter in probed.model.parameters())
    assert (probed.model.training, probed.optimizer.state, probed.state.step) == (True, {}, 0)
    # the control: a pass does change the running statistics
    before = usual.model.patch_embed.trunk.groups[0].norm1.running_var.clone()
    usual.model(torch.zeros(4, 1, 8, 8))
    assert not torch.equal(usual.model.patch_embed.trunk.groups[0].norm1.running_var, before)


# ------------------------------------------------------------------------------------------------ in the middle
@pytest.mark.parametrize(("batch", "pieces", "typed"), [(16, 2, 4), (15, 1, 3), (18, 3, 6)])
def test_out_of_memory_names_what_to_type(warm, tmp_path, batch, pieces, typed) -> None:
    settings = (*PROBE, f"data.batch_size={batch}")
    arguments = (*settings, f"trainer.grad_accum_steps={pieces}", "trainer.save_every_steps=2")
    done, _ = on_small_device(
        *arguments, "run_dir=run", cwd=tmp_path, check=False, limit=batch // typed, after=3 * pieces
    )
    assert (done.code, done.err.count("\n")) == (7, 1), done
    assert done.err.startswith(
        f"vit-train: error: out of memory: ViT with data.batch_size={batch} in {pieces} micro-batches of "
        f"{batch // pieces} (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    )
    override = re.search(r"trainer\.grad_accum_steps=\d+", done.err)[0]
    assert override == f"trainer.grad_accum_steps={typed}"
    assert load(resolve_link(tmp_path / "run/checkpoints/last")).state["train"]["step"] == 2
    on_small_device(*settings, override, "run_dir=second", cwd=tmp_path, limit=batch // typed)


def test_where_nothing_is_left_to_cut_the_advice_is_another() -> None:
    config = {"data": {"batch_size": 8}, "trainer": {"grad_accum_steps": 8}}
    line = advice(config, "ViT", torch.device("cpu"), torch.OutOfMemoryError("full"))
    assert "grad_accum_steps" not in line
    assert "each micro-batch is already a single image" in line
    assert "smaller model" in line


# --------------------------------------------------------------------------------------- memory of the machine
# 256 images of 1,024 patches: 256 x 1,024 x 256 x 4 bytes between the layers of an MLP
WIDE = (
    *TINY,
    "data.limit=null",
    "trainer.grad_accum_steps=1",
    "model.mlp_ratio=8",
    "data.img_size=32",
    "data.batch_size=256",
    "trainer.max_steps=1",
)


def take_no_more(mebibytes):
    """From now on the allocator of this process refuses more than it has and so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.skipif(sys.platform != "linux", reason="limits are set and read as Linux has them")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (WIDE, r"ViT with data\.batch_size=256 in 1 micro-batches of 256"),
        ((*TINY, "model.embed_dim=8192", "model.mlp_ratio=100"), "you tried to allocate"),
    ],
)
def test_memory_of_the_machine_runs_out(warm, tmp_path, arguments, words) -> None:
    limited = functools.partial(take_no_more, 650)
    done = vit_train_forked(*arguments, "run_dir=run", cwd=tmp_path, check=False, prepare=limited)
    assert (done.code, done.err.count("\n")) == (7, 1), done
    assert re.search(f"out of memory.* {words}", done.err)


@pytest.mark.parametrize("allocate", [bytearray, np.empty, torch.empty])
def test_every_allocator_is_understood(capsys, allocate) -> None:
    code = command.run("vit-eval", lambda _: allocate(2**55) and None, argparse.Namespace)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (7, 1)
    assert said.startswith("vit-eval: error: out of memory (")


def test_other_errors_are_not_about_memory() -> None:
    assert ran_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not ran_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not ran_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(("free", "said"), [(2**20, True), (2**40, False)])
def test_a_step_that_needs_more_than_is_free_is_announced(tmp_path, monkeypatch, free, said) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda _: free)
    done = vit_train_here(*TINY, "trainer.precision=fp32", "summary=true", cwd=tmp_path)
    assert done.code == 0, done
    assert ("a training step needs about 0.0 GiB, but only 0.0 GiB are free" in done.out) == said
