"""Initial weights against what init.py says they follow, and the first loss of fine-tuning against ln K."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch
from conftest import with_trained_head
from scipy.stats import multivariate_normal
from torch import nn

from vit_train.layers import Attention, Mlp, PatchEmbed, TrunkEmbed, WindowAttention, init_local
from vit_train.layers.window import Span
from vit_train.models import DeiT, HybridEmbed, Swin, ViT
from vit_train.models.swin import PatchMerging
from vit_train.training.objective import CrossEntropy
from vit_train.weights import load_pretrained


def patches(**settings):
    return PatchEmbed(img_size=32, patch_size=4, in_channels=3, embed_dim=48, **settings)


def hybrid_trunk():
    return HybridEmbed(img_size=32, backbone="resnet18", layer="layer2", in_channels=3, embed_dim=48)


SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 4}
FAMILIES = {
    "vit": lambda k: ViT(patch_embed=patches(), num_classes=k, **SIZES),
    "vit_mlp_head": lambda k: ViT(patch_embed=patches(), num_classes=k, head="mlp", **SIZES),
    "vit_mean": lambda k: ViT(
        patch_embed=TrunkEmbed(img_size=32, in_channels=3, widths=(24, 48)), num_classes=k,
        pool="mean", norm_first=False, rel_pos=True, **SIZES,
    ),
    "deit": lambda k: DeiT(patch_embed=patches(), num_classes=k, **SIZES),
    "hybrid": lambda k: ViT(patch_embed=hybrid_trunk(), num_classes=k, **SIZES),
    "swin": lambda k: Swin(
        patch_embed=patches(norm=True, any_size=True), embed_dim=48, depths=(2, 2), num_heads=(3, 6),
        window_size=4, num_classes=k,
    ),
    "swin_local": lambda k: Swin(
        patch_embed=patches(norm=True, any_size=True), embed_dim=48, depths=(2, 2), num_heads=(3, 8),
        window_size=5, local_start=True, num_classes=k,
    ),
}  # fmt: skip


def first_loss(model, num_classes):
    names = [str(i) for i in range(num_classes)]
    objective = CrossEntropy(names, [1] * num_classes, label_smoothing=0.1)
    targets = torch.arange(7) * 31 % num_classes
    return objective(model.train(), torch.randn(7, 3, 32, 32), targets)[0].item()


@pytest.mark.parametrize("num_classes", [5, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_loss_from_scratch_is_near_ln_k(family, num_classes):
    """Not ln K itself: heads of some size learn faster, see docs/RESULTS.md. `pytest -rP` shows the figures."""
    torch.manual_seed(0)
    loss = first_loss(FAMILIES[family](num_classes), num_classes)
    print(f"{family}, {num_classes} classes: {loss:.2f}, ln K is {math.log(num_classes):.2f}")
    assert loss == pytest.approx(math.log(num_classes), abs=2)


@pytest.mark.parametrize("num_classes", [5, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_loss_of_fine_tuning_is_ln_k(family, num_classes, tmp_path):
    """Pretrained weights for 10 classes, far from their start, under a new head."""
    torch.manual_seed(0)
    torch.save(with_trained_head(FAMILIES[family](10)).state_dict(), tmp_path / "w.pth")
    model = FAMILIES[family](num_classes)
    load_pretrained(model, str(tmp_path / "w.pth"))
    assert first_loss(model, num_classes) == pytest.approx(math.log(num_classes), rel=0.01)


def xavier(fan_in, fan_out):
    """Deviation of Glorot and Bengio 2010, equation 16: uniform within sqrt(6 / (fan_in + fan_out))."""
    return math.sqrt(6 / (fan_in + fan_out)) / math.sqrt(3)


@pytest.mark.parametrize("width", [48, 96, 192])
def test_deviations_of_attention_and_mlp(width):
    """Query, key and value are three matrices from `width` to `width`, as in flax's MultiHeadDotProductAttention."""
    torch.manual_seed(width)
    for module in (Attention(width, num_heads=3), WindowAttention(width, num_heads=3, window_size=4)):
        for matrix in module.qkv.weight.chunk(3):
            assert matrix.std().item() == pytest.approx(xavier(width, width), rel=0.03)
            assert matrix.abs().max() <= math.sqrt(6 / (2 * width))
        assert module.proj.weight.std().item() == pytest.approx(xavier(width, width), rel=0.03)
    mlp = Mlp(width, hidden_dim=5 * width)
    for linear in (mlp.fc1, mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(xavier(width, 5 * width), rel=0.03)
    merging = PatchMerging(width)
    assert merging.reduction.weight.std().item() == pytest.approx(xavier(4 * width, 2 * width), rel=0.03)


def bumps(rows, num_heads):
    """A normal density around one place for each head, 3 at its top, over all offsets: (rows, num_heads)."""
    reach = (math.isqrt(rows) - 1) // 2
    offsets = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), axis=-1)
    heads = []
    for head in range(num_heads):
        place = cmath.rect(2 if num_heads > 6 and head % 2 else 1, 2 * math.pi * head / num_heads)
        density = multivariate_normal((place.imag, place.real)).pdf(offsets)
        heads.append(3 * 2 * math.pi * density.reshape(rows))
    return torch.tensor(np.stack(heads, axis=1))


@pytest.mark.parametrize("num_heads", [1, 3, 7])
def test_each_head_begins_by_attending_to_a_place_beside_the_token(num_heads):
    """Before anything is learned (no scores): where softmax puts most, from a token in the middle."""
    torch.manual_seed(0)
    attention = WindowAttention(21 * num_heads, num_heads=num_heads, window_size=9)
    init_local(attention)
    weights = attention.bias(Span(9, 9), Span(7, 7)).softmax(dim=-1)[:, 4 * 7 + 3].view(num_heads, 9, 7)
    tops = {divmod(int(each.argmax()), 7) for each in weights}
    assert len(tops) == num_heads
    assert (4, 3) not in tops
    assert all(abs(row - 4) <= 2 and abs(column - 3) <= 2 for row, column in tops)
    corners = weights[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # far away nothing is preferred, nothing shut out
    assert ((corners > 0.4 / 63) & (corners < 1 / 63)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_starts_as_stated(family):
    torch.manual_seed(0)
    model = FAMILIES[family](37)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if "backbone" in name or ("trunk" in name and parameter.ndim == 4):
            continue  # torchvision's own; tests/models/test_resnet.py
        if kind == "bias":
            assert not parameter.any(), name
        elif owner in linears:
            rows = parameter.shape[0] // 3 if owner.endswith("qkv") else parameter.shape[0]
            assert parameter.std().item() == pytest.approx(xavier(parameter.shape[1], rows), rel=0.08), name
        elif owner == "patch_embed.proj":  # LeCun normal, truncated at two deviations
            fan_in = parameter[0].numel()
            assert parameter.std().item() == pytest.approx(math.sqrt(1 / fan_in), rel=0.15), name
        elif kind == "relative_position_bias_table" and family == "swin_local":
            assert (parameter - bumps(*parameter.shape)).std().item() == pytest.approx(0.02, rel=0.3), name
        elif kind.endswith("_token") or kind == "relative_position_bias_table":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
        else:
            assert kind == "pos_embed" or ("norm" in owner and (parameter == 1).all()), name
