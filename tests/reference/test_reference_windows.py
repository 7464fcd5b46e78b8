"""Swin against torchvision's and timm's, at sizes whose maps are smaller than a window or do not divide into windows."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import swin_t
from torchvision.models.swin_transformer import ShiftedWindowAttention

from vit_train.layers import PatchEmbed, WindowAttention
from vit_train.models import Swin
from vit_train.weights import load_pretrained


def ours(
    img_size, *, mask_padding, window_size=7, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)
):
    patch_embed = PatchEmbed(
        img_size=img_size, patch_size=4, in_channels=3, embed_dim=embed_dim, norm=True, any_size=True
    )
    return Swin(
        patch_embed=patch_embed, embed_dim=embed_dim, depths=depths, num_heads=num_heads,
        window_size=window_size, mask_padding=mask_padding, num_classes=1000,
    ).eval()  # fmt: skip


@functools.cache
def swin_t_pair(folder):
    """torchvision's swin_t with weights far enough from zero that a wrong window shows, and ours with the same."""
    torch.manual_seed(0)
    theirs = swin_t().eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    torch.save(theirs.state_dict(), folder / "swin_t.pth")
    model = ours(224, mask_padding=False)
    load_pretrained(model, str(folder / "swin_t.pth"))
    return theirs, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("side", [64, 96, 128, 160, 192, 224, 256, 320])
def test_swin_t_equals_torchvision(side, folder):
    theirs, model = swin_t_pair(folder)
    images = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


@settings(max_examples=10)
@given(height=st.integers(9, 37), width=st.integers(9, 37))
def test_swin_t_equals_torchvision_on_oblong_images(height, width, folder):
    theirs, model = swin_t_pair(folder)
    images = torch.randn(1, 3, 4 * height, 4 * width)  # whole patches: torchvision cuts what is left over
    with torch.inference_mode():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


# timm shrinks a window to a map that is smaller, and pads maps that windows do not divide in a way of its own:
# these sizes have maps that are whole windows or smaller than one.
@pytest.mark.parametrize(
    ("window_size", "side"), [(4, 32), (4, 64), (4, 128), (5, 40), (5, 80), (7, 28), (7, 56), (7, 112)]
)
def test_equals_timm(window_size, side, tmp_path):
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4)}
    theirs = timm.models.swin_transformer.SwinTransformer(
        img_size=side, patch_size=4, window_size=window_size, num_classes=1000, **sizes
    ).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    state = {name.replace("head.fc", "head"): tensor for name, tensor in theirs.state_dict().items()}
    model = ours(side, mask_padding=True, window_size=window_size, **sizes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias_table") and state[name].shape != parameter.shape:
            # timm's table for the smaller window is the middle of the whole one
            own, whole = (round(len(t) ** 0.5) for t in (state[name], parameter))
            edge = (whole - own) // 2
            table = torch.full((whole, whole, parameter.shape[1]), 7.0)
            table[edge : edge + own, edge : edge + own] = state[name].view(own, own, -1)
            state[name] = table.view(whole**2, -1)
    model.load_state_dict(state)
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


@given(
    rows=st.integers(1, 17),
    cols=st.integers(1, 17),
    window=st.integers(1, 8),
    shifted=st.booleans(),
)
def test_one_window_attention_equals_torchvision(rows, cols, window, shifted):
    torch.manual_seed(rows * 17 + cols)
    theirs = ShiftedWindowAttention(12, [window] * 2, [window // 2 if shifted else 0] * 2, num_heads=3)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    module = WindowAttention(12, num_heads=3, window_size=window, shifted=shifted, mask_padding=False)
    state = theirs.state_dict()
    state.pop("relative_position_index")
    module.load_state_dict(state)
    x = torch.randn(2, rows, cols, 12)
    torch.testing.assert_close(module(x), theirs(x), rtol=1e-4, atol=1e-5)
