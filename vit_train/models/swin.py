"""Swin Transformer: "Hierarchical Vision Transformer using Shifted Windows" (Liu et al. 2021).

Official code: microsoft/Swin-Transformer. Parameter names and the place of `downsample`, at the start of a
stage, are timm's.

Shapes: B batch, C H W image, h w map of tokens (halved from stage to stage), D width (doubled), K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.construct import Dim, Expansion, Few, Fraction, Positive, Window
from vit_train.layers import (
    Block,
    WindowAttention,
    drop_path_schedule,
    init_identity,
    init_linear,
    init_local,
)


class PatchMerging(nn.Module):
    """One token of each 2 x 2, (B, h, w, C) -> (B, ceil(h / 2), ceil(w / 2), 2 C); odd maps are padded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        init_linear(self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        B, h, w, C = x.shape
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
            h, w = h + h % 2, w + w % 2
        # Down the columns first, the order the published weights know.
        x = x.view(B, h // 2, 2, w // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, h // 2, w // 2, 4 * C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks of one resolution, (B, h, w, C) -> (B, h, w, C), after an optional patch merging."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Swin(nn.Module):
    """Stages of shifted-window attention, a norm, the mean over the map, a linear head.

    Args:
        patch_embed: (B, C, H, W) -> (B, h, w, D), with `embed_dim`; `PatchEmbed(norm=True, any_size=True)` in
            the paper.
        embed_dim: width D of the first stage; each further stage doubles it.
        depths: blocks of each stage; every second block shifts its windows.
        num_heads: attention heads of each stage.
        window_size: tokens along one side of a window.
        mlp_ratio: hidden width of the MLPs over the width of the stage.
        qkv_bias: whether the query, key and value projections have a bias.
        drop_rate: dropout after the patch embedding, in the MLPs and after the attention.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
        mask_padding: windows that reach beyond the map have fewer tokens; False: padding takes part in the
            attention, as in the published models. See `WindowAttention`.
        zero_start: every block begins as the identity; see `init_identity`.
        local_start: every head begins by attending to one place beside the token; see `init_local`.
        num_classes: K.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        patch_embed: nn.Module,
        embed_dim: Dim,
        depths: tuple[Few, ...],
        num_heads: tuple[Dim, ...],
        window_size: Window,
        mlp_ratio: Expansion = 4.0,
        qkv_bias: bool = True,
        drop_rate: Fraction = 0.0,
        attn_drop_rate: Fraction = 0.0,
        drop_path_rate: Fraction = 0.0,
        mask_padding: bool = True,
        zero_start: bool = False,
        local_start: bool = False,
        num_classes: Positive,
    ) -> None:
        super().__init__()
        if (width := patch_embed.embed_dim) != embed_dim:
            raise ValueError(f"embed_dim {embed_dim} differs from patch_embed.embed_dim {width}")
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"depths names {len(depths)} stages, but num_heads {len(num_heads)}")
        self.embed_dim = embed_dim
        self.num_classes = num_classes

        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(drop_path_schedule(drop_path_rate, sum(depths)))
        stages = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads)):
            dim = embed_dim * 2**i
            blocks = [
                Block(
                    dim,
                    WindowAttention(
                        dim,
                        num_heads=heads,
                        window_size=window_size,
                        shifted=j % 2 == 1,
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                        mask_padding=mask_padding,
                    ),
                    mlp_ratio=mlp_ratio,
                    drop=drop_rate,
                    drop_path=next(rates),
                    norm_eps=1e-5,
                )
                for j in range(depth)
            ]
            stages.append(Stage(PatchMerging(dim // 2) if i else nn.Identity(), blocks))
        self.layers = nn.Sequential(*stages)
        if zero_start:
            self.layers.apply(init_identity)
        if local_start:
            self.layers.apply(init_local)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, num_classes)
        init_linear(self.head)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would harm and whose shape does not tell."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised map of the last stage, (B, C, H, W) -> (B, h, w, D)."""
        return self.norm(self.layers(self.pos_drop(self.patch_embed(images))))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits, (B, h, w, D) -> (B, K)."""
        return self.head(features.mean(dim=(1, 2)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))
