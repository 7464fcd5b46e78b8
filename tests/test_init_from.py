"""Starting from trained weights, freezing and layer decay: through the command, and exact like everything else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import TINY, build, checkpoint_hashes, vit_train_here, whole_state
from safetensors.torch import save_file

from vit_train.checkpoint import load, resolve_link
from vit_train.layers import Block
from vit_train.training.guard import Guard
from vit_train.training.optimizers import adamw, freeze_parts, layer_ids, set_lr
from vit_train.weights import state_dict_named

SWIN = (
    "model=swin_cifar",
    "model.embed_dim=16",
    "model.depths=[2,2]",
    "model.num_heads=[2,4]",
    "model.window_size=4",
    "data.limit=80",
    "data.batch_size=16",
    "trainer.epochs=1",
    "tracker.tensorboard=false",
)


def tensors(run):
    return load(resolve_link(run / "checkpoints" / "last")).tensors


def said(done):
    return " ".join(done.out.split())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A short run on the digits, with averaged weights."""
    home = tmp_path_factory.mktemp("pretrained")
    done = vit_train_here(*TINY, "run_dir=run", cwd=home)
    assert done.code == 0, done.err
    return home / "run"


# ----------------------------------------------------------------------------------------------- the command
def test_a_run_starts_from_another_ones_averaged_weights(pretrained, in_tmp):
    done = vit_train_here(
        *TINY,
        f"init_from={pretrained}",
        "optimizer.lr=1e-30",
        "trainer.freeze=[patch_embed]",
        "run_dir=new",
        "seed=5",
        cwd=in_tmp,
    )
    assert done.code == 0, done.err
    assert f" weights from {pretrained} (checkpoint step_000000" in said(done)
    assert "tensors loaded" in said(done)
    assert "made anew" not in said(done)
    before, after = load(resolve_link(pretrained / "checkpoints/best")).tensors, tensors(in_tmp / "new")
    names = [name.removeprefix("ema/") for name in before if name.startswith("ema/")]
    assert len(names) > 20
    assert all(torch.equal(before[f"ema/{name}"], after[f"model/{name}"]) for name in names)


def test_other_classes_another_size_and_its_report(pretrained, in_tmp):
    from vit_train.cli import data_command as data

    assert data.main(["digits", str(in_tmp / "digits")]) == 0
    for split in ("train", "val", "test"):
        for digit in range(3, 10):
            shutil.rmtree(in_tmp / "digits" / split / str(digit))
    done = vit_train_here(
        *TINY,
        "data=imagefolder",
        "data.root=digits",
        "data.in_channels=1",
        "data.img_size=16",
        "model=vit_digits",
        "augment=none",
        "trainer.epochs=1",
        "trainer.ema_decay=0.5",
        f"init_from={pretrained}",
        "run_dir=new",
        cwd=in_tmp,
    )
    assert done.code == 0, done.err
    assert "resized: pos_embed" in said(done)
    assert "made anew: head.weight, head.bias" in said(done)
    assert "data.mean and data.std are those the weights were trained with" in said(done)
    new = load(resolve_link(in_tmp / "new/checkpoints/last")).state
    old = load(resolve_link(pretrained / "checkpoints/last")).state
    assert new["inference"]["mean"] == old["inference"]["mean"]


def test_interrupted_after_init_from_equals_uninterrupted(pretrained, in_tmp):
    shutil.copytree(pretrained, in_tmp / "source")
    settings = (*TINY, "init_from=source", "trainer.freeze=[blocks.0]", "optimizer.layer_decay=0.7")
    assert vit_train_here(*settings, "run_dir=whole", cwd=in_tmp).code == 0
    done = vit_train_here(*settings, "run_dir=parts", "trainer.stop_at_step=7", cwd=in_tmp)
    assert done.code == 0, done.err
    shutil.rmtree(in_tmp / "source")  # a continuation has its own weights
    assert vit_train_here("resume=parts", "trainer.stop_at_step=11", cwd=in_tmp).code == 0
    done = vit_train_here(*settings, "run_dir=parts", cwd=in_tmp)  # and the whole command continues as well
    assert done.code == 0, done.err
    assert whole_state(in_tmp / "parts") == whole_state(in_tmp / "whole")


def test_another_source_is_another_run(pretrained, in_tmp):
    settings = (*TINY, "run_dir=run", "trainer.stop_at_step=1")
    assert vit_train_here(*settings, cwd=in_tmp).code == 0
    done = vit_train_here(*settings, f"init_from={pretrained}", cwd=in_tmp)
    assert done.code == 2
    assert "init_from: null -> " in done.err


def test_nothing_stored_names_a_file_to_read(pretrained, in_tmp):
    """A run without a checkpoint whose configuration came from somebody else."""
    assert vit_train_here(*TINY, f"init_from={pretrained}", "run_dir=run", cwd=in_tmp).code == 0
    shutil.rmtree(in_tmp / "run/checkpoints")
    (in_tmp / "run/result.json").unlink()
    done = vit_train_here("resume=run", cwd=in_tmp)
    assert done.code == 4
    assert "type the full command with run_dir=run" in done.err
    assert vit_train_here(*TINY, f"init_from={pretrained}", "run_dir=run", cwd=in_tmp).code == 0


def test_a_damaged_best_checkpoint_is_named(pretrained, in_tmp):
    shutil.copytree(pretrained, in_tmp / "source", symlinks=True)
    best = resolve_link(in_tmp / "source/checkpoints/best")
    (best / "model.safetensors").write_bytes(b"damaged")
    done = vit_train_here(*TINY, "init_from=source", "run_dir=new", "trainer.stop_at_step=0", cwd=in_tmp)
    assert done.code == 0, done.err
    assert f"init_from,checkpointskipped:{best}" in "".join(done.out.split())  # lines are folded anywhere


def test_the_summary_says_what_is_frozen_and_how_the_rate_falls(pretrained, in_tmp):
    settings = (*TINY, f"init_from={pretrained}", "trainer.stop_at_step=0")
    done = vit_train_here(*settings, "optimizer.layer_decay=0.5", "trainer.freeze=[blocks.0]", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "M trained, the others frozen" in said(done)
    assert "falling from layer to layer to " in said(done)
    assert "made for training from scratch" in said(done)
    done = vit_train_here(*settings, "optimizer.lr=1e-4", cwd=in_tmp)
    assert "frozen" not in said(done)
    assert "falling" not in said(done)
    assert "from scratch" not in said(done)


ERRORS = {
    "init_from=nowhere.pth": (4, "no such file or run"),
    "init_from=torchvision:vit_x": (2, "no such model in torchvision"),
    "init_from=.": (4, "holds no checkpoint"),
    "init_from=3": (4, "/3: no such file or run"),
}


@pytest.mark.parametrize("typed", ERRORS)
def test_a_wrong_source_is_one_line_and_no_run(typed, in_tmp):
    code, says = ERRORS[typed]
    done = vit_train_here(*TINY, typed, "run_dir=run", cwd=in_tmp)
    assert done.code == code
    assert says in done.err
    assert done.err.count("\n") == 1
    assert not (in_tmp / "run").exists()


def test_what_does_not_fit_is_an_error_unless_asked_for(pretrained, in_tmp):
    settings = (*TINY, "model.depth=3", f"init_from={pretrained}", "run_dir=run", "trainer.stop_at_step=0")
    done = vit_train_here(*settings, cwd=in_tmp)
    assert done.code == 2
    assert "blocks.2.norm1.weight is missing" in done.err
    assert not (in_tmp / "run").exists()
    done = vit_train_here(*settings, "init_strict=false", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "made anew: blocks.2.norm1.weight" in said(done)


def test_swin_weights_from_elsewhere_bring_their_padding(in_tmp):
    model = build(*SWIN).trainer.model
    save_file(state_dict_named(model, "timm"), in_tmp / "w.safetensors")
    done = vit_train_here(*SWIN, "init_from=w.safetensors", "run_dir=run", cwd=in_tmp)
    assert done.code == 0, done.err
    assert "model.mask_padding=false, as the weights were trained" in said(done)
    stored = load(resolve_link(in_tmp / "run/checkpoints/last")).state["config"]
    assert stored["model"]["mask_padding"] is False
    # the same command finds its own run finished, and a longer one goes on
    assert "nothing to do" in vit_train_here(*SWIN, "init_from=w.safetensors", "run_dir=run", cwd=in_tmp).out
    done = vit_train_here(*SWIN, "init_from=w.safetensors", "run_dir=run", "trainer.epochs=2", cwd=in_tmp)
    assert done.code == 0, done.err
    # our own weights say themselves how they were trained, and what is typed wins
    done = vit_train_here(*SWIN, "init_from=run", "model.mask_padding=true", "run_dir=b", cwd=in_tmp)
    assert done.code == 0, done.err
    told = "the weights were trained with model.mask_padding=false, not with the value you typed"
    assert told in said(done)


# ------------------------------------------------------------------------------------- freezing, layer decay
def test_frozen_parts_keep_their_weights_and_the_rest_learns(pretrained, in_tmp):
    settings = (*TINY, f"init_from={pretrained}", "trainer.freeze=[patch_embed,pos_embed,blocks.0-0]")
    assert vit_train_here(*settings, "run_dir=run", cwd=in_tmp).code == 0
    before, after = load(resolve_link(pretrained / "checkpoints/best")).tensors, tensors(in_tmp / "run")
    frozen, trained = [], []
    for name in before:
        if name.startswith("ema/"):
            own = name.removeprefix("ema/")
            is_frozen = own == "pos_embed" or own.startswith(("patch_embed.", "blocks.0."))
            same = torch.equal(before[name], after[f"model/{own}"])
            assert same == torch.equal(before[name], after[name])
            (frozen if is_frozen else trained).append(same)
            assert is_frozen != any(slot.startswith(f"optimizer/{own}/") for slot in after)
    assert len(frozen) > 10
    assert all(frozen)
    assert len(trained) > 10
    assert not any(trained)


def test_a_frozen_batch_norm_keeps_its_statistics():
    settings = (
        *TINY,
        "model=hybrid_cifar",
        "model.patch_embed.widths=[8,16,32]",
        "data.img_size=32",
        "data.limit=32",
    )
    for freeze, same in (("[patch_embed.trunk]", True), ("[blocks.0]", False)):
        trainer = build(*settings, f"trainer.freeze={freeze}").trainer
        before = {n: b.clone() for n, b in trainer.model.named_buffers() if n.endswith("running_mean")}
        epoch = iter(trainer.train_loader)
        trainer.guard = Guard(trainer.strategy, trainer.parts.signals, None, None)
        trainer.train_step(next(epoch), 0)
        after = dict(trainer.model.named_buffers())
        assert len(before) > 5
        assert all(torch.equal(before[n], after[n]) == same for n in before)


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        ("[block.0]", "has no 'block.0'"),
        ("[blocks.0-9]", "has no 'blocks.2'"),
        ("[blocks.1-0]", "type 0-1"),
        ("[patch_embed,cls_token,pos_embed,blocks,norm,head]", "freeze"),
        ("[patch_embed,pos_embed,blocks,norm,head]", "leaves nothing to train"),
    ],
)
def test_freezing_what_is_not_there_is_one_line(freeze, says, in_tmp):
    done = vit_train_here(*TINY, f"trainer.freeze={freeze}", cwd=in_tmp)
    assert done.code == 2
    assert says in done.err
    assert not (in_tmp / "runs").exists()


def test_ranges_name_blocks_of_every_stage():
    model = build(*SWIN).trainer.model
    freeze_parts(model, ["layers.0-1.blocks.1"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    wanted = ("layers.0.blocks.1.", "layers.1.blocks.1.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(wanted)}


def test_the_rate_falls_from_layer_to_layer():
    model = build(*SWIN).trainer.model
    ids = layer_ids(model)
    assert sum(isinstance(module, Block) for module in model.modules()) == 4
    assert ids["patch_embed.proj.weight"] == 0
    assert ids["layers.0.blocks.0.norm1.weight"] == 1
    assert ids["layers.0.blocks.1.mlp.fc1.weight"] == 2
    assert ids["layers.1.downsample.reduction.weight"] == 3
    assert ids["layers.1.blocks.0.norm1.weight"] == 3
    assert ids["layers.1.blocks.1.norm1.weight"] == 4
    assert ids["norm.weight"] == ids["head.weight"] == 5
    optimizer = adamw(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    set_lr(optimizer, 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)  # what is logged is the head's
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr"] == pytest.approx(0.1 * 0.5 ** (5 - ids[name]))
            spared = parameter.ndim <= 1 or name.endswith("bias_table")
            assert group["weight_decay"] == (0.0 if spared else 0.1)
    assert seen == set(ids)


def test_without_layer_decay_nothing_changes():
    model = build(*TINY).trainer.model
    assert len(adamw(model, lr=1.0).param_groups) == 2
    with pytest.raises(ValueError, match="has none"):
        adamw(torch.nn.Linear(2, 2), lr=1.0, layer_decay=0.5)


def test_hashes_differ_from_a_run_without(pretrained, in_tmp):
    """The negative control: what is compared above does tell runs apart."""
    for name, extra in (
        ("a", ()),
        ("b", (f"init_from={pretrained}",)),
        ("c", ("optimizer.layer_decay=0.7",)),
    ):
        assert vit_train_here(*TINY, "trainer.epochs=1", *extra, f"run_dir={name}", cwd=in_tmp).code == 0
    hashes = [json.dumps(checkpoint_hashes(in_tmp / name), sort_keys=True) for name in "abc"]
    assert len(set(hashes)) == 3
