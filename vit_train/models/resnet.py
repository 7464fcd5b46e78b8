"""A small convolutional network for small images, accurate after few epochs.

Source: "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, arXiv 2404.00498); see `ConvTrunk`.

Shapes: B batch, C H W image, D width of the last group, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from vit_train.construct import Dim, Positive
from vit_train.layers import ConvTrunk, init_linear

LOGIT_SCALE = 1 / 9  # the paper's: the head then bears the rate of the convolutions


class ResNet(ConvTrunk):
    """A `ConvTrunk`, the maximum of each channel, a linear head.

    Args:
        in_channels: image channels C.
        widths: channels of each group, which halves the map.
        num_classes: K.

    Raises:
        ValueError: in forward, images so small that nothing is left of them.
    """

    def __init__(self, *, in_channels: Dim, widths: tuple[Dim, ...], num_classes: Positive) -> None:
        super().__init__(in_channels=in_channels, widths=widths)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes)
        init_linear(self.head)

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits, (B, D, h, w) -> (B, K)."""
        return self.head(features.amax(dim=(2, 3))) * LOGIT_SCALE

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))
