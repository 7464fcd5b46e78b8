"""`vit-predict RUN IMAGE...`: the likeliest classes of files, folders, patterns, URLs or a list of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vit_train.cli import command
from vit_train.errors import DataError, WorkerLostError
from vit_train.system import durable
from vit_train.text import one_line

if TYPE_CHECKING:
    from vit_train.inference.trained import Trained
    from vit_train.report.predictions import Csv, JsonLines, PredictionTable

_FEW = 32  # images that are read before worker processes would have started


def main(argv: list[str] | None = None) -> int:
    """Runs `vit-predict` on these arguments (None: the process's own) and returns its exit code."""
    return command.run("vit-predict", predict, partial(_parser().parse_intermixed_args, argv))


def predict(arguments: argparse.Namespace) -> None:
    """Predicts and writes, batch by batch.

    Raises:
        CheckpointError, ConfigError, DataError, WorkerLostError: see the messages. DataError also after
            everything else was written, where an image could not be read.
    """
    from vit_train.inference.images import find_images

    names = find_images(arguments.images, stdin=command.stdin_lines(), allow_url=arguments.allow_url)
    with _output(arguments.out) as file:
        trained = command.load_run("vit-predict", arguments, command.device(arguments.device))
        failed = _write(arguments, trained, names, file)
    if failed:
        raise DataError(f"{failed:,} of {len(names):,} images could not be read: each is named above")


def _write(arguments: argparse.Namespace, trained: Trained, names: list[str], file: IO[str]) -> int:
    """Returns how many images could not be read."""
    from tqdm import tqdm

    from vit_train.data.image_data import ImageData, num_cores
    from vit_train.inference import prediction

    workers = arguments.num_workers
    if workers is None:
        workers = 0 if len(names) <= _FEW else min(num_cores(), ImageData.max_workers)
    batches = prediction.predict(
        trained, names, top_k=arguments.top_k, batch_size=arguments.batch_size, num_workers=workers
    )
    format_ = _format(arguments, trained, names, file)
    failed = 0
    # a bar only where it takes longer than a second
    with tqdm(total=len(names), unit="image", leave=False, delay=1, disable=None) as bar:
        try:
            file.write(format_.head())
            for predictions in batches:
                errors = [each.error for each in predictions if each.error is not None]
                with tqdm.external_write_mode(file=sys.stdout):
                    for error in errors:
                        print(one_line(f"vit-predict: skipped: {error}"), file=sys.stderr)
                    file.write(format_.text(predictions))
                    file.flush()
                failed += len(errors)
                bar.update(len(predictions))
        except WorkerLostError as error:
            raise error.reworded(advice="look at that file and its disk, or type --num-workers 0") from error
        finally:
            batches.close()  # ends the workers
    return failed


def _format(
    arguments: argparse.Namespace, trained: Trained, names: list[str], file: IO[str]
) -> PredictionTable | Csv | JsonLines:
    from vit_train.report.predictions import Csv, JsonLines, PredictionTable

    chosen = arguments.format
    if chosen == "auto" and file.isatty():
        chosen = "table"
    if chosen == "table":
        return PredictionTable(file, names, trained.class_names)
    if chosen == "csv" or (chosen == "auto" and Path(arguments.out or "").suffix.lower() == ".csv"):
        return Csv(min(arguments.top_k, len(trained.class_names)))
    return JsonLines()


@contextmanager
def _output(out: str | None) -> Iterator[IO[str]]:
    """Stdout, or a file that appears whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    if out is None:
        yield sys.stdout
        return
    path = command.output_file("--out", out)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with command.writing(f"--out {out}"):
            durable.make_directory(path.parent)
            with aside.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="vit-predict",
        description="Predicts the likeliest classes of images.",
    )
    command.add_run(parser)
    command.add_images(parser)
    parser.add_argument(
        "--top-k", type=command.whole_number(1), default=5, metavar="K", help="classes per image; default: 5"
    )
    command.add_device(parser)
    parser.add_argument(
        "--batch-size",
        type=command.whole_number(1),
        default=64,
        metavar="N",
        help="images at a time; default: 64",
    )
    parser.add_argument(
        "--num-workers",
        type=command.whole_number(0, 256),
        metavar="N",
        help="processes that read images; default: one per core, none for a few images",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "table", "jsonl", "csv"),
        default="auto",
        help="auto: a table on a terminal, CSV for --out NAME.csv, else JSON Lines",
    )
    parser.add_argument("--out", metavar="FILE", help="where the predictions go; default: stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
