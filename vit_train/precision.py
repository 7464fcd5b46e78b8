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
    """`auto` becomes bf16 where the hardware computes in it (the CPU included), else fp32.

    Raises:
        ValueError: fp16 on a CPU, where it is slower than fp32 and has no loss scaling worth using.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; on a CPU type trainer.precision=bf16 or fp32")
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device) else "fp32"


def inference_precision(trained_in: object, device: torch.device) -> Precision:
    """The precision a model was trained in, where this device computes in it; else what `auto` means here.

    Args:
        trained_in: as a configuration holds it; whatever is no precision counts as auto.
        device: where the model is now, which may not be where it was trained.
    """
    if trained_in == "fp32" or (trained_in == "fp16" and device.type != "cpu"):
        return trained_in
    return resolve_precision("auto", device)


@cache
def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16; where it is emulated it is many times slower than fp32.

    A CPU does with AVX-512 BF16 or AMX on x86, with the bf16 extension on Arm Linux. On mps autocast covers
    too few operators to gain.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " bf16" in cpuinfo.read_text(errors="replace")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context forward passes run in, whatever the one around it: a teacher has its own."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; for everything else a disabled scaler, which is a no-op."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
