"""The teacher of a run: found, compared with the one the run began with, matched with the data, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vit_train.composed import config_dir, plain
from vit_train.construct import make
from vit_train.errors import CheckpointError, ConfigError, suggest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_train.state import Parts
    from vit_train.teacher import Found, Teacher


def find_teacher(
    cfg: DictConfig,
    device: torch.device,
    trust: tuple[str, ...],
    *,
    stored: bool = False,
    goes_on: bool = False,
) -> Found | None:
    """The teacher that the objective names, on its device; None where it names none.

    Its place and SHA-256 go into the configuration: a run keeps its teacher.

    Args:
        cfg: the whole configuration, with what the data told.
        device: where it will run.
        trust: packages whose code a teacher's run may name.
        stored: whether the configuration is a stored one: then nothing is downloaded.
        goes_on: whether the run was started before.

    Raises:
        ConfigError: the name or its keys make no sense.
        CheckpointError: it cannot be read, or is another one than `objective.teacher_sha256` says.
    """
    node = cfg.objective
    if node.get("teacher") is None:
        return None
    from vit_train.teacher import read_teacher

    sizes = {key: cfg.data[key] for key in ("num_classes", "img_size", "in_channels")}
    advice = "; type objective.teacher= with the place where it is now" if goes_on else ""
    try:
        found = read_teacher(
            node.teacher,
            sizes=sizes,
            make_model=_make_model,
            device=device,
            model=node.get("teacher_model"),
            trust=trust,
            download=not stored,
        )
    except (CheckpointError, ConfigError) as error:
        raise (CheckpointError if goes_on else type(error))(f"{error}{advice}") from error
    sha256, wanted = found.sha256(), node.get("teacher_sha256")
    if wanted != sha256 and (stored or wanted is not None):  # a stored one is always known
        raise CheckpointError(
            f"objective.teacher={node.teacher} is another teacher (SHA-256 {sha256[:12]}..., not "
            f"{str(wanted)[:12]}...){advice}"
        )
    OmegaConf.update(cfg, "objective.teacher", found.source)
    OmegaConf.update(cfg, "objective.teacher_sha256", sha256, force_add=True)
    found.model.to(device)
    return found


def _make_model(name: str, *, mask_padding: bool | None, **sizes: int) -> nn.Module:
    """A model of one of our configs, for images and classes of these sizes.

    Raises:
        ConfigError: there is no such config.
    """
    from hydra import compose, initialize_config_dir

    from vit_train.trained import without_download

    known = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"objective.teacher_model={name}: no such model{suggest(name, known)}")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", [f"model={name}", *(f"data.{key}={size}" for key, size in sizes.items())])
    node = without_download(plain(cfg)["model"])
    if mask_padding is not None and "mask_padding" in node:
        node["mask_padding"] = mask_padding
    made: nn.Module = make(node, key="objective.teacher_model")
    return made


def make_teacher(found: Found, cfg: DictConfig, data: Any, device: torch.device) -> Teacher:
    """The teacher for this data, ready to teach.

    Raises:
        ConfigError, DataError: its images or classes are not those of the data.
    """
    from vit_train.teacher import Teacher

    teacher = Teacher(
        found, class_names=data.class_names, mean=data.mean, std=data.std, precision=cfg.trainer.precision
    ).to(device)
    if cfg.trainer.compile:
        teacher.model.compile()
    return teacher


def measure(teacher: Teacher, parts: Parts, facts: Any, *, begun: bool) -> dict[str, Any]:
    """The entry of run.json: where the teacher is from, what it is, and its top-1 on the validation split.

    Args:
        teacher: on its device.
        parts: of the run.
        facts: the entry that is there already.
        begun: whether the run has a checkpoint: what was measured before its first step stands.

    Raises:
        ConfigError: it knows less than `objective.teacher_min_top1`, or nothing can tell.
        KeyboardInterrupt: a signal arrived.
    """
    from vit_train.evaluation import evaluate
    from vit_train.models.cost import multiply_adds

    data, node, model = parts.data, parts.about["config"]["objective"], teacher.model
    least, sha256 = node.get("teacher_min_top1"), node["teacher_sha256"]
    about = {
        "source": node["teacher"],
        "sha256": sha256,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": multiply_adds(model, in_channels=teacher.in_channels, img_size=teacher.img_size),
        "classes": teacher.classes,
        "top1": None,
    }
    if begun or (isinstance(facts, dict) and facts.get("sha256") == sha256):
        before = facts.get("top1") if isinstance(facts, dict) else None
        return {**about, "top1": before if isinstance(before, float) else None}
    if not data.sizes["val"]:
        if least is not None:
            raise ConfigError(
                f"objective.teacher_min_top1={least:g} needs validation images; set data.val_fraction"
            )
        return about
    figures = evaluate(
        teacher,
        parts.tracker.progress(data.loader("val"), "teacher"),
        objective=parts.objective,
        transform=parts.eval_transform,
        strategy=parts.strategy,
        precision="fp32",  # it has its own
        num_classes=data.num_classes,
        should_stop=parts.signals.arrived,
    )
    if figures is None:
        raise KeyboardInterrupt
    if least is not None and figures.top1 < least:
        raise ConfigError(
            f"objective.teacher={node['teacher']} knows {figures.top1:.2%} of the validation images, less "
            f"than objective.teacher_min_top1={least:.2%}; type a better teacher or a smaller fraction"
        )
    return {**about, "top1": figures.top1}
