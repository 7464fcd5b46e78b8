"""From pixels to a grid of tokens.

`PatchEmbed` is ViT's linear map of each patch (Dosovitskiy et al. 2020, google-research/vision_transformer).
Anything with the interface of `GridEmbed` can take its place: the convolutions of `TrunkEmbed`, a whole CNN.

Shapes: (B, C, H, W) pixels -> (B, h, w, D) tokens, h = H / patch_size.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.construct import Dim, Side

from .checks import require_divides
from .init import init_projection


class GridEmbed(nn.Module):
    """What a model may know of its patch embedding: sizes. Subclasses add `forward`.

    Args:
        img_size: height and width of the images in pixels.
        patch_size: pixels per token along one axis.
        embed_dim: width D of the tokens.
        any_size: whether images of other sizes are welcome.
        grid_size: tokens (h, w) of an image of `img_size`; None where they are its patches.

    Raises:
        ValueError: `grid_size` is None, and `patch_size` does not divide `img_size` or (any size) is larger.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        any_size: bool = False,
        grid_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.any_size = any_size
        if grid_size is None:
            if not any_size:
                require_divides("patch_size", patch_size, "img_size", img_size)
            elif not 1 <= patch_size <= img_size:
                raise ValueError(f"patch_size {patch_size} is not between 1 and img_size {img_size}")
            grid_size = (-(-img_size // patch_size),) * 2
        self.grid_size: tuple[int, int] = grid_size

    def check_size(self, images: Tensor) -> None:
        """Raises ValueError for images (B, C, H, W) of a size this embedding was not made for."""
        H, W = images.shape[-2:]
        if self.any_size:
            if min(H, W) < self.patch_size:
                raise ValueError(f"images of {H}x{W} are smaller than one patch of {self.patch_size}")
        elif not H == W == self.img_size:
            raise ValueError(f"images are {H}x{W}, but the model was made for img_size {self.img_size}")


class PatchEmbed(GridEmbed):
    """A linear map of each patch.

    Args:
        img_size: height and width of the images in pixels.
        patch_size: height and width of a patch in pixels.
        in_channels: image channels C.
        embed_dim: width D of the tokens.
        projection: how it is computed, from the same parameters: "conv", a strided convolution, or "unfold",
            cutting the patches and one matrix product. State dicts and results are interchangeable.
        norm: LayerNorm of the tokens, as Swin has it.
        any_size: accept images of any size from one patch on, padded with zeros at the right and the bottom
            to whole patches (Swin); otherwise only `img_size`, which the patch must divide.

    Raises:
        ValueError: `patch_size` does not divide `img_size`; in forward, images of another size.
    """

    def __init__(
        self,
        *,
        img_size: Side,
        patch_size: Side,
        in_channels: Dim,
        embed_dim: Dim,
        projection: Literal["conv", "unfold"] = "conv",
        norm: bool = False,
        any_size: bool = False,
    ) -> None:
        super().__init__(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, any_size=any_size)
        self.projection = projection
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5) if norm else nn.Identity()
        init_projection(self.proj)

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        P = self.patch_size
        B, C, H, W = images.shape
        if H % P or W % P:
            images = F.pad(images, (0, -W % P, 0, -H % P))
        if self.projection == "conv":
            # Contiguous, or every later addition would keep the convolution's (B, D, h, w) memory order and
            # every norm would have to copy.
            x = self.proj(images).permute(0, 2, 3, 1).contiguous()
        else:
            h, w = images.shape[-2] // P, images.shape[-1] // P
            patches = images.reshape(B, C, h, P, w, P).permute(0, 2, 4, 1, 3, 5).reshape(B, h, w, C * P * P)
            x = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return self.norm(x)
