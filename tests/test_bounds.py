"""Every number a user can type has its bounds in an annotation, and what it makes is what its place takes."""

from __future__ import annotations

import copy
import math
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Gt
from conftest import TINY, build, compose, vit_train_here
from omegaconf import OmegaConf
from test_configs import CHOICES, EXPERIMENTS

from vit_train.cli import data_command as data
from vit_train.cli import predict
from vit_train.config.build import build_run
from vit_train.config.check import GROUPS, Augmentation, Launch, Root, check_config, plain
from vit_train.construct import TARGET, check, is_node, locate, make, parameters, with_defaults
from vit_train.errors import ConfigError, DataError
from vit_train.models import ViT
from vit_train.report.console import Console
from vit_train.runs.stored import STORED_CODE

# Numbers that need no bound of their own, and why; infinity and NaN are refused here as well
UNBOUNDED = {
    "mean": "levels of a data set, which may be centred on anything",
    "value_range": "black and white of a sensor; ImageFolder wants them in order",
}
EXTREMES = (-1, 0, 1, 1e30, math.nan, math.inf, -math.inf, 10**30)


def nodes_in(value: Any) -> Any:
    """Every node inside, innermost first."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes_in(inner)
    if is_node(value):
        yield value


def shipped() -> dict[str, dict[str, Any]]:
    """One node, with the constructor's defaults, for each constructor that a shipped config names."""
    found: dict[str, dict[str, Any]] = {}
    for choice in (*CHOICES, *(f"experiment={name}" for name in EXPERIMENTS)):
        for node in nodes_in(plain(compose(choice, "data.img_size=224", "data.num_classes=10"))):
            found.setdefault(node[TARGET], with_defaults(node))
    for schema in (Root, Augmentation):
        name = f"{schema.__module__}.{schema.__name__}"
        found[name] = {TARGET: name, "seed": 0} if schema is Root else {TARGET: name, "repeats": 1}
    return found


SHIPPED = shipped()


def members_of(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def numbers(hint: Any, *, bounded: bool = False) -> list[bool]:
    """For each int or float that an annotation allows, whether it has bounds: an int two, a float one."""
    members, origin = members_of(hint), get_origin(hint)
    if len(members) > 1:  # a name may look like a number
        return [
            found for member in members if not (member is int and str in members) for found in numbers(member)
        ]
    if hint in (int, float):
        return [bounded]
    if origin is Annotated:
        inner, *limits = get_args(hint)
        kinds = {type(limit).__name__ for limit in limits}
        below, above = kinds & {"Ge", "Gt"}, kinds & {"Le", "Lt"}
        return numbers(inner, bounded=bool(below) and (inner is float or bool(above)))
    if origin in (tuple, list):
        return [found for member in get_args(hint) for found in numbers(member)]
    return numbers(get_args(hint)[1]) if origin is dict else []


def hints_of(target) -> dict:
    return {name: parameter.annotation for name, parameter in parameters(target).items()}


NUMBERS = {
    (target, name): numbers(hint)
    for target in SHIPPED
    for name, hint in hints_of(locate(target)).items()
    if numbers(hint) and name in SHIPPED[target]
}


def test_the_reading_itself() -> None:
    assert len(SHIPPED) > 20
    assert {
        "vit_train.models.Swin",
        "vit_train.data.ImageFolder",
        "vit_train.training.schedules.MultiStep",
    } <= set(SHIPPED)
    assert len(NUMBERS) > 100
    assert numbers(tuple[Annotated[float, Gt(0)], int] | None) == [True, False]
    assert numbers(Annotated[int, Gt(0)]) == [False]
    assert numbers(Literal["auto"] | bool | str) == []


def test_every_number_has_a_bound_or_a_reason() -> None:
    """A whole number from both sides, and any from below."""
    without = {f"{target}.{name}" for (target, name), found in NUMBERS.items() if not all(found)}
    assert {key for key in without if key.rsplit(".", 1)[-1] not in UNBOUNDED} == set()
    assert {key.rsplit(".", 1)[-1] for key in without} == set(UNBOUNDED)


def filled(hint: Any, number: Any) -> Any:
    """As many of them as the annotation wants."""
    for member in members_of(hint):
        inner = get_args(member)[0] if get_origin(member) is Annotated else member
        if get_origin(inner) is tuple:
            return [number for part in get_args(inner) if part is not Ellipsis]
        if get_origin(inner) is dict:
            return {"a class": number}
    return number


@pytest.mark.parametrize(("target", "name"), NUMBERS)
def test_an_extreme_number_is_taken_or_refused_by_its_full_key(target: str, name: str) -> None:
    for number in EXTREMES:
        value = filled(hints_of(locate(target))[name], number)
        lines = check({**SHIPPED[target], name: value}, key="group")
        lines = [line for line in lines if line.startswith(f"group.{name}")]
        assert len(lines) <= 1
        assert all("\n" not in line for line in lines)
        if not math.isfinite(number):
            assert lines, f"{target}.{name} takes {number}"
            assert isinstance(number, float)


# Groups that between them name every constructor that small images need
BUILT = {
    "model=vit_digits": ("model.", "data.", "trainer.", "tracker.", "optimizer.", "schedule.", "objective."),
    "optimizer=sgd schedule=multistep": ("optimizer.", "schedule."),
    "optimizer=adam schedule=plateau": ("optimizer.", "schedule."),
    "augment=deit": ("augment.",),
    "model=swin_cifar model.window_size=2 model.embed_dim=12 model.depths=[1,1,1]": ("model.",),
    "model=deit_tiny_distilled model.patch_embed.patch_size=4 model.embed_dim=12 model.depth=1": ("model.",),
}
SMALL = (*TINY[:3], "trainer.max_steps=2", "tracker.tensorboard=false", "data.limit=20")


def keys_of(value: Any, key: str = "") -> Any:
    """Full keys of the arguments of all nodes that are numbers."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        full = f"{key}.{name}".lstrip(".")
        if (value.get(TARGET), name) in NUMBERS:
            yield full, hints_of(locate(value[TARGET]))[name]
        yield from keys_of(inner, full)


@pytest.mark.parametrize("choice", BUILT)
def test_what_is_taken_builds_and_makes_a_step(choice: str, in_tmp: Any) -> None:
    """Or it does not fit another key, which a line that starts with the group says."""
    cfg = compose(*SMALL, *choice.split())
    keys = [pair for pair in keys_of(plain(cfg)) if pair[0].startswith(BUILT[choice])]
    assert len(keys) > 5
    built = 0
    for key, hint in keys:
        for number in (0, 1, 1e30):
            typed = copy.deepcopy(cfg)
            OmegaConf.update(typed, key, filled(hint, number))
            line = refusal(typed)
            built += line is None
            assert line is None or re.match(rf"({'|'.join(GROUPS)})[.:].*$", line), f"{key}={number}: {line}"
    assert built > len(keys) // 2


def refusal(cfg: Any) -> str | None:
    """The error of building a run and making its first step, None where it goes well."""
    try:
        trainer = build_run(cfg, Launch(), Console()).trainer
    except (ConfigError, DataError) as error:
        return str(error)
    batch = next(iter(trainer.train_loader))
    images, targets = trainer.parts.train_transform(batch, 0, 0)
    trainer.objective(trainer.model, images, targets)[0].backward()
    trainer.optimizer.step()
    assert math.isfinite(trainer.schedule(1))
    return None


# ------------------------------------------------------------------------------------------------ what is said
def said(*overrides: str) -> list[str]:
    """The errors of a configuration, a line each, without building anything."""
    try:
        check_config(compose(*overrides))
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines() if not line.endswith("configuration:")]
    return []


def test_all_are_said_at_once() -> None:
    typed = ("optimizer.lr=0", "data.batch_size=0", "trainer.ema_decay=2", "augment.batch.hflip_prob=2")
    assert said(*typed, "model.depth=0", "objective.label_smoothing=1", "schedule.warmup_epochs=inf") == [
        "model.depth: must be at least 1, got 0",
        "augment.batch.hflip_prob: must be at most 1, got 2",
        "objective.label_smoothing: must be less than 1, got 1",
        "optimizer.lr: must be auto or greater than 0, got 0",
        "schedule.warmup_epochs: must be a finite number, got inf",
        "trainer.ema_decay: must be less than 1, got 2",
        "data.batch_size: must be at least 1, got 0",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.lr=nan: must be auto or a finite number, got nan",
        "optimizer.weight_decay=-1: must be at least 0, got -1",
        "optimizer.layer_decay=1.5: must be at most 1, got 1.5",
        "optimizer.betas=[0.9,1.0]: must be less than 1, got 1.0 (at position 1)",
        "schedule.final_factor=2: must be at most 1, got 2",
        "model.drop_rate=1: must be less than 1, got 1",
        "model.mlp_ratio=0: must be greater than 0, got 0",
        "model.embed_dim=0: must be at least 1, got 0",  # once, though the patch embedding copies it
        "objective.class_weights={7:-1}: must be greater than 0, got -1",
        "augment.repeats=2147483648: must be at most 1000, got 2147483648",
        "augment.batch.crop_scale=[0.5,0.1]: must be auto or in ascending order, got [0.5, 0.1]",
        "augment.batch.crop_scale=[0.5,2]: must be at most 1, got 2 (at position 1)",
        "augment.batch.crop_ratio=[0,1]: must be at least 0.1, got 0 (at position 0)",
        "augment.sample.magnitude=31: must be at most 30, got 31",
        "augment.sample.scale=[1.0,0.5]: must be in ascending order, got [1.0, 0.5]",
        "data.std=[0.5,0.0,0.5]: must be greater than 0, got 0.0 (at position 1)",
        "data.background=[0,0,256]: must be at most 255, got 256 (at position 2)",
        "data.value_range=[0,inf]: must be a finite number, got inf (at position 1)",
        "data.val_fraction=1.0: must be less than 1, got 1.0",
        "data.train_fraction=0: must be greater than 0, got 0",
        "data.num_workers=100000: must be at most 256, got 100000",
        "seed=99999999999999999999: must be less than 9223372036854775808, got 99999999999999999999",
    ],
)
def test_a_number_out_of_its_bounds_is_one_line(line: str) -> None:
    override, _, reason = line.partition(": ")
    key = override.partition("=")[0] + (".7" if "class_weights" in override else "")
    folder = ("data=imagefolder", "augment=deit")
    assert said(*folder, override) == [f"{key}: {reason}"]


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.weight_decay=0",
        "optimizer.lr=1e-30",
        "optimizer.betas=[0,0]",
        "objective.label_smoothing=0",
        "schedule.warmup_epochs=0",
        "model.drop_rate=0",
        "augment.sample.num_ops=0",
        "augment.sample.scale=[1,1]",
        "data.val_fraction=0",
        "data.train_fraction=1",
        "data.num_workers=0",
        "trainer.ema_decay=null",
        "trainer.epochs=2147483647",
        "seed=-1",
    ],
)
def test_what_is_useful_stays_legal(override: str) -> None:
    assert said("data=imagefolder", "augment=deit", override) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("schedule.warmup_epochs=50", "schedule: warmup_epochs=50 "),
        ("objective.class_weights={nope:1}", "objective: class_weights names 'nope'"),
        ("trainer.freeze=[nope]", "trainer: freeze: ViT has no 'nope'"),
        ("data.mean=[1,2]", "data: mean needs one value per channel"),
        ("model.num_heads=5", "model: num_heads 5 does not divide embed_dim"),
        ("augment.batch.num_classes=3", "augment.batch.num_classes=3, but the data has 10 classes"),
    ],
)
def test_what_relates_two_keys_names_the_group(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(*TINY, override)
    assert str(refused.value).startswith(line)


def test_a_model_of_an_older_version_that_is_out_of_bounds_can_still_be_read() -> None:
    node = plain(compose("data.num_classes=10", "model.drop_rate=1.0"))["model"]
    assert check(node, key="model") == ["model.drop_rate: must be less than 1, got 1.0"]
    assert isinstance(make(node, allow=STORED_CODE["model"]), ViT)


# ------------------------------------------------------------------------------------------ what a node makes
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("schedule=[0.1,0.2]", "schedule=[0.1,0.2]: a config is chosen by its name"),
        ("model={}", "model={}: an empty mapping changes nothing"),
        ("augment={}", "augment={}: an empty mapping changes nothing"),
        ("model.patch_embed={}", "model.patch_embed={}: an empty mapping changes nothing"),
        ("model.patch_embed=3", "model.patch_embed: expected Module, got 3 (int)"),
        ("augment.batch='a\nb'", "augment.batch: needs a `_target_`"),
        ("augment.batch=null", "augment.batch: needs a `_target_`"),
        ("~augment.batch", "augment.batch: needs a `_target_`"),
        ("augment.sample=3", "augment.sample: expected Callable or null, got 3 (int)"),
        ("data.sample_transform={}", "data.sample_transform: expected Callable or null, got {} (dict)"),
        (
            "schedule.warmup_epochs={T}",
            "schedule.warmup_epochs: expected float or null, builtins.dict makes dict",
        ),
        ("objective.class_weights={T}", "objective.class_weights: "),
        (
            "augment.batch.mixup_alpha={T}",
            "augment.batch.mixup_alpha: expected float, builtins.dict makes dict",
        ),
        ("augment.sample={T}", "data.sample_transform: expected Callable or null, builtins.dict makes dict"),
        ("model={T}", "model: builtins.dict does not make a model"),
        ("data={T}", "data: builtins.dict does not make a data module"),
        ("strategy={T}", "strategy: expected SingleDevice, builtins.dict makes dict"),
        ("trainer={T}", "trainer: expected Trainer, builtins.dict makes dict"),
        ("tracker={_target_:types.SimpleNamespace,_partial_:false}", "tracker: "),
    ],
)
def test_a_node_makes_what_its_place_takes_or_one_line_says_so(override: str, line: str, in_tmp: Any) -> None:
    target = "builtins.set" if "class_weights" in override else "builtins.dict"
    done = vit_train_here(override.replace("{T}", f"{{_target_:{target}}}"), cwd=in_tmp)
    assert done.code == 2
    assert done.err.startswith(f"vit-train: error: {line}")
    assert done.err.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


# -------------------------------------------------------------------------------------------- other commands
@pytest.mark.parametrize(
    "arguments",
    [
        [predict, "run", "a.png", "--num-workers", "99999999999999999999"],
        [predict, "run", "a.png", "--batch-size", "99999999999999999999"],
        [predict, "run", "a.png", "--top-k", "9" * 5000],
        [data, "check", "root", "--num-workers", "257"],
        [data, "stats", "root", "--img-size", "16385"],
    ],
)
def test_other_commands_refuse_what_is_too_large(arguments: list[Any], capsys: Any) -> None:
    command, *typed = arguments
    assert command.main(typed) == 2
    assert f"argument {typed[-2]}: " in capsys.readouterr().err.splitlines()[-1]
