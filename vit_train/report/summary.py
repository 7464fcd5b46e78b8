"""Tables before the first step and after the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vit_train.text import count, duration, percent, printable

if TYPE_CHECKING:
    from vit_train.config.build import Run

_CLASSES_SHOWN = 12


def summary(run: Run) -> Table:
    """What is about to happen: model, data, device, batch, budget, where from, where to."""
    config, origin, trainer = run.config, run.origins, run.trainer
    data, parts = trainer.parts.data, trainer.parts
    node, settings = config["model"], config["trainer"]
    parameters = sum(p.numel() for p in parts.model.parameters())
    trained = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    frozen = f" ({trained / 1e6:.2f}M trained, the others frozen)" if trained < parameters else ""
    rates = sorted({group.get("base_lr", group["lr"]) for group in trainer.optimizer.param_groups})
    falls = config["optimizer"].get("layer_decay", 1) < 1
    falling = f", falling from layer to layer to {rates[0]:.1g}" if falls else ""
    batch, pieces = min(config["data"]["batch_size"], data.sizes["train"]), settings["grad_accum_steps"]
    split = f" = {pieces} micro-batches of {batch // pieces}" if pieces > 1 else ""
    optimizer, side = config["optimizer"], data.img_size
    rows = {
        "model": f"{node['_target_'].rsplit('.', 1)[-1]}, {parameters / 1e6:.2f}M parameters{frozen}, "
        f"{run.multiply_adds / 1e9:.3f} GMACs an image (multiply-adds)  [{origin['model']}]",
        "weights": run.weights,
        "data": ", ".join(
            f"{split_name} {size:,}" if size else f"no {split_name}"
            for split_name, size in data.sizes.items()
        )
        + f" images of {data.in_channels} x {side} x {side}  [{origin['data']}]",
        "classes": f"{data.num_classes}: {class_table(data.class_names, data.class_counts)}"
        + _balance(config),
        **(
            {}
            if run.teacher is None
            else {"teacher": _teacher(run.teacher, data.sizes["val"], trainer.objective.extra_repr())}
        ),
        "augmentation": origin["augment"],
        "device": f"{trainer.strategy.describe()}, {trainer.precision}"
        + (", compiled" if settings["compile"] else ""),
        "batch": f"{batch}{split}, {count(trainer.steps_per_epoch, 'step')} an epoch  "
        f"[{origin['data.batch_size']}]",
        "optimizer": f"{optimizer['_target_'].rsplit('.', 1)[-1]}, lr {optimizer['lr']:g}{falling}  "
        f"[{origin['optimizer.lr']}]",
        "schedule": origin["schedule"],
        "budget": f"{count(trainer.total_epochs, 'epoch')}, {count(trainer.total_steps, 'step')}  "
        f"[{origin['trainer.epochs']}]",
        "run directory": str(run.run_dir),
    }
    if trainer.state.step:
        rows["continues"] = f"after step {trainer.state.step:,}, epoch {trainer.state.closed_epochs + 1}"
    for i, note in enumerate(run.notes):
        rows["note" if not i else f"note {i + 1}"] = note
    return key_value_table(rows)


def _teacher(about: Mapping[str, Any], images: int, kind: str) -> str:
    """Who teaches, how large it is and how good."""
    names = about["source"].replace("/checkpoints/", "/").split("/")
    top1 = (
        "not measured"
        if about["top1"] is None
        else f"top-1 {about['top1']:.2%} of {images:,} validation images"
    )
    return (
        f"{'/'.join(names[-2:])}: {about['model']}, {about['parameters'] / 1e6:.2f}M parameters, "
        f"{about['multiply_adds'] / 1e9:.3f} GMACs an image, {top1}; classes: {about['classes']}  [{kind}]"
    )


def _balance(config: Mapping[str, Any]) -> str:
    """What is done about classes of different sizes, or nothing."""
    chosen = []
    if config["data"].get("sampler") == "balanced":
        chosen.append("data.sampler=balanced")
    weights = config["objective"].get("class_weights")
    if weights is not None:
        chosen.append(f"objective.class_weights={weights if weights == 'auto' else 'as typed'}")
    return f"  [{', '.join(chosen)}]" if chosen else ""


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars of the recipe, for TensorBoard's table of runs."""
    groups = ("model", "data", "objective", "optimizer", "schedule", "trainer")
    skipped = ("root", "num_workers", "stop_at_step", "stop_after_minutes", "save_every_steps", "seed")
    flat = {
        f"{group}.{key}": value
        for group in groups
        for key, value in config[group].items()
        if isinstance(value, bool | int | float | str) and not key.startswith("_") and key not in skipped
    }
    return {"seed": config["seed"], **flat}


def key_value_table(rows: Mapping[str, str]) -> Table:
    """Two columns without lines."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, printable(value))
    return table


def class_table(names: Sequence[str], counts: Sequence[int]) -> str:
    """Training images per class in one line; the ends of the list where there are many."""
    pairs = [f"{name} {number:,}" for name, number in zip(names, counts)]
    if len(pairs) > _CLASSES_SHOWN:
        pairs = [*pairs[: _CLASSES_SHOWN // 2], "...", *pairs[-_CLASSES_SHOWN // 2 :]]
    return ", ".join(pairs)


def closing_table(result: Mapping[str, Any]) -> Table:
    """The figures of result.json as the user sees them."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("")
    for heading in ("loss", "top-1 %", "top-5 %", "epoch"):
        table.add_column(heading, justify="right")
    for label, key in (("best val", "best/val"), ("last val", "last/val"), ("test", "test")):
        if result.get(f"{key}/loss") is None:
            continue
        epoch = result.get(f"{key.split('/')[0]}/epoch", result.get("best/epoch"))
        table.add_row(
            label,
            f"{result[f'{key}/loss']:.4f}",
            percent(result[f"{key}/top1"]),
            percent(result.get(f"{key}/top5")),
            "-" if epoch is None else f"{epoch:g}",
        )
    table.caption = (
        f"{count(result['epochs'], 'epoch')}, {count(result['steps'], 'step')} in "
        f"{duration(result['seconds'])}, {result['images_per_second']:,.0f} images/s"
    )
    return table
