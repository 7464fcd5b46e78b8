"""Pretrained weights in, and out under other projects' names. Knows models; knows no trainer and no Hydra."""

from .load import LoadReport, load_pretrained
from .names import Layout, state_dict_named
from .source import Pretrained, read_pretrained

__all__ = [
    "Layout",
    "LoadReport",
    "Pretrained",
    "load_pretrained",
    "read_pretrained",
    "state_dict_named",
]
