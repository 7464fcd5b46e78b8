"""Pretrained weights: other projects' names and resizes, files of every kind, every tensor accounted for."""

from __future__ import annotations

import argparse
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import with_trained_head
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer import checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer import checkpoint_filter_fn as timm_vit_filter
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from vit_train.errors import CheckpointError, ConfigError
from vit_train.layers import PatchEmbed
from vit_train.models import DeiT, Swin, ViT
from vit_train.weights import differs_in_timm, load_pretrained, read_pretrained, state_dict_named


def patches(*, img_size=32, patch_size=8, embed_dim=32, in_channels=3, **settings):
    return PatchEmbed(
        img_size=img_size, patch_size=patch_size, in_channels=in_channels, embed_dim=embed_dim, **settings
    )


def vit(*, img_size=32, num_classes=10, in_channels=3, kind=ViT, **settings):
    embed = patches(img_size=img_size, in_channels=in_channels)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, **settings}
    return with_trained_head(kind(patch_embed=embed, num_classes=num_classes, **sizes)).eval()


def swin(*, img_size=64, window_size=4, mask_padding=False):
    model = Swin(
        patch_embed=patches(img_size=img_size, patch_size=4, embed_dim=16, norm=True, any_size=True),
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=window_size,
        mask_padding=mask_padding,
        num_classes=10,
    )
    return with_trained_head(model).eval()


def torchvision_vit(image_size=32):
    return VisionTransformer(
        image_size=image_size,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=10,
    )


def torchvision_swin():
    return SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10
    )


def timm_vit(img_size=32, *, distilled=False):
    sizes = {
        "img_size": img_size,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2,
    }
    kind = timm.models.deit.VisionTransformerDistilled if distilled else TimmViT
    return kind(num_classes=10, **sizes)


def timm_swin():
    return TimmSwin(
        img_size=64,
        patch_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        num_classes=10,
    )


FAMILIES = {
    "torchvision vit": (torchvision_vit, vit, 32, "torchvision"),
    "torchvision swin": (torchvision_swin, swin, 64, "torchvision"),
    "timm vit": (timm_vit, vit, 32, "timm"),
    "timm deit distilled": (lambda: timm_vit(distilled=True), lambda: vit(kind=DeiT), 32, "timm"),
    "timm swin": (timm_swin, swin, 64, "timm"),
}


def randomised(model):
    """Every parameter different, so that no two can be mixed up unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def difference(a, b, size, channels=3):
    torch.manual_seed(1)
    images = torch.randn(3, channels, size, size)
    expected = b(images)
    return float((a(images) - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------------------ names and values
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_same_logits_from_their_file_and_their_names_back(family, suffix, tmp_path):
    make_theirs, make_ours, size, layout = FAMILIES[family]
    theirs, ours, file = randomised(make_theirs()), make_ours(), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": theirs.state_dict()}, file)
    else:
        save_file(theirs.state_dict(), file)
    report = load_pretrained(ours, str(file))
    assert difference(ours, theirs, size) <= 1e-5
    assert len(report.loaded) == len(ours.state_dict())
    assert not report.resized
    assert not report.made_anew
    assert not report.left_over
    back = state_dict_named(ours, layout)
    make_theirs().load_state_dict(back, strict=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_the_mlp_names_in_the_files_torchvision_downloads(tmp_path):
    theirs, ours = randomised(torchvision_vit()), vit()
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torchvision_vit().load_state_dict(dict(old), strict=True)  # torchvision itself still reads them
    torch.save(old, tmp_path / "old.pth")
    load_pretrained(ours, str(tmp_path / "old.pth"))
    assert difference(ours, theirs, 32) <= 1e-5


def test_official_swin_names_are_what_timm_converts(tmp_path):
    theirs = randomised(timm_swin())
    ours = swin()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    load_pretrained(ours, str(tmp_path / "timm.pth"))
    official = state_dict_named(ours, "swin")
    assert "layers.0.downsample.reduction.weight" in official
    assert official["layers.0.blocks.1.attn_mask"].shape == (16, 16, 16)
    assert torch.equal(official["layers.0.blocks.1.attn_mask"], theirs.layers[0].blocks[1].attn_mask)
    assert set(official["layers.0.blocks.1.attn_mask"].unique().tolist()) == {-100.0, 0.0}
    assert "layers.0.blocks.0.attn_mask" not in official
    converted = timm_swin()
    converted.load_state_dict(checkpoint_filter_fn({"model": official}, converted), strict=True)
    assert difference(converted.eval(), theirs, 64) == 0
    torch.save(
        {"model": official, "optimizer": {"state": {}}, "config": argparse.Namespace(a=1)}, tmp_path / "o.pth"
    )
    again = swin()
    assert "microsoft/Swin-Transformer" in load_pretrained(again, str(tmp_path / "o.pth")).source
    assert difference(again, ours.eval(), 64) == 0
    assert difference(again, theirs, 64) <= 1e-5
    # nothing is shifted where a window is one token
    assert not any(name.endswith("attn_mask") for name in state_dict_named(swin(window_size=1), "swin"))


def test_relative_position_indices_are_torchvisions_own():
    theirs = torchvision_swin().state_dict()
    ours = state_dict_named(swin(), "torchvision")
    indices = [name for name in theirs if name.endswith("relative_position_index")]
    assert len(indices) == 4
    assert all(torch.equal(theirs[name], ours[name]) for name in indices)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model."])
def test_prefixes_are_stripped(prefix, tmp_path):
    theirs, ours = randomised(timm_vit()), vit()
    state = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    load_pretrained(ours, str(tmp_path / "w.pth"))
    assert difference(ours, theirs, 32) <= 1e-5


def test_averaged_weights_come_first(tmp_path):
    raw, averaged = timm_vit().state_dict(), randomised(timm_vit())
    torch.save({"model": raw, "model_ema": averaged.state_dict()}, tmp_path / "w.pth")
    ours = vit()
    load_pretrained(ours, str(tmp_path / "w.pth"))
    assert difference(ours, averaged, 32) <= 1e-5


def test_half_precision_files(tmp_path):
    theirs, ours = randomised(timm_vit()).half(), vit()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    load_pretrained(ours, str(tmp_path / "w.pth"))
    assert ours.head.weight.dtype == torch.float32
    assert torch.equal(ours.head.weight, theirs.head.weight.float())


@pytest.mark.parametrize(
    ("model", "layout", "says"),
    [
        (vit(pool="mean"), "torchvision", "plain patches"),
        (vit(rel_pos=True), "torchvision", "absolute positions"),
        (vit(head="mlp"), "torchvision", "one linear head"),
        (vit(norm_first=False), "torchvision", "norms first"),
        (vit(qkv_bias=False), "torchvision", "bias"),
        (vit(kind=DeiT), "torchvision", "no such DeiT"),
        (vit(), "swin", "has no ViT"),
        (swin(img_size=72, mask_padding=True), "torchvision", "mask_padding"),
        (swin(img_size=72), "swin", "whole windows"),
    ],
)
def test_a_model_without_counterpart_is_refused(model, layout, says):
    with pytest.raises(ConfigError, match=says):
        state_dict_named(model, layout)


# --------------------------------------------------------------------------------------------------- resizing
def test_positions_for_larger_images_are_torchvisions(tmp_path):
    theirs, ours = randomised(torchvision_vit()), vit(img_size=96)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    larger = torchvision_vit(96)
    larger.load_state_dict(interpolate_embeddings(96, 8, dict(theirs.state_dict())))
    report = load_pretrained(ours, str(tmp_path / "w.pth"))
    assert report.resized == ["pos_embed: 1 x 17 x 32 -> 1 x 145 x 32"]
    assert difference(ours, larger.eval(), 96) <= 1e-5


@pytest.mark.parametrize("size", [96, 16])
@pytest.mark.parametrize("distilled", [False, True])
def test_positions_for_other_images_are_timms(size, distilled, tmp_path):
    theirs = randomised(timm_vit(distilled=distilled))
    ours = vit(img_size=size, kind=DeiT if distilled else ViT)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    larger = timm_vit(size, distilled=distilled)
    larger.load_state_dict(timm_vit_filter(theirs.state_dict(), larger))
    load_pretrained(ours, str(tmp_path / "w.pth"))
    assert difference(ours, larger.eval(), size) <= 1e-5


def test_a_table_of_relative_positions_for_another_window(tmp_path):
    """The rule of microsoft/Swin-Transformer's load_pretrained: bicubic, per head."""
    small, large = randomised(swin(window_size=4)), swin(window_size=8)
    torch.save(state_dict_named(small, "swin"), tmp_path / "w.pth")
    report = load_pretrained(large, str(tmp_path / "w.pth"))
    assert len(report.resized) == 4
    table = small.layers[0].blocks[1].attn.relative_position_bias_table
    image = table.detach().T.reshape(1, 2, 7, 7)
    expected = F.interpolate(image, size=(15, 15), mode="bicubic").reshape(2, 225).T
    torch.testing.assert_close(large.layers[0].blocks[1].attn.relative_position_bias_table.detach(), expected)


def test_grey_images_look_the_same_to_a_model_for_colour(tmp_path):
    colour, grey = randomised(timm_vit()), vit(in_channels=1)
    torch.save(colour.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(grey, str(tmp_path / "w.pth"))
    assert report.resized == ["patch_embed.proj.weight: 32 x 3 x 8 x 8 -> 32 x 1 x 8 x 8"]
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    again = vit()
    load_pretrained(again, str(tmp_path / "grey.pth"))
    with torch.no_grad():
        expected = grey(image)
        torch.testing.assert_close(again(image.expand(-1, 3, -1, -1)), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- everything accounted for
def test_another_number_of_classes_makes_the_head_anew(tmp_path):
    theirs, ours = randomised(timm_vit()), vit(num_classes=3)
    assert ours.head.weight.any()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    report = load_pretrained(ours, str(tmp_path / "w.pth"))
    assert report.made_anew == ["head.weight", "head.bias"]
    assert not ours.head.weight.any()
    assert torch.equal(ours.norm.weight, theirs.norm.weight)


def test_weights_without_a_head(tmp_path):
    state = {k: v for k, v in randomised(timm_vit()).state_dict().items() if not k.startswith("head")}
    torch.save(state, tmp_path / "w.pth")
    assert load_pretrained(vit(), str(tmp_path / "w.pth")).made_anew == ["head.weight", "head.bias"]


def test_as_many_classes_of_other_names_make_the_head_anew(tmp_path):
    about = {"class_names": [f"c{i}" for i in range(10)], "mean": [0.5] * 3, "std": [0.5] * 3, "model": {}}
    file = tmp_path / "w.safetensors"
    save_file(randomised(timm_vit()).state_dict(), file, {"vit_train": json.dumps(about)})
    assert read_pretrained(str(file)).mean == (0.5, 0.5, 0.5)
    same = load_pretrained(vit(), str(file), class_names=about["class_names"])
    assert same.made_anew == []
    other = load_pretrained(vit(), str(file), class_names=[f"d{i}" for i in range(10)])
    assert other.made_anew == ["head.weight", "head.bias"]


MISFITS = {
    "too deep": ({"depth": 3}, ["blocks.2.norm1.weight is missing"]),
    "too shallow": ({"depth": 1}, ["blocks.1.norm1.weight has no place"]),
    "another width": ({"mlp_ratio": 4.0}, ["blocks.0.mlp.fc1.weight is 64 x 32, the model needs 128 x 32"]),
    "no class token": ({"pool": "mean"}, ["pos_embed is 1 x 17 x 32", "model.pool=cls"]),
    "a distillation token": ({"kind": DeiT}, ["dist_token is missing", "the weights have no distillation"]),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_an_error_or_in_the_report(misfit, tmp_path):
    settings, says = MISFITS[misfit]
    torch.save(randomised(timm_vit()).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError) as caught:
        load_pretrained(vit(**settings), str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)
    assert "init_strict=false" in str(caught.value)
    for part in says:
        assert part in str(caught.value)
    report = load_pretrained(vit(**settings), str(tmp_path / "w.pth"), strict=False)
    assert report.made_anew or report.left_over
    assert str(report).startswith(f"from {tmp_path / 'w.pth'} (timm's names): ")


def test_weights_of_something_else_never_pass(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="none of its tensors"):
        load_pretrained(vit(), str(tmp_path / "w.pth"), strict=False)


def test_swin_v2_is_named(tmp_path):
    torch.save({"layers.0.blocks.0.attn.cpb_mlp.0.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="Swin V2"):
        read_pretrained(str(tmp_path / "w.pth"))


# ------------------------------------------------------------------------------------------- files of every kind
def test_a_pickled_model_is_refused_with_what_to_type(tmp_path, monkeypatch):
    torch.save(timm_vit(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as caught:
        read_pretrained(str(tmp_path / "model.pth"))
    line = str(caught.value)
    assert "\n" not in line
    assert "can run any code" in line
    # the remedy, as typed
    import shlex
    import subprocess
    import sys

    typed = shlex.split(line[line.index("python -c") :])
    subprocess.run([sys.executable, *typed[1:]], cwd=tmp_path, check=True)
    load_pretrained(vit(), str(tmp_path / "weights.pth"))


class Canary:
    """What a hostile file does to whoever unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_hostile_pickle_runs_nothing(place, tmp_path):
    state, canary = timm_vit().state_dict(), Canary(tmp_path / "canary")
    torch.save({"model": state, "x": canary} if place == "beside" else canary, tmp_path / "w.pth")
    (tmp_path / "canary").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="run any code"):
        read_pretrained(str(tmp_path / "w.pth"))
    assert not (tmp_path / "canary").exists()


BROKEN = {
    "missing.pth": (None, "no such file"),
    "empty.pth": (b"", "not a file that torch.save wrote"),
    "text.pth": (b"hello, world", "not a file that torch.save wrote"),
    f"{'n' * 300}.pth": (None, "File name too long"),
    "text.safetensors": (b"hello, world", "not a whole safetensors"),
    "empty.safetensors": (b"", "not a whole safetensors"),
    "weights.zip": (b"PK", "weights come from"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name, tmp_path):
    content, says = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=says) as caught:
        read_pretrained(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_file_cut_short_is_one_line(suffix, share, tmp_path):
    file = tmp_path / f"w{suffix}"
    state = timm_vit().state_dict()
    torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError) as caught:
        read_pretrained(str(file))
    assert "\n" not in str(caught.value)


def test_a_file_without_weights(tmp_path):
    torch.save({"epoch": 3, "loss": [1.0]}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_pretrained(str(tmp_path / "w.pth"))


def test_a_name_torchvision_does_not_have():
    with pytest.raises(ConfigError, match=r"did you mean 'vit_b_16'.*vit_h_14"):
        read_pretrained("torchvision:vit_b16")
    for name in ("resnet50", "swin_v2_t"):
        with pytest.raises(ConfigError, match="no such model"):
            read_pretrained(f"torchvision:{name}")


def quantized():
    return torch.quantize_per_tensor(torch.ones(10), 0.1, 0, torch.qint8)


HOSTILE = {
    "sparse": lambda: torch.ones(10).to_sparse(),
    "quantized": quantized,
    "on no device": lambda: torch.ones(10, device="meta"),
    "complex": lambda: torch.ones(10, dtype=torch.complex64),
    "not finite": lambda: torch.full((10,), float("nan")),
    "few numbers that claim to be many": lambda: torch.ones(1).expand(300_000, 300_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile_tensors_are_refused(kind, tmp_path):
    state = {**timm_vit().state_dict(), "head.bias": HOSTILE[kind]()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"head\.bias") as caught:
        load_pretrained(vit(), str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)


def test_safetensors_with_numbers_of_eight_bits_are_refused(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        state = {**timm_vit().state_dict(), "head.bias": torch.ones(10).to(dtype)}
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=r"head\.bias is not a plain tensor of real numbers"):
            load_pretrained(vit(), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("wrong", [torch.ones(1, 1, 32), torch.ones(10, dtype=torch.int64)])
def test_tensors_of_the_wrong_kind_do_not_fit(wrong, tmp_path):
    name = "pos_embed" if wrong.ndim == 3 else "head.bias"
    torch.save({**timm_vit().state_dict(), name: wrong}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=f"{name} is"):
        load_pretrained(vit(), str(tmp_path / "w.pth"))


def test_a_description_nested_without_end_is_one_line(tmp_path):
    save_file(timm_vit().state_dict(), tmp_path / "w.safetensors", {"vit_train": "[" * 100_000})
    with pytest.raises(CheckpointError, match="not JSON"):
        read_pretrained(str(tmp_path / "w.safetensors"))


def test_a_swin_that_timm_pads_otherwise_is_named():
    assert differs_in_timm(swin()) is None
    assert "3 x 3" not in (differs_in_timm(swin(img_size=72)) or "")
    assert "18 x 18 tokens to windows of 4" in differs_in_timm(swin(img_size=72, mask_padding=True))
    assert differs_in_timm(vit()) is None
