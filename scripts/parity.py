"""Weights of other projects here, and ours there: the same logits, the same names.

    python scripts/parity.py                     every model below (the largest takes 12 GB of memory)
    python scripts/parity.py vit_b_16 swin_t     some of them
    python scripts/parity.py --json report.json

For each model: random weights -> a file in its project's names -> `init_from` -> logits of both on the same
images, relative to the largest logit, in fp32. Then the file saved back under their names is loaded there,
strictly. Then both at a larger size, each after its own resize of the positions: 384 pixels, 378 for patches
of 14. A Swin has windows of 12 there, as published models of that size, but torchvision's, which keeps its
7 and pads: timm pads after the shift, torchvision (and we) before it, so that only whole windows compare.
Needs timm.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from hydra import compose, initialize_config_dir
from timm.models import swin_transformer, vision_transformer
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from vit_train.config.check import config_dir, plain
from vit_train.construct import make
from vit_train.weights import load_pretrained, state_dict_named

GOAL = 1e-5
State = dict[str, Tensor]


@dataclass(frozen=True)
class Theirs:
    """A model of another project.

    Attributes:
        ours: the config of the same model here.
        build: makes it for images of a size.
        resized: what that project makes of its weights for another size: (state, model there, size) -> state.
        layout: whose names its file has.
        large: the larger size.
        large_window: of a Swin at that size, where it is another one.
        large_goal: allowed there; more where that project resizes in another way than we do.
    """

    ours: str
    build: Callable[[int], nn.Module]
    resized: Callable[[State, nn.Module, int], State]
    layout: str
    large: int = 384
    large_window: int | None = None
    large_goal: float = GOAL


def _torchvision_vit(name: str, ours: str, patch: int, large: int = 384) -> Theirs:
    return Theirs(
        ours,
        lambda size: getattr(torchvision.models, name)(image_size=size),
        lambda state, _, size: interpolate_embeddings(size, patch, state),
        "torchvision",
        large,
    )


def _torchvision_swin(name: str, ours: str) -> Theirs:
    # its Swin takes images of any size as they are
    return Theirs(ours, lambda _: getattr(torchvision.models, name)(), lambda state, *_: state, "torchvision")


def _timm(name: str, ours: str) -> Theirs:
    return Theirs(
        ours,
        lambda size: timm.create_model(name, img_size=size),
        lambda state, model, _: vision_transformer.checkpoint_filter_fn(state, model),
        "timm",
    )


def _timm_swin(size: int) -> nn.Module:
    window = 7 if size == 224 else 12
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=size, window_size=window)


def _official_swin(state: State, model: nn.Module, size: int) -> State:
    """Tables as microsoft/Swin-Transformer's `load_pretrained` resizes them; names by timm's conversion."""
    if size != 224:
        tables = {name: table for name, table in state.items() if name.endswith("bias_table")}
        for name, table in tables.items():
            image = table.T.reshape(1, -1, 13, 13)
            state[name] = F.interpolate(image, size=(23, 23), mode="bicubic").reshape(-1, 23 * 23).T
    return swin_transformer.checkpoint_filter_fn({"model": state}, model)


def _official_deit(state: State, model: nn.Module, _: int) -> State:
    """As facebookresearch/deit's main.py does it: bicubic, not antialiased."""
    wanted, given = model.pos_embed.shape[1], state["pos_embed"]
    prefix = 2 if "dist_token" in state else 1
    old, new = round((given.shape[1] - prefix) ** 0.5), round((wanted - prefix) ** 0.5)
    if old == new:
        return state
    image = given[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    grid = image.permute(0, 2, 3, 1).flatten(1, 2)
    return {**state, "pos_embed": torch.cat([given[:, :prefix], grid], 1)}


MODELS = {
    "vit_b_16": _torchvision_vit("vit_b_16", "vit_base", 16),
    "vit_b_32": _torchvision_vit("vit_b_32", "vit_base_32", 32),
    "vit_l_16": _torchvision_vit("vit_l_16", "vit_large", 16),
    "vit_l_32": _torchvision_vit("vit_l_32", "vit_large_32", 32),
    "vit_h_14": _torchvision_vit("vit_h_14", "vit_huge", 14, large=378),
    "swin_t": _torchvision_swin("swin_t", "swin_tiny"),
    "swin_s": _torchvision_swin("swin_s", "swin_small"),
    "swin_b": _torchvision_swin("swin_b", "swin_base"),
    **{
        f"timm {name}": _timm(name, ours)
        for name, ours in (
            ("deit_tiny_patch16_224", "deit_tiny"),
            ("deit_small_patch16_224", "deit_small"),
            ("deit_base_patch16_224", "deit_base"),
            ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled"),
            ("deit_small_distilled_patch16_224", "deit_small_distilled"),
            ("deit_base_distilled_patch16_224", "deit_base_distilled"),
            ("vit_small_patch16_224", "vit_small"),
            ("vit_base_patch16_224", "vit_base"),
        )
    },
    "timm swin_tiny_patch4_window7_224": Theirs(
        "swin_tiny",
        _timm_swin,
        lambda state, model, _: swin_transformer.checkpoint_filter_fn(state, model),
        "timm",
        large_window=12,
        large_goal=1e-3,
    ),
    "DeiT's deit_small (names, resize)": Theirs(
        "deit_small",
        lambda size: timm.create_model("deit_small_patch16_224", img_size=size),
        _official_deit,
        "timm",
        large_goal=1e-3,
    ),
    # Names as the official repository has them; timm's own conversion of them is the other side.
    "Swin's swin_tiny (names, resize)": Theirs(
        "swin_tiny", _timm_swin, _official_swin, "swin", large_window=12
    ),
}


def ours(name: str, size: int, window: int | None = None) -> nn.Module:
    """A model of ours for 1,000 classes, with the padding of the published Swin."""
    overrides = [f"model={name}", "data=imagefolder", f"data.img_size={size}", "data.num_classes=1000"]
    if name.startswith("swin"):
        overrides.append("model.mask_padding=false")
    if window is not None:
        overrides.append(f"model.window_size={window}")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return make(plain(compose("train", overrides=overrides))["model"]).eval()


@torch.no_grad()
def measure(theirs: Theirs, folder: Path) -> dict[str, Any]:
    """The figures of one model; see the head of this file.

    Args:
        theirs: the model.
        folder: for the weight file.
    """
    torch.manual_seed(0)
    there = theirs.build(224).eval()
    for parameter in there.parameters():  # theirs start with zeros and ones, which would hide a mix-up
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else 0.02))
    state = there.state_dict()
    if theirs.layout == "swin":  # written by us, read by timm's conversion: strict, below
        here = ours(theirs.ours, 224)
        load_pretrained(here, _written(state, folder))
        state = state_dict_named(here, "swin")
        del here
    file = _written(state, folder)

    images = torch.randn(2, 3, 224, 224)
    here = ours(theirs.ours, 224)
    report = load_pretrained(here, file)
    figures: dict[str, Any] = {"tensors": len(report.loaded), "difference": _relative(here, there, images)}
    saved = state_dict_named(here, theirs.layout)
    back = theirs.resized(dict(saved), there, 224) if theirs.layout == "swin" else saved
    figures["loads_there"] = str(theirs.build(224).load_state_dict(back, strict=True)).startswith("<All keys")
    figures["same_back"] = all(torch.equal(saved[name], state[name]) for name in state)
    del saved, back, there
    gc.collect()

    there = theirs.build(theirs.large).eval()
    there.load_state_dict(theirs.resized(dict(state), there, theirs.large), strict=True)
    here = ours(theirs.ours, theirs.large, theirs.large_window)
    report = load_pretrained(here, file)
    images = torch.randn(1, 3, theirs.large, theirs.large)
    return {
        **figures,
        "large": theirs.large,
        "resized": len(report.resized),
        "difference_large": _relative(here, there, images),
    }


def _written(state: State, folder: Path) -> str:
    torch.save(state, folder / "weights.pth")
    return str(folder / "weights.pth")


def _relative(here: nn.Module, there: nn.Module, images: Tensor) -> float:
    expected = there(images)
    return float((here(images) - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of: {', '.join(MODELS)}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.models) - set(MODELS)
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    results = {}
    print(f"{'model':<40} {'tensors':>7} {'224 px':>9} {'back':>5} {'strict':>6} {'larger':>7} {'there':>9}")
    for name in arguments.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found = results[name] = measure(MODELS[name], Path(folder))
        gc.collect()
        print(
            f"{name:<40} {found['tensors']:>7} {found['difference']:>9.1e} {found['same_back']!s:>5} "
            f"{found['loads_there']!s:>6} {found['large']:>4} px {found['difference_large']:>9.1e}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    missed = [
        name
        for name, r in results.items()
        if not (r["loads_there"] and r["same_back"] and r["difference"] <= GOAL)
        or r["difference_large"] > MODELS[name].large_goal
    ]
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
