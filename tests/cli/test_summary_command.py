"""`vit-train summary=true`: what any configuration costs, without data, memory or a trace on the disk."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path

import pytest
from conftest import TINY, compose, everything_in, vit_train_here

from vit_train.config.check import Launch
from vit_train.config.describe import describe
from vit_train.errors import ConfigError
from vit_train.models.cost import multiply_adds

MODELS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/model").glob("*.yaml"))
PARAMETERS = {
    "vit_tiny": 5_717_416,
    "deit_tiny_distilled": 5_910_800,
    "swin_tiny": 28_288_354,
    "vit_huge": 632_045_800,
}


@pytest.fixture
def typed(in_tmp):
    return functools.partial(vit_train_here, cwd=in_tmp)


def described(*overrides):
    return describe(compose(*overrides), Launch(overrides=list(overrides)))


def assert_refused(done, *words):
    assert done.code == 2
    assert re.fullmatch(r"vit-train: error: [^\n]+\n", done.err), done.err
    for word in words:
        assert word in done.err


@pytest.mark.parametrize("name", PARAMETERS)
def test_totals_are_the_published_ones(name, in_tmp):
    """Nothing is written, and the largest takes seconds."""
    start = time.process_time()
    found = described("data=imagefolder", f"model={name}")
    assert time.process_time() - start < 10
    parameters = PARAMETERS[name]
    assert sum(layer.parameters for layer in found.layers) == parameters
    assert sum(layer.multiply_adds for layer in found.layers) == found.multiply_adds > 1e9
    assert found.memory.gradients == found.memory.parameters == found.memory.ema == 4 * parameters
    assert 0 < found.memory.optimizer - 8 * parameters < 4 * 1000  # two moments, and the counts of steps
    assert everything_in(in_tmp) == {}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_table(name, in_tmp):
    """With few blocks, for speed."""
    side = 8 if "digits" in name else 32 if "cifar" in name else 224
    shallow = ["model.depths=[1,2]" if name.startswith("swin") else "model.depth=1"] * (
        name != "resnet_cifar"
    )
    heads = ["model.num_heads=[2,4]", "model.embed_dim=64"] if name.startswith("swin") else []
    found = described("data=imagefolder", f"model={name}", f"data.img_size={side}", *shallow, *heads)
    assert sum(layer.multiply_adds for layer in found.layers) == found.multiply_adds > 0
    assert 4 * sum(layer.parameters for layer in found.layers) == found.memory.gradients
    trunks = ("vit_cifar", "deit_cifar", "hybrid_cifar", "vit_digits")
    embed = "patch_embed.trunk.stem" if name in trunks else "patch_embed"
    ends = {"stem", "head"} if name == "resnet_cifar" else {embed, "norm", "head"}
    assert ends <= {layer.name for layer in found.layers}
    assert found.memory.activations > 0


def test_the_command(typed, in_tmp):
    done = typed("summary=true", "data=imagefolder", "trainer.grad_accum_steps=4")
    assert (done.code, done.err) == (0, "")
    assert "ViT, 5,717,416 parameters\n" in re.sub(" +\n", "\n", done.out)
    assert "3 x 224 x 224, 1.25 GMACs" in done.out
    rows = {line.split()[0]: line.split() for line in done.out.splitlines() if line.strip()}
    assert rows["blocks.11"][1:4] == ["197x192", "197x192", "444,864"]
    assert rows["patch_embed"][1:3] == ["3x224x224", "14x14x192"]
    assert rows["total"][1] == "5,717,416"
    assert "16 images, one of 4 micro-batches" in done.out
    assert "assumed, because only the images can tell: data.num_classes=1000, data.img_size=224" in done.out
    assert max(len(line.rstrip()) for line in done.out.splitlines()) <= 110
    assert everything_in(in_tmp) == {}


def test_what_the_data_would_say(in_tmp):
    for name, classes, side, channels in (
        ("cifar10", 10, 32, 3),
        ("cifar100", 100, 32, 3),
        ("digits", 10, 8, 1),
    ):
        for left_open in ((), ("data.img_size=null",)):
            found = described(f"data={name}", "model.depth=1", *left_open)
            data = found.config["data"]
            assert (data["num_classes"], data["img_size"], data["in_channels"]) == (classes, side, channels)
            assert found.notes == []
            assert found.layers[-1].output == (classes,)
    found = described("data=imagefolder", "data.num_classes=5", "data.img_size=64", "model.depth=1")
    auto = "optimizer.lr=0.001 (auto): blocks of width 192"
    assert found.notes == ["augment.batch.crop_scale=[0.35, 1.0] (auto): images of 64 pixels", auto]
    assert found.layers[-1].output == (5,)
    found = described("data=imagefolder", "data.num_classes=5", "model.depth=1")
    assert found.notes == [
        "assumed, because only the images can tell: data.img_size=224; type other values to see their cost",
        "augment.batch.crop_scale=[0.35, 1.0] (auto): images of 224 pixels",
        auto,
    ]


def test_settings_that_cost_or_save(in_tmp):
    def memory(*overrides):
        return described("data=cifar10", "data.batch_size=32", "model.depth=2", *overrides).memory

    usual = memory("trainer.precision=fp32")
    assert memory("trainer.precision=bf16").activations < 0.8 * usual.activations
    assert (
        memory("trainer.precision=fp32", "trainer.grad_accum_steps=2").activations < 0.6 * usual.activations
    )
    assert memory("trainer.ema_decay=null").ema == 0
    assert memory("optimizer=sgd").optimizer == usual.gradients
    frozen = memory("trainer.freeze=[patch_embed,blocks]", "trainer.precision=fp32")
    assert frozen.gradients < 0.1 * usual.gradients
    assert frozen.optimizer < 0.1 * usual.optimizer


def test_multiply_adds_are_those_of_the_summary_of_a_run(in_tmp):
    from conftest import build

    run = build(*TINY, "run_dir=run")
    found = described(*TINY)
    data = found.config["data"]
    real = multiply_adds(run.trainer.model, in_channels=data["in_channels"], img_size=data["img_size"])
    assert found.multiply_adds == run.multiply_adds == real


# ---------------------------------------------------------------------------------------------------- mistakes
def test_mistakes_are_one_line_and_nothing_is_written(typed, in_tmp):
    assert_refused(typed("summary=yes_please"), "summary: expected bool")
    assert_refused(typed("summary=true", "trainer.epoch=3"), "did you mean 'trainer.epochs'?")
    assert_refused(typed("summary=true", "model.num_heads=5"), "5")
    assert_refused(typed("summary=true", "data.batch_size=10", "trainer.grad_accum_steps=3"), "divisible")
    assert_refused(typed("summary=true", "trainer.freeze=[nothing]"), "freeze: ViT has no 'nothing'")
    assert_refused(typed("summary=true", "data=cifar10", "data.img_size=2"), "type data.img_size=3 or more")
    assert_refused(typed("summary=true", "strategy.device=cuda:77"), "cuda:77")
    assert_refused(typed("summary=true", "resume=latest"), "type one of them")
    assert everything_in(in_tmp) == {}


def test_it_never_matters_to_a_continuation(typed, in_tmp):
    """Neither the key of a new run, nor its absence from an old one; nor a description in between."""
    done = typed(*TINY, "run_dir=run", "trainer.stop_at_step=2")
    assert done.code == 0, done.err
    before = everything_in(in_tmp)
    done = typed(*TINY, "run_dir=run", "summary=true")
    assert (done.code, done.err) == (0, "")
    assert everything_in(in_tmp) == before
    config = in_tmp / "run/config.yaml"
    assert "summary: false\n" in config.read_text()
    config.write_text(config.read_text().replace("summary: false\n", ""))
    for arguments in (("resume=run", "summary=false", "trainer.stop_at_step=4"), (*TINY, "run_dir=run")):
        done = typed(*arguments)
        assert (done.code, done.err) == (0, ""), done
    assert (in_tmp / "run/result.json").is_file()


def test_no_secret_and_no_list_of_choices(in_tmp):
    with pytest.raises(ConfigError, match="one model per run"):
        describe(compose(), Launch(overrides=["model=[vit_tiny,vit_small]"]))
