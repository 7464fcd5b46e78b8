"""A teacher for distillation: a trained model of any kind, frozen, that answers in the student's classes.

It comes from a run or checkpoint of ours, from torchvision or timm, or from a file of weights and the name of
its model. It sees what the student sees, augmented and mixed, in its own normalisation, size and precision.
Nothing that is read can run code: see `trained` and `weights.source`.

Shapes: B batch, C channels, H W pixels, K classes of the student, K' of the teacher.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train import checkpoint
from vit_train.errors import CheckpointError, ConfigError, DataError, VitTrainError, suggest
from vit_train.places import expanded
from vit_train.precision import Precision
from vit_train.resume import Packages
from vit_train.trained import fits, from_checkpoint
from vit_train.weights import load_pretrained, read_pretrained
from vit_train.weights.source import check_tensors

TORCHVISION, TIMM = "torchvision:", "timm:"
_KEY = "objective.teacher"
_NAMED = 5  # classes in a message
_WORDNET = re.compile(r"n\d{8}")  # the names of ImageNet's folders, where torchvision has words


@dataclass(frozen=True)
class Found:
    """A trained model as it came, and what is needed to feed it and to read its answers.

    Attributes:
        model: in evaluation mode.
        source: where it can be read again: a checkpoint directory, a file, or a name.
        class_names: in the order of its logits; None where they are not known.
        mean, std: normalisation per channel; None is the student's.
        img_size: side of its images in pixels.
        in_channels: 1 or 3.
        precision: what it computes in; None is the student's.
    """

    model: nn.Module
    source: str
    class_names: list[str] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    img_size: int
    in_channels: int = 3
    precision: Precision | None = None

    def sha256(self) -> str:
        """Of all that decides what it answers to given pixels, hexadecimal."""
        digest = hashlib.sha256(repr((self.class_names, self.mean, self.std)).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def answers(self, img_size: int | None = None) -> int:
        """K', of images of its own size or another one; 0 where it does not take those."""
        side, channels = img_size or self.img_size, self.in_channels
        probe = copy.deepcopy(self.model).to("meta")
        try:
            return int(probe(torch.empty(1, channels, side, side, device="meta")).shape[1])
        except (RuntimeError, ValueError, AssertionError):
            return 0


def read_teacher(
    source: str,
    *,
    sizes: Mapping[str, int],
    make_model: Callable[..., nn.Module],
    device: torch.device,
    model: str | None = None,
    trust: Packages = (),
    download: bool = True,
) -> Found:
    """Reads the teacher that `objective.teacher` names.

    Args:
        source: a run, a checkpoint, torchvision:NAME, timm:NAME; with `model` a file or folder of weights.
        sizes: `num_classes`, `img_size`, `in_channels` of the student, and of a file that does not say.
        make_model: a model of ours by its name, for these sizes and `mask_padding`.
        device: where it will run.
        model: of a file of weights: torchvision:NAME, timm:NAME, or a name that `make_model` knows.
        trust: packages whose code a run may name.
        download: whether what a library does not have in its cache may be fetched.

    Raises:
        ConfigError: there is no such model, or the source needs another key.
        CheckpointError: it cannot be read.
    """
    if source.startswith((TORCHVISION, TIMM)):
        if model is not None:
            raise ConfigError(f"{_KEY}={source} is a model with its weights; leave out {_KEY}_model")
        return _from_library(source, download=download)
    path = expanded(source)
    if model is not None:
        return _from_file(str(path.absolute()), model, sizes, make_model)
    if path.is_dir():
        return _from_run(path, device, trust)
    if path.is_file():
        raise ConfigError(
            f"{_KEY}={source}: a file does not say which model its weights are of; type "
            f"{_KEY}_model=torchvision:NAME, timm:NAME or the name of a model of ours, such as vit_tiny"
        )
    near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise CheckpointError(f"{_KEY}={source}: no such run, checkpoint or file{suggest(str(path), near)}")


def _from_run(path: Path, device: torch.device, trust: Packages) -> Found:
    try:
        stored, _ = checkpoint.load_run(path, partial(fits, trust=trust))
        known = from_checkpoint(stored, device=device, trust=trust)
    except CheckpointError as error:
        raise CheckpointError(f"{_KEY}: {str(error).replace(' --trust ', ' trust=')}") from error
    return Found(
        known.model,
        str(known.path.resolve()),
        known.class_names,
        known.mean,
        known.std,
        known.img_size,
        known.in_channels,
        known.precision(),
    )


def _from_library(source: str, *, download: bool = True, num_classes: int | None = None) -> Found:
    """A model of torchvision or timm with its weights, or at random with another number of classes."""
    make = _torchvision if source.startswith(TORCHVISION) else _timm
    try:
        return make(source, download=download, num_classes=num_classes)
    except VitTrainError:
        raise
    except Exception as error:  # of any kind where there is no network, or the file is not what it should be
        raise CheckpointError(
            f"{_KEY}: {source} cannot be downloaded ({' '.join(str(error).split())}); where there is no "
            f"network, copy its weights and type {_KEY}=FILE {_KEY}_model={source}"
        ) from error


def _torchvision(source: str, *, download: bool, num_classes: int | None) -> Found:
    from torchvision import models

    name = source.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"{_KEY}: torchvision has no model {name!r} for classification{suggest(name, known)}"
        )
    weights = models.get_model_weights(name).DEFAULT
    if num_classes is None:
        _check_cache(
            source, (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).is_file(), download
        )
        model = models.get_model(name, weights=weights)
    else:
        model = models.get_model(name, num_classes=num_classes)
    preset = weights.transforms()
    names = None if num_classes is not None else list(weights.meta["categories"])
    return Found(model.eval(), source, names, tuple(preset.mean), tuple(preset.std), preset.crop_size[0])


def _timm(source: str, *, download: bool, num_classes: int | None) -> Found:
    try:
        import timm
        from huggingface_hub import try_to_load_from_cache
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
    except ImportError as error:
        raise ConfigError(f"{_KEY}: {source} needs timm; type pip install timm") from error

    name = source.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ConfigError(f"{_KEY}: timm has no model {name!r}{suggest(name, timm.list_models())}")
    if num_classes is None:
        config = timm.get_pretrained_cfg(name)
        hub = config.hf_hub_id if config else None
        found = try_to_load_from_cache(hub, "model.safetensors") if hub else None
        _check_cache(source, isinstance(found, str), download)
        cached = {"file": found} if isinstance(found, str) else None
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cached)
    else:
        model = timm.create_model(name, num_classes=num_classes)
    about: Any = model.pretrained_cfg
    subset = None if num_classes is not None else infer_imagenet_subset(model)
    names = None if subset is None else list(ImageNetInfo(subset).label_names())
    return Found(model.eval(), source, names, about["mean"], about["std"], about["input_size"][1])


def _check_cache(source: str, is_there: bool, download: bool) -> None:
    if not is_there and not download:
        raise CheckpointError(
            f"{_KEY}={source} is not in the cache, and a run that goes on downloads nothing"
        )


def _from_file(
    source: str, name: str, sizes: Mapping[str, int], make_model: Callable[..., nn.Module]
) -> Found:
    try:
        given = read_pretrained(source)
        count = sizes["num_classes"] if given.class_names is None else len(given.class_names)
        if name.startswith((TORCHVISION, TIMM)):
            found = _from_library(name, num_classes=count)
            check_tensors(source, given.as_saved)
            found.model.load_state_dict(given.as_saved)
            # a file does not tell the size, and most convolutions take any
            if found.answers(sizes["img_size"]):
                found = replace(found, img_size=sizes["img_size"])
        else:
            model = make_model(name, **{**sizes, "num_classes": count}, mask_padding=given.mask_padding)
            if anew := load_pretrained(model, given).made_anew:
                raise ConfigError(f"{_KEY}={source} has other classes: {', '.join(anew)} would start anew")
            about = (given.mean, given.std, sizes["img_size"], sizes["in_channels"])
            found = Found(model.eval(), source, None, *about)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{_KEY}={source} does not hold {name} with {count} classes, as the data has ({reason})"
        ) from error
    except (CheckpointError, ConfigError) as error:
        raise type(error)(str(error).replace("init_from=", f"{_KEY}=")) from error
    return replace(found, source=source, class_names=given.class_names)


class Teacher(nn.Module):
    """Images as the student gets them -> the teacher's logits for the student's classes, without a gradient.

    Args:
        found: the teacher.
        class_names: K names, the student's order.
        mean, std: the student's normalisation, per channel.
        precision: the student's, for a teacher that has none of its own.

    Attributes:
        classes: in words, how the classes were matched.

    Raises:
        ConfigError: the teacher sees grey images, and the student coloured ones.
        DataError: the teacher does not know all classes.
    """

    picked: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        found: Found,
        *,
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision,
    ) -> None:
        super().__init__()
        if len(mean) > found.in_channels:
            raise ConfigError(f"{_KEY}={found.source} takes grey images, and the data has colours")
        self.model = found.model.eval().requires_grad_(False)
        self.img_size, self.in_channels = found.img_size, found.in_channels
        self.precision = found.precision or precision
        picked, self.classes = match_classes(found.class_names, found.answers(), class_names)
        self.register_buffer("picked", None if picked is None else torch.tensor(picked))
        ours, theirs = (
            torch.tensor([*both])[..., None, None]
            for both in ((mean, std), (found.mean or mean, found.std or std))
        )
        same = ours.shape == theirs.shape and bool((ours == theirs).all())
        self.register_buffer("scale", None if same else ours[1] / theirs[1])
        self.register_buffer("shift", None if same else (ours[0] - theirs[0]) / theirs[1])

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stays in evaluation mode, whatever the objective does that holds it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float, normalised for the student -> (B, K) float32."""
        if self.scale is not None and self.shift is not None:  # of grey images it makes three channels
            images = images * self.scale + self.shift
        if images.shape[-1] != self.img_size:
            side = (self.img_size, self.img_size)
            images = F.interpolate(images, size=side, mode="bilinear", antialias=True)
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with torch.autocast(images.device.type, dtype=dtype, enabled=self.precision != "fp32"):
            logits: Tensor = self.model(images).float()
        return logits if self.picked is None else logits.index_select(1, self.picked)


def match_classes(
    theirs: Sequence[str] | None, count: int, ours: Sequence[str]
) -> tuple[list[int] | None, str]:
    """Which of the teacher's logits are those of the student's classes.

    Args:
        theirs: K' names; None where they are not known.
        count: K'.
        ours: K names.

    Returns:
        K indices, None where they are 0, 1, 2 ... K - 1 of K; and in words how the classes were matched.

    Raises:
        DataError: the teacher does not know all classes.
    """
    place = {normalize("NFC", name): i for i, name in enumerate(theirs or ())}
    missing = [name for name in ours if name not in place]
    if theirs is not None and not missing:
        picked = [place[name] for name in ours]
        if count > len(ours):
            return picked, f"{len(ours)} of its {count:,}, by name"
        return (
            (None, f"the same {count:,}")
            if picked == [*range(count)]
            else (picked, f"the same {count:,}, reordered")
        )
    folders = all(_WORDNET.fullmatch(name) for name in ours) and not any(map(_WORDNET.fullmatch, place))
    if count == len(ours) and (theirs is None or folders):
        return None, f"its {count:,} are assumed to be in the order of the data's: they have no such names"
    if theirs is None:
        raise DataError(
            f"{_KEY} has {count:,} classes without names, the data {len(ours):,}: they cannot be matched"
        )
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    raise DataError(
        f"{_KEY} does not know {len(missing):,} of the {len(ours):,} classes of the data "
        f"({', '.join(map(repr, missing[:_NAMED]))}{more}); it has {count:,}, and names must be equal"
    )
