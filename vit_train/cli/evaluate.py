"""`vit-eval RUN`: the report on a trained run or checkpoint, on its own data or on other data by override."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_train.checkpoint import MANIFEST
from vit_train.cli import command
from vit_train.errors import ConfigError, DataError, blame
from vit_train.system import durable
from vit_train.system.places import expanded
from vit_train.text import some, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vit_train.data import Split
    from vit_train.inference.trained import Trained
    from vit_train.report.evaluation_figures import Evaluated
    from vit_train.system.precision import Precision

_OVERRIDABLE = ("data", "strategy", "trainer.precision")
_FOLDER = "vit_train.data.ImageFolder"
_FEW = 100  # images, below which a single one moves the figures by more than a point


@dataclass(frozen=True)
class Place:
    """Where a report goes: a directory, a run of its own in TensorBoard; None where it does not.

    A run directory takes both, as `eval/<name>` and `tensorboard/eval_<name>`. A checkpoint directory is no
    place for reports.
    """

    folder: Path | None = None
    tensorboard: Path | None = None


def main(argv: list[str] | None = None) -> int:
    """Runs `vit-eval` on these arguments (None: the process's own) and returns its exit code."""
    # key=value may stand anywhere
    return command.run("vit-eval", report, partial(_parser().parse_intermixed_args, argv))


def report(arguments: argparse.Namespace) -> None:
    """Evaluates, prints the tables and writes the report.

    Raises:
        CheckpointError, ConfigError, DataError: see the messages.
    """
    json = None if arguments.json is None else command.output_file("--json", arguments.json)
    from vit_train.inference.trained import from_checkpoint
    from vit_train.report.console import Console
    from vit_train.report.evaluation_figures import evaluation_tables
    from vit_train.report.evaluation_files import check_place

    stored, trust = command.read_run("vit-eval", arguments)
    config = with_overrides(stored.state["config"], arguments.overrides, stored.state["inference"])
    root = other_root(config["data"], stored.state["config"]["data"])
    if root is not None:
        for key, whole in (("limit", None), ("train_fraction", 1.0)):  # they are about the run's own images
            if key in config["data"] and not any(t.startswith(f"data.{key}=") for t in arguments.overrides):
                config["data"][key] = whole
    strategy, data = build_data(config, trust)
    try:
        trained = from_checkpoint(stored, device=strategy.device, weights=arguments.weights, trust=trust)
        precision = precision_of(trained, config, strategy.device, arguments.overrides)
        split, splits = choose(arguments.split, data, elsewhere=root is not None)
        place = place_of(arguments, split, root)
        if place.folder is not None:
            check_place(place.folder)  # now, not after the work
        fingerprint = data.fingerprint()
        own = fingerprint == stored.state.get("dataset_fingerprint")
        about = {
            "split": split,
            "tta": arguments.tta,
            "overrides": arguments.overrides,
            "notes": notes_on(
                data,
                splits,
                asked=arguments.split,
                own=own,
                seen=own or root is None,
                limit=config["data"].get("limit"),
            ),
            "dataset_fingerprint": fingerprint,
        }
        with blame(ConfigError, f"{stored.path} cannot be evaluated on this data"):
            try:
                evaluated, mistakes = _evaluate(trained, precision, strategy, data, splits, about)
            except RuntimeError as error:
                raise data.worker_lost(error) or error from error
    finally:
        data.close()
    console = Console()
    for note in evaluated.about["notes"]:
        console.say(note)
    for table in evaluation_tables(evaluated):
        console.say(table)
    for path in _write(place, json, evaluated, mistakes):
        console.say(f"report  {path}")


def _evaluate(
    trained: Trained,
    precision: Precision,
    strategy: Any,
    data: Any,
    splits: list[Split],
    about: dict[str, Any],
) -> tuple[Evaluated, Tensor | None]:
    """The figures, and the images of the worst mistakes, if there are any."""
    from datetime import UTC, datetime

    from tqdm import tqdm

    from vit_train.data.loading.chosen import Chosen
    from vit_train.report.evaluation_figures import evaluated
    from vit_train.training.evaluation import Collector, MirrorMean, evaluate
    from vit_train.training.objective import CrossEntropy

    chosen, collector = Chosen(data, splits), Collector()
    evaluation = evaluate(
        MirrorMean(trained.model) if about["tta"] == "hflip" else trained.model,
        tqdm(chosen, desc=about["split"], unit="batch", leave=False, disable=None),
        objective=CrossEntropy(trained.class_names, [1] * len(trained.class_names)),
        transform=trained.batch_transform(),
        strategy=strategy,
        precision=precision,
        num_classes=len(trained.class_names),
        class_map=class_map(data.class_names, trained.class_names).to(strategy.device),
        collect=collector,
    )
    assert evaluation is not None
    predictions = collector.finish()
    report = evaluated(
        evaluation,
        predictions,
        class_names=trained.class_names,
        files=[chosen.source(i) for i in predictions.index.tolist()],
        about={
            **about,
            "data": _name(data),
            "checkpoint": str(trained.path),
            "step": trained.step,
            "weights": trained.weights,
            "device": strategy.describe(),
            "precision": precision,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    wrong = predictions.index[report.mistakes].tolist()
    return report, chosen.images(wrong) if wrong else None


def notes_on(
    data: Any, splits: list[Split], *, asked: str | None, own: bool, seen: bool, limit: int | None
) -> list[str]:
    """What the reader of the figures should know.

    Args:
        data: after `setup`.
        splits: what was evaluated.
        asked: --split.
        own: whether the images are exactly those of the run, wherever they are.
        seen: whether those of the data's training split were trained on.
        limit: data.limit.
    """
    notes, images = [], sum(data.sizes[split] for split in splits)
    if asked is None and "train" in splits:
        notes.append(f"{_name(data)} has no test or val split: all of its {images:,} images are evaluated")
    if seen and "train" in splits:
        # with another limit, or files that came later, not all of them
        known = f"{data.sizes['train']:,}" if own else "some"
        better = "the figures are better than for new images"
        notes.append(f"the model was trained on {known} of these {images:,} images: {better}")
    if limit in {data.sizes[split] for split in splits}:
        notes.append(f"data.limit={limit} may leave out images: type data.limit=null to evaluate all of them")
    if images < _FEW:
        notes.append(f"{images} images only: a single one moves top-1 by {100 / images:.1f} points")
    return notes


def _name(data: Any) -> str:
    from vit_train.data import ImageFolder

    return str(data.root) if isinstance(data, ImageFolder) else type(data).__name__


def precision_of(
    trained: Trained, config: dict[str, Any], device: torch.device, overrides: list[str]
) -> Precision:
    """What was typed, else what every command that uses the model computes in.

    Raises:
        ConfigError: the device does not compute in what was typed.
    """
    from vit_train.construct import as_config_error
    from vit_train.system.precision import resolve_precision

    if not any(text.startswith("trainer.precision=") for text in overrides):
        return trained.precision()
    with as_config_error("trainer.precision"):
        return resolve_precision(config["trainer"]["precision"], device)


def choose(asked: str | None, data: Any, *, elsewhere: bool) -> tuple[str, list[Split]]:
    """Which split, and which of the data's own it is made of.

    Without --split that is test, else val; and all of a folder elsewhere that has neither, because what
    training held out of the run's own data means nothing there.

    Raises:
        DataError: the data has no such images with labels.
    """
    present: list[Split] = [name for name, size in data.sizes.items() if size]
    if asked is None:
        asked = "test" if data.sizes["test"] else "all" if elsewhere and data.holds_out else "val"
    if asked == "all":
        return asked, present
    if asked not in present:
        others = ", ".join(present)
        raise DataError(f"this data has no {asked} images with labels; type --split with one of {others}")
    return asked, [name for name in present if name == asked]


def other_root(data: dict[str, Any], stored: dict[str, Any]) -> Path | None:
    """The folder that was typed, where it is not the one of the run."""
    if data.get("_target_") != stored.get("_target_"):
        return expanded(data.get("root"))
    folders = [expanded(node.get("root")) for node in (data, stored)]
    return folders[0] if folders[0].absolute() != folders[1].absolute() else None


def place_of(arguments: argparse.Namespace, split: str, root: Path | None) -> Place:
    """Where the report goes; see `Place`. With --json alone only the figures are written, there.

    Raises:
        ConfigError: RUN/eval is a link.
    """
    run = Path(arguments.run)
    if arguments.out is not None:
        return Place(expanded(arguments.out))
    if arguments.json is not None or (run / MANIFEST).is_file():
        return Place()
    name = split
    if root is not None:  # folders of the same name in different places are different data
        plain = re.sub(r"[^\w.-]+", "_", root.absolute().name).strip("._")[:40] or "data"
        place = str(root.absolute()).encode(errors="surrogateescape")
        name = f"{plain}-{hashlib.sha256(place).hexdigest()[:6]}_{split}"
    name += f"_{arguments.tta}" if arguments.tta else ""
    name += f"_{arguments.weights}" if arguments.weights != "auto" else ""
    tensorboard = run / "tensorboard"
    logs = tensorboard.is_dir() and not tensorboard.is_symlink()
    folder = command.output_folder(run, "eval") / name
    return Place(folder, tensorboard / f"eval_{name}" if logs else None)


def _write(place: Place, json: Path | None, evaluated: Evaluated, mistakes: Tensor | None) -> list[Path]:
    """Writes what there is a place for; returns what the user should look at.

    Raises:
        ConfigError: it cannot be written.
    """
    from vit_train.report import evaluation_files as files

    written = []
    if json is not None:
        with command.writing(f"--json {json}"):
            durable.make_directory(json.parent)
            durable.replace(json, files.json_text(evaluated))
        written.append(json)
    if place.folder is None:
        return written
    pictures = files.draw(evaluated, mistakes)
    with command.writing(place.folder, "; type --out with another directory"):
        files.write_report(place.folder, evaluated, pictures)
        if place.tensorboard is not None:
            files.log_to_tensorboard(place.tensorboard, evaluated, pictures)
    return [*written, place.folder / "report.html"]


def class_map(data_classes: list[str], model_classes: list[str]) -> Any:
    """The model's class id of each of the data's classes, by name: (len(data_classes),) int64.

    Raises:
        DataError: the data has classes the model was not trained on.
    """
    import torch

    ids = {name: i for i, name in enumerate(model_classes)}
    unknown = [name for name in data_classes if name not in ids]
    if unknown:
        named = some([*map(repr, unknown)])
        if len(unknown) == 1:
            what = f"the model does not know class {named} of the data{suggest(unknown[0], ids)}"
        else:
            what = f"the model does not know the classes {named} of the data"
        raise DataError(
            f"{what}: names must match exactly, upper and lower case included: rename the folder, or leave "
            f"it out (the model knows: {', '.join(model_classes)})"
            + ("; images without labels are for vit-predict" if len(unknown) == len(data_classes) else "")
        )
    return torch.tensor([ids[name] for name in data_classes])


def build_data(config: dict[str, Any], trust: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Strategy and data module of a stored configuration, the data at the size the model was trained with.

    Raises:
        CheckpointError, ConfigError, DataError: see the messages.
    """
    from vit_train.construct import check, make
    from vit_train.runs.stored import allowed, current
    from vit_train.system.precision import Precision

    # the classes may be fewer or in another order; they are matched by name
    unused = {key: None for key in ("num_classes", "sample_transform") if key in config["data"]}
    node = {**config["data"], **unused}
    devices = current(config["strategy"])
    # before `check`, which imports what is named
    allow = allowed({"data": node, "strategy": devices}, trust)
    errors = check(node, key="data") + check(devices, key="strategy")
    if errors:
        raise ConfigError("; ".join(errors))
    precisions = typing.get_args(Precision)
    if config["trainer"].get("precision") not in precisions:
        raise ConfigError(f"trainer.precision: expected one of {', '.join(precisions)}")
    strategy = make(devices, key="strategy", allow=allow["strategy"])
    data = make(node, key="data", allow=allow["data"])
    with blame(ConfigError, "data"):
        strategy.start()
        data.setup(device=strategy.device, rank=0, world_size=1, training=False, should_stop=lambda: False)
    return strategy, data


def with_overrides(
    config: dict[str, Any], overrides: list[str], inference: Mapping[str, Any]
) -> dict[str, Any]:
    """The stored configuration with trailing `key=value` arguments, as `resume=` reads them.

    `data=imagefolder` counts first, wherever it stands: `data.root` and the others are keys of the folder,
    whose images the model takes as `inference` says.

    Raises:
        ConfigError: an argument is not `key=value`, or its key is not one evaluation uses.
    """
    import copy

    from vit_train.cli.typed import key_and_value

    config = copy.deepcopy(config)
    groups = [text for text in overrides if text.startswith("data=")]
    for text in groups:
        if text != "data=imagefolder":
            raise ConfigError(
                f"{text}: data other than the run's own must be a folder of images: "
                "type data=imagefolder data.root=/path/to/your/folder"
            )
    if groups and config["data"].get("_target_") != _FOLDER:
        config["data"] = folder_for(config["data"], inference)
    for override in (text for text in overrides if text not in groups):
        key, value = key_and_value(override)
        if key != _OVERRIDABLE[-1] and not key.startswith(tuple(f"{group}." for group in _OVERRIDABLE)):
            raise ConfigError(f"{key}: evaluation uses only data.*, strategy.* and trainer.precision")
        *parents, name = key.split(".")
        node = config
        for part in parents:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if not isinstance(node, dict) or name not in node or name.startswith("_"):
            if key == "data.root":
                raise ConfigError(f"the run's data is not a folder: type data=imagefolder {override}")
            known = [k for k in node if not k.startswith("_")] if isinstance(node, dict) else []
            raise ConfigError(f"{key}: no such key{suggest(name, known)} (choices: {', '.join(known)})")
        node[name] = value
    return config


def folder_for(data: Mapping[str, Any], inference: Mapping[str, Any]) -> dict[str, Any]:
    """The node of a folder of images, read as the stored node `data` and the model's `inference` say."""
    from vit_train.construct import with_defaults

    loading = ("batch_size", "num_workers", "worker_timeout_seconds")
    return with_defaults(
        {
            "_target_": _FOLDER,
            "resize": "squash",  # as arrays are
            **{key: data[key] for key in loading if key in data},
            **{key: inference[key] for key in ("img_size", "in_channels", "mean", "std")},
        }
    )


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="vit-eval",
        description="Evaluates a trained model: loss, top-1, top-5, precision, recall and F1 per class, "
        "confusion matrix, calibration, the most confident mistakes.",
        epilog="Other images, classes are matched by name: vit-eval RUN data.root=other/photos; for a run "
        "that was not trained on a folder: data=imagefolder data.root=other/photos",
    )
    command.add_run(parser)
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="such as data.batch_size=512"
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        help="default: test, else val; all of another data.root that has neither",
    )
    parser.add_argument(
        "--tta",
        choices=("hflip",),
        help="test-time augmentation: the mean probability of each image and its mirror image",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where the report goes; default: RUN/eval/<split> of a run directory"
    )
    parser.add_argument("--json", metavar="FILE", help="the figures alone, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
