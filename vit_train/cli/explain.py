"""`vit-explain RUN IMAGE...`: pictures of where a trained model looks."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import normalize

from vit_train.checkpoint import MANIFEST
from vit_train.cli import command
from vit_train.errors import ConfigError, DataError
from vit_train.system import durable
from vit_train.system.places import expanded
from vit_train.text import one_line, suggest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vit_train.inference.attention import Method
    from vit_train.inference.trained import Trained
    from vit_train.report.overlay import Explained

_SHOWN_CHOICES = 20
_NOTHING = "nothing speaks for it here"
_LONGEST_NAME = 50  # characters, of up to four bytes each: file systems take 255 bytes


def main(argv: list[str] | None = None) -> int:
    """Runs `vit-explain` on these arguments (None: the process's own) and returns its exit code."""
    return command.run("vit-explain", explain, partial(_parser().parse_intermixed_args, argv))


def explain(arguments: argparse.Namespace) -> None:
    """Draws every image and says where the pictures are.

    Raises:
        CheckpointError, ConfigError, DataError: see the messages. DataError also after everything else was
            drawn, where an image could not be read.
    """
    from tqdm import tqdm

    from vit_train.inference.attention import NAMES
    from vit_train.inference.images import find_images
    from vit_train.report.overlay import SHEET, Sheet, picture

    found = find_images(arguments.images, stdin=command.stdin_lines(), allow_url=arguments.allow_url)
    files = list(dict.fromkeys(found))
    trained = command.load_run("vit-explain", arguments, command.device(arguments.device))
    method = choose_method(trained, arguments)
    target = None if arguments.class_name is None else class_id(trained, arguments.class_name)
    folder = _folder(arguments)
    sheet, drawn = Sheet(), 0
    named = zip(files, output_names(files))
    for file, name in tqdm(named, total=len(files), unit="image", leave=False, disable=None):
        try:
            explained = explain_image(trained, file, method=method, target=target, heads=arguments.heads)
        except DataError as error:
            tqdm.write(one_line(f"vit-explain: skipped: {error}"), file=sys.stderr)
            continue
        drawn += 1
        written = folder / f"{name}_{method}.png"
        write_png(written, picture(explained))
        sheet.add(explained)
        tqdm.write(_line(file, explained.title, written), file=sys.stdout)
    if arguments.sheet and drawn:
        heading = NAMES[method] + (f" for {arguments.class_name}" if target is not None else "")
        write_png(folder / "sheet.png", sheet.draw(heading))
        more = f"the first {SHEET} of {drawn:,} images" if drawn > SHEET else "all of them"
        print(_line("sheet", more, folder / "sheet.png"))
    if drawn < len(files):
        failed = len(files) - drawn
        raise DataError(f"{failed:,} of {len(files):,} images could not be read: each is named above")


def _line(*parts: object) -> str:
    return one_line("  ".join(map(str, parts)))


def explain_image(
    trained: Trained, file: str, *, method: Method, target: int | None, heads: bool
) -> Explained:
    """What the model says to one image (a path or URL), and where it looks.

    `target` is the class that Grad-CAM explains; None takes the one predicted. With `heads` each head of the
    last layer is shown beside their mean.

    Raises:
        DataError: the image cannot be read.
    """
    import torch

    from vit_train.data.transforms.decode import decode
    from vit_train.data.transforms.sample_transforms import seen_box
    from vit_train.inference import attention
    from vit_train.inference.prediction import NOT_FINITE, fetched
    from vit_train.report.overlay import Explained, shown_name
    from vit_train.system.precision import autocast

    device = next(trained.model.parameters()).device
    content = fetched(file)
    # the model may be given less of a large file, as in vit-predict
    image = decode(content, name=file, background=trained.background, value_range=trained.value_range)
    pixels = trained.read(content, name=file)
    images = trained.batch_transform().normalize(pixels[None].to(device))
    with torch.no_grad(), autocast(trained.precision(), device):  # as vit-predict says it
        probabilities = trained.model(images).float().softmax(1)[0].tolist()
    if any(map(math.isnan, probabilities)):
        raise DataError(f"{file}: {NOT_FINITE}")
    predicted = max(range(len(probabilities)), key=probabilities.__getitem__)
    explained = predicted if target is None else target
    maps = attention.explain(trained.model, images, torch.tensor([explained], device=device), method=method)
    parts = maps.parts if heads or method == "gradcam" else {}
    whole = attention.NAMES[method]
    if method == "gradcam":
        whole += f" for {shown_name(trained.class_names[explained], explained)}"

    def says(chosen: int) -> str:
        return f"{shown_name(trained.class_names[chosen], chosen)} {probabilities[chosen]:.1%}"

    notes = ["/".join(Path(file).parts[-2:])]
    if target is not None:
        notes.insert(0, f"predicted: {says(predicted)}")
    if not maps.whole.any():
        notes.insert(0, _NOTHING)
    return Explained(
        image=image,
        box=seen_box(*image.size, img_size=trained.img_size, resize=trained.resize),
        maps=dict(_labelled(name, values, method) for name, values in {whole: maps.whole, **parts}.items()),
        title=says(predicted) if target is None else f"explained: {says(target)}",
        note=", ".join(notes),
    )


def _labelled(name: str, values: Tensor, method: Method) -> tuple[str, NDArray[np.float32]]:
    """A map (1, h, w) as it is shown; attention with what a patch gets: it tells a flat map from a peak."""
    shares = values[0].cpu().numpy()
    if method == "gradcam":
        return name if shares.any() else f"{name}\n{_NOTHING}", shares
    return f"{name}\n{shares.min():.1%} to {shares.max():.1%} a patch", shares


def choose_method(trained: Trained, arguments: argparse.Namespace) -> Method:
    """What is drawn: as typed, or what suits the model and the other arguments.

    Raises:
        ConfigError: they contradict each other or the model.
    """
    from vit_train.inference.attention import NAMES, methods

    known, family = methods(trained.model), type(trained.model).__name__
    if not known:
        raise ConfigError(
            f"{family} has nothing to draw: vit-explain knows ViT, DeiT, hybrids, Swin and ResNet"
        )
    method: Method = known[0] if arguments.method == "auto" else arguments.method
    if arguments.method == "auto" and arguments.heads and "attention" in known:
        method = "attention"
    if method not in known:
        why = "its attention stays inside shifted windows, and no token stands for the result"
        if family == "ResNet":
            why = "it has no attention"
        if method == "gradcam":
            why = "every token ends up with information from the whole image, so the map misses what decides"
        raise ConfigError(f"--method {method} has no meaning for {family}: {why}; type --method {known[0]}")
    if arguments.heads and method != "attention":
        instead = "type --method attention" if "attention" in known else f"leave it out for {family}"
        raise ConfigError(f"--heads shows the attention of the last layer, not {NAMES[method]}; {instead}")
    if arguments.class_name is not None and method != "gradcam":
        raise ConfigError(f"--class: {NAMES[method]} is the same for every class; leave it out for {family}")
    return method


def class_id(trained: Trained, name: str) -> int:
    """The id of the class of that name.

    Raises:
        ConfigError: there is none.
    """
    names, name = trained.class_names, normalize("NFC", name)
    if name not in names:
        shown = ", ".join(names[:_SHOWN_CHOICES]) + (", ..." if len(names) > _SHOWN_CHOICES else "")
        raise ConfigError(f"--class {name}: no such class{suggest(name, names)} (classes: {shown})")
    return names.index(name)


def output_names(files: list[str]) -> list[str]:
    """A name for each file: its own without suffix, with that of its folder where others have the same.

    Cut where a file system would not take it with what is added. Case does not tell names apart: on macOS and
    Windows it would be the same file.
    """
    paths = [Path(file).absolute() for file in files]
    stems = [path.stem[:_LONGEST_NAME] for path in paths]
    counts = Counter(stem.casefold() for stem in stems)
    names: list[str] = []
    taken: set[str] = set()
    for path, stem in zip(paths, stems):
        name = stem if counts[stem.casefold()] == 1 else f"{path.parent.name}_{stem}"[:_LONGEST_NAME]
        unique, number = name, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique.casefold())
        names.append(unique)
    return names


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Writes a picture; a crash leaves no half of it.

    Raises:
        ConfigError: it cannot be written.
    """
    from vit_train.report.overlay import png

    with command.writing(path, "; type --out DIR"):
        durable.replace(path, png(pixels))


def _folder(arguments: argparse.Namespace) -> Path:
    """Where the pictures go: RUN/explain, for a single checkpoint ./explain."""
    run = Path(arguments.run)
    home = Path() if (run / MANIFEST).is_file() else run
    folder = expanded(arguments.out) if arguments.out else command.output_folder(home, "explain")
    with command.writing(folder, "; type --out DIR"):
        durable.make_directory(folder)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="vit-explain",
        description="Draws where a trained model looks: the image beside a map over it, as PNG.",
    )
    command.add_run(parser)
    command.add_images(parser)
    parser.add_argument(
        "--method",
        choices=("auto", "rollout", "attention", "gradcam"),
        default="auto",
        help="rollout: attention through all layers (the default for ViT, DeiT, hybrids); attention: of the "
        "last layer; gradcam: what speaks for a class (Swin, ResNet)",
    )
    parser.add_argument(
        "--heads",
        action="store_true",
        help="a panel for each head of the last layer; alone it means --method attention",
    )
    parser.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="with gradcam: explain this class instead of the predicted one",
    )
    parser.add_argument("--out", metavar="DIR", help="default: RUN/explain; for a checkpoint ./explain")
    parser.add_argument(
        "--sheet", action="store_true", help="also sheet.png: every image beside its map, up to 64"
    )
    command.add_device(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
