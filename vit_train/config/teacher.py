"""The teacher of a run: found, compared with the one the run began with, matched with the data, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vit_train.config.shipped import model_names, model_node
from vit_train.construct import make
from vit_train.errors import CheckpointError, ConfigError
from vit_train.text import suggest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_train.inference.teacher import Found, Teacher
    from vit_train.training.state import Parts


def find_teacher(cfg: DictConfig, trust: tuple[str, ...], *, download: bool) -> Found | None:
    """The teacher that the objective names; None where it names none.

    Its place and SHA-256 go into the configuration, which holds what the data told: a run keeps its teacher.
    The run a teacher comes from may name code of the packages in `trust`.

    Raises:
        ConfigError: the name or its keys make no sense.
        CheckpointError: it cannot be read, or is another one than `objective.teacher_sha256` says.
    """
    node = cfg.objective
    if node.get("teacher") is None:
        return None
    from vit_train.inference.teacher import read_teacher

    try:
        found = read_teacher(
            node.teacher,
            sizes={key: cfg.data[key] for key in ("num_classes", "img_size", "in_channels")},
            make_model=_make_model,
            model=node.get("teacher_model"),
            trust=trust,
            download=download,
        )
    except ConfigError as error:
        if download:
            raise
        raise CheckpointError(str(error)) from error  # whoever wrote it
    sha256, known = found.sha256(), node.get("teacher_sha256")
    if known not in (None, sha256):
        raise CheckpointError(
            f"objective.teacher={node.teacher} is another teacher: its SHA-256 is {sha256}, not {known}; "
            "type objective.teacher= with the right one, such as RUN/checkpoints/step_00001234"
        )
    OmegaConf.update(cfg, "objective.teacher", found.source)
    OmegaConf.update(cfg, "objective.teacher_sha256", sha256, force_add=True)
    return found


def _make_model(name: str, *, mask_padding: bool | None, **sizes: int) -> nn.Module:
    """A model of one of our configs, for images and classes of these sizes.

    Raises:
        ConfigError: no config has this name.
    """
    if name not in model_names():
        from vit_train.inference.teacher import in_library

        guess = in_library(name) or suggest(name, model_names())
        raise ConfigError(f"objective.teacher_model={name}: no such model{guess}")
    node = model_node(name, sizes, {})
    if mask_padding is not None and "mask_padding" in node:
        node["mask_padding"] = mask_padding
    made: nn.Module = make(node, key="objective.teacher_model")
    return made


def make_teacher(found: Found, cfg: DictConfig, data: Any, device: torch.device) -> Teacher:
    """The teacher for this data, ready to teach.

    Raises:
        ConfigError, DataError: its images or classes are not those of the data.
    """
    from vit_train.inference.teacher import Teacher

    about = {"class_names": data.class_names, "mean": data.mean, "std": data.std}
    teacher = Teacher(found, **about, device=device, precision=cfg.trainer.precision)
    if cfg.trainer.compile:
        teacher.model.compile()
    return teacher


def measure(teacher: Teacher, parts: Parts, facts: Any) -> dict[str, Any]:
    """The entry of run.json: where the teacher is from, what it is, and its top-1 on the validation split.

    In `facts`, the entry that is there already, the top-1 stands where it is of this teacher.

    Raises:
        ConfigError: its top-1 is below `objective.teacher_min_top1`, or nothing tells it.
        KeyboardInterrupt: a signal arrived.
    """
    node, model = parts.about["config"]["objective"], teacher.model
    least, sha256 = node.get("teacher_min_top1"), node["teacher_sha256"]
    before = facts.get("top1") if isinstance(facts, dict) and facts.get("sha256") == sha256 else None
    top1 = before if isinstance(before, float) else _top1(teacher, parts)
    if least is not None and top1 is None:
        raise ConfigError(
            f"objective.teacher_min_top1={least:g}: there are no validation images to measure the teacher; "
            "set data.val_fraction, or leave it out"
        )
    if least is not None and top1 < least:
        raise ConfigError(
            f"objective.teacher={node['teacher']} classifies {top1:.2%} of the validation images correctly, "
            f"less than objective.teacher_min_top1={least:.2%}; type a better teacher or a smaller fraction"
        )
    return {
        "source": node["teacher"],
        "sha256": sha256,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": teacher.multiply_adds,
        "classes": teacher.classes,
        "top1": top1,
    }


def _top1(teacher: Teacher, parts: Parts) -> float | None:
    """On the validation split, as the student sees it; None without one."""
    from vit_train.training.evaluation import evaluate

    if not parts.data.sizes["val"]:
        return None
    try:
        figures = evaluate(
            teacher,
            parts.tracker.progress(parts.data.loader("val"), "teacher"),
            objective=parts.objective,
            transform=parts.eval_transform,
            strategy=parts.strategy,
            precision="fp32",  # it has its own
            num_classes=parts.data.num_classes,
            should_stop=parts.signals.arrived,
        )
    except (RuntimeError, EOFError, ConnectionError) as error:
        raise parts.data.worker_lost(error) or error from error
    if figures is None:
        raise KeyboardInterrupt
    return figures.top1
