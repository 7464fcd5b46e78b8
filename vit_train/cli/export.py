"""`vit-export RUN --format onnx`: a trained model as a file that other software loads."""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vit_train.checkpoint import MANIFEST
from vit_train.cli import command
from vit_train.errors import ConfigError, SaveError
from vit_train.system import durable
from vit_train.text import printable

if TYPE_CHECKING:
    from vit_train.inference.trained import Trained
    from vit_train.weights import Layout

FORMATS = {
    "onnx": "a graph for onnxruntime and others",
    "pt2": "a graph for torch.export.load, which needs no code of ours",
    "safetensors": "weights",
    "pth": "weights, under 'state_dict'",
}
NAMES = ("timm", "torchvision", "swin")
_LONGEST_NAME = 100  # characters of a file name


def main(argv: list[str] | None = None) -> int:
    """Runs `vit-export` on these arguments (None: the process's own) and returns its exit code."""
    return command.run("vit-export", export, partial(_parser().parse_args, argv))


def export(arguments: argparse.Namespace) -> None:
    """Makes the file, compares it with the model, writes it and its description.

    Raises:
        CheckpointError, ConfigError, SaveError: see the messages.
    """
    file_format = arguments.format
    if arguments.names is not None and file_format in ("onnx", "pt2"):
        raise ConfigError(f"--names is for weight files; leave it out for a graph (--format {file_format})")
    out = None if arguments.out is None else command.output_file("--out", arguments.out)
    if out is not None:
        command.output_file("--out", f"{arguments.out}.json")  # which is written beside it

    import torch

    from vit_train.inference import export as exporting

    trained = command.load_run("vit-export", arguments, torch.device("cpu"))
    model = trained.model.float()
    layout: Layout = arguments.names or "timm"
    shape = (trained.in_channels, trained.img_size, trained.img_size)
    exporting.check_possible(file_format, model)
    target = out or _default(Path(arguments.run), trained, file_format)
    about = exporting.describe(trained, file_format, layout=layout)
    _progress(f"making the {file_format} file ...")
    content = exporting.make_file(
        model, file_format, images=torch.zeros(2, *shape), about=about, layout=layout
    )
    _progress("loading it again and comparing ...")
    difference = exporting.verify(content, file_format, model, image_shape=shape)

    beside = target.with_name(f"{target.name}.json")
    try:
        durable.make_directory(target.parent)
        durable.replace(target, content)
        durable.replace(beside, json.dumps(about, indent=1, ensure_ascii=False))
    except OSError as error:
        raise SaveError(f"{target} cannot be written: {error.strerror or error}") from error
    sizes = ", ".join(str(size) for size in exporting.BATCH_SIZES)
    print(
        f"checked  {sizes} images: largest difference of a logit {difference:.1g} "
        f"(allowed {exporting.MAX_DIFFERENCE[file_format]:g})"
    )
    print(f"file     {printable(str(target))}  ({len(content) / 1e6:,.1f} MB)")
    print(f"about    {printable(str(beside))}")
    if about.get("note"):
        print(f"note     {about['note']}")


def _default(run: Path, trained: Trained, file_format: str) -> Path:
    """RUN/export/<name of the run>.<format>; of a checkpoint, in the run it belongs to, if it is in one."""
    home = run
    if (run / MANIFEST).is_file():
        folder = run.absolute().parent
        home = folder.parent if folder.name == "checkpoints" else folder
    # the name comes from a file: only what is harmless in every file system
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", str(trained.config.get("name") or "")).strip("._-")
    return command.output_folder(home, "export") / f"{name[:_LONGEST_NAME] or 'model'}.{file_format}"


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="vit-export",
        description="Writes a trained model as a file that other software loads. The file is loaded again "
        "and compared with the model first. It carries class names and preprocessing, as does the .json "
        "beside it.",
        epilog="An existing file is replaced once the new one has passed the comparison.",
    )
    command.add_run(parser)
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        required=True,
        help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()),
    )
    parser.add_argument("--out", metavar="FILE", help="default: RUN/export/<name of the run>.<format>")
    parser.add_argument(
        "--names",
        choices=NAMES,
        help="parameter names of a weight file: those of timm (default, DeiT's too), torchvision or "
        "swin (microsoft/Swin-Transformer)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
