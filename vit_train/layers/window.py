"""Shifted-window attention: "Swin Transformer" (Liu et al. 2021), microsoft/Swin-Transformer.

Attention inside windows of w x w tokens, with a learned bias for each relative position. In every second
block the windows begin w // 2 tokens later, which leaves smaller ones at both ends of an axis.

Others roll the map, so that its two ends share a window, and hide them from each other with a mask;
torchvision also pads maps that are not whole windows. Here the map is cut into pieces with windows of one
size, and attention is computed in each of them, without roll and mask. Padding that takes part in it is one
more key of its window. The result is the same, but for dropout of the attention weights.

Shapes: B batch, h w map of tokens, C channels, H heads, d = C / H, G windows, N tokens of a window.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import attend, relative_index
from .checks import require_divides
from .init import TOKEN_STD, init_linear


class Span(NamedTuple):
    """Consecutive tokens of one axis, cut into windows of one length.

    Attributes:
        length: tokens of all its windows together.
        window: tokens of one window.
        padding: zero tokens that complete a window; 0 where they are hidden.
    """

    length: int
    window: int
    padding: int = 0


def _index(h: int, w: int, below: int, right: int, side: int, device: torch.device) -> Tensor:
    """Rows of the table for each query and key of a window, (h w, keys).

    The zero tokens that complete it, in `below` rows and `right` columns, are only keys, and come last.
    """
    full_h, full_w = h + below, w + right
    index = relative_index(full_h, full_w, side, device).view(full_h, full_w, full_h, full_w)[:h, :w]
    parts = index[:, :, :h, :w], index[:, :, :h, w:], index[:, :, h:]
    return torch.cat([part.reshape(h * w, -1) for part in parts], 1)


# The first caller may be an evaluation: an inference tensor could not be saved for a later backward.
_kept_index = functools.lru_cache(maxsize=256)(torch.inference_mode(False)(_index))


def forget_indices() -> None:
    """Drops the indices that are kept: those made under a mode of torch's are of no use outside of it."""
    _kept_index.cache_clear()


class WindowAttention(nn.Module):
    """Self-attention within windows of a map of any size, (B, h, w, C) -> (B, h, w, C).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        window_size: tokens along one side of a window.
        shifted: shift the windows by window_size // 2 along each axis that one window does not cover.
        qkv_bias: whether the query, key and value projections have a bias.
        attn_drop: dropout of the attention weights; all padding of a window is kept or dropped together.
        proj_drop: dropout of the output.
        mask_padding: True leaves a window that reaches beyond the map with fewer tokens, as if padding were
            hidden from the others. False follows the published models as torchvision has them: zero tokens
            fill the last window and take part in the attention.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window_size: int,
        shifted: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        require_divides("num_heads", num_heads, "embed_dim", dim)
        self.num_heads = num_heads
        self.window_size = window_size
        self.shifted = shifted
        self.attn_drop = attn_drop
        self.mask_padding = mask_padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=TOKEN_STD)
        init_linear(self.qkv, matrices=3)
        init_linear(self.proj)

    def spans(self, size: int) -> list[Span]:
        """How an axis of `size` tokens is cut into windows, in the order of the tokens."""
        window = self.window_size
        missing = 0 if self.mask_padding else -size % window
        if size <= window:  # one window covers the axis: there is nothing to shift
            return [Span(size, size, missing)]
        first = window // 2 if self.shifted else 0
        whole = (size - first) // window * window
        last = size - first - whole
        # After a shift, some of the padding may have a window of its own, which no token sees.
        spans = Span(first, first), Span(whole, window), Span(last, last, min(missing, window - last))
        return [span for span in spans if span.length]

    def bias(self, rows: Span, cols: Span) -> Tensor:
        """Relative position bias of a window, (H, N, N); (H, N, N + 1) where it has padding.

        All zero tokens of a window have the same key and value, so one key stands for them. Its bias is the
        logarithm of the sum of the exponentials of theirs.
        """
        table = self.relative_position_bias_table
        sizes = rows.window, cols.window, rows.padding, cols.padding
        # Under torch.compile, torch.export and torch.jit.trace the index is part of the graph.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        index = (_index if traced else _kept_index)(*sizes, self.window_size, table.device)
        bias = table[index].permute(2, 0, 1)
        tokens = bias.shape[1]
        if bias.shape[2] == tokens:
            return bias
        return torch.cat([bias[..., :tokens], bias[..., tokens:].logsumexp(-1, keepdim=True)], -1)

    def _append_padding(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, G H, N, d) of tokens, then those of a zero token: (B, G H, N + 1, d)."""
        B, GH, _, d = k.shape
        H = self.num_heads
        zero = k.new_zeros(3 * H * d) if self.qkv.bias is None else self.qkv.bias.to(k.dtype)
        # On the CPU torch.cat is many times slower where a part is not contiguous.
        both = zero.view(3, 1, 1, H, 1, d)[1:].expand(2, B, GH // H, H, 1, d)
        key, value = both.reshape(2, B, GH, 1, d).unbind()
        return torch.cat([k, key], 2), torch.cat([v, value], 2)

    def _attend(self, qkv: Tensor, rows: Span, cols: Span) -> Tensor:
        """Attention inside the windows of a piece of the map, (B, rows, cols, 3 C) -> (B, rows, cols, C)."""
        B, H, C = qkv.shape[0], self.num_heads, qkv.shape[3] // 3
        # (B, rows of windows, y, columns of windows, x, 3, H, d)
        shape = (B, rows.length // rows.window, rows.window, cols.length // cols.window, cols.window)
        # Windows become more heads rather than more images: CUDA kernels have a limit of 65,535 images.
        G = shape[1] * shape[3]
        # Unbound before the windows are cut: the gradients then return in one copy, else in two.
        q, k, v = (
            part.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, G * H, rows.window * cols.window, C // H)
            for part in qkv.view(*shape, 3, H, C // H).unbind(5)
        )
        bias = self.bias(rows, cols).repeat(G, 1, 1)
        if bias.shape[2] > bias.shape[1]:
            k, v = self._append_padding(k, v)
        out = attend(q, k, v, bias=bias, dropout=self.attn_drop if self.training else 0.0)
        out = out.view(B, shape[1], shape[3], H, rows.window, cols.window, C // H)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, rows.length, cols.length, C)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        rows, cols = (self.spans(size) for size in qkv.shape[1:3])
        bands = []
        for band, row in zip(qkv.split([span.length for span in rows], 1), rows):
            pieces = band.split([span.length for span in cols], 2)
            bands.append(torch.cat([self._attend(piece, row, col) for piece, col in zip(pieces, cols)], 2))
        return self.proj_drop(self.proj(torch.cat(bands, 1)))


def init_local(module: nn.Module) -> None:
    """Lets each head of window attention begin by attending to one place beside the token itself.

    The relative positions get a bump of height 3 and deviation 1 around that place. The places of up to six
    heads stand on one ring, those of more on two, where many heads share places. So the model starts much as
    convolutions do ("Structured Initialization for Attention in Vision Transformers", Zheng et al. 2024,
    arXiv 2404.01139, who choose queries and keys to that end).
    """
    if isinstance(module, WindowAttention):
        head = torch.arange(module.num_heads)
        radius, angle = 1.0 + (head % 2) * (len(head) > 6), 2 * math.pi * head / len(head)
        offset = torch.arange(1.0 - module.window_size, module.window_size)
        down, right = offset[:, None, None] - radius * angle.sin(), offset[:, None] - radius * angle.cos()
        with torch.no_grad():
            bumps = 3 * torch.exp(-(down**2 + right**2) / 2)
            module.relative_position_bias_table.add_(bumps.flatten(0, 1))
