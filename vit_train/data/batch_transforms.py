"""What happens to a whole batch on the device: uint8 images in, floats for the model out.

A batch transform is a module called `transform(batch, epoch, step) -> (images, targets)`: images float
(B, C, H, W), targets as in the batch or mixed to (B, K).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_train.data.batch import Batch


class Normalize(nn.Module):
    """(x / 255 - mean) / std per channel: all that evaluation does, and training without mixing.

    Args:
        mean: per-channel mean on the 0 to 1 scale.
        std: per-channel standard deviation on the 0 to 1 scale.

    Raises:
        ValueError: different lengths, or a std that is not positive.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"expected one positive std for each mean, got mean {mean} and std {std}")
        # One multiply and one add per pixel: x * scale + bias with scale = 1 / (255 std), bias = -mean / std.
        mean_column = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        std_column = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("scale", (1 / (255 * std_column)).float(), persistent=False)
        self.register_buffer("bias", (-mean_column / std_column).float(), persistent=False)

    def forward(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Images uint8 (B, C, H, W) become float32 (B, C, H, W); targets pass through."""
        return batch.images.to(self.scale.dtype).mul_(self.scale).add_(self.bias), batch.targets
