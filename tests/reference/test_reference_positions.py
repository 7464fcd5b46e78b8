"""Positions, weights at other sizes, the average and what is dropped at random: against timm, torchvision and formulas.

Grids and windows are odd, so that no token of one lies on a token of the other.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from vit_train.layers import Attention, Block, DropPath, PatchEmbed, WindowAttention
from vit_train.layers.init import sincos_positions
from vit_train.models import DeiT, Swin, ViT
from vit_train.training.ema import Ema
from vit_train.weights import Pretrained, load_pretrained
from vit_train.weights.load import resize_bias_table, resize_positions

SIDES = st.integers(1, 17)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


# ------------------------------------------------------------------------------------- sines and cosines
@given(SIDES, SIDES, st.integers(1, 67))
def test_sines_and_cosines(h, w, dim):
    """sin(x f), sin(y f), cos(x f), cos(y f) for the frequencies f = 10000 ** (-i / q), q = dim // 4; zeros remain."""
    quarter = dim // 4
    expected = np.zeros((h * w, dim))
    for token in range(h * w):
        y, x = divmod(token, w)
        for i in range(quarter):
            frequency = 10_000.0 ** (-i / quarter)
            waves = (
                np.sin(x * frequency),
                np.sin(y * frequency),
                np.cos(x * frequency),
                np.cos(y * frequency),
            )
            expected[token, i : 4 * quarter : quarter] = waves
    found = sincos_positions(h, w, dim)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)  # angles to 16, of 24 bits


# --------------------------------------------------------------------------------- weights at another size
def vit(grid, *, patch=3, channels=1, kind=ViT, **own):
    embed = PatchEmbed(img_size=grid * patch, patch_size=patch, in_channels=channels, embed_dim=6)
    return kind(patch_embed=embed, embed_dim=6, depth=1, num_heads=3, num_classes=4, **own)


def randomised(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def as_pretrained(tensors, *, align_corners):
    return Pretrained("w.pth", "timm's names", tensors, align_corners=align_corners)


@given(SIDES, st.tuples(SIDES, SIDES), st.integers(0, 2), st.integers(1, 9), DTYPES, SEEDS)
@settings(max_examples=100)
def test_tables_of_positions(side, grid, prefix, dim, dtype, seed):
    """timm's are antialiased, torchvision's align the corners; the tokens before the patches stay what they are."""
    torch.manual_seed(seed)
    table = torch.randn(1, prefix + side**2, dim).to(dtype)
    found = resize_positions(table, grid, num_prefix_tokens=prefix, align_corners=False)
    expected = resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    aligned = resize_positions(table, (grid[0], grid[0]), num_prefix_tokens=prefix, align_corners=True)
    if prefix == 1 and dtype == torch.float32:
        theirs = interpolate_embeddings(5 * grid[0] + 3, 5, {"encoder.pos_embedding": table})
        torch.testing.assert_close(aligned, theirs["encoder.pos_embedding"])
    if grid[0] == side:
        torch.testing.assert_close(aligned, table, rtol=0, atol=1e-5)


@given(SIDES, SIDES, st.integers(0, 2), st.booleans(), SEEDS)
def test_positions_of_loaded_weights(side, other, prefix, align_corners, seed):
    kinds = ({"pool": "mean"}, {"pool": "cls"}, {"kind": DeiT})
    theirs, ours = (vit(grid, **kinds[prefix]) for grid in (side, other))
    tensors = {name: tensor.clone() for name, tensor in randomised(theirs, seed).state_dict().items()}
    report = load_pretrained(ours, as_pretrained(tensors, align_corners=align_corners))
    table = tensors["pos_embed"]
    if other == side:
        assert report.resized == []
        expected = table
    elif align_corners:
        with_class = {"encoder.pos_embedding": torch.cat([torch.zeros(1, 1, 6), table[:, prefix:]], 1)}
        patches = interpolate_embeddings(3 * other, 3, with_class)["encoder.pos_embedding"][:, 1:]
        expected = torch.cat([table[:, :prefix], patches], 1)
    else:
        expected = resample_abs_pos_embed(table, [other, other], num_prefix_tokens=prefix)
    torch.testing.assert_close(ours.pos_embed.detach(), expected)
    for name, tensor in tensors.items():
        assert name == "pos_embed" or torch.equal(ours.state_dict()[name], tensor), name


@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 5), DTYPES, SEEDS)
@settings(max_examples=100)
def test_tables_of_relative_positions(window, other, heads, dtype, seed):
    torch.manual_seed(seed)
    table = torch.randn((2 * window - 1) ** 2, heads).to(dtype)
    rows = (2 * other - 1) ** 2
    found = resize_bias_table(table, rows)
    expected = resize_rel_pos_bias_table_simple(table.float(), (other, other), (rows, heads)).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 7), st.integers(1, 7), SEEDS)
@settings(max_examples=20)
def test_relative_positions_of_loaded_weights(window, other, seed):
    def swin(size):
        embed = PatchEmbed(img_size=21, patch_size=3, in_channels=1, embed_dim=6, norm=True, any_size=True)
        sizes = {"embed_dim": 6, "depths": (2, 1), "num_heads": (1, 3)}
        return Swin(patch_embed=embed, **sizes, window_size=size, num_classes=4)

    theirs, ours = swin(window), swin(other)
    tensors = {name: tensor.clone() for name, tensor in randomised(theirs, seed).state_dict().items()}
    load_pretrained(ours, as_pretrained(tensors, align_corners=False))
    for name, tensor in ours.state_dict().items():
        expected = tensors[name]
        if name.endswith("relative_position_bias_table"):
            expected = resize_rel_pos_bias_table_simple(expected, (other, other), tuple(tensor.shape))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- the average
class Counted(nn.Module):
    """Parameters of several shapes, one of them frozen, and two buffers: all that can be averaged or copied."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.randn(()))
        self.layer.bias.requires_grad_(False)


@given(st.floats(0, 0.9999), st.integers(0, 2000), st.integers(1, 30), SEEDS)
def test_the_average_is_its_recursion(decay, first, steps, seed):
    """average = d average + (1 - d) weight, d = min(decay, (1 + step) / (10 + step)), in float64.

    Running statistics go the same way, other buffers are those of the model.
    """
    torch.manual_seed(seed)
    model = Counted()
    average = Ema(model, decay=decay)

    def averaged(module):
        statistics = {name: b.clone() for name, b in module.named_buffers() if "running_" in name}
        return {**{name: p.detach() for name, p in module.named_parameters()}, **statistics}

    expected = {name: tensor.double() for name, tensor in averaged(model).items()}
    assert len(expected) == len(dict(model.named_parameters())) + 2
    for step in range(first, first + steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter))
        model.norm(torch.randn(4, 5))
        average.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, tensor in averaged(model).items():
            expected[name] = d * expected[name] + (1 - d) * tensor.double()
    for name, tensor in averaged(average.module).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(average.module.layer.bias, model.layer.bias), "the frozen one moved"
    for name, buffer in average.module.named_buffers():
        assert name in expected or torch.equal(buffer, model.get_buffer(name)), name


# ----------------------------------------------------------------------------------- dropped at random
DRAWS = 4000


def near(found, expected, deviation):
    """Whether a mean over `DRAWS` lies within 5 standard errors: one of 1.7 million does not."""
    assert (found - expected).abs().max().item() <= 5 * deviation / DRAWS**0.5 + 1e-5


@pytest.mark.parametrize("rate", [0.03, 0.37, 0.9])
def test_drop_path_keeps_the_mean_and_drops_whole_samples(rate):
    """Also in bf16, where 1 / keep has three digits: the share that is kept has all of them."""
    torch.manual_seed(1)
    drop = DropPath(rate).train()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        out = drop(torch.ones(DRAWS, 3, 1, dtype=dtype)).float()
        assert (out == out[:, :1]).all()
        kept = out[:, 0, 0] != 0
        near(kept.float().mean(), torch.tensor(1 - rate), (rate * (1 - rate)) ** 0.5)
        torch.testing.assert_close(
            out[kept], torch.full_like(out[kept], 1 / (1 - rate)), rtol=tolerance, atol=0
        )


@pytest.mark.parametrize("rate", [0.1, 0.45])
@pytest.mark.parametrize("kind", ["attention", "window", "window of 2 x 2"])
def test_dropped_attention_weights_keep_the_mean(kind, rate):
    """The answer is linear in the weights: its mean over many draws is the answer without dropout."""
    torch.manual_seed(2)
    if kind == "attention":
        module, x = Attention(6, num_heads=3, attn_drop=rate, proj_drop=rate), torch.randn(1, 5, 6)
    else:
        window = 2 if "2 x 2" in kind else 5
        module = WindowAttention(
            6, num_heads=3, window_size=window, shifted=True, attn_drop=rate, proj_drop=rate
        )
        x = torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        drawn = module.train()(x.expand(DRAWS, *x.shape[1:]))
        expected = module.eval()(x)
    near(drawn.mean(0), expected[0], drawn.std(0).max().item())
    assert drawn.std(0).min() > 0.01, "nothing was dropped"


def test_a_block_that_drops_keeps_the_mean_of_each_branch():
    """Drop path scales the branch, not the sum: where both are kept, each counts 1 / keep."""
    torch.manual_seed(3)
    block = Block(6, Attention(6, num_heads=2), mlp_ratio=2.0, drop_path=0.25).train()
    x = torch.randn(64, 5, 6)
    with torch.no_grad():
        out = block(x)
        plain = copy.deepcopy(block).eval()
        options = []
        for attn in (0, 1 / 0.75):
            y = x + attn * plain.attn(plain.norm1(x))
            options += [y + mlp * plain.mlp(plain.norm2(y)) for mlp in (0, 1 / 0.75)]
    near_one = torch.stack([(out - option).abs().amax((1, 2)) for option in options]) < 1e-5
    assert near_one.sum(0).tolist() == [1] * 64
    assert near_one.any(1).all(), "one of the four never came"
