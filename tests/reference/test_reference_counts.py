"""What a model costs, and what a run's result says of its pace, against formulas written out here.

The formulas are of the layers as the papers draw them: they know neither the modules nor torch's counters. Patches,
widths, heads and windows are odd, and windows do not divide the map.

D width, T tokens, g side of a grid, w side of a window, K classes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import vit_train_here
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from vit_train.layers import PatchEmbed, TrunkEmbed
from vit_train.models import DeiT, HybridEmbed, Swin, ViT, cost
from vit_train.models.cost import multiply_adds
from vit_train.runs.record import closing_figures


# ------------------------------------------------------------------------------------------------- the formulas
def linear(inputs, outputs, tokens, *, bias=True):
    """(parameters, multiply-adds) of a linear map of each token."""
    return outputs * (inputs + bias), tokens * inputs * outputs


def norm(width):
    return 2 * width, 0


def convolution(channels, outputs, kernel, side):
    """With a bias, to a map of `side` x `side`."""
    return outputs * (channels * kernel**2 + 1), side**2 * outputs * channels * kernel**2


def together(*costs):
    return tuple(sum(values) for values in zip(*costs))


def block(width, *, hidden, tokens, scores, qkv_bias, table=0):
    """`scores`: how many pairs of query and key there are, each of one product for all heads together."""
    return together(
        norm(width),
        linear(width, 3 * width, tokens, bias=qkv_bias),
        (table, 2 * scores * width),  # query times key, weight times value
        linear(width, width, tokens),
        norm(width),
        linear(width, hidden, tokens),
        linear(hidden, width, tokens),
    )


def transformer(
    embed, side, *, width, depth, hidden, qkv_bias, prefix, heads, classes, mlp_head=False, table=0
):
    """Rows of a ViT or DeiT on a grid of `side` x `side`."""
    tokens = side**2 + prefix
    rows = {"": ((tokens + prefix) * width, 0), "patch_embed": embed}
    for i in range(depth):
        rows[f"blocks.{i}"] = block(
            width, hidden=hidden, tokens=tokens, scores=tokens**2, qkv_bias=qkv_bias, table=table
        )
    head = linear(width, classes, 1)
    rows["norm"] = norm(width)
    rows["head"] = together(linear(width, width, 1), head) if mlp_head else head
    return rows | ({"head_dist": head} if heads == 2 else {})


def swin(embed, side, *, width, depths, heads, window, ratio, qkv_bias, mask_padding, classes):
    rows = {"patch_embed": embed}
    for i, (depth, num_heads) in enumerate(zip(depths, heads)):
        if i:  # one token of 2 x 2, the last row and column doubled where they are alone
            side, width = math.ceil(side / 2), 2 * width
            merged = linear(2 * width, width, side**2, bias=False)
            rows[f"layers.{i}.downsample"] = together(norm(2 * width), merged)
        for j in range(depth):
            # tokens of each window of an axis, and whether it has padding, which is one more key where it is not hidden
            seen = math.ceil(side / window) * window
            shift = window // 2 if j % 2 and seen > window else 0
            real, padded = (Counter((token - shift) // window for token in range(n)) for n in (side, seen))
            axis = [(n, padded[place] > n and not mask_padding) for place, n in real.items()]
            pairs = sum(y * x * (y * x + (down or right)) for y, down in axis for x, right in axis)
            rows[f"layers.{i}.blocks.{j}"] = block(
                width,
                hidden=int(ratio * width),
                tokens=side**2,
                scores=pairs,
                qkv_bias=qkv_bias,
                table=num_heads * (2 * window - 1) ** 2,
            )
    return rows | {"norm": norm(width), "head": linear(width, classes, 1)}


def check(build, rows, *, channels, size):
    """The model's parameters and multiply-adds, as a whole and row by row, without its weights."""
    with torch.device("meta"):
        model = build()
    parameters, products = together(*rows.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert multiply_adds(model, in_channels=channels, img_size=size) == products
    with pytest.MonkeyPatch.context() as patch:
        # what is kept for the backward pass takes most of the time, and is tested in tests/report/test_model_cost.py
        patch.setattr(cost, "kept_for_backward", lambda *_args, **_kwargs: {})
        shape = (1, channels, size, size)
        table = cost.layers_of(model, shape, precision="fp32", device=torch.device("cpu"))
    found = {layer.name: (layer.parameters, layer.multiply_adds) for layer in table}
    own = [name for name in found if "pos_embed" in name or name == "(between)"]
    found = {"" if name in own else name: figures for name, figures in found.items()}
    assert {name: figures for name, figures in found.items() if figures != (0, 0)} == {
        name: figures for name, figures in rows.items() if figures != (0, 0)
    }


def check_real(build, rows, *, channels, size):
    """That the real model computes as much, as torch counts it."""
    _, products = together(*rows.values())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build().eval()(torch.zeros(3, channels, size, size))
    assert counter.get_total_flops() == 3 * 2 * products


# ------------------------------------------------------------------------------------------------- the families
ODD_HEADS = st.sampled_from([1, 2, 3, 5])
CHANNELS = st.sampled_from([1, 2, 3, 4])
CLASSES = st.sampled_from([1, 2, 7, 101])
RATIO = st.sampled_from([0.5, 1.0, 2.3, 4.0])


@given(st.data())
@settings(max_examples=30)
def test_vit_and_deit(data):
    draw = data.draw
    patch, side, heads = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(ODD_HEADS)
    width, channels, classes = heads * draw(st.integers(1, 9)), draw(CHANNELS), draw(CLASSES)
    depth, ratio, bias = draw(st.integers(0, 3)), draw(RATIO), draw(st.booleans())
    distilled = draw(st.booleans())
    pool, head, first = ("cls", "linear", True) if distilled else draw(
        st.tuples(st.sampled_from(["cls", "mean"]), st.sampled_from(["linear", "mlp"]), st.booleans())
    )  # fmt: skip
    projection, normed = draw(st.sampled_from(["conv", "unfold"])), draw(st.booleans())
    size = patch * side
    embed = convolution(channels, width, patch, side)
    rows = transformer(
        together(embed, norm(width)) if normed else embed,
        side,
        width=width,
        depth=depth,
        hidden=int(width * ratio),
        qkv_bias=bias,
        prefix=2 if distilled else pool == "cls",
        heads=2 if distilled else 1,
        classes=classes,
        mlp_head=head == "mlp",
    )
    own = {} if distilled else {"pool": pool, "head": head, "norm_first": first}

    def build():
        return (DeiT if distilled else ViT)(
            patch_embed=PatchEmbed(
                img_size=size,
                patch_size=patch,
                in_channels=channels,
                embed_dim=width,
                projection=projection,
                norm=normed,
            ),
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=ratio,
            qkv_bias=bias,
            num_classes=classes,
            **own,
        )

    check(build, rows, channels=channels, size=size)
    check_real(build, rows, channels=channels, size=size)


@given(st.lists(st.integers(1, 9), max_size=2), st.integers(7, 20), ODD_HEADS, CHANNELS, st.booleans())
@settings(max_examples=10)
def test_a_trunk_of_convolutions_and_relative_positions(widths, size, heads, channels, rel_pos):
    width = 3 * heads
    rows, inputs, side = {}, 8 * channels, size + 1
    stem = (inputs * (channels * 4 + 1), side**2 * inputs * channels * 4)
    for i, outputs in enumerate([*widths, width]):
        first, second = ((outputs * n * 9, outputs * n * 9) for n in (inputs, outputs))
        rows[f"patch_embed.trunk.groups.{i}"] = together(
            (first[0], first[1] * side**2), norm(outputs), (second[0], second[1] * (side // 2) ** 2), norm(outputs)
        )  # fmt: skip
        inputs, side = outputs, side // 2
    table = rel_pos * heads * (2 * side - 1) ** 2
    rest = transformer(
        stem, side, width=width, depth=1, hidden=3 * width, qkv_bias=True, prefix=1, heads=1, classes=7, table=table
    )  # fmt: skip
    rows |= {"patch_embed.trunk.stem": rest.pop("patch_embed")} | rest

    def build():
        embed = TrunkEmbed(img_size=size, in_channels=channels, widths=(*widths, width))
        sizes = {"embed_dim": width, "depth": 1, "num_heads": heads, "mlp_ratio": 3.0, "num_classes": 7}
        return ViT(patch_embed=embed, rel_pos=rel_pos, **sizes)

    check(build, rows, channels=channels, size=size)


@given(st.data())
@settings(max_examples=25)
def test_swin(data):
    draw = data.draw
    patch, size, window = draw(st.integers(1, 5)), draw(st.integers(5, 41)), draw(st.integers(1, 7))
    stages = draw(st.integers(1, 3))
    depths = tuple(draw(st.integers(1, 2)) for _ in range(stages))
    heads = tuple(draw(st.sampled_from([1, 3])) * 2**i for i in range(stages))
    width, channels, classes = 3 * draw(st.integers(1, 4)), draw(CHANNELS), draw(CLASSES)
    ratio, bias, mask, normed = draw(RATIO), draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    side = math.ceil(size / patch)
    embed = convolution(channels, width, patch, side)  # padded to whole patches
    own = {"qkv_bias": bias, "mask_padding": mask}
    rows = swin(
        together(embed, norm(width)) if normed else embed,
        side,
        width=width,
        depths=depths,
        heads=heads,
        window=window,
        ratio=ratio,
        **own,
        classes=classes,
    )

    def build():
        return Swin(
            patch_embed=PatchEmbed(
                img_size=size,
                patch_size=patch,
                in_channels=channels,
                embed_dim=width,
                norm=normed,
                any_size=True,
            ),
            embed_dim=width,
            depths=depths,
            num_heads=heads,
            window_size=window,
            mlp_ratio=ratio,
            **own,
            num_classes=classes,
        )

    check(build, rows, channels=channels, size=size)
    check_real(build, rows, channels=channels, size=size)


LAYERS = {
    "resnet18": ("layer1", "layer2"),
    "vgg11": ("features.3", "features.5"),
    "mobilenet_v2": ("features.3",),
}


@given(st.data())
@settings(max_examples=8)
def test_hybrid(data):
    """The trunk's convolutions are counted by hand in torchvision's own model."""
    draw = data.draw
    backbone = draw(st.sampled_from(sorted(LAYERS)))
    layer, size, heads = draw(st.sampled_from(LAYERS[backbone])), draw(st.integers(17, 45)), draw(ODD_HEADS)
    with torch.device("meta"):
        width, trunk, costs = 7 * heads, get_model(backbone).eval(), []

    def counted(module, _inputs, output):
        outputs, side = output.shape[1], output.shape[2]
        inputs = module.in_channels // module.groups
        taps = inputs * module.kernel_size[0] * module.kernel_size[1]
        costs.append((outputs * (taps + (module.bias is not None)), side * output.shape[3] * outputs * taps))

    def normed(module, _inputs, _output):
        costs.append(norm(module.num_features))

    def stop(_module, _inputs, output):
        raise StopIteration(output.shape)

    for module in trunk.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(counted if isinstance(module, nn.Conv2d) else normed)
    trunk.get_submodule(layer).register_forward_hook(stop)
    with pytest.raises(StopIteration) as reached:
        trunk(torch.empty(1, 3, size, size, device="meta"))
    _, channels, map_side, _ = reached.value.value
    patch = draw(st.sampled_from([d for d in range(1, map_side + 1) if map_side % d == 0]))
    side = map_side // patch
    embed = together(*costs, convolution(channels, width, patch, side))
    rows = transformer(
        embed, side, width=width, depth=1, hidden=2 * width, qkv_bias=True, prefix=1, heads=1, classes=5
    )

    def build():
        stem = HybridEmbed(
            img_size=size,
            backbone=backbone,
            layer=layer,
            in_channels=3,
            embed_dim=width,
            patch_size=patch,
        )
        return ViT(patch_embed=stem, embed_dim=width, depth=1, num_heads=heads, mlp_ratio=2.0, num_classes=5)

    check(build, rows, channels=3, size=size)


def test_a_real_model_of_more_tokens_than_plain_products_are_used_for():
    """Above 1,024 tokens the CPU takes its fused kernel, which torch's counter does not know."""
    _, products = together(
        *transformer(
            convolution(1, 6, 1, 33), 33, width=6, depth=1, hidden=6, qkv_bias=True, prefix=1, heads=1, classes=3
        ).values()
    )  # fmt: skip
    embed = PatchEmbed(img_size=33, patch_size=1, in_channels=1, embed_dim=6)
    model = ViT(patch_embed=embed, embed_dim=6, depth=1, num_heads=3, mlp_ratio=1.0, num_classes=3).train()
    assert multiply_adds(model, in_channels=1, img_size=33) == products
    assert model.training
    assert model.pos_embed.device.type == "cpu"


# --------------------------------------------------------------------------------------------- result.json
@given(
    steps=st.integers(0, 10**6),
    batch=st.integers(1, 4096),
    seconds=st.one_of(st.just(0.0), st.floats(0.001, 1e6)),
    closed=st.integers(0, 900),
)
def test_pace_of_a_run(steps, batch, seconds, closed):
    state = SimpleNamespace(
        step=steps, seconds=seconds, closed_epochs=closed, best=None, last={}, stopped_early=False
    )
    found = closing_figures(state=state, test={}, steps_per_epoch=7, batch_size=batch, seed=5)
    assert found["images_per_second"] == (
        pytest.approx(steps * batch / seconds, rel=1e-12) if seconds else None
    )
    assert (found["steps"], found["epochs"], found["last/epoch"]) == (steps, closed, closed)
    assert (found["steps_per_epoch"], found["seed"], found["seconds"]) == (7, 5, seconds)
    assert all(
        found[f"{kind}/{name}"] is None for kind in ("best/val", "last/val") for name in ("loss", "top1")
    )


@pytest.mark.parametrize(
    ("images", "batch", "budget", "steps", "epochs"),
    [
        (50, 16, "trainer.max_steps=7", 7, 3),  # 3 steps an epoch, 2 images of each left over
        (37, 9, "trainer.epochs=2", 8, 2),
        (20, 64, "trainer.epochs=3", 3, 3),  # a set smaller than a batch is one batch, of 20
    ],
)
def test_steps_epochs_and_images_of_a_real_run(tmp_path, images, batch, budget, steps, epochs):
    done = vit_train_here(
        *(f"data.limit={images}", f"data.batch_size={batch}", budget, "data.num_workers=0", "model.depth=1"),
        *("trainer.eval_every_epochs=1", "tracker.tensorboard=false", "run_dir=run"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["epochs"], result["last/epoch"]) == (steps, epochs, epochs)
    assert result["steps_per_epoch"] == max(images // batch, 1)
    assert result["images_per_second"] == pytest.approx(steps * min(batch, images) / result["seconds"])
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    val = [event for event in events if "val/top1" in event]
    assert [event["step"] for event in val] == [
        min((i + 1) * result["steps_per_epoch"], steps) for i in range(epochs)
    ]
    best = max(val, key=lambda event: (event["val/top1"], -event["val/loss"]))
    assert result["best/epoch"] == val.index(best) + 1
    for name in ("loss", "top1", "top5", "macro_top1"):
        assert result[f"best/val/{name}"] == best[f"val/{name}"]
        assert result[f"last/val/{name}"] == val[-1][f"val/{name}"]
