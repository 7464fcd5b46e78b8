"""`vit-train summary=true`: what a configuration costs, without its data and without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vit_train.config.check import Launch, check_config, check_launch, check_values, plain, read_class_weights
from vit_train.config.parts import doubts, make_part, outline, resolve_auto
from vit_train.config.teacher import find_teacher
from vit_train.construct import as_config_error, locate, with_defaults
from vit_train.errors import ConfigError, VitTrainError
from vit_train.runs.stored import trusted

if TYPE_CHECKING:
    from vit_train.models.cost import Layer, Memory

# Where only the images know
_ASSUMED_CLASSES, _ASSUMED_SIZE = 1000, 224


@dataclass
class Described:
    """A configuration as `summary=true` shows it."""

    config: dict[str, Any]  # resolved, with what the data would tell
    layers: list[Layer]
    memory: Memory  # of a training step
    multiply_adds: int  # of one image
    micro_batch: int  # images that go through the model at once
    device: str  # where training would run, in words
    notes: list[str]  # what was assumed


def describe(cfg: DictConfig, launch: Launch) -> Described:
    """What a configuration costs. Reads no data and takes no memory, but for a teacher's, and writes nothing.

    Raises:
        ConfigError: see the message.
    """
    check_launch(launch, cfg)
    if cfg.resume is not None:
        raise ConfigError("summary=true describes a configuration, resume= continues a run: type one of them")
    read_class_weights(cfg)
    check_config(cfg)
    for group in ("data", "trainer", "optimizer"):
        cfg[group] = {**with_defaults(plain(cfg)[group], inherited=group == "trainer"), **cfg[group]}
    check_values(cfg)
    notes = _assume(cfg)
    if cfg.init_from is not None:
        notes.append("init_from is not read here, but its weights may set model.mask_padding in training")

    import torch

    from vit_train.models.cost import layers_of, memory_of
    from vit_train.system.precision import resolve_precision
    from vit_train.training.memory import shortage
    from vit_train.training.optimizers import freeze_parts
    from vit_train.training.strategy import SingleDevice

    strategy = make_part(plain(cfg), "strategy", None, SingleDevice)
    with as_config_error("trainer.precision"):
        cfg.trainer.precision = resolve_precision(cfg.trainer.precision, strategy.device)
    notes += doubts(cfg.trainer.precision, strategy.device)
    model, multiply_adds = outline(plain(cfg), None)
    notes += resolve_auto(cfg, launch.overrides, model)
    try:
        taught = find_teacher(cfg, trusted(cfg.trust, hydra=True), download=False)
    except VitTrainError as error:
        taught = None
        notes.append(f"the memory of the teacher is not counted: {error}")
    config = plain(cfg)
    micro_batch = cfg.data.batch_size // cfg.trainer.grad_accum_steps
    with as_config_error("trainer"):
        freeze_parts(model, config["trainer"]["freeze"])
    with as_config_error("model"):
        batch_shape = (micro_batch, cfg.data.in_channels, cfg.data.img_size, cfg.data.img_size)
        layers = layers_of(model, batch_shape, precision=cfg.trainer.precision, device=strategy.device)
        memory = memory_of(
            model,
            layers,
            make_optimizer=make_part(config, "optimizer", None, torch.optim.Optimizer),
            has_ema=cfg.trainer.ema_decay is not None,
            teacher=taught.model if taught else None,
        )
    if strategy.device.type == "cpu":  # asking a GPU would take memory of it
        notes += shortage(memory.total, strategy.device)
    return Described(config, layers, memory, multiply_adds, micro_batch, str(strategy.device), notes)


def _assume(cfg: DictConfig) -> list[str]:
    """Fills in what only the data knows; returns what was guessed."""
    target = cfg.data["_target_"]
    known = {
        "num_classes": getattr(locate(target), "default_num_classes", None),
        "img_size": with_defaults({"_target_": target}, inherited=True).get("img_size"),
    }
    guesses = {"num_classes": _ASSUMED_CLASSES, "img_size": _ASSUMED_SIZE}
    guessed = [key for key in guesses if cfg.data.get(key) is None and known[key] is None]
    for key, guess in guesses.items():
        if cfg.data.get(key) is None:
            OmegaConf.update(cfg, f"data.{key}", known[key] or guess, force_add=True)
    if not guessed:
        return []
    values = ", ".join(f"data.{key}={guesses[key]}" for key in guessed)
    return [f"assumed, because only the images can tell: {values}; type other values to see their cost"]
