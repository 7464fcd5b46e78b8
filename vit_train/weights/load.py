"""Pretrained weights into a model: positions resized, the head made anew, every name accounted for.

Sources: torchvision's `interpolate_embeddings` (bicubic, corners aligned), timm's `resample_abs_pos_embed`
(bicubic, antialiased), microsoft/Swin-Transformer's `load_pretrained` for the tables of relative positions.
Each set of weights is resized as the project does whose names it has, so that fine-tuning here starts where
it would there. DeiT's names are timm's, so DeiT's files are resized as timm does (its own script leaves the
antialiasing out: 1e-4 of the logits); tables of relative positions always as microsoft/Swin-Transformer does.

Shapes: N = prefix tokens + h * w, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train.errors import ConfigError
from vit_train.models import ViT
from vit_train.text import some
from vit_train.weights.source import KEY, Pretrained, check_tensors, read_pretrained

_HEADS = ("head.", "head_dist.")
_TOKENS = ("cls_token", "dist_token")
_OR_NOT_STRICT = "choose the model the weights were trained for, or type init_strict=false to take what fits"


@dataclass
class LoadReport:
    """What became of each tensor.

    Attributes:
        source: where the weights came from, and whose names they had.
        loaded: names in the model that have the tensor of the file.
        resized: `name: from -> to` of those that were fitted.
        made_anew: names in the model that keep their random start.
        left_over: names in the file (under our names) that the model has no place for.
        passed_over: names in the file (its own) that lay beside the weights.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    made_anew: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    passed_over: Sequence[str] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (
            ("resized", self.resized),
            ("made anew", self.made_anew),
            ("left over", self.left_over),
            ("passed over", self.passed_over),
        ):
            if names:
                parts.append(f"{what}: {some(names)}")
        return f"from {self.source}: {'; '.join(parts)}"


def load_pretrained(
    model: nn.Module,
    source: str | Pretrained,
    *,
    strict: bool = True,
    class_names: Sequence[str] | None = None,
) -> LoadReport:
    """Fills a model with pretrained weights, in place.

    Args:
        model: one of ours, or any whose names the weights have.
        source: see `read_pretrained`, or what it returned.
        strict: whether a tensor that is missing, left over or of another shape is an error; where it is not,
            the model keeps its own start for it.
        class_names: of the model. Where the weights know theirs and they are others, the head is made anew,
            also if there are as many.

    Returns:
        What became of each tensor.

    Raises:
        ConfigError: strict, and something does not fit.
        CheckpointError: the source cannot be read.
    """
    pretrained = read_pretrained(source) if isinstance(source, str) else source
    own = model.state_dict()
    theirs, passed_over = _taken(own, pretrained)
    report = LoadReport(f"{pretrained.source} ({pretrained.whose})", passed_over=passed_over)
    problems: list[str] = []
    if _other_head(own, theirs, pretrained.class_names, class_names):
        report.made_anew += [name for name in own if name.startswith(_HEADS)]
        for head in _HEADS:
            for name in [n for n in own if n.startswith(head)][-2:]:  # weight and bias of its last layer
                own[name].zero_()  # on features that are trained already: the first loss is ln K
        theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith(_HEADS)}
    with torch.no_grad():
        for name, mine in own.items():
            if name in report.made_anew:
                continue
            given = theirs.pop(name, None)
            fitted = None if given is None else _fitted(name, given, mine, model, pretrained)
            if given is None or fitted is None:
                said = "missing" if given is None else f"{_sides(given)}, the model needs {_sides(mine)}"
                problems.append(f"{name} is {said}")
                report.made_anew.append(name)
                continue
            if fitted is not given:
                report.resized.append(f"{name}: {_sides(given)} -> {_sides(mine)}")
            mine.copy_(fitted)
            report.loaded.append(name)
    report.left_over += theirs
    problems += [f"{name} has no place in the model" for name in theirs]
    if not report.loaded:
        said = f"{pretrained.source}: none of its tensors has a place in {_kind(model)}{pretrained.contents}"
        raise ConfigError(said, key=KEY, advice="type the model= they are of, or rename them as timm does")
    if problems and strict:
        said = f"{pretrained.source} ({pretrained.whose}) does not fit {_kind(model)}: {some(problems)}"
        raise ConfigError(f"{said}{_advice(own, pretrained.tensors)}", key=KEY, advice=_OR_NOT_STRICT)
    return report


def _taken(own: dict[str, Tensor], pretrained: Pretrained) -> tuple[dict[str, Tensor], Sequence[str]]:
    """The tensors, and names passed over; a model of yours with one of ours inside takes all as they are."""
    if own.keys() <= pretrained.tensors.keys() or not own.keys() <= pretrained.as_saved.keys():
        return dict(pretrained.tensors), pretrained.passed_over
    check_tensors(pretrained.source, pretrained.as_saved)
    return dict(pretrained.as_saved), ()


def _other_head(
    own: dict[str, Tensor],
    theirs: dict[str, Tensor],
    their_classes: list[str] | None,
    classes: Sequence[str] | None,
) -> bool:
    """Whether the head of the weights answers another question than the model's."""
    if their_classes is not None and classes is not None and list(classes) != their_classes:
        return True
    mine = {name: tensor.shape for name, tensor in own.items() if name.startswith(_HEADS)}
    given = {name: tensor.shape for name, tensor in theirs.items() if name.startswith(_HEADS)}
    # of the layers both have: a second head that only one of them has is not a question of classes
    common = mine.keys() & given.keys()
    return not common or any(mine[name] != given[name] for name in common)


def _fitted(name: str, given: Tensor, mine: Tensor, model: nn.Module, source: Pretrained) -> Tensor | None:
    """The tensor in the shape the model needs, itself where it has it, None where no rule makes it fit."""
    if given.ndim != mine.ndim or given.is_floating_point() != mine.is_floating_point():
        return None
    if given.shape == mine.shape:
        return given
    if name == "pos_embed" and isinstance(model, ViT) and given.shape[2] == mine.shape[2]:
        prefix = sum(token in source.tensors for token in _TOKENS)
        if prefix == len(model.prefix_tokens()):
            grid: tuple[int, int] = model.patch_embed.grid_size  # type: ignore[assignment]
            return resize_positions(given, grid, num_prefix_tokens=prefix, align_corners=source.align_corners)
    if name.endswith("relative_position_bias_table") and given.shape[1] == mine.shape[1]:
        return resize_bias_table(given, mine.shape[0])
    if name.startswith("patch_embed.") and given.ndim == 4:
        return fit_channels(given, mine.shape)
    return None


def resize_positions(
    positions: Tensor, grid: tuple[int, int], *, num_prefix_tokens: int, align_corners: bool
) -> Tensor | None:
    """Position embeddings of another grid, bicubic; those of the prefix tokens stay.

    Args:
        positions: (1, prefix + n * n, D), of a square grid.
        grid: (h, w) wanted.
        num_prefix_tokens: class and distillation tokens, which come first.
        align_corners: as torchvision; else antialiased, as timm.

    Returns:
        (1, prefix + h * w, D), or None where the tokens given are not a square.
    """
    prefix, patches = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    if not side or side * side != patches.shape[1]:
        return None
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(
        image, size=grid, mode="bicubic", align_corners=align_corners, antialias=not align_corners
    )
    resized = image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat([prefix, resized.to(positions.dtype)], dim=1)


def resize_bias_table(table: Tensor, rows: int) -> Tensor | None:
    """A table of relative positions for another window, bicubic as in microsoft/Swin-Transformer.

    Args:
        table: ((2 w - 1) ** 2, H).
        rows: the (2 w' - 1) ** 2 wanted.

    Returns:
        (rows, H), or None where the rows of the two are not squares.
    """
    side, wanted = math.isqrt(table.shape[0]), math.isqrt(rows)
    if not side or side**2 != table.shape[0] or wanted**2 != rows:
        return None
    image = table.float().T.reshape(1, -1, side, side)
    resized = F.interpolate(image, size=(wanted, wanted), mode="bicubic")
    return resized.reshape(-1, rows).T.to(table.dtype)


def fit_channels(weight: Tensor, shape: torch.Size) -> Tensor | None:
    """The first convolution for grey images from one for colour, or the reverse.

    To a grey image, or one whose colours are equal, both give the same answer.

    Args:
        weight: (D, C, P, P).
        shape: (D, C', P, P) wanted.

    Returns:
        The sum over the colours, or a third of the weight for each; None for other shapes.
    """
    if (weight.shape[0], *weight.shape[2:]) != (shape[0], *shape[2:]):
        return None
    if shape[1] == 1 and weight.shape[1] == 3:
        return weight.sum(1, keepdim=True)
    if shape[1] == 3 and weight.shape[1] == 1:
        return weight.expand(shape) / 3
    return None


def _advice(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """What the most frequent misfits mean."""
    if ("dist_token" in theirs) != ("dist_token" in own):
        which = "model=deit_..._distilled" if "dist_token" in theirs else "model=vit_... or deit_..."
        return f"; the weights have {'a' if 'dist_token' in theirs else 'no'} distillation token ({which})"
    if ("cls_token" in theirs) != ("cls_token" in own) and "pos_embed" in theirs:
        return f"; type model.pool={'cls' if 'cls_token' in theirs else 'mean'}"
    return ""


def _kind(model: nn.Module) -> str:
    name = type(model).__name__
    return f"{name} of {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


def _sides(tensor: Tensor) -> str:
    return " x ".join(str(side) for side in tensor.shape) or "a number"
