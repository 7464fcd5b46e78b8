"""Vision Transformer: "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020).

Official code: google-research/vision_transformer. Parameter names are timm's.

Shapes: B batch, C H W image, h w grid of patches, N = h * w patches + prefix tokens, D width, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vit_train.construct import Dim, Expansion, Few, Fraction, Positive
from vit_train.layers import Attention, Block, drop_path_schedule, init_identity, init_linear
from vit_train.layers.init import TOKEN_STD, sincos_positions

_NOT_DECAYED = ("cls_token", "dist_token", "pos_embed", "relative_position_bias_table")


class ViT(nn.Module):
    """Patches, learned positions, transformer blocks, a norm, and a head on the class token or the mean.

    Args:
        patch_embed: (B, C, H, W) -> (B, h, w, D), with `grid_size` and `embed_dim`: `PatchEmbed`,
            `TrunkEmbed` or `HybridEmbed`.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads; must divide `embed_dim`.
        mlp_ratio: hidden width of the MLPs over `embed_dim`.
        qkv_bias: whether the query, key and value projections have a bias.
        norm_first: pre-norm blocks (ViT), or post-norm ones as in the original Transformer.
        rel_pos: learn a bias of the attention scores for each offset between two patches; see `Attention`.
        zero_start: every block begins as the identity; see `init_identity`.
        pool: what the head sees: the class token, or the mean over the patches (no class token then).
        head: one linear layer, or two of which the first keeps the width, with GELU between.
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
        norm_first: bool = True,
        rel_pos: bool = False,
        zero_start: bool = False,
        pool: Literal["cls", "mean"] = "cls",
        head: Literal["linear", "mlp"] = "linear",
        drop_rate: Fraction = 0.0,
        attn_drop_rate: Fraction = 0.0,
        drop_path_rate: Fraction = 0.0,
        num_classes: Positive,
    ) -> None:
        super().__init__()
        if (width := patch_embed.embed_dim) != embed_dim:
            raise ValueError(f"embed_dim {embed_dim} differs from patch_embed.embed_dim {width}")
        self.embed_dim = embed_dim
        self.num_classes = num_classes
        self.pool = pool

        self.patch_embed = patch_embed
        self._init_tokens(*patch_embed.grid_size)  # type: ignore[misc]
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                Attention(
                    embed_dim,
                    num_heads=num_heads,
                    qkv_bias=qkv_bias,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
                    grid_size=patch_embed.grid_size if rel_pos else None,  # type: ignore[arg-type]
                ),
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                drop_path=rate,
                norm_first=norm_first,
                norm_eps=1e-6,
            )
            for rate in drop_path_schedule(drop_path_rate, depth)
        )
        if zero_start:
            self.blocks.apply(init_identity)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = (
            nn.Linear(embed_dim, num_classes)
            if head == "linear"
            else nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, num_classes))
        )
        self.head.apply(init_linear)

    def _init_tokens(self, h: int, w: int) -> None:
        """Makes the learned tokens and one position for each token."""
        if self.pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
            nn.init.trunc_normal_(self.cls_token, std=TOKEN_STD)
        # The prefix tokens are learned themselves: their positions start at zero.
        prefix = torch.zeros(len(self.prefix_tokens()), self.embed_dim)
        positions = torch.cat([prefix, sincos_positions(h, w, self.embed_dim)])
        self.pos_embed = nn.Parameter(positions[None])

    def prefix_tokens(self) -> list[Tensor]:
        """The learned tokens (1, 1, D) that stand before the patches."""
        return [self.cls_token] if self.pool == "cls" else []

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would harm and whose shape does not tell."""
        return {name for name, _ in self.named_parameters() if name.endswith(_NOT_DECAYED)}

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens, (B, C, H, W) -> (B, N, D), prefix tokens first."""
        x = self.patch_embed(images).flatten(1, 2)
        prefix = [token.expand(x.shape[0], -1, -1) for token in self.prefix_tokens()]
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits, (B, N, D) -> (B, K)."""
        return self.head(features[:, 0] if self.pool == "cls" else features.mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))
