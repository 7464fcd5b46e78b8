"""Every model config builds what its header says, and takes any data its sizes allow."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from vit_train.construct import check, make

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))

# torchvision's and DeiT's published counts; (pixels, classes, parameters)
PARAMETERS = {
    "vit_tiny": (224, 1000, 5_717_416),
    "vit_small": (224, 1000, 22_050_664),
    "vit_base": (224, 1000, 86_567_656),
    "vit_base_32": (224, 1000, 88_224_232),
    "vit_large": (224, 1000, 304_326_632),
    "vit_large_32": (224, 1000, 306_535_400),
    "vit_huge": (224, 1000, 632_045_800),
    "vit_scratch_tutorial": (224, 10, 86_396_938),
    "deit_tiny": (224, 1000, 5_717_416),
    "deit_small": (224, 1000, 22_050_664),
    "deit_base": (224, 1000, 86_567_656),
    "deit_tiny_distilled": (224, 1000, 5_910_800),
    "deit_small_distilled": (224, 1000, 22_436_432),
    "deit_base_distilled": (224, 1000, 87_338_192),
    "swin_tiny": (224, 1000, 28_288_354),
    "swin_small": (224, 1000, 49_606_258),
    "swin_base": (224, 1000, 87_768_224),
    "swin_large": (224, 1000, 196_532_476),
    "swin_cifar": (32, 10, 14_373_340),
    "swin_cifar_w4": (32, 10, 14_365_420),
}


def node(name, *, img_size, in_channels=3, num_classes=10):
    """The model's node, as plain data."""
    data = {"img_size": img_size, "in_channels": in_channels, "num_classes": num_classes}
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(f"model/{name}", overrides=[f"+data.{key}={value}" for key, value in data.items()])
    return OmegaConf.to_container(cfg, resolve=True)["model"]


def on_meta(name, **data):
    with torch.device("meta"):
        return make(node(name, **data)).eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def native(name):
    """Pixels, channels and classes of the header."""
    if name in PARAMETERS:
        pixels, classes, _ = PARAMETERS[name]
        return pixels, 3, classes
    return (8, 1, 10) if "digits" in name else (32, 3, 10) if "cifar" in name else (224, 3, 1000)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    img_size, num_classes, parameters = PARAMETERS[name]
    assert count(on_meta(name, img_size=img_size, num_classes=num_classes)) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_header_tells_the_truth(name):
    img_size, in_channels, num_classes = native(name)
    model = on_meta(name, img_size=img_size, in_channels=in_channels, num_classes=num_classes)
    images = torch.empty(1, in_channels, img_size, img_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(images)
    assert logits.shape == (1, num_classes)
    gmacs = counter.get_total_flops() / 2e9
    line = (
        f"# {count(model):,} parameters, {gmacs:.3g} GMACs at {img_size} pixels and {num_classes:,} classes."
    )
    assert line in (CONFIGS / "model" / f"{name}.yaml").read_text().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_constructor(name):
    img_size, in_channels, num_classes = native(name)
    tree = node(name, img_size=img_size, in_channels=in_channels, num_classes=num_classes)
    assert check(tree) == []
    assert ("embed_dim" in tree) == ("patch_embed" in tree)
    if name != "resnet_cifar":
        embed = tree["patch_embed"]
        assert tree["embed_dim"] == (embed["widths"][-1] if "widths" in embed else embed["embed_dim"])


@pytest.mark.parametrize("name", NAMES)
def test_takes_other_data(name):
    """Grey images of another size and another number of classes; Swin any size at all."""
    img_size = 225 if name.startswith("swin") else 448
    model = on_meta(name, img_size=img_size, in_channels=1, num_classes=3)
    assert model(torch.empty(2, 1, img_size, img_size, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("_cifar", "_w4", "_digits"))])
def test_a_gradient_step_lowers_the_loss(name):
    img_size, in_channels, num_classes = native(name)
    torch.manual_seed(0)
    model = make(node(name, img_size=img_size, in_channels=in_channels, num_classes=num_classes))
    images, targets = torch.randn(2, in_channels, img_size, img_size), torch.arange(2)

    def loss():
        logits = model(images)
        heads = logits if isinstance(logits, tuple) else (logits,)
        return sum(torch.nn.functional.cross_entropy(head, targets) for head in heads)

    before = loss()
    before.backward()
    with torch.no_grad():
        squared_norm = sum(p.grad.square().sum() for p in model.parameters())
        for parameter in model.parameters():
            parameter -= 0.02 / squared_norm * parameter.grad  # to first order the loss falls by 0.02
        assert 0.01 < before - loss() < 0.03
