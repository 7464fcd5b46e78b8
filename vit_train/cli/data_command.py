"""`vit-data`: look at a dataset, or make one, before training on it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from vit_train.cli import command
from vit_train.errors import DataError, WorkerLostError
from vit_train.system import durable
from vit_train.system.places import as_argument, as_typed, expanded
from vit_train.text import count, some

_STDOUT = "-"


def main(argv: list[str] | None = None) -> int:
    """Runs `vit-data` on these arguments (None: the process's own) and returns its exit code."""
    parse = partial(_parser().parse_args, argv)
    return command.run("vit-data", lambda arguments: arguments.work(arguments), parse)


def check(arguments: argparse.Namespace) -> int:
    """Looks at every image of a folder; returns 3 if something would break training.

    Raises:
        ConfigError: --json cannot be written.
        DataError: there is no such folder.
    """
    out = _json_file(arguments.json)
    from vit_train.data.folder.check import check_folder
    from vit_train.data.image_data import num_cores
    from vit_train.report.console import Console
    from vit_train.report.dataset import check_tables

    workers = num_cores() if arguments.num_workers is None else arguments.num_workers
    with _bars() as start, _typed_root():
        report = check_folder(arguments.root, num_workers=workers, start=start)
    if out is not None:
        _write_json(out, asdict(report))
    if arguments.json != _STDOUT:
        console = Console()
        for table in check_tables(report):
            console.say(table)
    return DataError.exit_code if report.problems else 0


def stats(arguments: argparse.Namespace) -> None:
    """Prints mean and std of a split, and what to type to train with them.

    Raises:
        ConfigError: --json cannot be written.
        DataError: the folder or an image in it cannot be read.
        WorkerLostError: a worker process died.
    """
    out = _json_file(arguments.json)
    import torch

    from vit_train.data import ImageFolder
    from vit_train.data.transforms.stats import channel_stats, unusual
    from vit_train.report.console import Console
    from vit_train.report.dataset import stats_table

    data = ImageFolder(
        root=arguments.root,
        img_size=arguments.img_size,
        in_channels=arguments.channels,
        resize=arguments.resize,
        num_workers=arguments.num_workers,
        cache="none",
    )
    try:
        with _typed_root():
            data.setup(device=torch.device("cpu"), rank=0, world_size=1, training=arguments.split == "train")
        all_bad = f"vit-data check {as_argument(arguments.root)} lists all"
        with _bars() as start, _typed_root(all_bad):  # reading stops at the first
            found = channel_stats(data, arguments.split, progress=start(data.sizes[arguments.split]))
    except WorkerLostError as error:
        raise error.reworded(advice="type --num-workers 0 or a smaller number") from error
    finally:
        data.close()
    rounded = {name: [round(value, 4) for value in getattr(found, name)] for name in ("mean", "std")}
    if not all(rounded["std"]):
        raise DataError(
            f"{arguments.root}: all {arguments.split} images are of one colour: nothing to learn from"
        )
    notes = [note for note in data.notes if note.startswith("data.value_range")]
    for text, which in unusual(found.levels):
        names = some([data.source(arguments.split, i) for i in which])
        notes.append(f"{count(len(which), 'image')} {text}: {names}")
    overrides = [f"data.{name}={json.dumps(values).replace(' ', '')}" for name, values in rounded.items()]
    if out is not None:
        about = {"split": arguments.split, "img_size": data.img_size, "resize": data.resize}
        figures = {"num_images": found.num_images, "mean": found.mean, "std": found.std}
        _write_json(out, {"root": arguments.root, **about, **figures, "overrides": overrides, "notes": notes})
    if arguments.json != _STDOUT:
        console = Console()
        console.say(
            f"{arguments.root} at {data.img_size} x {data.img_size} pixels, on the scale from 0 to 1\n"
        )
        console.say(stats_table(found, arguments.split, data))
        for note in notes:
            console.say(f"note: {note}")
        console.say(f"\nto train with them, add: {shlex.join(overrides)}")


@contextmanager
def _bars() -> Iterator[Callable[[int], Callable[[int], object]]]:
    """Gives what starts a progress bar: total -> what is called with the number done."""
    from tqdm import tqdm

    with ExitStack() as stack:
        bar = partial(tqdm, unit="image", leave=False, delay=1, disable=None)
        yield lambda total: stack.enter_context(bar(total=total)).update


@contextmanager
def _typed_root(more: str = "") -> Iterator[None]:
    """Errors about `data.root` name what was typed here, and say more."""
    try:
        yield
    except DataError as error:
        raise error.reworded(key="", advice=more or error.advice) from error


def _json_file(path: str | None) -> Path | str | None:
    return path if path in (None, _STDOUT) else command.output_file("--json", str(path))


def _write_json(out: Path | str, content: dict[str, Any]) -> None:
    """ASCII, so that no name can do anything to a terminal; a reader gets every name as it is."""
    text = json.dumps(content, indent=1) + "\n"
    if isinstance(out, str):
        sys.stdout.write(text)
        return
    with command.writing(f"--json {out}"):
        durable.make_directory(out.parent)
        durable.replace(out, text)


def write_digits(root: str) -> None:
    """Writes the embedded digits as an image folder: root/{train,val,test}/<digit>/<number>.png.

    The splits are those of `data=digits`. The folder appears whole or not at all.

    Raises:
        DataError: `root` holds something already, or cannot be written.
    """
    # Resolved, because the finished folder can replace an empty one but not a link to it.
    target = expanded(root).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DataError(f"{target} is not an empty folder: name a new one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: a rename is atomic within one file system only.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
            folder = Path(aside) / target.name
            counts = _write_splits(folder)
            if target.exists() and sys.platform == "win32":
                target.rmdir()
            folder.rename(target)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror or error})") from error
    print(f"wrote {counts} to {target}")
    root = as_typed("data.root", target)
    print(f"train on it: vit-train data=imagefolder {root} data.in_channels=1 model=vit_digits")


def _write_splits(folder: Path) -> str:
    # Imported here, with torch and scikit-learn behind it: --help must answer at once.
    import torch

    from vit_train.data import Digits

    data = Digits()
    data.setup(device=torch.device("cpu"), rank=0, world_size=1)
    for split, source in data.sources.items():
        for name in data.class_names:
            (folder / split / name).mkdir(parents=True)
        for index, target in enumerate(source.targets.tolist()):
            source.read(index).save(folder / split / data.class_names[target] / f"{index:04d}.png")
    return ", ".join(f"{size} {split}" for split, size in data.sizes.items()) + " images"


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="vit-data", description="Look at a dataset, or make one.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    folder = command.Parser(add_help=False)
    folder.add_argument("root", metavar="ROOT", help="the folder, as data.root")
    folder.add_argument("--json", metavar="FILE", help="also write everything as JSON; - prints it instead")
    folder.add_argument(
        "--num-workers",
        type=command.whole_number(0, 256),
        metavar="N",
        help="processes that read images; default: one per core",
    )
    commands.add_parser(
        "check",
        parents=[folder],
        help="decode every image of a folder and say what is wrong with it",
        description=(
            "Decodes every image below ROOT, as training would, and looks at its layout. Exit code 3: "
            "something would break training, such as an image that cannot be read, a class without training "
            "images, a class that only val or test has, a layout that is neither <class>/<image> nor "
            "train/<class>/<image>. Warnings are about what training would pass over: equal files in two "
            "splits or two classes, classes that a split lacks, files that are not used."
        ),
        epilog=(
            "A damaged JPEG may still decode: of 100 with one flipped bit 98 do. Only a checksum made when "
            "the file was whole can tell."
        ),
    ).set_defaults(work=check)
    _add_stats(commands, folder)
    digits = commands.add_parser(
        "digits",
        help="write scikit-learn's embedded digits as an image folder",
        description="Writes scikit-learn's 1,797 digits as PNG files in ROOT/{train,val,test}/<digit>/.",
    )
    digits.add_argument("root", metavar="ROOT", help="a folder that does not exist yet, or is empty")
    digits.set_defaults(work=lambda arguments: write_digits(arguments.root))
    return parser


def _add_stats(commands: Any, folder: argparse.ArgumentParser) -> None:
    stats_ = commands.add_parser(
        "stats",
        parents=[folder],
        help="mean and standard deviation of the pixels: data.mean and data.std",
        description=(
            "Computes mean and standard deviation per channel over every pixel of a split, as training sees "
            "the images without augmentation, and prints what to type to train with them."
        ),
    )
    stats_.add_argument(
        "--img-size",
        type=command.whole_number(1, 2**14),
        metavar="N",
        help="side in pixels; default: what training would take",
    )
    stats_.add_argument(
        "--resize", choices=("crop", "squash"), default="crop", help="as data.resize; default: crop"
    )
    stats_.add_argument("--split", choices=("train", "val", "test"), default="train", help="default: train")
    stats_.add_argument(
        "--channels", type=int, choices=(1, 3), default=3, help="as data.in_channels; default: 3"
    )
    stats_.set_defaults(work=stats)


if __name__ == "__main__":
    sys.exit(main())
