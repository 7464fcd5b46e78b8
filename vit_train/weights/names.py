"""Parameter names of other projects, to ours and back.

Ours are timm's (ViT, DeiT, Swin), but for the head of Swin. Others:

    torchvision   vit_b_16 ..., swin_t ...
    swin          microsoft/Swin-Transformer: patch merging ends a stage there and begins one here
    timm          huggingface/pytorch-image-models, and facebookresearch/deit, whose models are timm's
    Hugging Face  ViT, DeiT and Swin of transformers: as in its files, and as version 5 has them in memory

A state dict is recognised by its names alone. Buffers that follow from the sizes (which pair of tokens looks
up which relative position, which tokens of a shifted window may see each other) are dropped on the way in and
made again on the way out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from vit_train.errors import ConfigError
from vit_train.layers import PatchEmbed, WindowAttention
from vit_train.layers.attention import relative_index
from vit_train.models import Swin, ViT

Layout = Literal["timm", "torchvision", "swin"]
# theirs, ours: at the beginning of a name, or anywhere where it begins with a dot
_Pairs = tuple[tuple[str, str], ...]

_MAX_STAGES = 10
_TORCHVISION_VIT: _Pairs = (
    ("class_token", "cls_token"),
    ("conv_proj.", "patch_embed.proj."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.layers.encoder_layer_", "blocks."),
    ("encoder.ln.", "norm."),
    ("heads.head.", "head."),
    (".ln_1.", ".norm1."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".ln_2.", ".norm2."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
)
# The files torchvision downloads were written by an older version of it.
_TORCHVISION_VIT_OLD: _Pairs = ((".mlp.linear_1.", ".mlp.fc1."), (".mlp.linear_2.", ".mlp.fc2."))
_TORCHVISION_SWIN: _Pairs = (
    ("features.0.0.", "patch_embed.proj."),
    ("features.0.2.", "patch_embed.norm."),
    *((f"features.{2 * i + 1}.", f"layers.{i}.blocks.") for i in range(_MAX_STAGES)),
    *((f"features.{2 * i}.", f"layers.{i}.downsample.") for i in range(1, _MAX_STAGES)),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
)
_TIMM_SWIN: _Pairs = (("head.fc.", "head."),)
_SWIN: _Pairs = tuple((f"layers.{i}.downsample.", f"layers.{i + 1}.downsample.") for i in range(_MAX_STAGES))
_HUGGING_FACE: _Pairs = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    *((f"encoder.layers.{i}.downsample.", f"layers.{i + 1}.downsample.") for i in range(_MAX_STAGES)),
    ("encoder.layers.", "layers."),
    *((f"{stack}.", "blocks.") for stack in ("encoder.layer", "layers")),
    ("layernorm.", "norm."),
    *((f"{kind}classifier.", "head.") for kind in ("", "cls_")),
    ("distillation_classifier.", "head_dist."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    *((f".attention.{proj}.", ".attn.proj.") for proj in ("output.dense", "o_proj")),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    *((f".attention.{part}.", ".attn.") for part in ("attention", "self", "relative_position_bias")),
    *((f".attention.{part[0]}_proj.", f".attn.{part}.") for part in ("query", "key", "value")),
)
_TASK = ("classifier.", "cls_classifier.", "distillation_classifier.")  # beside Hugging Face's backbone
# Each layout has one projection of the patches.
_PATCHES = ("embeddings.patch_embeddings.projection", "patch_embed.proj", "conv_proj", "features.0.0")
_NO_PART = ("decoder", "mask_token", "embeddings.mask_token", "pooler.")  # of a classifier
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_MAX_MODELS = 16  # a hostile file may hold a million
_BUFFERS = ("relative_position_index", "attn_mask")
_TABLE = "relative_position_bias_table"
_MASKED = -100.0  # what microsoft/Swin-Transformer adds to the score of a pair that must not see each other


def models_in(names: Collection[str]) -> dict[str, dict[str, str]]:
    """The models among names: what stands in front of each, and its names without that -> as they are.

    Where no layout is known, it is one model, behind the wrappers that all names share.
    """
    ends = re.compile(rf"(|.*\.)({'|'.join(map(re.escape, _PATCHES))})\.weight", re.DOTALL)
    fronts = sorted({match[1] for name in names if (match := ends.fullmatch(name))})[:_MAX_MODELS]
    models = {}
    for front in fronts:
        others = tuple(other for other in fronts if len(other) > len(front))
        inside = [name for name in names if name.startswith(front) and not name.startswith(others)]
        model = {name[len(front) :].replace("._orig_mod.", "."): name for name in inside}
        parent = re.sub(r"(^|\.)(vit|deit|swin)\.$", r"\1", front)
        if parent != front and f"{_PATCHES[0]}.weight" in model:
            heads = tuple(parent + head for head in _TASK)
            model |= {name[len(parent) :]: name for name in names if name.startswith(heads)}
        if recognise(model)[0] is not None:
            models[front] = {own: name for own, name in model.items() if not own.startswith(_NO_PART)}
    front = common_front(names)
    return models or {front: {name[len(front) :]: name for name in names}}


def common_front(names: Collection[str]) -> str:
    """The wrappers that all names share, such as `module.`."""
    front = ""
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(front + w) for name in names)), ""):
        front += wrapper
    return front


def to_ours(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """The same tensors under our names, and whose names they had (None: ours, or none that is known).

    Raises:
        ConfigError: they are those of a Swin V2, which is another model.
    """
    if any("cpb_mlp." in name or "position_bias_mlp." in name for name in tensors):
        raise ConfigError(
            "these are the weights of a Swin V2; vit-train has the first Swin (model=swin_tiny)"
        )
    layout, pairs = recognise(tensors)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    renamed = {_renamed(name, pairs): tensor for name, tensor in kept.items()}
    for name in [n for n in renamed if ".attn.query." in n and layout == "Hugging Face"]:
        apart = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shapes = {renamed[part].shape if part in renamed else () for part in apart}
        if len(shapes) == 1 and () not in shapes:
            renamed[name.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in apart])
    return renamed, layout


def recognise(names: Collection[str]) -> tuple[str | None, _Pairs]:
    """Whose names they are (None: no layout's), and the pairs that make them ours."""
    is_swin = any(name.endswith(_TABLE) for name in names)
    if "encoder.pos_embedding" in names:
        return "torchvision", _TORCHVISION_VIT + _TORCHVISION_VIT_OLD
    if "features.0.0.weight" in names and is_swin:
        return "torchvision", _TORCHVISION_SWIN
    if f"{_PATCHES[0]}.weight" in names:
        return "Hugging Face", _HUGGING_FACE
    if "layers.0.downsample.reduction.weight" in names:
        return "swin", _SWIN
    if "head.fc.weight" in names and is_swin:
        return "timm", _TIMM_SWIN
    qkv = "blocks.0.attn.qkv.weight"
    return ("timm", ()) if qkv in names or f"layers.0.{qkv}" in names else (None, ())


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    anywhere = [pair for pair in pairs if pair[0].startswith(".")]
    start = next(((old, new) for old, new in pairs if old[0] != "." and name.startswith(old)), ("", ""))
    name = start[1] + name[len(start[0]) :]
    for old, new in anywhere:
        name = name.replace(old, new)
    return name


def state_dict_named(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The state dict of a model as another project names it; its model of these sizes loads it strictly.

    Under timm's names it may be any model: what timm has no counterpart for keeps our names, and a Swin may
    answer otherwise there (`differs_in_timm`).

    Raises:
        ConfigError: torchvision or microsoft/Swin-Transformer have no such model, or it would compute
            something else there.
    """
    own = model.state_dict()
    if layout == "timm":
        pairs = _TIMM_SWIN if isinstance(model, Swin) else ()
    elif isinstance(model, Swin):
        _check_padding(model, layout)
        pairs = _SWIN if layout == "swin" else _TORCHVISION_SWIN
        own = {**own, **_buffers(model, layout)}
    else:
        _check_torchvision(model, layout)
        pairs = _TORCHVISION_VIT
    backward = [(ours, theirs) for theirs, ours in pairs]
    return {_renamed(name, backward): tensor for name, tensor in own.items()}


def _check_torchvision(model: nn.Module, layout: Layout) -> None:
    if layout == "swin":
        raise ConfigError(f"microsoft/Swin-Transformer has no {type(model).__name__}; use timm's names")
    names = model.state_dict().keys()
    # an exact type: a DeiT has one token more
    fits = type(model) is ViT and isinstance(model.patch_embed, PatchEmbed) and model.pool == "cls"
    if fits:
        assert isinstance(model, ViT)
        fits = isinstance(model.head, nn.Linear) and bool(model.blocks[0].norm_first)
        fits = fits and all(f"blocks.{i}.attn.qkv.bias" in names for i in range(len(model.blocks)))
        fits = fits and "pos_embed" in names and not any(name.endswith(_TABLE) for name in names)
    if not fits:
        raise ConfigError(
            f"torchvision has no such {type(model).__name__}: its vision transformers have plain patches, a "
            "class token, absolute positions, a bias everywhere, norms first and one linear head; use timm's "
            "names"
        )


def _maps(model: Swin) -> Iterable[tuple[str, WindowAttention, tuple[int, int]]]:
    """Every window attention with the size of the map it sees."""
    h, w = model.patch_embed.grid_size  # type: ignore[misc]
    for i, stage in enumerate(model.layers):
        if i:
            h, w = -(-h // 2), -(-w // 2)
        for j, block in enumerate(stage.blocks):  # type: ignore[arg-type]
            yield f"layers.{i}.blocks.{j}", block.attn, (h, w)


def _check_padding(model: Swin, layout: Layout) -> None:
    for name, attn, sizes in _maps(model):
        for size in sizes:
            if size % attn.window_size and (layout == "swin" or attn.mask_padding):
                raise ConfigError(
                    f"{name}: a map of {size} tokens is not whole windows of {attn.window_size}, and "
                    + (
                        "microsoft/Swin-Transformer has no padding"
                        if layout == "swin"
                        else "torchvision does not hide padding from the attention (model.mask_padding=true)"
                    )
                )


def differs_in_timm(model: nn.Module) -> str | None:
    """One sentence where timm's model of these sizes loads the weights and answers otherwise, else None."""
    if isinstance(model, Swin):
        for _, attn, (h, w) in _maps(model):
            if h % attn.window_size or w % attn.window_size:
                return (
                    f"timm pads a map of {h} x {w} tokens to windows of {attn.window_size} "
                    "in another way: the weights load there, but the answers differ"
                )
    return None


def _shift_mask(attn: WindowAttention, sizes: tuple[int, int]) -> Tensor:
    """0 where a query (of each window, row) sees a key (column), else _MASKED: (windows, N, N)."""
    window = attn.window_size
    # On the rolled axis the first span comes last, in one window with tokens from the other end.
    y, x = (torch.arange(size) >= size - attn.spans(size)[0].length for size in sizes)
    region = 2 * y.long()[:, None] + x.long()
    region = region.view(sizes[0] // window, window, sizes[1] // window, window).transpose(1, 2)
    region = region.reshape(-1, window**2)
    hidden = region[:, None, :] != region[:, :, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, _MASKED)


def _buffers(model: Swin, layout: Layout) -> dict[str, Tensor]:
    """What torchvision and microsoft/Swin-Transformer store beside the parameters."""
    made = {}
    for name, attn, sizes in _maps(model):
        window = attn.window_size
        index = relative_index(window, window, window)
        made[f"{name}.attn.relative_position_index"] = index if layout == "swin" else index.flatten()
        if layout == "swin" and any(len(attn.spans(size)) > 1 for size in sizes):
            made[f"{name}.attn_mask"] = _shift_mask(attn, sizes)
    return made
