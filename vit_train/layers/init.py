"""Initial weights of the transformer parts: those of the ViT paper's own code, with three differences.

google-research/vision_transformer (vit_jax/models_vit.py), value by value:

    query, key, value    Xavier uniform, each a matrix of its own; ours stand in one weight
    attn.proj, MLP       Xavier uniform, bias 0 (1e-6 in their MLP); at choice attn.proj and fc2 start
                         at 0 (`init_identity`)
    patch projection     LeCun normal, JAX's default: tokens start with the variance of the pixels
    head                 differs: 0 there. Here so on pretrained weights, where the first loss is then ln K;
                         from scratch Xavier uniform, which learns faster (docs/RESULTS.md)
    positions            differs: normal, deviation 0.02, there. Here the sines and cosines of the grid, as in
                         "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022), learned from there
    class token          differs: 0 there. Here deviation 0.02, as in DeiT

The deviation of 0.02 that DeiT, Swin and timm use for linear layers is Xavier's for a width of 2,500: a sixth
of it at a width of 64, where a narrow model hardly starts to learn. Swin's are Xavier uniform here too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TOKEN_STD = 0.02  # of class tokens and relative position bias, truncated at +-2: DeiT, Swin, timm
_WAVELENGTHS = 10_000.0
NEIGHBOURS = 0.9  # correlation of neighbouring pixels, and of colours; of CIFAR's 0.91, and 0.80 to 0.92


def init_linear(module: nn.Module, *, matrices: int = 1) -> None:
    """Xavier uniform weight of an nn.Linear, or of that many `matrices` stacked in it, and bias 0."""
    if isinstance(module, nn.Linear):
        for matrix in module.weight.detach().chunk(matrices):
            nn.init.xavier_uniform_(matrix)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_projection(conv: nn.Conv2d) -> None:
    """LeCun normal weight, zero bias."""
    fan_in = conv.in_channels * math.prod(conv.kernel_size)
    nn.init.trunc_normal_(conv.weight, std=math.sqrt(1 / fan_in))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def sincos_positions(h: int, w: int, dim: int) -> Tensor:
    """Sines and cosines of column and row at dim / 4 wavelengths each: (h * w, dim).

    Two-dimensional form of Vaswani et al. 2017, as MoCo v3 and "Better plain ViT baselines for ImageNet-1k"
    (Beyer et al. 2022) use it. What `dim` has beyond a multiple of 4 stays zero.
    """
    quarter = dim // 4
    frequency = _WAVELENGTHS ** (-torch.arange(quarter) / max(1, quarter))
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequency for axis in (column, row)], dim=1)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(waves, (0, dim - waves.shape[1]))


def init_whitening(conv: nn.Conv2d) -> None:
    """Filters (8 C, C, 2, 2) whose outputs on natural images are nearly uncorrelated and of like size.

    The principal components of patches in which neighbouring pixels and colours correlate by `NEIGHBOURS`,
    over their deviation: sums and differences along each axis (Haar's wavelets) of the mean colour and of
    cosines over the colours. Each has both signs, of which GELU passes one.
    """
    colours, r = torch.arange(conv.in_channels), NEIGHBOURS
    axis = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / torch.tensor([[2 * (1 + r)], [2 * (1 - r)]]).sqrt()
    waves = torch.cos(math.pi * (colours + 0.5) * colours[:, None] / len(colours))
    variances = torch.where(colours == 0, 1 + (len(colours) - 1) * r, 1 - r)
    waves = waves / (waves.norm(dim=1) * variances.sqrt())[:, None]
    filters = torch.einsum("dc,ei,fj->defcij", waves, axis, axis).flatten(0, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.cat([filters, -filters]))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
