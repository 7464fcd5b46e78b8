"""Numeric precision: what `auto` means on this hardware, the autocast context, the loss scaler."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`auto` becomes bf16 where that is faster (the CPU included), else fp32.

    Raises:
        ValueError: fp16 on a CPU, where it is slower than fp32 and has no loss scaling worth using.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; on a CPU type trainer.precision=bf16 or fp32")
    if precision != "auto":
        return precision
    return "bf16" if bf16_is_faster(device) else "fp32"


def inference_precision(trained_in: object, device: torch.device) -> Precision:
    """The precision a model was trained in, where it is fast on this device; else what `auto` means here.

    Args:
        trained_in: as a configuration holds it; whatever is not a precision counts as auto.
        device: where the model is now, which may not be where it was trained.
    """
    if trained_in == "fp32" or (trained_in == "fp16" and device.type != "cpu"):
        return trained_in
    return resolve_precision("auto", device)


@cache
def bf16_is_faster(device: torch.device) -> bool:
    """Whether the hardware is faster in bf16 than in fp32; where it emulates bf16 it is many times slower.

    On x86 that takes AMX, or the AVX-512 BF16 of AMD: with Intel's and no AMX, training is a third slower
    than in fp32 (docs/RESULTS.md). On Arm Linux it takes the bf16 extension. On mps autocast covers too few
    operators to gain.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    file = Path("/proc/cpuinfo")
    about = file.read_text(errors="replace") if file.exists() else platform.processor()
    if platform.machine().lower() in ("x86_64", "amd64"):
        pays = torch.cpu._is_avx512_bf16_supported() and "GenuineIntel" not in about
        return bool(torch.cpu._is_amx_tile_supported() or pays)
    return " bf16" in about


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context forward passes run in, whatever the one around it: a teacher has its own."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; for everything else a disabled scaler, which is a no-op."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
