"""Where the work runs: one device, or several GPUs in one process.

`SingleDevice` is the no-op base; a strategy overrides the few places where its kind of distribution differs.
The loop sees only this interface. The only module that may import torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import parallel_apply, replicate
from torch.optim import Optimizer

from vit_train.construct import Threads
from vit_train.data import Batch
from vit_train.system import memory
from vit_train.training.ema import Ema
from vit_train.training.optimizers import load_named_state, named_state

Outputs = Tensor | tuple[Tensor, ...]


def resolve_device(device: str, *, advice: str = "strategy.device=auto") -> torch.device:
    """`auto` is the accelerator that is there (cuda, mps), else the cpu. `advice` is typed for it.

    Raises:
        ValueError: the named device is not there.
    """
    if device == "auto":
        # without check_available a CUDA build answers "cuda" on a machine that has no driver
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N, mps") from None
    if wanted.type != "cpu":
        found = torch.accelerator.current_accelerator(check_available=True)
        count = torch.accelerator.device_count() if found else 0
        if found is None or found.type != wanted.type or (wanted.index or 0) >= count:
            has = f"{count} x {found.type}" if found else "no accelerator"
            raise ValueError(f"device {device!r} is not available: torch sees {has}; type {advice}")
    return wanted


class SingleDevice:
    """One process, one device.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        num_threads: CPU threads torch computes with; null leaves it to torch (one per core). Threads wait for
            one another by spinning, so for a tiny model on a busy machine one thread is many times faster.

    Raises:
        ValueError: the device is not there.
    """

    rank = 0
    world_size = 1
    supports_compile = True

    def __init__(self, *, device: str = "auto", num_threads: Threads | None = None) -> None:
        self.device = resolve_device(device)
        self.num_threads = num_threads

    def start(self) -> None:
        """Joins the other ranks. Called once, before anything is built on a device."""
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        if self.device.type == "cpu":
            memory.keep_freed()

    def describe(self) -> str:
        """For the summary: which device, how much of it."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} ({self.device})"
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            return f"cpu, {threads} thread{'s' if threads > 1 else ''}"
        return str(self.device)

    def wrap(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """The callable a forward pass goes through; `model` itself keeps parameters and clean names."""
        return model

    def grad_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[object]:  # noqa: ARG002
        """Context of a backward pass that does or does not exchange gradients."""
        return nullcontext()

    def to_device(self, batch: Batch) -> Batch:
        """Copies a batch, without waiting where its memory is pinned."""
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Maximum over ranks."""
        return x

    def clip_grad_norm(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Total gradient norm as a scalar tensor; scales gradients down to `max_norm` where it is given."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def snapshot(self, model: nn.Module, ema: Ema | None, optimizer: Optimizer) -> dict[str, Tensor]:
        """CPU copies of everything trained, owned by the caller: `model/...`, `ema/...`, `optimizer/...`.

        Called on every rank; other ranks than 0 get an empty dict.
        """
        live = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        if ema is not None:
            live |= {f"ema/{name}": tensor for name, tensor in ema.module.state_dict().items()}
        live |= {f"optimizer/{name}": tensor for name, tensor in named_state(model, optimizer).items()}
        # contiguous() may return the live tensor itself, which the next step would change: copy always
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            for name, tensor in live.items()
        }

    def restore(
        self, tensors: Mapping[str, Tensor], model: nn.Module, ema: Ema | None, optimizer: Optimizer | None
    ) -> None:
        """Puts a snapshot back, strictly.

        Raises:
            RuntimeError, ValueError: names or shapes do not fit this model.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        model.load_state_dict(parts["model"])
        if ema is not None:
            ema.module.load_state_dict(parts["ema"])
        if optimizer is not None:
            load_named_state(model, optimizer, parts["optimizer"])


def scatter(images: Tensor, devices: list[torch.device]) -> list[Tensor]:
    """Cuts (B, ...) into one share per device, the first ones larger by one where B does not divide.

    A batch smaller than the number of devices leaves the last devices without a share.
    """
    shares = images.tensor_split(len(devices))
    return [s.to(d, non_blocking=True) for s, d in zip(shares, devices) if len(s)]


def gather(outputs: list[Outputs], device: torch.device) -> Outputs:
    """Concatenates the shares' outputs (or tuples of outputs) in order, on one device."""
    first = outputs[0]
    if isinstance(first, tuple):
        columns = zip(*outputs)
        return tuple(torch.cat([piece.to(device) for piece in column]) for column in columns)
    return torch.cat([output.to(device) for output in outputs if isinstance(output, Tensor)])


class DataParallel(SingleDevice):
    """Several GPUs in one process: weights are replicated each step, the batch is scattered, logits gathered.

    The loss is computed on the gathered logits, so it is the mean over the whole batch however unevenly the
    batch was cut. One GPU per process (DDP) scales better; this needs no launcher.

    Args:
        devices: such as [cuda:0, cuda:1]; null takes every visible GPU. A device may be named twice, and
            several `cpu` entries run one after another, which computes the same.
        num_threads: CPU threads, see `SingleDevice`.

    Raises:
        ValueError: there is no GPU and none was named, or a named device is not there.
    """

    supports_compile = False  # replicas are made anew each step, so each step would compile anew

    def __init__(self, *, devices: tuple[str, ...] | None = None, num_threads: Threads | None = None) -> None:
        if devices is None:
            devices = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
            if not devices:
                raise ValueError("strategy data_parallel finds no GPU; type strategy=single")
        if not devices:
            raise ValueError("strategy.devices is empty; name at least one device or type strategy=single")
        self.devices = [resolve_device(device) for device in devices]
        super().__init__(device=devices[0], num_threads=num_threads)

    def describe(self) -> str:
        """For the summary: how many devices of which kind."""
        return f"{super().describe()}, data parallel over {', '.join(map(str, self.devices))}"

    def wrap(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """A forward pass over all devices; autograd brings the gradients back to the first."""

        def forward(images: Tensor) -> Outputs:
            shares = scatter(images, self.devices)
            devices = self.devices[: len(shares)]
            if len(shares) == 1:
                return model(shares[0])
            if self.device.type != "cuda":
                return gather([model(share) for share in shares], self.device)
            replicas = replicate(model, devices, detach=not torch.is_grad_enabled())
            calls: Any = [self._in_thread(replica, i) for i, replica in enumerate(replicas)]
            return gather(parallel_apply(calls, [(share,) for share in shares], None, devices), self.device)

        return forward

    def _in_thread(self, replica: nn.Module, number: int) -> Callable[[Tensor], Any]:
        """A replica with this thread's autocast and a random stream of its own.

        Autocast's type belongs to a thread: parallel_apply carries over that it is on, not that it is bf16.
        """
        kind = self.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def forward(share: Tensor) -> Any:
            if share.is_cuda:  # every device was seeded alike: their dropout masks would be as well
                torch.cuda.manual_seed(torch.cuda.initial_seed() + number)
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                return replica(share)

        return forward


def auto(*, device: str = "auto", num_threads: Threads | None = None) -> SingleDevice:
    """`data_parallel` when more than one GPU is visible and no launcher set ranks, else `single`.

    Args:
        device: auto, cpu, cuda, cuda:N or mps; naming one GPU uses just that one.
        num_threads: CPU threads, see `SingleDevice`.
    """
    launched = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    if device in ("auto", "cuda") and torch.cuda.device_count() > 1 and not launched:
        return DataParallel(num_threads=num_threads)
    return SingleDevice(device=device, num_threads=num_threads)
