"""A convolutional trunk in place of the patch embedding: the hybrid ViT of Dosovitskiy et al. 2020.

A hybrid model is a `ViT` whose `patch_embed` is a `HybridEmbed`. The trunks are torchvision's, where the
paper uses a ResNet with group norm and standardised weights (google-research/vision_transformer).

Shapes: (B, C, H, W) pixels -> trunk (B, C', H', W') -> (B, h, w, D) tokens, h = H' / patch_size.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from vit_train.construct import Dim, Side
from vit_train.layers import GridEmbed, init_projection
from vit_train.layers.checks import require_divides


def _first_conv(in_channels: int, like: nn.Conv2d, *, small: bool = False) -> nn.Conv2d:
    """A new first convolution, initialised as torchvision does its ResNets."""
    conv = nn.Conv2d(
        in_channels,
        like.out_channels,
        kernel_size=3 if small else like.kernel_size[0],
        stride=1 if small else like.stride[0],
        padding=1 if small else like.kernel_size[0] // 2,
        bias=like.bias is not None,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _trunk(
    backbone: str, layer: str, in_channels: int, *, small_stem: bool, pretrained: bool
) -> nn.Sequential:
    """The layers of the backbone up to `layer`, under torchvision's names: (B, C, H, W) -> (B, C', H', W').

    A sequence rather than torchvision's `create_feature_extractor`: a deep copy of what that returns forgets
    whether it was in evaluation mode, and would update its batch norms unasked.
    """
    # Here and not above: `vit_train.models` does without torchvision, whose import takes 1.5 s.
    from torchvision import models

    known = models.list_models(module=models)
    if backbone not in known:
        close = difflib.get_close_matches(backbone, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f" (such as {', '.join(known[:5])})"
        raise ValueError(f"{backbone!r} is not a torchvision classification model{hint}")
    net: Any = models.get_model(backbone, weights="DEFAULT" if pretrained else None)
    if small_stem:
        if not (hasattr(net, "conv1") and hasattr(net, "maxpool")):
            raise ValueError(
                f"small_stem changes the first layers of a ResNet; {backbone} has no such layers"
            )
        net.conv1 = _first_conv(in_channels, net.conv1, small=True)
        del net.maxpool
    elif in_channels != 3:
        name, conv = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, _first_conv(in_channels, conv))
    body = net.features if hasattr(net, "features") else net
    prefix = "features." if hasattr(net, "features") else ""
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in body.named_children():
        if isinstance(module, nn.AdaptiveAvgPool2d | nn.Linear):
            break
        kept[name] = module
    wanted = layer.removeprefix(prefix)
    if wanted not in kept or not layer.startswith(prefix):
        names = ", ".join(f"{prefix}{name}" for name in kept)
        raise ValueError(f"{backbone} has no layer {layer!r} to cut at; use one of {names}")
    cut = OrderedDict(list(kept.items())[: list(kept).index(wanted) + 1])
    return nn.Sequential(OrderedDict(features=nn.Sequential(cut))) if prefix else nn.Sequential(cut)


class HybridEmbed(GridEmbed):
    """A torchvision backbone cut at a layer, and a linear map of each of its features (or patches of them).

    Args:
        img_size: height and width of the images in pixels.
        backbone: name of a torchvision classification model that runs its layers one after another, such as
            resnet50, vgg16, convnext_tiny or efficientnet_b0.
        layer: where to cut: "layer1" to "layer4" of a ResNet, "features.N" of most others.
        in_channels: image channels C; other than 3, the first convolution is made anew.
        embed_dim: width D of the tokens.
        patch_size: height and width of a patch in features of the trunk.
        small_stem: for small images: a 3x3 convolution of stride 1 in place of a ResNet's 7x7 of stride 2 and
            max pooling.
        pretrained: load torchvision's ImageNet weights (downloaded on first use).

    Raises:
        ValueError: the backbone has no such layer, it leaves nothing of images this small, or `patch_size`
            does not divide the map it returns; in forward, images of another size.
    """

    def __init__(
        self,
        *,
        img_size: Side,
        backbone: str,
        layer: str,
        in_channels: Dim,
        embed_dim: Dim,
        patch_size: Side = 1,
        small_stem: bool = False,
        pretrained: bool = False,
    ) -> None:
        # On the meta device a first copy tells the size of the map and costs neither memory nor arithmetic.
        with torch.device("meta"):
            probe = _trunk(backbone, layer, in_channels, small_stem=small_stem, pretrained=False).eval()
            try:
                _, channels, h, w = probe(torch.empty(1, in_channels, img_size, img_size)).shape
            except RuntimeError as error:  # torch's: nothing is left of the map
                too_small = f"img_size {img_size} is too small for {backbone} {layer}"
                raise ValueError(f"{too_small}; type data.img_size={2 * img_size} or more") from error
        require_divides("patch_size", patch_size, f"the map of {backbone} {layer} at img_size {img_size}:", h)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            grid_size=(h // patch_size, w // patch_size),
        )
        self.backbone = _trunk(backbone, layer, in_channels, small_stem=small_stem, pretrained=pretrained)
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        init_projection(self.proj)

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return self.proj(self.backbone(images)).permute(0, 2, 3, 1).contiguous()
