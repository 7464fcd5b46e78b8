"""What a model costs before it costs anything: multiply-adds, and the memory of a training step by layer.

Nothing here computes or takes memory. Shapes and multiply-adds come from the meta device. What a training
step keeps for its backward pass is counted with torch's saved-tensor hooks on fake tensors: without memory
too, but with the device and the autocast of the real ones, so that the same operators run.

Shapes: B batch, C channels, H W pixels; h w grid, N tokens, D width inside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from vit_train.layers import Block, ConvGroup
from vit_train.layers.window import forget_indices
from vit_train.system.precision import Precision, autocast

Shape = tuple[int, ...]


@dataclass
class Layer:
    """One row: a module, or what the model does outside of those.

    Attributes:
        name: of the module, as in `named_modules()`; of parameters that belong to the model itself.
        input, output: shapes without the batch; None where it is not a module.
        parameters: how many numbers it learns or keeps frozen.
        frozen: how many of them it keeps.
        multiply_adds: of one image.
        activation_bytes: what it keeps for the backward pass of one batch.
    """

    name: str
    input: Shape | None = None
    output: Shape | None = None
    parameters: int = 0
    frozen: int = 0
    multiply_adds: int = 0
    activation_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes a training step holds on its device, less what the kernels use for themselves."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    teacher: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


def multiply_adds(model: nn.Module, *, in_channels: int, img_size: int) -> int:
    """Multiply-adds of one forward pass of one image, attention included.

    Half of what torch's FLOP counter says. Papers print this number as "FLOPs" (17.6 G for ViT-B/16).

    Args:
        model: left as it is; a copy without weights is counted, which computes nothing.
        in_channels: of the image.
        img_size: side in pixels.

    Raises:
        ValueError: the model does not take such images.
    """
    # on the meta device, whatever the model's: the counter does not know the fused attention of a CPU
    counted = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(torch.empty(1, in_channels, img_size, img_size, device="meta"))
    return int(counter.get_total_flops()) // 2


def layers_of(
    model: nn.Module, batch_shape: Shape, *, precision: Precision, device: torch.device
) -> list[Layer]:
    """The rows of the table; their figures add up to the model's.

    Args:
        model: on the meta device, with what is frozen frozen.
        batch_shape: (B, C, H, W) of the images that go through the model at once.
        precision: of the training step, not auto.
        device: where training will run; nothing is put there.

    Raises:
        ValueError: the model does not take such images.
    """
    own = [name for name, _ in model.named_parameters(recurse=False)]
    rows = {"": _row(", ".join(own) or "(between)", model.parameters(recurse=False))}
    rows |= {name: _row(name, module.parameters()) for name, module in _parts(model)}
    _count_multiply_adds(model, rows, torch.empty(1, *batch_shape[1:], device="meta"))
    kept = kept_for_backward(model, batch_shape, precision=precision, device=device)
    for name, nbytes in kept.items():
        rows[name].activation_bytes += nbytes
    return [row for row in rows.values() if row.parameters or row.multiply_adds or row.activation_bytes]


def kept_for_backward(
    model: nn.Module, batch_shape: Shape, *, precision: Precision, device: torch.device
) -> dict[str, int]:
    """Bytes of the tensors a forward pass in training saves, by the part of the model that saves them first.

    Each storage counts once; parameters and buffers are not counted. Under autocast the copies of the weights
    in the lower precision are, and the two statistics a norm keeps of each token count 2 bytes instead of 4:
    less than one percent of the whole.

    Args:
        model: on the meta device; its mode is set to training.
        batch_shape: (B, C, H, W).
        precision: not auto.
        device: whose operators are taken.

    Returns:
        Bytes by the names of the parts; "" is the model outside of them.
    """
    kept: dict[str, int] = {}
    running = ""
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage gets the same address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            kept[running] = kept.get(running, 0) + storage.nbytes()
        return tensor

    def enter(name: str, _inputs: Any) -> None:
        nonlocal running
        running = name

    def leave(_name: str, _output: Any) -> None:
        nonlocal running
        running = ""

    with ExitStack() as stack:
        stack.enter_context(_watching(model, enter, leave))
        stack.callback(forget_indices)  # those made here are fake
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device).requires_grad_(
                tensor.requires_grad
            )
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        seen |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in state.values()}
        images = torch.empty(batch_shape, device=device)
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        stack.enter_context(autocast(precision, device))
        functional_call(model.train(), state, (images,))
    return kept


def memory_of(
    model: nn.Module,
    layers: list[Layer],
    *,
    make_optimizer: Callable[[nn.Module], Optimizer],
    has_ema: bool,
    teacher: nn.Module | None = None,
) -> Memory:
    """What a training step holds.

    Args:
        model: on the meta device, with what is frozen frozen.
        layers: its rows.
        make_optimizer: as the trainer calls it; one step is done, so that it shows what it keeps.
        has_ema: whether averaged weights are kept as well.
        teacher: a model that is only asked, and keeps nothing for a backward pass.
    """
    weights, taught = (
        sum(tensor.nbytes for tensor in kept.state_dict().values()) if kept else 0
        for kept in (model, teacher)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Memory(
        parameters=weights,
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=_optimizer_bytes(make_optimizer(model), trained),
        ema=weights if has_ema else 0,
        teacher=taught,
        activations=sum(layer.activation_bytes for layer in layers),
    )


def _optimizer_bytes(optimizer: Optimizer, parameters: list[nn.Parameter]) -> int:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    slots = (slot for state in optimizer.state.values() for slot in state.values())
    return sum(slot.nbytes for slot in slots if isinstance(slot, Tensor))


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that make a row, in order: blocks, groups, and whatever holds none."""
    for name, module in model.named_children():
        full = f"{prefix}{name}"
        whole = Block | ConvGroup
        if not isinstance(module, whole) and any(isinstance(m, whole) for m in module.modules()):
            yield from _parts(module, f"{full}.")
        else:
            yield full, module


def _count_multiply_adds(model: nn.Module, rows: dict[str, Layer], images: Tensor) -> None:
    counter = FlopCounterMode(display=False)
    started: dict[str, int] = {}

    def enter(name: str, inputs: Any) -> None:
        rows[name].input, started[name] = _shape(inputs), counter.get_total_flops()

    def leave(name: str, output: Any) -> None:
        rows[name].output = _shape(output)
        rows[name].multiply_adds += (counter.get_total_flops() - started[name]) // 2

    with _watching(model, enter, leave), torch.no_grad(), counter:
        model.eval()(images)
    rows[""].multiply_adds = counter.get_total_flops() // 2 - sum(row.multiply_adds for row in rows.values())


@contextmanager
def _watching(
    model: nn.Module, enter: Callable[[str, Any], None], leave: Callable[[str, Any], None]
) -> Iterator[None]:
    """Calls `enter(name, inputs)` and `leave(name, output)` before and after each part computes."""
    with ExitStack() as hooks:
        for part, module in _parts(model):
            before = module.register_forward_pre_hook(lambda _, inputs, name=part: enter(name, inputs))
            after = module.register_forward_hook(lambda _, __, output, name=part: leave(name, output))
            hooks.enter_context(before)
            hooks.enter_context(after)
        yield


def _shape(values: Any) -> Shape | None:
    first = values[0] if isinstance(values, tuple) and values else values
    return tuple(first.shape[1:]) if isinstance(first, Tensor) else None


def _row(name: str, parameters: Iterator[nn.Parameter]) -> Layer:
    counted = [(p.numel(), p.requires_grad) for p in parameters]
    frozen = sum(n for n, trains in counted if not trains)
    return Layer(name, parameters=sum(n for n, _ in counted), frozen=frozen)
