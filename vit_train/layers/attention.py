"""Multi-head self-attention: "Attention Is All You Need" (Vaswani et al. 2017), as used in ViT.

`attend` is the one place where attention is computed; window attention uses it as well.

Shapes: B batch, H heads, N tokens, C = H * d channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import require_divides
from .init import TOKEN_STD, init_linear

PLAIN_MAX_TOKENS = 1024
SHORT_ROW = 32


def prefers_fused(q: Tensor) -> bool:
    """Whether PyTorch's fused kernel is the faster one for these queries (..., N, d).

    On accelerators it is. On the CPU its backward is slow at the sizes vision transformers have: at 65
    tokens it takes a third of the whole training step in bf16, and plain matrix products nearly double the
    images per second (231 against 125, ViT-Ti with patch 4 on 2 cores). Above about 1,000 tokens the N x N
    matrix leaves the cache and its memory outweighs that. Meta tensors compute nothing; as plain products
    their operations can be counted.
    """
    return q.device.type not in ("cpu", "meta") or q.shape[-2] > PLAIN_MAX_TOKENS


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    fused: bool | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v.

    Plain products in bf16 round the scores, which the fused kernel keeps in fp32: an error of 0.4 percent
    where scores deviate by 1, 0.8 to 0.9 by 4 (65 and 197 tokens, against float64), for 0.2. Scores in fp32
    would take 10 percent of a training step of vit_cifar, 12 of deit_tiny (one thread).

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        bias: added to the scores, broadcastable to (B, H, N, M); -inf excludes a key.
        dropout: probability of dropping an attention weight (0 outside training).
        fused: True for the fused kernel, False for plain matrix products, None for the faster one.

    Returns:
        (B, H, N, d).
    """
    if prefers_fused(q) if fused is None else fused:
        attn_mask = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
    # Scaling q is cheaper than scaling the scores, and keeps them small where the product is bf16.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    # softmax computes in fp32 inside whatever its dtype. Rows shorter than one bf16 vector are the exception
    # in speed: forward and backward take 4 ms in bf16 and 1 ms in fp32 at 16 tokens, 8 and 9 ms at 49.
    short = scores.shape[-1] < SHORT_ROW
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32) if short else scores.dtype
    if bias is not None:
        scores = scores + bias.to(softmax_dtype)
    weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(v.dtype)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return weights @ v


def relative_index(h: int, w: int, side: int, device: torch.device | None = None) -> Tensor:
    """Which row of a table of relative positions holds for each pair of tokens of a grid: (h * w, h * w).

    The table has (2 * side - 1) ** 2 rows, by the offset down, then to the right, of query from key; a grid
    that is smaller than `side` uses the middle of it.
    """
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    down = y[:, None] - y[None, :] + side - 1
    right = x[:, None] - x[None, :] + side - 1
    index = down[:, None, :, None] * (2 * side - 1) + right[None, :, None, :]
    return index.reshape(h * w, h * w)


class Attention(nn.Module):
    """Self-attention over all tokens, (B, N, C) -> (B, N, C).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        qkv_bias: whether the query, key and value projections have a bias.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        grid_size: (h, w) of the last h * w tokens, to learn a bias of the scores for each offset between two
            of them, in each head (as Swin within a window, and BEiT: Bao et al. 2022, arXiv 2106.08254);
            tokens before them have none. None: no such bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    relative_index: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        grid_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        require_divides("num_heads", num_heads, "embed_dim", dim)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.relative_position_bias_table: nn.Parameter | None = None
        if grid_size is not None:
            side = max(grid_size)
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=TOKEN_STD)
            self.register_buffer("relative_index", relative_index(*grid_size, side), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        init_linear(self.qkv, matrices=3)
        init_linear(self.proj)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of the tokens, (B, N, C) -> three of (B, H, N, d)."""
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        # Unbound before the heads move forward: the gradients then return in one copy, else in two.
        q, k, v = (part.transpose(1, 2).contiguous() for part in qkv.unbind(2))
        return q, k, v

    def bias(self, num_tokens: int) -> Tensor | None:
        """What the offsets of the tokens add to the scores, (H, N, N); 0 for those before the grid."""
        if self.relative_position_bias_table is None:
            return None
        # Contiguous: in bf16 the CPU takes six times as long to add a strided one to the scores.
        bias = self.relative_position_bias_table[self.relative_index].permute(2, 0, 1).contiguous()
        prefix = num_tokens - len(self.relative_index)
        return F.pad(bias, (prefix, 0, prefix, 0)) if prefix else bias

    def weights(self, x: Tensor) -> Tensor:
        """What `forward` weighs the values with, (B, N, C) -> (B, H, N, N); rows sum to 1. For looking at."""
        q, k, _ = self.heads(x)
        scores, bias = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), self.bias(x.shape[1])
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        bias = self.bias(x.shape[1])
        out = attend(q, k, v, bias=bias, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
