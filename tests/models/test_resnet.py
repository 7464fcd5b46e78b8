import pytest
import torch
from conftest import build, checkpoint_hashes, vit_train_here
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vit_train.layers import ConvGroup, TrunkEmbed
from vit_train.layers.init import NEIGHBOURS
from vit_train.models import ResNet

SMALL = (
    "model=resnet_cifar",
    "model.widths=[8,16]",
    "optimizer=sgd",
    "optimizer.norm_bias_factor=8",
    "data.limit=64",
    "data.batch_size=16",
    "data.num_workers=0",
    "trainer.ema_decay=0.9",
    "trainer.max_steps=4",
)


def resnet(seed=0, **settings):
    torch.manual_seed(seed)
    return ResNet(**{"in_channels": 3, "widths": (8, 16, 32), "num_classes": 5, **settings})


@pytest.mark.parametrize(("channels", "widths", "classes"), [(3, (64, 256, 256), 10), (1, (5, 9), 3)])
def test_parameters_and_multiply_adds_by_hand(channels, widths, classes):
    stem = 8 * channels
    parameters, macs = stem * (channels * 2 * 2 + 1), stem * channels * 2 * 2 * 33 * 33
    inputs, side = stem, 33
    for width in widths:
        parameters += inputs * width * 9 + 2 * width + width * width * 9 + 2 * width
        macs += inputs * width * 9 * side**2 + width * width * 9 * (side // 2) ** 2
        inputs, side = width, side // 2
    parameters += (widths[-1] + 1) * classes
    macs += widths[-1] * classes
    with torch.device("meta"):
        model = resnet(in_channels=channels, widths=widths, num_classes=classes).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, channels, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(("inputs", "width"), [(24, 64), (9, 9), (12, 5)])
def test_convolutions_begin_as_the_identity(inputs, width):
    torch.manual_seed(0)
    group = ConvGroup(inputs, width)
    x = torch.randn(2, inputs, 7, 7)
    same = min(inputs, width)
    torch.testing.assert_close(group.conv1(x)[:, :same], x[:, :same])
    x = torch.randn(2, width, 7, 7)
    torch.testing.assert_close(group.conv2(x), x)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_stem_makes_natural_images_white(channels):
    """Patches with the correlations it is made for: after it those of the first half are 0, variances 1."""
    between = NEIGHBOURS + (1 - NEIGHBOURS) * torch.eye(2)
    colours = NEIGHBOURS + (1 - NEIGHBOURS) * torch.eye(channels)
    covariance = torch.kron(colours, torch.kron(between, between)).double()
    filters = resnet(in_channels=channels).stem.weight.detach().flatten(1).double()
    half, other = filters.chunk(2)
    torch.testing.assert_close(
        half @ covariance @ half.T, torch.eye(4 * channels).double(), atol=1e-4, rtol=0
    )
    assert torch.equal(other, -half)


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (33, 33)), (3, (7, 7)), (1, (45, 30))])
def test_any_size_and_colours(channels, size):
    model = resnet(in_channels=channels).train()
    images = torch.randn(2, channels, *size)
    h, w = ((side + 1) // 8 for side in size)
    assert model.forward_features(images).shape == (2, 32, h, w)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_images_that_are_too_small_are_refused(in_tmp):
    words = "images of 6x9 are too small for 3 groups; type data.img_size=7 or more"
    with pytest.raises(ValueError, match=words):
        resnet()(torch.randn(1, 3, 6, 9))
    done = vit_train_here("model=resnet_cifar", "data.img_size=6", cwd=in_tmp)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"vit-train: error: model: {words.replace('6x9', '6x6')}\n"


def test_the_order_in_memory_changes_nothing():
    model, images = resnet().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images.to(memory_format=torch.channels_last)))
    assert model.forward_features(images).is_contiguous(memory_format=torch.channels_last)


def test_weights_come_from_the_seed():
    first, again, other = resnet(0).state_dict(), resnet(0).state_dict(), resnet(1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["stem.weight"], other["stem.weight"]), "the stem has no chance in it"
    random = ("groups.0.conv1.weight", "groups.1.conv1.weight", "groups.2.conv1.weight", "head.weight")
    differ = [name for name in first if not torch.equal(first[name], other[name])]
    # with 24 channels from the stem, the first group of 8 is all identity
    assert [name for name in random if name in differ] == [*random[1:]]


def test_batch_norm_learns_what_evaluation_then_uses():
    model = resnet()
    model(torch.randn(64, 3, 32, 32) + 2)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6
    assert all(m.running_mean.any() for m in norms)


def test_a_run_that_was_interrupted_equals_one_that_was_not(in_tmp):
    whole = build(*SMALL, "run_dir=whole").trainer
    whole.fit()
    build(*SMALL, "run_dir=parts", "trainer.stop_at_step=2").trainer.fit()
    assert build(*SMALL, "run_dir=parts").trainer.state.step == 2
    build(*SMALL, "run_dir=parts").trainer.fit()
    expected = checkpoint_hashes(in_tmp / "whole")
    assert expected
    assert checkpoint_hashes(in_tmp / "parts") == expected
    average = dict(whole.ema.module.named_buffers())
    trained = dict(whole.model.named_buffers())
    name = "groups.1.norm2.running_var"
    assert not torch.equal(average[name], trained[name]), "no statistics of its own"


@pytest.mark.parametrize("side", [3, 7, 8, 15, 32, 33])
@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 5, 6)])
def test_the_trunk_as_a_patch_embedding_says_which_grid_it_gives(side, widths):
    settings = {"img_size": side, "in_channels": 2, "widths": widths}
    if side < 2 ** len(widths) - 1:
        with pytest.raises(ValueError, match=r"type data\.img_size=7 or more"):
            TrunkEmbed(**settings)
        return
    embed = TrunkEmbed(**settings)
    tokens = embed(torch.randn(2, 2, side, side))
    assert tokens.shape == (2, *embed.grid_size, widths[-1])
    assert tokens.is_contiguous()
    with pytest.raises(ValueError, match=f"made for img_size {side}"):
        embed(torch.randn(2, 2, side, side + 1))
