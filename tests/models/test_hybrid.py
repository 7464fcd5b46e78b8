import copy
import subprocess
import sys

import pytest
import torch
from conftest import with_trained_head

from vit_train.models import HybridEmbed, ViT


def embed(**overrides):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "backbone": "resnet18", "layer": "layer2", "in_channels": 3, "embed_dim": 24}
    return HybridEmbed(**(sizes | overrides))


@pytest.mark.parametrize(
    ("overrides", "grid"),
    [
        ({}, 4),
        ({"small_stem": True}, 16),
        ({"small_stem": True, "layer": "layer3", "patch_size": 2}, 4),
        ({"in_channels": 1}, 4),
        ({"in_channels": 5, "small_stem": True}, 16),
        ({"backbone": "vgg16", "layer": "features.9", "in_channels": 1}, 8),
    ],
)
def test_grid_of_the_announced_size(overrides, grid):
    module = embed(**overrides).eval()
    x = module(torch.randn(2, overrides.get("in_channels", 3), 32, 32))
    assert x.shape == (2, *module.grid_size, module.embed_dim) == (2, grid, grid, 24)
    assert x.is_contiguous()


def test_trunk_is_torchvisions_up_to_the_cut():
    from torchvision.models import resnet18

    module = embed().eval()
    reference = resnet18()
    result = reference.load_state_dict(module.backbone.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("layer3", "layer4", "fc")) for key in result.missing_keys)
    reference.eval()
    images = torch.randn(1, 3, 32, 32)
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
    x = module.proj(reference.layer2(reference.layer1(x))).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(images), x)


def test_hybrid_vit_trains_copies_and_reloads():
    def make():
        return with_trained_head(ViT(patch_embed=embed(), embed_dim=24, depth=2, num_heads=4, num_classes=5))

    model = make()
    images = torch.randn(4, 3, 32, 32)
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    model.eval()
    other = make().eval()
    assert not torch.equal(other(images), model(images))  # the batch norms have seen a batch
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images), model(images))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(images), model(images))
    assert not any(module.training for module in copied.modules())


def test_meta_device():
    with torch.device("meta"):
        module = embed().eval()
        assert module(torch.empty(2, 3, 32, 32)).shape == (2, 4, 4, 24)
    assert all(t.is_meta for t in module.state_dict().values())


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match=r"resnet18 has no layer 'layer9'.* layer1, layer2, layer3, layer4"):
        embed(layer="layer9")
    with pytest.raises(ValueError, match=r"vgg16 has no layer 'features\.31'.*features\.30"):
        embed(backbone="vgg16", layer="features.31")
    with pytest.raises(
        ValueError,
        match=r"patch_size 3 does not divide the map of resnet18 layer2 at img_size 32: 4; use one of 1, 2",
    ):
        embed(patch_size=3)
    with pytest.raises(ValueError, match=r"small_stem.*vgg16"):
        embed(backbone="vgg16", layer="features.9", small_stem=True)
    with pytest.raises(ValueError, match=r"16x16.*img_size 32"):
        embed()(torch.zeros(1, 3, 16, 16))


def test_importing_models_does_not_import_torchvision():
    code = "import sys, vit_train.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
