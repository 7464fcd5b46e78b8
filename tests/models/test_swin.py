import copy
import re

import pytest
import torch
from conftest import with_trained_head
from torch import nn
from torchvision.models import SwinTransformer

from vit_train.layers import PatchEmbed
from vit_train.models import Swin


def small(*, img_size=32, window_size=4, embed_dim=16, **overrides):
    torch.manual_seed(0)
    patch_embed = PatchEmbed(
        img_size=img_size, patch_size=2, in_channels=3, embed_dim=embed_dim, norm=True, any_size=True
    )
    sizes = {"depths": (2, 2), "num_heads": (2, 4), "mlp_ratio": 2.0, "num_classes": 5}
    return with_trained_head(
        Swin(patch_embed=patch_embed, embed_dim=embed_dim, window_size=window_size, **(sizes | overrides))
    )


@pytest.mark.parametrize("window_size", [4, 7])
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_finite_gradient(window_size, mask_padding, autocast):
    model = small(window_size=window_size, mask_padding=mask_padding, drop_path_rate=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, model.num_classes)
    logits.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (23, 23), (32, 32), (33, 20), (57, 57)])
def test_any_image_size(size, mask_padding):
    model = small(window_size=7, mask_padding=mask_padding, depths=(2, 2, 2), num_heads=(2, 2, 2))
    logits = model(torch.randn(2, 3, *size))
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.raises(ValueError, match="1x32 are smaller than one patch of 2"):
        model(torch.zeros(1, 3, 1, 32))


def from_torchvision(state):
    """torchvision's names -> ours. Its `features` alternate stages and mergings, which we keep together."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("relative_position_index"):
            continue
        name = name.replace("features.0.0", "patch_embed.proj").replace("features.0.2", "patch_embed.norm")
        if match := re.match(r"features\.(\d+)\.(.*)", name):
            position, rest = int(match[1]), match[2]
            if position % 2:
                name = f"layers.{position // 2}.blocks.{rest}"
            else:
                name = f"layers.{position // 2}.downsample.{rest}"
        renamed[name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")] = tensor
    return renamed


def torchvision_pair(window_size, mask_padding, std):
    torch.manual_seed(0)
    reference = SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2, 2], num_heads=[2, 2, 4], window_size=[window_size] * 2,
        mlp_ratio=2.0, num_classes=5,
    )  # fmt: skip
    for module in reference.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=std)
    for name, parameter in reference.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    ours = small(window_size=window_size, mask_padding=mask_padding, depths=(2, 2, 2), num_heads=(2, 2, 4))
    ours.load_state_dict(from_torchvision(reference.state_dict()), strict=True)
    return ours.eval(), reference.eval()


@pytest.mark.parametrize("mask_padding", [False, True])
def test_equals_torchvision_where_windows_fit(mask_padding):
    ours, reference = torchvision_pair(4, mask_padding, std=0.2)
    images = torch.randn(2, 3, 32, 32)  # maps of 16, 8 and 4
    torch.testing.assert_close(ours(images), reference(images), rtol=1e-5, atol=1e-5)


def test_equals_torchvision_with_padding_only_if_it_is_not_masked():
    images = torch.randn(2, 3, 40, 40)  # maps of 20, 10 and 5, in windows of 4
    ours, reference = torchvision_pair(4, False, std=0.2)
    torch.testing.assert_close(ours(images), reference(images), rtol=1e-5, atol=1e-5)
    ours, reference = torchvision_pair(4, True, std=0.2)
    assert not torch.allclose(ours(images), reference(images), rtol=1e-3)


def test_equals_torchvision_swin_t_at_224():
    from torchvision.models import swin_t

    torch.manual_seed(0)
    reference = swin_t().eval()
    patch_embed = PatchEmbed(
        img_size=224, patch_size=4, in_channels=3, embed_dim=96, norm=True, any_size=True
    )
    with torch.device("meta"):
        ours = Swin(
            patch_embed=patch_embed,
            embed_dim=96,
            depths=(2, 2, 6, 2),
            num_heads=(3, 6, 12, 24),
            window_size=7,
            num_classes=1000,
        ).eval()
    ours.load_state_dict(from_torchvision(reference.state_dict()), strict=True, assign=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), reference(images), rtol=1e-5, atol=1e-5)


def test_evaluation_is_deterministic_and_survives_copies():
    model = small(window_size=7, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    logits = model(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(logits, copy.deepcopy(model)(images))
    other = small(window_size=7).eval()
    nn.init.normal_(other.head.weight)
    assert not torch.equal(logits, other(images))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits, other(images))
    assert not list(model.buffers())


def test_meta_device():
    with torch.device("meta"):
        model = small(window_size=7)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 5)


def test_no_weight_decay_names_the_bias_tables():
    model = small()
    names = model.no_weight_decay()
    assert len(names) == 4
    assert names <= dict(model.named_parameters()).keys()
    assert "layers.1.blocks.0.attn.relative_position_bias_table" in names


def test_every_second_block_shifts_and_drop_path_grows():
    model = small(depths=(2, 3), drop_path_rate=0.4)
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [block.attn.shifted for block in blocks] == [False, True, False, True, False]
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_errors_name_both_numbers():
    with pytest.raises(ValueError, match="depths names 3 stages, but num_heads 2"):
        small(depths=(2, 2, 2))
    with pytest.raises(ValueError, match="num_heads 3 does not divide embed_dim 16; use one of 1, 2, 4"):
        small(num_heads=(3, 3))
    patch_embed = PatchEmbed(img_size=32, patch_size=2, in_channels=3, embed_dim=8)
    with pytest.raises(ValueError, match=r"embed_dim 16 differs from patch_embed\.embed_dim 8"):
        Swin(patch_embed=patch_embed, embed_dim=16, depths=(1,), num_heads=(1,), window_size=4, num_classes=5)


def test_a_zero_start_leaves_the_map_to_the_merging():
    model = small(zero_start=True).eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.patch_embed(images)
    for stage in model.layers:
        x = stage.downsample(x)
    assert torch.equal(model.forward_features(images), model.norm(x))
    assert not torch.equal(small().eval().forward_features(images), model.norm(x))
