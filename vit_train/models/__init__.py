"""The model families. Each is a plain module: images (B, C, H, W) -> logits (B, K)."""

from .deit import DeiT
from .hybrid import HybridEmbed
from .resnet import ResNet
from .swin import Swin
from .vit import ViT

__all__ = ["DeiT", "HybridEmbed", "ResNet", "Swin", "ViT"]
