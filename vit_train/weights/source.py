"""Where pretrained weights come from: a run, a checkpoint, files and folders of others, torchvision.

Nothing that is read can run code: safetensors hold numbers only, and pickled files are read by torch's loader
for weights alone (`weights_only=True`), without a fallback.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor

from vit_train import checkpoint
from vit_train.errors import CheckpointError, ConfigError, ran_out
from vit_train.system.places import expanded
from vit_train.text import suggest
from vit_train.weights.names import common_front, models_in, recognise, to_ours

KEY = "init_from"  # of the configuration, which errors are about
TORCHVISION = "torchvision:"
_PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
_INDEX = ".index.json"
# As Hugging Face's save_pretrained fills a folder
_IN_FOLDER = [file + end for file in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX)]
# Words of keys and prefixes: averages come first, as `weights=auto` has it. Lightning's: state_dict.
_AVERAGED = {"ema", "averaged", "swa", "shadow"}
_ORDER = ("state_dict", "model_state_dict", "model", "student")
_SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")  # no way out of the folder
_Choice = tuple[tuple[str, ...], str, dict[str, str], dict[str, Tensor]]
_MAX_DEPTH = 4  # of mappings in each other
# All weights of torchvision are trained with these, see the `transforms` of its weight classes.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pretrained:
    """Weights from elsewhere, under our names.

    Attributes:
        source: as typed.
        whose: whose parameter names they had, for messages.
        tensors: on the CPU.
        align_corners: how that project resizes position embeddings: with the corners of the grids aligned
            (torchvision), or the corners of their cells and antialiasing (timm).
        mask_padding: of a Swin, how it was trained; None where the weights do not tell.
        class_names: in the order of the logits, where they are known.
        mean, std: normalisation they were trained with, where it is known.
        skipped: a line for each damaged checkpoint that another one stood in for.
        as_saved: of a foreign file, what lies where the tensors were found, under its own names.
        passed_over: names of it that are not of the model: a loss, a teacher, a decoder.
        contents: of a foreign file, for messages.
    """

    source: str
    whose: str
    tensors: dict[str, Tensor]
    align_corners: bool = False
    mask_padding: bool | None = None
    class_names: list[str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    skipped: tuple[str, ...] = ()
    as_saved: Mapping[str, Tensor] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    contents: str = ""


def absolute_source(source: str | None) -> str | None:
    """The same source from any directory."""
    if source is None or source.startswith(TORCHVISION):
        return source
    return str(expanded(source).absolute())


@checkpoint.must_be_readable()
def read_pretrained(source: str) -> Pretrained:
    """Reads the weights `init_from` names.

    Args:
        source: a run directory (its best checkpoint, else its last), a checkpoint directory, a .safetensors,
            .pth, .pt, .ckpt, .bin or .tar file, a folder that Hugging Face's save_pretrained wrote, or
            `torchvision:vit_b_16` (downloaded once, and checked against the hash in the file's name).

    Raises:
        ConfigError: nothing of that name is known, or it is a model that vit-train does not have.
        CheckpointError: it cannot be read.
    """
    if source.startswith(TORCHVISION):
        return _from_torchvision(source)
    path = expanded(source)
    if path.is_dir():
        whole = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        own = (path / name for name in (checkpoint.MANIFEST, "state.json", "checkpoints"))
        if not whole or any(part.exists() for part in own):
            return _from_run(source, path)
        path = whole[0]
    elif not path.is_file():
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"{source}: no such file or run{suggest(str(path), siblings)}", key=KEY)
    if path.name.endswith((".safetensors", _INDEX, *_PICKLED)):
        return _from_file(source, path)
    raise ConfigError(
        f"{source}: weights come from a run directory, a .safetensors, .pth, .pt or .ckpt file, a "
        f"folder of save_pretrained, or {TORCHVISION}vit_b_16",
        key=KEY,
    )


def _from_torchvision(source: str) -> Pretrained:
    from torchvision import models

    name = source.removeprefix(TORCHVISION)
    listed = models.list_models(module=models)
    known = [n for n in listed if n.startswith(("vit_", "swin_")) and "v2" not in n]
    if name not in known:
        raise ConfigError(
            f"{source}: no such model in torchvision{suggest(name, known)} (choices: {', '.join(known)})",
            key=KEY,
        )
    try:
        weights = models.get_model_weights(name).DEFAULT
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network; a download that is not what its name says
        if ran_out(error):
            raise
        raise CheckpointError(
            f"{source} cannot be downloaded ({' '.join(str(error).split())})",
            key=KEY,
            advice="where there is no network, copy the file and type where it is",
        ) from error
    return replace(_foreign(source, state), mean=_IMAGENET_MEAN, std=_IMAGENET_STD)


def _from_run(source: str, path: Path) -> Pretrained:
    # Any model's: what fits is decided tensor by tensor, and nothing of the stored configuration is built.
    stored, skipped = checkpoint.load_run(path)
    has_ema = any(name.startswith("ema/") for name in stored.tensors)
    prefix = "ema/" if has_ema else "model/"
    tensors = {name[len(prefix) :]: t for name, t in stored.tensors.items() if name.startswith(prefix)}
    config, inference = stored.state.get("config"), stored.state.get("inference")
    own = _own(
        source,
        f"checkpoint {stored.path.name}{', averaged weights' if has_ema else ''}",
        tensors,
        inference if isinstance(inference, dict) else {},
        config.get("model") if isinstance(config, dict) else None,
    )
    return replace(own, skipped=tuple(skipped))


def _from_file(source: str, path: Path) -> Pretrained:
    saved = _saved(path)
    named = {k: v for k, v in saved.items() if isinstance(k, str)} if isinstance(saved, Mapping) else {}
    keys = ", ".join(repr(k) for k, v in named.items() if not isinstance(v, Tensor)) or "only tensors' names"
    choices = sorted(_choices(named), key=_rank)
    if not choices:
        raise CheckpointError(
            f"{path} holds no weights (its keys: {keys}): expected a state dict, or one under {_ORDER[0]!r}"
        )
    where, front, names, tensors = choices[0]
    about, wrapped = named.get("vit_train"), len(common_front(tensors))
    if isinstance(about, str):
        return _exported(source, tensors, about)
    some = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in list(names.values())[:3])
    place = [f"{what} {name!r}" for what, name in (("key", ".".join(where)), ("prefix", front)) if name]
    return replace(
        _foreign(source, {own: tensors[name] for own, name in names.items()}, place),
        as_saved={name[wrapped:]: tensor for name, tensor in tensors.items()},
        passed_over=tuple(sorted(tensors.keys() - set(names.values()))),
        contents=f" (its keys: {keys}; its tensors: {some} ...)",
    )


def _choices(saved: Mapping[str, Any]) -> Iterator[_Choice]:
    """Each model in what was saved: the keys that lead to a mapping, and there prefix, names and tensors."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), saved)]
    seen = set()
    for keys, value in waiting:  # which grows meanwhile
        if not isinstance(value, Mapping) or len(keys) > _MAX_DEPTH or id(value) in seen:
            continue
        seen.add(id(value))  # it may hold itself
        named = {key: inner for key, inner in value.items() if isinstance(key, str)}
        waiting += [((*keys, key), inner) for key, inner in named.items() if "optim" not in key]
        if tensors := {key: inner for key, inner in named.items() if isinstance(inner, Tensor)}:
            yield from ((keys, front, names, tensors) for front, names in models_in(tensors).items())


def _rank(choice: _Choice) -> tuple[bool, bool, bool, int, int]:
    """The lowest is the likeliest to be meant."""
    keys, front, names, _ = choice
    words = [*keys, *front.split(".")]
    # DINO and its like keep a teacher that is the student's average; a module's teacher is another model
    averaged = "teacher" in keys or any(_AVERAGED.intersection(word.lower().split("_")) for word in words)
    order = min((_ORDER.index(word) for word in words if word in _ORDER), default=len(_ORDER))
    return recognise(names)[0] is None, not averaged, "teacher" in words, order, -len(names)


def _saved(path: Path) -> Any:
    if path.name.endswith(_INDEX):
        return _from_shards(path)
    return _from_safetensors(path) if path.suffix == ".safetensors" else _from_pickle(path)


def _from_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        if other := [file for file in files.values() if not _SHARD.fullmatch(file)]:
            raise CheckpointError(f"{index} names {other[0]!r}, which is not a file of weights beside it")
        if other := [file for file in files.values() if not index.with_name(file).is_file()]:  # a pipe waits
            raise CheckpointError(f"{index} names {other[0]}, which is not a file")
        shards = {file: _saved(index.with_name(file)) for file in set(files.values())}
        return {name: shards[file][name] for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not the index of the files beside it") from error


def _from_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            about = (file.metadata() or {}).get("vit_train")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors if about is None else {**tensors, "vit_train": about}


def _from_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # an archive, or the pickle of older versions
            raise CheckpointError(f"{path} is not a file that torch.save wrote")
    try:
        # DeiT's and Swin's own scripts save their command line beside the weights: a bag of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{path} holds Python objects beside weights (a whole model was saved?), and loading those can "
            "run any code; where you trust the file, keep its weights alone: python -c "
            + shlex.quote(
                f"import torch; m = torch.load({str(path)!r}, weights_only=False); "
                "m = m if isinstance(m, dict) else {'model': m.state_dict()}; "
                "torch.save({k: v for k, v in m.items() if torch.is_tensor(v) or isinstance(v, dict) and "
                "all(map(torch.is_tensor, v.values()))}, 'weights.pth')"
            )
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        if ran_out(error):
            raise
        raise CheckpointError(f"{path} is not a weight file, or it is incomplete") from error


def _exported(source: str, tensors: dict[str, Tensor], about: str) -> Pretrained:
    """A file `vit-export` wrote: timm's names, and our own description."""
    try:
        described = json.loads(about)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: its description is not JSON", key=KEY) from error
    described = described if isinstance(described, dict) else {}
    renamed, _ = to_ours(tensors)
    return _own(source, "exported by vit-train", renamed, described, described.get("model"))


def _own(
    source: str, whose: str, tensors: dict[str, Tensor], about: Mapping[str, Any], model: Any
) -> Pretrained:
    check_tensors(source, tensors)
    names = about.get("class_names")
    masked = model.get("mask_padding") if isinstance(model, Mapping) else None
    return Pretrained(
        source,
        whose,
        tensors,
        mask_padding=masked if isinstance(masked, bool) else None,
        class_names=[normalize("NFC", str(name)) for name in names] if isinstance(names, list) else None,
        mean=_numbers(about.get("mean")),
        std=_numbers(about.get("std")),
    )


def check_tensors(source: str, tensors: Mapping[str, Tensor]) -> None:
    """That they are plain numbers, as many as the file holds.

    Raises:
        CheckpointError: one is sparse, quantized, float8, complex, elsewhere or not finite, or is a few
            numbers that claim to be many (an expanded view: working with it could fill the memory).
    """
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.is_complex() or (tensor.is_floating_point() and tensor.itemsize == 1):
            raise CheckpointError(f"{source}: {name} is not a plain tensor of real numbers", key=KEY)
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(f"{source}: {name} claims more numbers than the file holds", key=KEY)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} is not finite", key=KEY)


def _numbers(values: Any) -> tuple[float, ...] | None:
    fits = isinstance(values, list) and values and all(type(x) in (int, float) for x in values)
    return tuple(values) if fits else None


def _foreign(source: str, tensors: dict[str, Tensor], place: Sequence[str] = ()) -> Pretrained:
    check_tensors(source, tensors)
    renamed, layout = to_ours(tensors)
    is_swin = any(name.endswith("relative_position_bias_table") for name in renamed)
    names = {"swin": "microsoft/Swin-Transformer's names", None: "names as they are"}
    return Pretrained(
        source,
        ", ".join([*place, names.get(layout, f"{layout}'s names")]),
        renamed,
        align_corners=layout == "torchvision",
        mask_padding=False if is_swin else None,  # everyone else lets padding take part
    )
