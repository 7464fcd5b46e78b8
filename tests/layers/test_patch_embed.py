import pytest
import torch

from vit_train.layers import PatchEmbed


def embed(**overrides):
    return PatchEmbed(**({"img_size": 32, "patch_size": 4, "in_channels": 3, "embed_dim": 24} | overrides))


def test_conv_and_unfold_share_parameters_and_results():
    conv, unfold = embed(projection="conv"), embed(projection="unfold")
    unfold.load_state_dict(conv.state_dict(), strict=True)
    assert {k: tuple(v.shape) for k, v in unfold.state_dict().items()} == {
        "proj.weight": (24, 3, 4, 4),
        "proj.bias": (24,),
    }
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(conv(images), unfold(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", ["conv", "unfold"])
def test_token_of_a_patch_depends_on_that_patch_alone(projection):
    module = embed(projection=projection)
    images = torch.randn(1, 3, 32, 32)
    before = module(images)
    images[..., 4:8, 12:16] += 1
    changed = (module(images) - before).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("make", [embed, lambda: embed(norm=True), lambda: embed(projection="unfold")])
def test_grid_is_contiguous_and_of_the_announced_size(make):
    module = make()
    x = module(torch.randn(2, 3, 32, 32))
    assert x.shape == (2, *module.grid_size, module.embed_dim) == (2, 8, 8, 24)
    assert x.is_contiguous()
    assert module.patch_size == 4


@pytest.mark.parametrize(("size", "grid"), [(32, 8), (23, 6), (33, 9), (4, 1)])
@pytest.mark.parametrize("projection", ["conv", "unfold"])
def test_any_size_pads_to_whole_patches(size, grid, projection):
    module = embed(any_size=True, projection=projection)
    images = torch.randn(1, 3, size, size)
    padded = torch.zeros(1, 3, 4 * grid, 4 * grid)
    padded[..., :size, :size] = images
    assert module(images).shape == (1, grid, grid, 24)
    torch.testing.assert_close(module(images), module(padded))


def test_errors_name_both_numbers():
    with pytest.raises(
        ValueError, match="patch_size 5 does not divide img_size 32; use one of 1, 2, 4, 8, 16"
    ):
        embed(patch_size=5)
    with pytest.raises(ValueError, match=r"28x32.*img_size 32"):
        embed()(torch.zeros(1, 3, 28, 32))
    with pytest.raises(ValueError, match=r"3x32 are smaller than one patch of 4"):
        embed(any_size=True)(torch.zeros(1, 3, 3, 32))
    with pytest.raises(ValueError, match="patch_size 0 "):
        embed(patch_size=0)
    with pytest.raises(ValueError, match=r"patch_size 64 .* img_size 32"):
        embed(patch_size=64, any_size=True)
