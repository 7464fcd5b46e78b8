"""Shifted-window attention: "Swin Transformer" (Liu et al. 2021), microsoft/Swin-Transformer.

Attention inside windows of w x w tokens, the windows of every second block shifted by w // 2, with a learned
bias for each relative position. The shift is cyclic; a mask separates what the roll brought together.

Padding tokens never pass through the projections: they are inserted between the query-key-value projection
and the attention, and removed before the output projection. At window 7 and 16x16, 8x8, 4x4 maps that is
42 to 67 percent of the tokens.

Shapes: B batch, h w map of tokens, C channels, H heads, d = C / H, G windows, N tokens of a window.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import attend, relative_index
from .checks import require_heads
from .init import TOKEN_STD, init_linear


class Axis(NamedTuple):
    """How one axis of a map is cut into windows."""

    size: int  # tokens of the map
    window: int  # tokens of a window
    padding: int  # tokens added to fill the last window
    shift: int  # tokens the windows are shifted by

    @property
    def padded(self) -> int:
        return self.size + self.padding

    @property
    def parts(self) -> tuple[int, int, int]:
        """Lengths on the padded, rolled axis: real tokens, padding, the real tokens rolled to the end."""
        return self.size - self.shift, self.padding, self.shift


def _axis_labels(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token of the padded, rolled axis: whether the roll wrapped it, and whether it is real."""
    rolled = torch.arange(axis.padded, device=device)
    wrapped = rolled >= axis.padded - axis.shift
    real = (rolled + axis.shift) % axis.padded < axis.size
    return wrapped, real


def _window_tables(
    rows: Axis, cols: Axis, table_window: int, mask_padding: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Index into the bias table (N * N,), and the mask to add (G, 1, N, N) or None where all is visible."""
    index = relative_index(rows.window, cols.window, table_window, device).flatten()
    masks_padding = mask_padding and (rows.padding > 0 or cols.padding > 0)
    if not (rows.shift or cols.shift or masks_padding):
        return index, None

    wrapped_y, real_y = _axis_labels(rows, device)
    wrapped_x, real_x = _axis_labels(cols, device)

    def by_window(label: Tensor) -> Tensor:
        label = label.view(rows.padded // rows.window, rows.window, cols.padded // cols.window, cols.window)
        return label.transpose(1, 2).reshape(-1, rows.window * cols.window)

    region = by_window(2 * wrapped_y.long()[:, None] + wrapped_x.long()[None, :])
    visible = region[:, :, None] == region[:, None, :]
    if masks_padding:
        real = by_window(real_y[:, None] & real_x[None, :])
        # Padding is hidden as a key. As a query its result is thrown away, so it may see everything: a row
        # without any key would be NaN, and NaN times a zero gradient is NaN.
        visible = (visible & real[:, None, :]) | ~real[:, :, None]
    mask = torch.zeros(visible.shape, device=device).masked_fill_(~visible, float("-inf"))
    return index, mask.unsqueeze(1)


# The first caller may be an evaluation: an inference tensor could not be saved for a later backward.
_cached_window_tables = functools.lru_cache(maxsize=256)(torch.inference_mode(False)(_window_tables))


def window_tables(
    rows: Axis, cols: Axis, *, table_window: int, mask_padding: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """`_window_tables`, remembered for each kind of map and device (no buffers, no state, shared by blocks).

    Under torch.compile and torch.export they are part of the graph instead.
    """
    tables = _window_tables if torch.compiler.is_compiling() else _cached_window_tables
    return tables(rows, cols, table_window, mask_padding, device)


def forget_window_tables() -> None:
    """Drops what is remembered: tables made under a mode of torch's are of no use outside of it."""
    _cached_window_tables.cache_clear()


def _insert_padding(x: Tensor, dim: int, axis: Axis, fill: Tensor | None) -> Tensor:
    """Adds the padding of one axis, zeros or the token `fill`, to a map whose real tokens are rolled."""
    if axis.padding == 0:
        return x
    real, padding, wrapped = axis.parts
    shape = list(x.shape)
    shape[dim] = padding
    pad = x.new_zeros(shape) if fill is None else fill.to(x.dtype).expand(shape)
    # split rather than slices: its backward is one concatenation, theirs a zero tensor each and a sum.
    x_real, x_wrapped = x.split([real, wrapped], dim)
    return torch.cat([x_real, pad, x_wrapped], dim)


def _remove_padding(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Undoes `_insert_padding`."""
    if axis.padding == 0:
        return x
    x_real, _, x_wrapped = x.split(axis.parts, dim)
    return torch.cat([x_real, x_wrapped], dim)


class WindowAttention(nn.Module):
    """Self-attention within windows of a map of any size, (B, h, w, C) -> (B, h, w, C).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        window_size: tokens along one side of a window.
        shifted: shift the windows by window_size // 2 along each axis that one window does not cover.
        qkv_bias: whether the query, key and value projections have a bias.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        mask_padding: True hides padding tokens from all others, and shrinks a window larger than the map to
            the map, which equals padding the map to the window and is much cheaper. False follows the
            published models as torchvision has them: zero tokens take part in the attention.

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
        require_heads(num_heads, dim)
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

    def cut(self, h: int, w: int) -> tuple[Axis, Axis]:
        """How a map of h x w tokens is cut into windows, along rows and along columns."""
        return self._cut_axis(h), self._cut_axis(w)

    def _cut_axis(self, size: int) -> Axis:
        window = self.window_size
        if size <= window:  # one window covers the axis: there is nothing to shift
            return Axis(size, size, 0, 0) if self.mask_padding else Axis(size, window, window - size, 0)
        return Axis(size, window, -size % window, window // 2 if self.shifted else 0)

    def bias(self, rows: Axis, cols: Axis) -> Tensor:
        """Relative position bias and mask in one tensor, (G * H, N, N)."""
        table = self.relative_position_bias_table
        index, mask = window_tables(
            rows, cols, table_window=self.window_size, mask_padding=self.mask_padding, device=table.device
        )
        num_windows = (rows.padded // rows.window) * (cols.padded // cols.window)
        N = rows.window * cols.window
        bias = table[index].view(N, N, -1).permute(2, 0, 1)
        bias = bias.expand(num_windows, -1, -1, -1) if mask is None else bias + mask
        return bias.flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, h, w, C = x.shape
        H = self.num_heads
        rows, cols = self.cut(h, w)
        shifts = (rows.shift, cols.shift)
        # Rolled here, where a token has C channels, rather than after the projection to 3 C.
        if any(shifts):
            x = x.roll((-shifts[0], -shifts[1]), (1, 2))
        qkv = self.qkv(x)
        # A padding token is zero, so the projection would make the bias of it. A masked one can be anything.
        fill = None if self.mask_padding else self.qkv.bias
        qkv = _insert_padding(_insert_padding(qkv, 1, rows, fill), 2, cols, fill)

        # (B, rows of windows, y, columns of windows, x, 3, H, d): windows become more heads, so that the bias
        # has no batch dimension and both ways of computing attention can broadcast it.
        G = (rows.padded // rows.window, cols.padded // cols.window)
        qkv = qkv.view(B, G[0], rows.window, G[1], cols.window, 3, H, C // H)
        # Unbound before the windows are cut: the gradients then return in one copy, else in two.
        shape = (B, G[0] * G[1] * H, rows.window * cols.window, C // H)
        q, k, v = (part.permute(0, 1, 3, 5, 2, 4, 6).reshape(shape) for part in qkv.unbind(5))
        out = attend(q, k, v, bias=self.bias(rows, cols), dropout=self.attn_drop if self.training else 0.0)
        out = out.view(B, *G, H, rows.window, cols.window, C // H).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(B, rows.padded, cols.padded, C)

        out = self.proj(_remove_padding(_remove_padding(out, 1, rows), 2, cols))
        if any(shifts):
            out = out.roll(shifts, (1, 2))
        return self.proj_drop(out)
