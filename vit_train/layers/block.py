"""The transformer block shared by every family, with the attention injected.

Pre-norm as in ViT ("An Image is Worth 16x16 Words", Dosovitskiy et al. 2020) and Swin; post-norm as in the
original Transformer (Vaswani et al. 2017). Only the last dimension is touched here, so that the tokens may
come as a sequence (B, N, C) for ViT or as a map (B, h, w, C) for Swin: whatever `attn` takes.
"""

from __future__ import annotations

from torch import Tensor, nn

from .drop_path import DropPath
from .mlp import Mlp


class Block(nn.Module):
    """Attention and MLP, each with a residual connection, a norm and drop path.

    Args:
        dim: channels C.
        attn: module from and to (..., C).
        mlp_ratio: hidden width of the MLP over `dim`.
        drop: dropout in the MLP.
        drop_path: probability of dropping a residual branch for a sample.
        norm_first: True for pre-norm `x + f(norm(x))`, False for post-norm `norm(x + f(x))`.
        norm_eps: epsilon of the norms; 1e-6 in ViT and DeiT, 1e-5 in Swin.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_first: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_dim=max(1, int(dim * mlp_ratio)), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop_path(self.attn(x)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


def init_identity(module: nn.Module) -> None:
    """A `Block` then adds nothing at first: the last layer of both branches is 0. For `nn.Module.apply`.

    Goyal et al. 2017 (arXiv 1706.02677) start the residual branches of a ResNet so.
    """
    if isinstance(module, Block):
        nn.init.zeros_(module.attn.proj.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(module.mlp.fc2.weight)
