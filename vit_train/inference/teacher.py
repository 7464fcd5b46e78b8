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
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_train import checkpoint
from vit_train.errors import CheckpointError, ConfigError, DataError, VitTrainError, ran_out
from vit_train.inference.trained import fits, from_checkpoint
from vit_train.models.cost import multiply_adds
from vit_train.runs.stored import Packages
from vit_train.system.places import expanded
from vit_train.system.precision import Precision, autocast, inference_precision
from vit_train.text import some, suggest
from vit_train.weights import load_pretrained, read_pretrained
from vit_train.weights.source import TORCHVISION, Pretrained, check_tensors

TIMM = "timm:"
_KEY = "objective.teacher"
_WORDNET = re.compile(r"n\d{8}")  # the names of ImageNet's folders, where torchvision has words
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Found:
    """A trained model as it came, and what is needed to feed it and to read its answers.

    Attributes:
        model: on the CPU, in evaluation mode.
        source: where it can be read again: a checkpoint directory, a file, or a name.
        design: what no tensor tells of it: its name in a library, or the node that describes it.
        class_names: in the order of its logits; None where they are not known.
        mean, std: normalisation per channel; None is the student's.
        img_size: side of its images in pixels.
        in_channels: 1 or 3.
        trained_in: its precision; None is the student's.
    """

    model: nn.Module
    source: str
    design: Any
    class_names: list[str] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    img_size: int
    in_channels: int = 3
    trained_in: object = None

    def sha256(self) -> str:
        """A hash, in hexadecimal digits, of everything that decides which logits an image gets."""
        about = (self.design, self.class_names, self.mean, self.std, self.img_size, self.trained_in)
        digest = hashlib.sha256(repr(about).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


@checkpoint.must_be_readable()
def read_teacher(
    source: str,
    *,
    sizes: Mapping[str, int],
    make_model: Callable[..., nn.Module],
    model: str | None = None,
    trust: Packages = (),
    download: bool = True,
) -> Found:
    """Reads the teacher that `objective.teacher` names.

    Args:
        source: a run, a checkpoint, torchvision:NAME, timm:NAME; with `model` a file or folder of weights.
        sizes: `num_classes`, `img_size`, `in_channels` of the student, and of a file that does not say.
        make_model: makes a model of ours from its name, these sizes and `mask_padding`.
        model: of a file of weights: torchvision:NAME, timm:NAME, or a name that `make_model` knows.
        trust: packages whose code a run may name.
        download: whether what a library does not have in its cache may be fetched.

    Raises:
        ConfigError: no model has this name, or the source needs another key.
        CheckpointError: it cannot be read.
    """
    if source.startswith((TORCHVISION, TIMM)):
        if model is not None:
            raise ConfigError(f"{_KEY}={source} is a model with its weights; leave out {_KEY}_model")
        made, *about = _from_library(source, download=download)
        return Found(made, source, source, *about)
    path = expanded(source)
    if model is not None and (path / "checkpoints").is_dir():
        raise ConfigError(f"{_KEY}={source} is a run, which knows its model; leave out {_KEY}_model")
    if model is not None:
        return _from_file(str(path.absolute()), model, sizes, make_model)
    if path.is_dir():
        return _from_run(path, trust)
    near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if path.is_file():
        raise ConfigError(
            f"{_KEY}={source}: a file does not say which model its weights are of; type "
            f"{_KEY}_model=torchvision:NAME, timm:NAME or the name of a model of ours, such as vit_tiny"
        )
    guess = in_library(source) or suggest(str(path), {*near} - {str(path)}) or "; type the place where it is"
    raise CheckpointError(f"{_KEY}={source}: no such run, checkpoint or file{guess}")


def in_library(name: str) -> str:
    """A question where only the prefix of a model of torchvision is missing or misspelt, else nothing."""
    from torchvision import models

    name = name.rpartition(":")[2]
    return f"; did you mean '{TORCHVISION}{name}'?" if name in models.list_models(module=models) else ""


def _from_run(path: Path, trust: Packages) -> Found:
    stored, _ = checkpoint.load_run(path, partial(fits, trust=trust, hydra=True))
    known = from_checkpoint(stored, device=_CPU, trust=trust)
    precision = known.config["trainer"].get("precision")
    about = (known.class_names, known.mean, known.std, known.img_size, known.in_channels)
    return Found(known.model, str(known.path.resolve()), known.config["model"], *about, precision or "auto")


def _from_library(source: str, *, download: bool) -> Any:
    """A model with its own weights; its class names, mean, std and side of an image."""
    make = _torchvision if source.startswith(TORCHVISION) else _timm
    try:
        return make(source, download=download, num_classes=None)
    except VitTrainError:
        raise
    except Exception as error:  # of any kind where there is no network, or the file is not what it should be
        if ran_out(error):
            raise
        raise CheckpointError(
            f"{_KEY}: {source} cannot be downloaded ({' '.join(str(error).split())}); where there is no "
            f"network, copy its weights and type {_KEY}=FILE {_KEY}_model={source}"
        ) from error


def _torchvision(source: str, *, download: bool, num_classes: int | None) -> Any:
    """As `_from_library`; with a number of classes a model at random, whose classes have no names."""
    from torchvision import models

    name = source.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"{_KEY}: torchvision has no model {name!r} for classification{suggest(name, known)}"
        )
    weights = models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    preset, names = weights.transforms(), None
    if num_classes is None:
        _check_cache(source, file.is_file(), download)
        model, names = models.get_model(name, weights=weights), list(weights.meta["categories"])
    else:
        model = models.get_model(name, num_classes=num_classes)
    return model.eval(), names, tuple(preset.mean), tuple(preset.std), preset.crop_size[0]


def _timm(source: str, *, download: bool, num_classes: int | None) -> Any:
    try:
        import timm
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.utils import logging
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
    except ImportError as error:
        raise ConfigError(f"{_KEY}: {source} needs timm; type pip install timm") from error

    name = source.removeprefix(TIMM)
    known = timm.list_models() + timm.list_models(pretrained=True)
    if name not in known:
        raise ConfigError(f"{_KEY}: timm has no model {name!r}{suggest(name, known)}")
    names = None
    if num_classes is None:
        config = timm.get_pretrained_cfg(name)
        file = (
            try_to_load_from_cache(config.hf_hub_id, "model.safetensors")
            if config and config.hf_hub_id
            else None
        )
        _check_cache(source, isinstance(file, str), download)
        logging.set_verbosity_error()  # a line for each attempt, where there is no network
        cached = {"file": file} if isinstance(file, str) else None
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cached)
        subset = infer_imagenet_subset(model)
        names = list(ImageNetInfo(subset).label_names()) if subset else None
    else:
        model = timm.create_model(name, num_classes=num_classes)
    about: Any = model.pretrained_cfg
    return model.eval(), names, about["mean"], about["std"], about["input_size"][1]


def _check_cache(source: str, is_there: bool, download: bool) -> None:
    if not is_there and not download:
        raise CheckpointError(f"{_KEY}={source} is not in the cache, and nothing is downloaded here")


def _from_file(
    source: str, name: str, sizes: Mapping[str, int], make_model: Callable[..., nn.Module]
) -> Found:
    try:
        given = read_pretrained(source)
        count = sizes["num_classes"] if given.class_names is None else len(given.class_names)
        fill = partial(_of_library if name.startswith((TORCHVISION, TIMM)) else _of_ours, given, name)
        sizes = {**sizes, "num_classes": count}
        # first without memory: a small file may name a huge model. RegNets of torchvision need some.
        with suppress(NotImplementedError), torch.device("meta"):
            fill(sizes, make_model)
        model, *about = fill(sizes, make_model)
    except RuntimeError as error:
        if ran_out(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{_KEY}={source} does not hold {name} with {count} classes, as the data has ({reason})"
        ) from error
    except (CheckpointError, ConfigError) as error:
        if not error.key:
            raise
        raise error.reworded(key=_KEY) from error
    return Found(model, source, name, given.class_names, *about)


def _of_library(given: Pretrained, name: str, sizes: Mapping[str, int], _: object) -> Any:
    """A model of a library with the weights given; its mean, std, side of an image and channels."""
    make = _torchvision if name.startswith(TORCHVISION) else _timm
    model, _, mean, std, usual = make(name, download=False, num_classes=sizes["num_classes"])
    check_tensors(given.source, given.as_saved)
    last, tensor = [*model.state_dict().items()][-1]  # of the head
    theirs = given.as_saved.get(last, tensor).shape
    if theirs != tensor.shape:
        raise DataError(_not_matched(theirs[0] if theirs else 0, sizes["num_classes"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a model without memory stays without
        model.load_state_dict(given.as_saved)
    # a file does not tell the size, and most convolutions take any
    return model, mean, std, sizes["img_size"] if _answers(model, 3, sizes["img_size"]) else usual, 3


def _of_ours(
    given: Pretrained, name: str, sizes: Mapping[str, int], make_model: Callable[..., nn.Module]
) -> Any:
    """The same of one of our configs."""
    model = make_model(name, **sizes, mask_padding=given.mask_padding).eval()
    try:
        anew = load_pretrained(model, given).made_anew
    except ConfigError as error:
        raise error.reworded(advice="choose the model the weights were trained for") from error
    if anew:
        raise ConfigError(
            f"{_KEY}={given.source} has other classes: {', '.join(anew)} would have to be trained "
            "from scratch"
        )
    return model, given.mean, given.std, sizes["img_size"], sizes["in_channels"]


def _answers(model: nn.Module, channels: int, side: int) -> int:
    """How many logits an image gets; 0 where the model does not take such images."""
    probe = copy.deepcopy(model).to("meta")
    try:
        return int(probe(torch.empty(1, channels, side, side, device="meta")).shape[1])
    except (RuntimeError, ValueError, AssertionError):
        return 0


class Teacher(nn.Module):
    """Images as the student gets them -> the teacher's logits for the student's classes, without a gradient.

    Args:
        found: the teacher.
        class_names: K names, the student's order.
        mean, std: the student's normalisation, per channel.
        device: where it will run.
        precision: the student's, for a teacher that has none of its own.

    Attributes:
        classes: in words, how the classes were matched.
        multiply_adds: of one image.

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
        device: torch.device,
        precision: Precision,
    ) -> None:
        super().__init__()
        if len(mean) > found.in_channels:
            raise ConfigError(f"{_KEY}={found.source} takes grey images, and the data has colours")
        self.model, self.img_size = found.model.requires_grad_(False), found.img_size
        own = found.trained_in is not None
        self.precision = inference_precision(found.trained_in, device) if own else precision
        known = found.class_names
        count = _answers(self.model, found.in_channels, self.img_size) if known is None else len(known)
        picked, self.classes = match_classes(known, count, class_names)
        self.multiply_adds = multiply_adds(self.model, in_channels=found.in_channels, img_size=self.img_size)
        self.register_buffer("picked", None if picked is None else torch.tensor(picked))
        ours, theirs = (
            torch.tensor([*both])[..., None, None]
            for both in ((mean, std), (found.mean or mean, found.std or std))
        )
        same = ours.shape == theirs.shape and bool((ours == theirs).all())
        self.register_buffer("scale", None if same else ours[1] / theirs[1])
        self.register_buffer("shift", None if same else (ours[0] - theirs[0]) / theirs[1])
        self.eval().to(device)

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
        with autocast(self.precision, images.device):
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
        if picked == [*range(count)]:
            return None, f"the same {count:,}"
        return picked, f"the same {count:,}, reordered"
    folders = all(_WORDNET.fullmatch(name) for name in ours) and not any(map(_WORDNET.fullmatch, place))
    if count == len(ours) and (theirs is None or folders):
        assumed = "assumed to be those of the data, in the same order"
        return None, f"its {count:,} have no matching names and are {assumed}"
    if theirs is None:
        raise DataError(_not_matched(count, len(ours)))
    raise DataError(
        f"{_KEY} does not know {len(missing):,} of the {len(ours):,} classes of the data "
        f"({some([*map(repr, missing)])}); it has {count:,}, and names must match exactly, "
        f"upper and lower case included{suggest(missing[0], place)}"
    )


def _not_matched(theirs: int, ours: int) -> str:
    return f"{_KEY} has {theirs:,} classes without names, the data {ours:,}: they cannot be matched"
