"""DeiT with its distillation token: "Training data-efficient image transformers" (Touvron et al. 2020).

Official code: facebookresearch/deit. Without distillation DeiT is a ViT of other sizes: see the configs
`deit_tiny`, `deit_small`, `deit_base`.

Shapes: B batch, C H W image, N = 2 + patches tokens, D width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_train.construct import Dim, Expansion, Few, Fraction, Positive
from vit_train.layers import init_linear
from vit_train.layers.init import TOKEN_STD

from .vit import ViT


class DeiT(ViT):
    """A ViT with a second learned token and head, which a teacher's labels train.

    In training the forward pass returns (logits, distill_logits), in evaluation the mean of both.

    Args:
        patch_embed: (B, C, H, W) -> (B, h, w, D), with `grid_size` and `embed_dim`.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads; must divide `embed_dim`.
        mlp_ratio: hidden width of the MLPs over `embed_dim`.
        qkv_bias: whether the query, key and value projections have a bias.
        drop_rate: dropout after the positions, in the MLPs and after the attention.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
        num_classes: K.

    Raises:
        ValueError: sizes that do not fit each other; in forward, images of another size than `img_size`.
    """

    def __init__(
        self,
        *,
        patch_embed: nn.Module,
        embed_dim: Dim,
        depth: Few,
        num_heads: Dim,
        mlp_ratio: Expansion = 4.0,
        qkv_bias: bool = True,
        drop_rate: Fraction = 0.0,
        attn_drop_rate: Fraction = 0.0,
        drop_path_rate: Fraction = 0.0,
        num_classes: Positive,
    ) -> None:
        super().__init__(
            patch_embed=patch_embed,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
        )
        self.head_dist = nn.Linear(embed_dim, num_classes)
        init_linear(self.head_dist)

    def _init_tokens(self, h: int, w: int) -> None:
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        nn.init.trunc_normal_(self.dist_token, std=TOKEN_STD)
        super()._init_tokens(h, w)

    def prefix_tokens(self) -> list[Tensor]:
        return [self.cls_token, self.dist_token]

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"dist_token"}

    def forward_head(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, N, D) -> (logits, distill_logits) in training, their mean in evaluation, each (B, K)."""
        logits, distill_logits = self.head(features[:, 0]), self.head_dist(features[:, 1])
        if self.training:
            return logits, distill_logits
        return (logits + distill_logits) / 2

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.forward_head(self.forward_features(images))
