"""Exported files: other software loads them and gives the model's own answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import with_trained_head
from safetensors import safe_open
from torch import nn

from vit_train.errors import ConfigError, SaveError
from vit_train.inference import export
from vit_train.inference.export import (
    BATCH_SIZES,
    MAX_DIFFERENCE,
    describe,
    largest_difference,
    load_file,
    make_file,
)
from vit_train.inference.trained import Trained
from vit_train.layers import PatchEmbed
from vit_train.models import DeiT, HybridEmbed, ResNet, Swin, ViT
from vit_train.weights import read_pretrained

NAMES = ["bird", "caf\u00e9 \ud800", "dog\n"]  # half a surrogate pair, as a file name may hold
PATCH = {"_target_": "vit_train.layers.PatchEmbed", "pretrained": True}


def patches(img_size, **settings):
    return PatchEmbed(img_size=img_size, patch_size=4, in_channels=3, embed_dim=32, **settings)


def swin(mask_padding, depths=(2,)):
    """A map of 9 x 9 tokens in windows of 4: padded, and shifted in the second block."""
    model = Swin(
        patch_embed=patches(36, norm=True, any_size=True),
        embed_dim=32,
        depths=depths,
        num_heads=(2, 4)[: len(depths)],
        window_size=4,
        mask_padding=mask_padding,
        num_classes=3,
    )
    return with_trained_head(model)


def vit(patch_embed, kind=ViT, **settings):
    return with_trained_head(
        kind(patch_embed=patch_embed, embed_dim=32, depth=1, num_heads=2, num_classes=3, **settings)
    )


def hybrid():
    trunk = HybridEmbed(
        img_size=36, backbone="resnet18", layer="layer2", in_channels=3, embed_dim=32, patch_size=5
    )
    return vit(trunk)


MODELS = {
    "vit": lambda: vit(patches(36)),
    "deit": lambda: vit(patches(36), DeiT),
    "swin": lambda: swin(True, (2, 1)),  # and the odd map halved
    "swin_published": lambda: swin(False),
    "hybrid": hybrid,
    "resnet": lambda: ResNet(in_channels=3, widths=(8, 16), num_classes=3),
}


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    """A model whose every weight is away from its start, so that no part of it is idle."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return as_trained(model, {"_target_": "vit_train.models.X", "patch_embed": PATCH})


def as_trained(model, node, img_size=36):
    return Trained(
        model=model,
        class_names=NAMES,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.1),
        img_size=img_size,
        in_channels=3,
        resize="crop",
        background=(255, 255, 255),
        value_range=None,
        config={"model": node},
        path=Path("step_00000007"),
        weights="ema",
        step=7,
    )


def made(trained, file_format, **settings):
    about = describe(trained, file_format, **settings)
    images = torch.zeros(2, 3, trained.img_size, trained.img_size)
    return make_file(trained.model, file_format, images=images, about=about, **settings)


def assert_describes(text, trained, file_format):
    about = json.loads(text)
    assert about["format"] == file_format
    assert about["class_names"] == NAMES
    assert (about["mean"], about["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    assert (about["img_size"], about["in_channels"], about["resize"]) == (36, 3, "crop")
    assert (about["weights"], about["step"]) == ("ema", 7)
    assert about["model"]["_target_"] == "vit_train.models.X"
    assert about["model"]["patch_embed"]["pretrained"] is False, "whoever builds it would download"
    assert "float32 (B, 3, 36, 36)" in about["input"]


def logits(trained, size):
    images = torch.randn(size, 3, 36, 36, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        return images, trained.model(images)


# ----------------------------------------------------------------------------------------------------- graphs
def test_onnx(trained, tmp_path, capfd):
    content = made(trained, "onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    assert_describes({p.key: p.value for p in loaded.metadata_props}["vit_train"], trained, "onnx")
    session = onnxruntime.InferenceSession(path)
    for size in (1, 2, 5):
        images, expected = logits(trained, size)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        assert (torch.from_numpy(got) - expected).abs().max() < 1e-4
    difference = export.verify(content, "onnx", trained.model, image_shape=(3, 36, 36))
    assert 0 < difference < MAX_DIFFERENCE["onnx"]
    assert str(Path(export.__file__).parents[2]).encode() not in content, "it names this machine's folders"
    assert capfd.readouterr() == ("", "")


def test_pt2(trained, tmp_path):
    content = made(trained, "pt2")
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    extra = {"vit_train.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    assert_describes(extra["vit_train.json"], trained, "pt2")
    for size in (1, 2, 5):
        images, expected = logits(trained, size)
        assert (module(images) - expected).abs().max() < 1e-5
    assert export.verify(content, "pt2", trained.model, image_shape=(3, 36, 36)) < MAX_DIFFERENCE["pt2"]
    assert str(Path(export.__file__).parents[2]).encode() not in content, "it names this machine's folders"


# ---------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("file_format", ["safetensors", "pth"])
def test_weights_come_back_exactly(trained, tmp_path, file_format):
    """Through the file's own library, through `verify`, and through `init_from`."""
    content = made(trained, file_format)
    path = tmp_path / f"model.{file_format}"
    path.write_bytes(content)
    if file_format == "pth":
        about = torch.load(path, weights_only=True)["vit_train"]
    else:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()["vit_train"]
    assert_describes(about, trained, file_format)
    assert export.verify(content, file_format, trained.model, image_shape=(3, 36, 36)) == 0
    read = read_pretrained(str(path))
    own = trained.model.state_dict()
    assert read.tensors.keys() == own.keys()
    assert all(torch.equal(read.tensors[name], own[name]) for name in own)
    assert (read.class_names, read.mean) == (NAMES, (0.5, 0.4, 0.3))


@pytest.mark.parametrize("masked", [True, False])
def test_a_swin_keeps_how_it_was_trained(tmp_path, masked):
    node = {"_target_": "vit_train.models.Swin", "mask_padding": masked}
    path = tmp_path / "swin.safetensors"
    path.write_bytes(made(as_trained(swin(masked).eval(), node), "safetensors"))
    assert read_pretrained(str(path)).mask_padding is masked


@pytest.mark.parametrize("file_format", ["safetensors", "pth"])
@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
def test_timm_loads_the_weights_strictly(tmp_path, family, file_format):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_classes": 3}
    if family == "swin":
        ours = Swin(
            patch_embed=patches(32, norm=True, any_size=True),
            embed_dim=32,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            mask_padding=False,
            num_classes=3,
        )
        with_trained_head(ours)
        name = "swin_tiny_patch4_window7_224"
        sizes |= {"depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    else:
        ours = vit(patches(32), DeiT if family == "deit" else ViT)
        name = "vit_tiny_patch16_224" if family == "vit" else "deit_tiny_distilled_patch16_224"
        sizes |= {"depth": 1, "num_heads": 2}
    path = tmp_path / f"model.{file_format}"
    path.write_bytes(made(as_trained(ours.eval(), {"_target_": "x"}, img_size=32), file_format))
    theirs = timm.create_model(name, checkpoint_path=str(path), **sizes).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert (theirs(images) - ours(images)).abs().max() < 1e-5


def test_names_of_another_project(tmp_path):
    model = vit(patches(36))
    about = describe(as_trained(model, {"_target_": "x"}), "pth", layout="torchvision")
    content = make_file(model, "pth", images=torch.zeros(2, 3, 36, 36), about=about, layout="torchvision")
    assert about["names"] == "torchvision"
    assert "encoder.pos_embedding" in torch.load(io.BytesIO(content), weights_only=True)["state_dict"]
    assert export.verify(content, "pth", model.eval(), image_shape=(3, 36, 36)) == 0
    with pytest.raises(ConfigError, match="timm's names"):
        make_file(model, "pth", images=torch.zeros(2, 3, 36, 36), about=about, layout="swin")


# --------------------------------------------------------------------------------------------------- refusals
def test_a_file_of_another_model_is_refused():
    """The smallest difference that matters: one weight, in every format."""
    torch.manual_seed(0)
    model = vit(patches(36)).eval()
    trained = as_trained(model, {"_target_": "x"})
    contents = {file_format: made(trained, file_format) for file_format in ("pt2", "safetensors", "pth")}
    with torch.no_grad():
        model.head.bias[1] += 1e-4
    for file_format, content in contents.items():
        with pytest.raises(SaveError, match=r"differ from the model's by 1\.0e-04, more than"):
            export.verify(content, file_format, model, image_shape=(3, 36, 36))


def test_what_is_not_a_number_is_refused():
    model = vit(patches(36)).eval()
    trained = as_trained(model, {"_target_": "x"})
    with torch.no_grad():
        model.head.bias[1] = float("nan")
    with pytest.raises(SaveError, match="by nan"):
        export.verify(made(trained, "pth"), "pth", model, image_shape=(3, 36, 36))


def test_a_damaged_file_is_refused():
    model = vit(patches(36)).eval()
    for file_format in ("onnx", "pt2", "safetensors", "pth"):
        with pytest.raises(SaveError, match=f"the {file_format} file cannot be loaded again"):
            export.verify(b"x" * 100, file_format, model, image_shape=(3, 36, 36))


def test_a_graph_that_knows_one_batch_size_only_is_refused():
    model = vit(patches(36)).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, 36, 36),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with pytest.raises(SaveError, match="cannot be loaded again"):
        export.verify(buffer.getvalue(), "pt2", model, image_shape=(3, 36, 36))


def test_answers_of_another_shape_are_refused():
    model = vit(patches(36)).eval()
    with pytest.raises(ValueError, match=r"answers 1 images with \(1, 2\), the model with \(1, 3\)"):
        largest_difference(lambda images: model(images)[:, :2], model, image_shape=(3, 36, 36))


def test_weights_are_compared_with_a_copy_that_forgot_its_own():
    """A file without a tensor must not pass because the copy still had it."""
    model = vit(patches(36)).eval()
    forward = load_file(made(as_trained(model, {"_target_": "x"}), "pth"), "pth", model)
    assert forward is not model
    assert BATCH_SIZES == (1, 3, 17)
    saved = io.BytesIO()
    torch.save({"state_dict": {k: v for k, v in model.state_dict().items() if k != "head.bias"}}, saved)
    with pytest.raises(SaveError, match="cannot be loaded again"):
        export.verify(saved.getvalue(), "pth", model, image_shape=(3, 36, 36))


class Depends(nn.Module):
    """Torch cannot make a graph of it."""

    def forward(self, images):
        return images.flatten(1)[:, :3] if images.sum().item() > 0 else images.flatten(1)[:, 3:6]


@pytest.mark.parametrize("file_format", ["onnx", "pt2"])
def test_a_model_without_a_graph_is_one_line(file_format):
    with pytest.raises(SaveError, match=f"torch cannot export this model as {file_format}") as raised:
        make_file(Depends(), file_format, images=torch.zeros(2, 3, 8, 8), about={})
    assert "\n" not in str(raised.value)


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    export.check_possible("pt2", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"needs onnxscript: pip install 'vit-train\[export\]'"):
        export.check_possible("onnx", nn.Linear(2, 2))


def test_a_model_too_large_for_one_onnx_file_is_refused_before_the_work():
    with torch.device("meta"):
        large = nn.Linear(20_000, 30_000)
    with pytest.raises(ConfigError, match=r"2\.4 GB of weights, .* type --format pt2"):
        export.check_possible("onnx", large)
