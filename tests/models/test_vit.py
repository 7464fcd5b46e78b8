import copy
import functools

import pytest
import torch
from conftest import with_trained_head
from torchvision.models import VisionTransformer

from vit_train.layers import PatchEmbed, TrunkEmbed
from vit_train.models import DeiT, ViT


def trunk(*, img_size, in_channels, embed_dim, patch_size):
    assert patch_size == 4
    return TrunkEmbed(img_size=img_size, in_channels=in_channels, widths=(8, embed_dim))


def small(cls=ViT, *, img_size=16, patch_size=4, embed_dim=24, stem=PatchEmbed, **overrides):
    torch.manual_seed(0)
    patch_embed = stem(img_size=img_size, patch_size=patch_size, in_channels=3, embed_dim=embed_dim)
    sizes = {"embed_dim": embed_dim, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 5}
    return with_trained_head(cls(patch_embed=patch_embed, **(sizes | overrides)))


VARIANTS = {
    "cls": small,
    "mean": functools.partial(small, pool="mean"),
    "mlp_head": functools.partial(small, head="mlp"),
    "post_norm": functools.partial(small, norm_first=False),
    "trunk": functools.partial(small, stem=trunk, pool="mean"),
    "no_bias": functools.partial(small, qkv_bias=False),
    "regularised": functools.partial(small, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1),
    "rel_pos": functools.partial(small, rel_pos=True, pool="mean"),
    "deit": functools.partial(small, DeiT),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_finite_gradient(variant, autocast):
    model = VARIANTS[variant]()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = model(torch.randn(4, 3, 16, 16))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(out.shape == (4, 5) for out in outputs)
    sum(out.float().square().sum() for out in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_is_deterministic_and_survives_copies(variant):
    model = VARIANTS[variant]().eval()
    images = torch.randn(2, 3, 16, 16)
    logits = model(images)
    assert logits.shape == (2, model.num_classes)
    assert torch.equal(logits, model(images))
    assert torch.equal(logits, copy.deepcopy(model)(images))
    torch.manual_seed(1)
    other = VARIANTS[variant]().eval()
    torch.nn.init.normal_(next(other.parameters()))
    assert not torch.equal(logits, other(images))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits, other(images))


@pytest.mark.parametrize("variant", ["cls", "trunk", "deit"])
def test_a_zero_start_is_the_identity_that_learns(variant):
    model = VARIANTS[variant](zero_start=True).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = model.patch_embed(images).flatten(1, 2)
    tokens = torch.cat([*(token.expand(2, -1, -1) for token in model.prefix_tokens()), tokens], dim=1)
    assert torch.equal(model.forward_features(images), model.norm(tokens + model.pos_embed))
    model(images).square().sum().backward()
    assert all(block.attn.proj.weight.grad.abs().sum() > 0 for block in model.blocks)
    assert all(block.mlp.fc2.weight.grad.abs().sum() > 0 for block in model.blocks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_device(variant):
    with torch.device("meta"):
        model = VARIANTS[variant]().eval()
        assert model(torch.empty(2, 3, 16, 16)).shape == (2, 5)
    assert all(p.is_meta for p in model.parameters())


def from_torchvision(state):
    """torchvision's names -> ours."""
    replacements = {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln.": "norm.",
        "heads.head": "head",
        "encoder.layers.encoder_layer_": "blocks.",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        "mlp.linear_1": "mlp.fc1",
        "mlp.linear_2": "mlp.fc2",
    }
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in replacements.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def test_equals_torchvision():
    torch.manual_seed(0)
    reference = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=7
    )
    # torchvision's head, biases and class token start as zeros, which would hide mistakes.
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    model = small(img_size=32, patch_size=8, embed_dim=32, num_classes=7)
    model.load_state_dict(from_torchvision(reference.state_dict()), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), reference.eval()(images), rtol=1e-5, atol=1e-5)


def test_features_and_tokens():
    images = torch.randn(2, 3, 16, 16)
    for variant, prefix in (("cls", 1), ("mean", 0), ("deit", 2)):
        model = VARIANTS[variant]().eval()
        features = model.forward_features(images)
        assert features.shape == (2, prefix + 16, 24)
        assert model.pos_embed.shape == (1, prefix + 16, 24)
        assert torch.equal(model.forward_head(features), model(images))
    # With its initial weight and bias the final norm leaves mean 0.
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 18), rtol=0, atol=1e-5)


def test_no_weight_decay_names_exist():
    assert small().no_weight_decay() == {"cls_token", "pos_embed"}
    assert small(pool="mean").no_weight_decay() == {"pos_embed"}
    assert small(DeiT).no_weight_decay() == {"cls_token", "pos_embed", "dist_token"}
    for variant in VARIANTS.values():
        model = variant()
        assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_drop_path_grows_with_depth():
    rates = [block.drop_path.rate for block in small(drop_path_rate=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_tokens_start_with_the_variance_of_the_pixels():
    # LeCun: tokens keep the variance of the pixels.
    assert abs(small(embed_dim=128).patch_embed(torch.randn(8, 3, 16, 16)).std().item() - 1) < 0.1


def test_positions_start_as_waves_of_row_and_column():
    positions = small(embed_dim=128, pool="mean").pos_embed[0].reshape(4, 4, 128)
    column, row = positions[..., :32], positions[..., 32:64]  # the sines
    assert torch.equal(column[0], column[3])
    assert torch.equal(row[:, 0], row[:, 3])
    torch.testing.assert_close(column[0, :, 0], torch.arange(4.0).sin())
    # all different, and near ones more alike than far ones
    likeness = positions.flatten(0, 1) @ positions[0, 0]
    assert likeness.argmax() == 0
    assert likeness[1] > likeness[2] > likeness[3]
    prefix = small(DeiT, embed_dim=128).pos_embed[0, :2]
    assert not prefix.any()


def test_export_has_one_graph():
    model = small(pool="mean").eval()
    exported = torch.export.export(
        model, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}}
    )
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(exported.module()(images), model(images))


def test_errors_name_both_numbers():
    with pytest.raises(
        ValueError, match="num_heads 5 does not divide embed_dim 24; use one of 1, 2, 3, 4, 6"
    ):
        small(num_heads=5)
    patch_embed = PatchEmbed(img_size=16, patch_size=4, in_channels=3, embed_dim=32)
    with pytest.raises(ValueError, match=r"embed_dim 24 differs from patch_embed\.embed_dim 32"):
        ViT(patch_embed=patch_embed, embed_dim=24, depth=1, num_heads=4, num_classes=5)
    with pytest.raises(ValueError, match=r"20x20.*img_size 16"):
        small()(torch.zeros(1, 3, 20, 20))
