"""`vit-data`: look at a dataset, or make one, before training on it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from vit_train.errors import DataError, VitTrainError


def main(argv: list[str] | None = None) -> int:
    """Runs `vit-data` and returns its exit code.

    Args:
        argv: the arguments after the command; None takes the process's own.
    """
    arguments = _parser().parse_args(argv)
    try:
        write_digits(arguments.root)
    except VitTrainError as error:
        print(f"vit-data: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write_digits(root: str) -> None:
    """Writes the embedded digits as an image folder: root/{train,val,test}/<digit>/<number>.png.

    The splits are those of `data=digits`. The folder appears whole or not at all.

    Raises:
        DataError: `root` holds something already, or cannot be written.
    """
    # Resolved, because the finished folder can replace an empty one but not a link to it.
    target = Path(root).expanduser().resolve()
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
    print(f"train on it: vit-train data=imagefolder data.root={target} data.in_channels=1 model=vit_digits")


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
    parser = argparse.ArgumentParser(prog="vit-data", description="Look at a dataset, or make one.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    digits = commands.add_parser(
        "digits",
        help="write scikit-learn's embedded digits as an image folder",
        description="Writes scikit-learn's 1,797 digits as PNG files in ROOT/{train,val,test}/<digit>/.",
    )
    digits.add_argument("root", metavar="ROOT", help="a folder that does not exist yet, or is empty")
    return parser


if __name__ == "__main__":
    sys.exit(main())
