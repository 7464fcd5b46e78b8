"""DeiT with its distillation token: "Training data-efficient image transformers" (Touvron et al. 2020).

Official code: facebookresearch/deit. Without distillation DeiT is a ViT of other sizes: see the configs
`deit_tiny`, `deit_small`, `deit_base`.

Shapes: B batch, C H W image, N = 2 + patches tokens, D width, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vit_train.construct import Dim, Positive
from vit_train.layers import init_linear
from vit_train.layers.init import TOKEN_STD

from .vit import ViT


class DeiT(ViT):
    """A ViT with a second learned token and head, which a teacher's labels train.

    In training the forward pass returns (logits, distill_logits), in evaluation the mean of both.

    Args:
        embed_dim: width D.
        num_classes: K.
        options: as for `ViT`, but for `pool`: the heads see their tokens.

    Raises:
        ValueError: sizes that do not fit each other, or a `pool`; in forward, images of another size than
            `img_size`.
    """

    def __init__(self, *, embed_dim: Dim, num_classes: Positive, **options: Any) -> None:
        if options.get("pool", "cls") != "cls":
            raise ValueError("pool: the two heads of a DeiT see their tokens; leave it out")
        super().__init__(embed_dim=embed_dim, num_classes=num_classes, **options)
        self.head_dist = nn.Linear(embed_dim, num_classes)
        init_linear(self.head_dist)

    def _init_tokens(self, h: int, w: int) -> None:
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        nn.init.trunc_normal_(self.dist_token, std=TOKEN_STD)
        super()._init_tokens(h, w)

    def prefix_tokens(self) -> list[Tensor]:
        return [self.cls_token, self.dist_token]

    def forward_head(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, N, D) -> (logits, distill_logits) in training, their mean in evaluation, each (B, K)."""
        logits, distill_logits = self.head(features[:, 0]), self.head_dist(features[:, 1])
        if self.training:
            return logits, distill_logits
        return (logits + distill_logits) / 2
