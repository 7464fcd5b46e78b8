"""Randomness as a function, not a state.

Every random draw is seeded from what it is *for* - (seed, purpose, epoch, index, ...) - immediately before it
happens. Nothing has to be saved to resume bit for bit, worker count cannot change a batch, and skipping
ahead costs nothing. This module is the only place that touches a global generator.
"""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch
from torch import Tensor

_MAX_NUMPY_SEED = 2**32
_WORD = 2**32 - 1
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: multiples of it are spread evenly


def mix(*parts: int | str) -> int:
    """Hashes the parts into one 63-bit seed.

    blake2b rather than `hash()` (salted per process) or a sum (collides): the same parts give the same seed
    on every machine and in every worker, and neighbouring parts give unrelated seeds.
    """
    text = ",".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(index: Tensor, draw: Tensor, num: int, *parts: int | str) -> Tensor:
    """Random numbers of samples, by arithmetic on their ids: the same on every device and in every batch.

    Integers only until the last step, so that no rounding depends on the device. The scrambling is Thomas
    Mueller's 32-bit hash (https://stackoverflow.com/a/12996028): its multiplier keeps products within int64.

    Args:
        index: (B,) int64, sample ids.
        draw: (B,) int64, which repeat of the sample.
        num: numbers per sample.
        parts: what they are for, such as (seed, "augment", epoch).

    Returns:
        (B, num) float32 in [0, 1), multiples of 2**-24.
    """
    seed = mix(*parts)
    sample = _scramble(_scramble(index & _WORD ^ seed & _WORD) + draw * _GOLDEN & _WORD)
    streams = torch.arange(num, device=index.device) * _GOLDEN + (seed >> 31)
    return (_scramble(sample[:, None] ^ _scramble(streams & _WORD)) >> 8).float() * 2.0**-24


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 0..2**32-1 in which every bit depends on every other."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _WORD
    return (x >> 16) ^ x


def seed_cpu(*parts: int | str) -> None:
    """Seeds torch's CPU generator, `random` and numpy from the parts (about 7 us).

    For CPU-side sample transforms. `torch.manual_seed` would cost ten times as much, because it also walks
    every accelerator.
    """
    seed = mix(*parts)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % _MAX_NUMPY_SEED)


def seed_device(device: torch.device, *parts: int | str) -> None:
    """Seeds the generators a forward pass on `device` draws from (dropout, drop path, weight init)."""
    seed = mix(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        getattr(module, "manual_seed_all", module.manual_seed)(seed)  # mps has one device and no _all


def use_deterministic_operators(only: bool) -> None:
    """Makes an operator that has no deterministic implementation an error, or allows all of them again.

    Called before the first matrix product on a GPU: cuBLAS reads its workspace setting once
    (https://docs.nvidia.com/cuda/cublas, "Results reproducibility").
    """
    if only:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(only)
    torch.backends.cudnn.benchmark = False
