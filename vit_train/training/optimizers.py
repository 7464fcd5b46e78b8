"""Optimizer factories: a factory takes the model and returns a torch optimizer.

Parameters are grouped here, once, by name and shape.

Sources: decoupled weight decay, Loshchilov and Hutter 2019 (arXiv 1711.05101); no decay on norms, biases and
position tables as in DeiT and Swin; a learning rate that falls from layer to layer, Clark et al. 2020
(ELECTRA), for vision Bao et al. 2022 (BEiT).
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer

from vit_train.construct import Fraction, NotNegativeFloat, PositiveFloat, Share
from vit_train.layers import Block
from vit_train.text import suggest
from vit_train.training.muon import Muon


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float,
    layer_decay: float = 1.0,
    norm_bias_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; vectors (norms, biases) and what the model names do not.

    With `layer_decay` there are two for each layer, from the head down: the head learns at `lr`, the last
    block at `lr * layer_decay`, the one below at `lr * layer_decay ** 2`, down to the patch embedding.

    Args:
        model: every parameter with `requires_grad` lands in exactly one group. It may have a method
            `no_weight_decay`, which returns names as in `named_parameters()`.
        weight_decay: of the groups that decay.
        lr: of the head.
        layer_decay: factor from one layer to the one below it; 1 is the same rate for all.
        norm_bias_factor: of the rate of the biases of batch norms, which are then groups of their own.

    Raises:
        ValueError: the model has no blocks to count.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    layers = dict.fromkeys(dict(model.named_parameters()), 0) if layer_decay == 1 else layer_ids(model)
    top = max(layers.values())
    groups: dict[tuple[int, bool, float], dict[str, Any]] = {
        (layer, decays, factor): {
            "params": [],
            "lr": lr * layer_decay ** (top - layer) * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for layer in range(top, -1, -1)  # the head first: its rate is the one that is logged
        for decays, factor in ((True, 1.0), (False, 1.0), (False, norm_bias_factor))
    }
    norms = (name for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    norm_biases = {f"{name}.bias" for name in norms}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in exempt
            factor = norm_bias_factor if name in norm_biases else 1.0
            groups[layers[name], decays, factor]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter: 0 what comes before the first block, n block n, then norm and head.

    What stands between two blocks (Swin's patch merging) belongs to the one that follows.

    Raises:
        ValueError: the model has no `Block`.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"layer_decay needs a model of blocks; {type(model).__name__} has none")
    ids, seen = {}, 0
    for name, _ in model.named_parameters():
        inside = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        seen = seen if inside is None else inside + 1
        ids[name] = seen if inside is not None or seen == 0 else seen + 1
    return ids


def freeze_parts(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Parts of a model that training leaves as they are.

    A frozen batch norm also keeps its statistics: it stays in evaluation mode.

    Args:
        model: its parameters lose `requires_grad`.
        names: of modules or parameters, as in `named_parameters()`; blocks.0-5 is blocks.0 to blocks.5.

    Returns:
        The model itself.

    Raises:
        ValueError: the model has no part of that name, or nothing would be left to train.
    """
    parameters = dict(model.named_parameters())
    for prefix in itertools.chain.from_iterable(map(_each, names)):
        frozen = [name for name in parameters if name == prefix or name.startswith(f"{prefix}.")]
        if not frozen:
            known = [name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))]
            raise ValueError(
                f"freeze: {type(model).__name__} has no {prefix!r}{suggest(prefix, known)} "
                f"(it has {', '.join(known)})"
            )
        for name in frozen:
            parameters[name].requires_grad_(False)
        for name, module in model.named_modules():
            if f"{name}.".startswith(f"{prefix}.") and isinstance(module, _BatchNorm):
                module.train = types.MethodType(_stay, module.eval())  # type: ignore[method-assign]
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("freeze leaves nothing to train")
    return model


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001
    return module


def _each(name: str) -> list[str]:
    """blocks.0-2 -> blocks.0, blocks.1, blocks.2.

    Raises:
        ValueError: a range runs backwards.
    """
    parts = []
    for part in name.split("."):
        span = re.fullmatch(r"(\d+)-(\d+)", part)
        if span and int(span[1]) > int(span[2]):
            raise ValueError(f"freeze: {part} in {name!r} runs backwards; type {span[2]}-{span[1]}")
        parts.append([str(i) for i in range(int(span[1]), int(span[2]) + 1)] if span else [part])
    return [".".join(chosen) for chosen in itertools.product(*parts)]


def _fused(model: nn.Module) -> bool:
    """One kernel for all parameters where torch has it (cpu, cuda, mps): several times the loop's speed."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    return kinds <= {"cpu", "cuda", "mps"} and all(p.is_floating_point() for p in model.parameters())


def auto_lr(model: nn.Module, *, fine_tuned: bool) -> tuple[float, str]:
    """The rate that `lr: auto` means for AdamW and batches of about 64 images, and the reason.

    It falls with the width, that of most blocks, as Adam's does (Yang et al. 2022, arXiv 2203.03466). A
    `fine_tuned` model starts from trained weights: a tenth.
    """
    widths = [module.norm1.normalized_shape[0] for module in model.modules() if isinstance(module, Block)]
    width = sorted(widths)[len(widths) // 2] if widths else getattr(model, "embed_dim", None)
    reason = f"{'blocks' if widths else 'a model'} of width {width}"
    if not isinstance(width, int):
        width, reason = 384, f"{type(model).__name__} has no blocks and no embed_dim that gives its width"
    lr = 1e-3 if width <= 192 else 5e-4 if width <= 384 else 2e-4
    if not fine_tuned:
        return lr, reason
    return lr / 10, f"{reason}; a tenth of the usual rate, to keep what the pretrained weights have learned"


def adamw(
    model: nn.Module,
    *,
    lr: PositiveFloat | Literal["auto"],
    weight_decay: NotNegativeFloat = 0.05,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: PositiveFloat = 1e-8,
    layer_decay: Share = 1.0,
) -> Optimizer:
    """AdamW with decay groups (`decay_groups`).

    Args:
        model: whose parameters are optimised.
        lr: base learning rate; the schedule multiplies it. `auto` is resolved before (`auto_lr`).
        weight_decay: decoupled, of matrices only.
        betas: decay of the two moment averages.
        eps: added to the denominator.
        layer_decay: factor of the rate from one layer to the one below it; for fine-tuning.
    """
    assert lr != "auto", "config/parts.py resolves it"
    groups = decay_groups(model, weight_decay, lr=lr, layer_decay=layer_decay)
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=_fused(model))


def adam(
    model: nn.Module,
    *,
    lr: PositiveFloat,
    weight_decay: NotNegativeFloat = 0.0,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: PositiveFloat = 1e-8,
) -> Optimizer:
    """Plain Adam, one group (weight decay is L2 on everything, as the tutorials have it)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Adam(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_fused(model))


def sgd(
    model: nn.Module,
    *,
    lr: PositiveFloat,
    weight_decay: NotNegativeFloat = 0.0,
    momentum: Fraction = 0.9,
    nesterov: bool = False,
    layer_decay: Share = 1.0,
    norm_bias_factor: PositiveFloat = 1.0,
) -> Optimizer:
    """SGD with momentum and decay groups (`decay_groups`)."""
    return SGD(
        decay_groups(model, weight_decay, lr=lr, layer_decay=layer_decay, norm_bias_factor=norm_bias_factor),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        fused=_fused(model),
    )


def muon(
    model: nn.Module,
    *,
    lr: PositiveFloat,
    weight_decay: NotNegativeFloat = 0.05,
    momentum: Fraction = 0.95,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: PositiveFloat = 1e-8,
    layer_decay: Share = 1.0,
) -> Optimizer:
    """Muon for the matrices between the pixels and the head, AdamW for all else, with decay groups.

    Query, key and value are three matrices, though one weight holds them. Both optimizers take the same rate
    and weight decay; `betas` and `eps` are AdamW's, see `adamw`. `momentum` is Nesterov's, of Muon.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    matrices = {
        id(p): 3 if f".{name}".endswith(".qkv.weight") and len(p) == 3 * p.shape[1] else 1
        for name, p in model.named_parameters()
        if p.ndim == 2 and name not in exempt and not name.startswith("head")
    }
    by_muon: list[dict[str, Any]] = []
    by_adamw: list[dict[str, Any]] = []
    for group in decay_groups(model, weight_decay, lr=lr, layer_decay=layer_decay):
        if rest := [p for p in group["params"] if id(p) not in matrices]:
            by_adamw.append(group | {"params": rest})
        for number in (1, 3):
            if chosen := [p for p in group["params"] if matrices.get(id(p)) == number]:
                by_muon.append(group | {"params": chosen, "matrices": number})
    parts: list[Optimizer] = [AdamW(by_adamw, lr=lr, betas=betas, eps=eps, fused=_fused(model))]
    if by_muon:
        parts.append(Muon(by_muon, lr=lr, momentum=momentum))
    return Together(parts)


class Together(Optimizer):
    """Optimizers of different kinds as one, with one list of groups and one state.

    Args:
        parts: each with parameters of its own; the first group of the first is the one that is logged.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(itertools.islice(groups, len(part.param_groups)))
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:  # how torch's load_state_dict ends
        super().__setstate__(state)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)


def set_lr(optimizer: Optimizer, multiplier: float) -> None:
    """Sets every group's rate to its own base rate times the multiplier."""
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * multiplier


def named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer tensors as `<parameter name>/<slot>`; hyperparameters stay in the configuration."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def load_named_state(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restores `named_state`, whatever the order of the parameters now is.

    Raises:
        ValueError: a tensor belongs to no parameter, or a parameter's shape differs.
    """
    parameters = dict(model.named_parameters())
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"optimizer state {key!r} belongs to no parameter of this model")
        if tensor.ndim and tensor.shape != parameters[name].shape:
            expected = tuple(parameters[name].shape)
            raise ValueError(f"optimizer state {key!r} has shape {tuple(tensor.shape)}, not {expected}")
        slots.setdefault(name, {})[slot] = tensor
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: slots[names[id(p)]] for i, p in enumerate(order) if names[id(p)] in slots}
    # torch's own loader moves each slot to where this optimizer wants it (a fused step counts on the device)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
