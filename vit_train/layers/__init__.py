"""The parts vision transformers are made of. Imports torch and nothing else."""

from .attention import Attention, attend
from .block import Block, init_identity
from .conv_trunk import ConvGroup, ConvTrunk, TrunkEmbed
from .drop_path import DropPath, drop_path_schedule
from .init import init_linear, init_projection
from .mlp import Mlp
from .patch_embed import GridEmbed, PatchEmbed
from .window import WindowAttention, init_local

__all__ = [
    "Attention",
    "Block",
    "ConvGroup",
    "ConvTrunk",
    "DropPath",
    "GridEmbed",
    "Mlp",
    "PatchEmbed",
    "TrunkEmbed",
    "WindowAttention",
    "attend",
    "drop_path_schedule",
    "init_identity",
    "init_linear",
    "init_local",
    "init_projection",
]
