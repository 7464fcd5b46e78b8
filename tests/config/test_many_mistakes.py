"""However many mistakes a command holds, one answer names them all, before the data is looked at.

Sixty commands of two to five mistakes each. Their folder of images does not exist, which would be the answer
if anything had looked for it.
"""

from __future__ import annotations

import random

import pytest
from conftest import vit_train_here

# Typed -> said in its line; the line begins with the key
MISTAKES = {
    "seed=99999999999999999999": "must be less than 9223372036854775808",
    "seed=1.5": "expected int",
    "sed=3": "no such key; did you mean 'seed'?",
    "lr=0.1": "did you mean 'optimizer.lr'?",
    "trainr.epochs=3": "did you mean 'trainer'?",
    "init_strict=perhaps": "expected bool",
    "name=[a]": "expected",
    "model.depth=0": "must be at least 1",
    "model.depht=3": "did you mean 'model.depth'?",
    "model.embed_dim=192.0": "expected int",
    "model.num_heads=-3": "must be at least 1",
    "model.mlp_ratio=0": "must be greater than 0",
    "model.drop_rate=1": "must be less than 1",
    "model.pool=max": "'max' is not one of cls, mean",
    "model.patch_embed.patch_size=0": "must be at least 1",
    "model.patch_embed.patchsize=4": "did you mean 'model.patch_embed.patch_size'?",
    "data.batch_size=0": "must be at least 1",
    "data.batchsize=8": "did you mean 'data.batch_size'?",
    "data.num_workers=99999999999999999999": "must be at most",
    "data.img_size=0": "must be at least 1",
    "data.val_fraction=2": "must be less than 1",
    "data.limit=-3": "must be at least 1",
    "data.cache=disk": "'disk' is not one of auto, none, ram, device",
    "data.resize=crp": "did you mean 'crop'?",
    "data.background=[0,0,300]": "must be at most 255",
    "data.std=[1,0,1]": "must be greater than 0",
    "data.on_bad_image=ignore": "'ignore' is not one of error, skip",
    "augment.batch.hflip_prob=2": "must be at most 1",
    "augment.batch.flip=0.5": "no such key",
    "augment.batch.mixup_alpha=-1": "must be at least 0",
    "augment.batch.crop_scale=[0.1]": "crop_scale",
    "augment.repeats=2147483648": "must be at most",
    "augment.sampel=1": "did you mean 'augment.sample'?",
    "objective.label_smoothing=1.5": "must be",
    "objective.smoothing=0.1": "no such key",
    "optimizer.lr=0": "greater than 0",
    "optimizer.weightdecay=1": "did you mean 'optimizer.weight_decay'?",
    "optimizer.betas=[0.9,2]": "must be less than 1",
    "optimizer.weight_decay=-1": "must be at least 0",
    "optimizer.layer_decay=2": "must be at most 1",
    "optimizer.eps=${nope}": "'nope' not found",
    "schedule.warmup_epochs=inf": "finite",
    "schedule.warmup=3": "no such key",
    "schedule.final_factor=-0.5": "must be at least 0",
    "strategy.num_threads=0": "must be at least 1",
    "strategy.devise=cpu": "did you mean 'strategy.device'?",
    "trainer.epochs=0": "must be at least 1",
    "trainer.epoch=3": "did you mean 'trainer.epochs'?",
    "trainer.max_steps=1.5": "expected int",
    "trainer.precision=bf17": "did you mean 'bf16'?",
    "trainer.ema_decay=2": "must be less than 1",
    "trainer.grad_clip_norm=-1": "must be greater than 0",
    "trainer.grad_accum_steps=abc": "expected int",
    "trainer.compile=1": "expected bool",
    "trainer.keep_checkpoints=-1": "must be at least",
    "trainer.stop_after_minutes=nan": "finite",
    "trainer.early_stop_patience=0": "must be at least 1",
    "tracker.tensorboard=maybe": "expected bool",
    "tracker.log_every_steps=0": "must be at least 1",
}


def commands():
    """Sixty of them, the same every time; together they hold every mistake."""
    shuffled, rng = [], random.Random(0)
    while len(shuffled) < 300:
        shuffled += rng.sample(sorted(MISTAKES), len(MISTAKES))
    for i in range(60):
        number, chosen = 2 + i % 4, {}
        while len(chosen) < number:
            mistake = shuffled.pop(0)
            chosen[mistake.partition("=")[0]] = mistake
        yield tuple(chosen.values())


COMMANDS = tuple(commands())


def test_every_mistake_is_made():
    assert len(COMMANDS) == 60
    assert {mistake for typed in COMMANDS for mistake in typed} == {*MISTAKES}


@pytest.mark.parametrize("mistakes", COMMANDS, ids=" ".join)
def test_one_answer_names_every_mistake(mistakes, in_tmp):
    done = vit_train_here("data=imagefolder", "data.root=nowhere", *mistakes, cwd=in_tmp)
    assert (done.code, done.out) == (2, "")
    header, *lines = done.err.splitlines()
    assert header == f"vit-train: error: {len(mistakes)} errors in the configuration:"
    assert len(lines) == len(mistakes)
    for mistake in mistakes:
        key = mistake.partition("=")[0]
        key = "trainr" if key.startswith("trainr") else key
        (line,) = [line for line in lines if line.startswith((f"  {key}: ", f"  {key}["))]
        assert MISTAKES[mistake] in line, line
    assert list(in_tmp.iterdir()) == []
