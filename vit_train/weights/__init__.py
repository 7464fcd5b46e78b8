"""Pretrained weights in, and out under other projects' names. Knows models; knows no trainer and no Hydra."""

from .load import LoadReport, load_pretrained
from .names import Layout, differs_in_timm, state_dict_named
from .source import Pretrained, read_pretrained

__all__ = [
    "Layout",
    "LoadReport",
    "Pretrained",
    "differs_in_timm",
    "load_pretrained",
    "read_pretrained",
    "state_dict_named",
]
