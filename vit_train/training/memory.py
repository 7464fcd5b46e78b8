"""Memory of the device: what to type when it is full, and finding a micro-batch that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vit_train.errors import OutOfMemoryError, ran_out_of_memory
from vit_train.system.memory import available_memory
from vit_train.system.precision import autocast


def fit_micro_batch(trainer: Any, batch_size: int) -> int:
    """Doubles the number of micro-batches until one of them, and an optimizer step, fit in memory.

    Where twice as many do not divide the batch it is the next number that does. The batch, and so what a
    step learns from, stays as large. Nothing of the trainer changes but `grad_accum_steps`; weights and
    running statistics are put back.

    Args:
        trainer: before its first step.
        batch_size: images per step on this device.

    Returns:
        The number of micro-batches.

    Raises:
        OutOfMemoryError: not even one image fits.
    """
    statistics = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    pieces = trainer.grad_accum_steps
    try:
        while not _fits(trainer, -(-batch_size // pieces), batch_size):
            finer = _next_divisor(batch_size, pieces)
            if finer is None:
                raise OutOfMemoryError(
                    "out of memory with micro-batches of one image; type a smaller model or data.img_size"
                )
            pieces = finer
    finally:
        for name, buffer in trainer.model.named_buffers():
            buffer.copy_(statistics[name])
    return pieces


def _fits(trainer: Any, images: int, batch_size: int) -> bool:
    """A forward and backward pass, beside as much memory as the batch and the optimizer will take.

    A second one where there are several micro-batches: the gradients of the first are there by then.
    """
    data, device = trainer.parts.data, trainer.strategy.device
    try:
        # AdamW's two averages
        slots = [torch.empty_like(p) for p in trainer.model.parameters() if p.requires_grad for _ in range(2)]
        batch = torch.zeros(batch_size, data.in_channels, data.img_size, data.img_size, device=device)
        y = torch.zeros(images, dtype=torch.int64, device=device)
        for _ in range(1 if images == batch_size else 2):
            with autocast(trainer.precision, device):
                loss, *_ = trainer.objective(trainer.forward, batch[:images], y)
            loss.backward()
        del slots
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return False
    finally:
        trainer.model.zero_grad(set_to_none=True)
    return True


def shortage(needed: int, device: torch.device) -> list[str]:
    """A note where a training step needs more bytes than are free on its device, else none.

    Linux may end what takes too much of the machine's memory with SIGKILL, and then nothing else is said.
    """
    free = available_memory(device)
    if needed <= free:
        return []
    return [
        f"a training step needs about {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free: "
        "type a smaller data.batch_size or model, or a larger trainer.grad_accum_steps for the same batch"
    ]


def advice(config: Mapping[str, Any], name: str, device: torch.device, error: Exception) -> str:
    """One line for a run of the model `name` that ran out of memory."""
    batch, pieces = config["data"]["batch_size"], config["trainer"]["grad_accum_steps"]
    said = " ".join(str(error).split("\n")[0].split())
    total = ""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device) / 2**30
        size = torch.cuda.get_device_properties(device).total_memory / 2**30
        total = f"; {used:.1f} of {size:.1f} GiB were in use"
    finer = _next_divisor(batch, pieces)
    typed = (
        "each micro-batch is already a single image: type a smaller model or data.img_size"
        if finer is None
        else f"type trainer.grad_accum_steps={finer} for the same batch in less memory "
        "(trainer.auto_batch=true finds the number), or a smaller data.batch_size"
    )
    return (
        f"out of memory: {name} with data.batch_size={batch} in {pieces} micro-batches of {batch // pieces}"
        f"{total} ({said}); {typed}"
    )


def _next_divisor(batch: int, pieces: int) -> int | None:
    """The smallest divisor at least twice as large; None where a piece is one image already."""
    return next((n for n in range(2 * pieces, batch + 1) if batch % n == 0), None)
