"""`vit-eval RUN`: figures of a trained run or checkpoint on its own data, or on other data by override."""

from __future__ import annotations

import argparse
import json
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_train.cli import command
from vit_train.errors import CheckpointError, ConfigError, DataError, suggest

if TYPE_CHECKING:
    from vit_train.evaluation import Evaluation
    from vit_train.trained import Trained

_OVERRIDABLE = ("data", "strategy", "trainer.precision")
# What building and running raise where a stored value, or one beside RUN, makes no sense
_UNFIT = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def main(argv: list[str] | None = None) -> int:
    """Runs `vit-eval` and returns its exit code.

    Args:
        argv: the arguments after the command; None takes the process's own.
    """
    arguments = _parser().parse_args(argv)
    return command.run("vit-eval", lambda: report(arguments))


def report(arguments: argparse.Namespace) -> None:
    """Evaluates, prints the tables and writes the JSON report.

    Raises:
        CheckpointError, ConfigError, DataError: see the messages.
    """
    from vit_train import checkpoint, durable
    from vit_train.report.console import Console
    from vit_train.report.evaluated import evaluation_json, evaluation_tables
    from vit_train.trained import fits, from_checkpoint, stored_config

    run = Path(arguments.run)
    stored, problems = checkpoint.load_run(run, fits)
    command.say_skipped("vit-eval", problems, stored.path)
    config = with_overrides(stored_config(stored), arguments.overrides)
    strategy, data = build_data(config)
    try:
        trained = from_checkpoint(stored, device=strategy.device, weights=arguments.weights)
        split = arguments.split or ("test" if data.sizes["test"] else "val")
        if not data.sizes[split]:
            present = ", ".join(name for name, size in data.sizes.items() if size)
            raise DataError(f"this data has no {split} images; type --split with one of {present}")
        evaluation = _evaluate(trained, config, strategy, data, split)
    except _UNFIT as error:
        lost = data.worker_lost(error)
        if lost is not None or type(error).__name__ == "OutOfMemoryError":
            raise lost or error from error
        raise ConfigError(f"{stored.path} cannot be evaluated on this data: {_reason(error)}") from error
    finally:
        data.close()
    result = evaluation_json(evaluation, trained, split=split, fingerprint=data.fingerprint())
    console = Console()
    for table in evaluation_tables(evaluation, trained, split=split):
        console.say(table)
    is_run = not (run / checkpoint.MANIFEST).is_file()
    target = Path(arguments.json) if arguments.json else run / f"eval_{split}.json" if is_run else None
    if target is not None:
        try:
            durable.replace(target, json.dumps(result, indent=1, ensure_ascii=False))
        except OSError as error:
            raise ConfigError(f"--json {target} cannot be written: {error.strerror or error}") from error
        console.say(f"report  {target}")


def _evaluate(trained: Trained, config: dict[str, Any], strategy: Any, data: Any, split: str) -> Evaluation:
    from tqdm import tqdm

    from vit_train.data.batch_transforms import Normalize
    from vit_train.evaluation import evaluate
    from vit_train.objective import CrossEntropy
    from vit_train.precision import resolve_precision

    precision = config["trainer"]["precision"]
    if precision == "fp16" and strategy.device.type == "cpu":
        precision = "fp32"
    loader = data.loader(split)
    result = evaluate(
        trained.model,
        tqdm(loader, desc=split, unit="batch", leave=False, disable=not sys.stderr.isatty()),
        objective=CrossEntropy(trained.class_names, [1] * len(trained.class_names)),
        transform=Normalize(trained.mean, trained.std).to(strategy.device),
        strategy=strategy,
        precision=resolve_precision(precision, strategy.device),
        num_classes=len(trained.class_names),
        class_map=class_map(data.class_names, trained.class_names).to(strategy.device),
    )
    assert result is not None
    return result


def class_map(data_classes: list[str], model_classes: list[str]) -> Any:
    """The model's class id of each of the data's classes, by name: (len(data_classes),) int64.

    Raises:
        DataError: the data has a class the model was not trained on.
    """
    import torch

    ids = {name: i for i, name in enumerate(model_classes)}
    unknown = [name for name in data_classes if name not in ids]
    if unknown:
        raise DataError(
            f"class {unknown[0]!r} of the data is not one the model knows{suggest(unknown[0], ids)} "
            f"(it knows: {', '.join(model_classes)})"
        )
    return torch.tensor([ids[name] for name in data_classes])


def build_data(config: dict[str, Any]) -> tuple[Any, Any]:
    """Strategy and data module of a stored configuration, the data at the size the model was trained with.

    Raises:
        ConfigError, DataError: see the messages.
    """
    from vit_train.construct import check, foreign_code, make
    from vit_train.precision import Precision

    # before `check`, which imports what is named
    foreign = foreign_code(config["data"], ("vit_train.data",), "data")
    foreign += foreign_code(config["strategy"], ("vit_train.strategy",), "strategy")
    if foreign:
        raise CheckpointError(f"the checkpoint names code that is not vit-train's: {'; '.join(foreign)}")
    # the classes may be fewer or in another order; they are matched by name
    node = {**config["data"], "num_classes": None, "limit": None, "sample_transform": None}
    errors = check(node, key="data") + check(config["strategy"], key="strategy")
    if errors:
        raise ConfigError("; ".join(errors))
    precisions = typing.get_args(Precision)
    if config["trainer"].get("precision") not in precisions:
        raise ConfigError(f"trainer.precision: expected one of {', '.join(precisions)}")
    strategy = make(config["strategy"], key="strategy", allow=("vit_train.strategy",))
    data = make(node, key="data", allow=("vit_train.data",))
    try:
        strategy.start()
        data.setup(device=strategy.device, rank=0, world_size=1)
    except _UNFIT as error:
        raise ConfigError(f"data: {_reason(error)}") from error
    return strategy, data


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def with_overrides(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The stored configuration with trailing `key=value` arguments, values read as YAML.

    Raises:
        ConfigError: an argument is no `key=value`, or its key is not one evaluation uses.
    """
    import copy

    import yaml

    config = copy.deepcopy(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: expected key=value, such as data.root=other/photos")
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in _OVERRIDABLE):
            raise ConfigError(f"{key}: evaluation uses only {', '.join(f'{a}.*' for a in _OVERRIDABLE[:2])}")
        *parents, name = key.split(".")
        node = config
        for part in parents:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if not parents or not isinstance(node, dict) or name not in node or name.startswith("_"):
            known = [k for k in node if not k.startswith("_")] if isinstance(node, dict) else []
            raise ConfigError(f"{key}: no such key{suggest(name, known)} (choices: {', '.join(known)})")
        try:
            node[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{override}: the value is not valid YAML") from None
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit-eval",
        description="Evaluates a trained model: loss, top-1, top-5 and accuracy per class.",
        epilog="Other data by override, classes are matched by name: vit-eval RUN data.root=other/photos",
    )
    command.add_run(parser)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as data.batch_size=512")
    parser.add_argument("--split", choices=("val", "test"), help="default: test, else val")
    parser.add_argument(
        "--json", metavar="FILE", help="where the report goes; default: RUN/eval_<split>.json"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
