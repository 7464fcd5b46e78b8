"""The constructor is the schema: what `check` finds, what `make` builds, what stored data may not name."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from torch import nn

from vit_train.construct import NotNegative, Positive, check, make, parameters, with_defaults
from vit_train.errors import ConfigError


class Widget:
    def __init__(
        self,
        *,
        width: Positive,
        mode: Literal["fast", "slow"] = "fast",
        rate: float = 0.1,
        sizes: tuple[int, ...] = (1,),
        child: nn.Module | None = None,
        weights: Literal["auto"] | dict[str, float] | None = None,
        skip: NotNegative = 0,
        flag: bool = False,
    ) -> None:
        if width == 13:
            raise ValueError("width 13 brings bad luck")
        self.sizes, self.child, self.rate = sizes, child, rate


def node(**extra: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.Widget", "width": 4, **extra}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"rate": 1},  # an int is a float
        {"sizes": [1, 2]},  # a YAML list is a tuple
        {"child": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 2}},
        {"child": None},
        {"weights": "auto"},
        {"weights": {"cat": 2}},
    ],
)
def test_right_values_pass(extra: dict[str, Any]) -> None:
    assert check(node(**extra), key="w") == []
    make(node(**extra))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rat": 1.0}, "w.rat: Widget has no such key; did you mean 'w.rate'?"),
        ({"rate": "abc"}, "w.rate: expected float, got 'abc' (str)"),
        ({"rate": True}, "w.rate: expected float, got True (bool)"),
        ({"mode": "fasst"}, "w.mode: 'fasst' is not one of fast, slow; did you mean 'fast'?"),
        ({"sizes": [1, "2"]}, "w.sizes: expected tuple[int, ...]"),
        ({"sizes": [1, 2.5]}, "(at position 1)"),
        ({"width": 0}, "w.width: must be at least 1, got 0"),
        ({"width": 2.0}, "w.width: expected int, got 2.0 (float)"),
        ({"width": True}, "w.width: expected int, got True (bool)"),
        ({"skip": -1}, "w.skip: must be at least 0, got -1"),
        ({"flag": 1}, "w.flag: expected bool, got 1 (int)"),
        ({"child": {"_target_": f"{__name__}.Widget", "width": 1}}, "w.child: expected Module, got Widget"),
        (
            {"child": {"_target_": "torch.nn.Linear", "in_features": "1", "out_features": 2}},
            "w.child.in_features: expected int",
        ),
        ({"child": {"_target_": "torch.nn.Liner"}}, "did you mean 'Linear'?"),
        ({"child": {"_target_": "no_such_package.Thing"}}, "w.child._target_: cannot import"),
        ({"_recursive_": False}, "w._recursive_"),
    ],
)
def test_wrong_values_are_reported_with_their_full_key(extra: dict[str, Any], message: str) -> None:
    errors = check(node(**extra), key="w")
    assert len(errors) == 1, errors
    assert message in errors[0]
    assert errors[0].startswith("w.")


def test_every_error_is_reported_at_once() -> None:
    errors = check({"a": node(rate="x", mode="y"), "b": [node(width=None)]}, key="root")
    assert [e.split(":")[0] for e in errors] == ["root.a.rate", "root.a.mode", "root.b[0].width"]


def test_a_missing_required_argument_is_named() -> None:
    assert check({"_target_": f"{__name__}.Widget"}, key="w") == ["w.width: missing, Widget needs it"]


def test_values_that_arrive_later_are_not_checked() -> None:
    assert check(node(width=None), key="w")
    assert check(node(width=None), key="w", pending=frozenset({"w.width"})) == []


def test_make_converts_and_nests() -> None:
    built = make(
        node(sizes=[3, 4], rate=1, child={"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 2})
    )
    assert built.sizes == (3, 4)
    assert isinstance(built.rate, float)
    assert isinstance(built.child, nn.Linear)


def test_a_partial_waits() -> None:
    partial = make({**node(), "_partial_": True})
    assert isinstance(partial(), Widget)


def test_a_refusal_of_the_constructor_names_the_key() -> None:
    with pytest.raises(ConfigError, match="model: width 13 brings bad luck"):
        make(node(width=13), key="model")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "vit_train.models.vit.torch.load",  # an allowed prefix that leads elsewhere
        "vit_train.modelsx.ViT",
        "vit_train.cli.train.main",
        f"{__name__}.Widget",
    ],
)
def test_stored_data_never_chooses_code(target: str) -> None:
    with pytest.raises(ConfigError):
        make({"_target_": target}, key="model", allow=("vit_train.models", "vit_train.layers"))


def makes(value: Any) -> Any:
    """A user's own node may name these."""
    return value


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"rate": "x"}, "w.rate: expected float, {} makes 'x'"),
        ({"width": 0}, "w.width: expected int, {} makes 0"),
        ({"child": {}}, "w.child: expected Module or null, {} makes dict"),
        ({"sizes": [1, "2"]}, "w.sizes: expected tuple[int, ...], {} makes list"),
        ({"mode": "fasst"}, "w.mode: expected fast or slow, {} makes 'fasst'"),
    ],
)
def test_what_an_inner_node_makes_is_checked(extra: dict[str, Any], line: str) -> None:
    maker = f"{__name__}.makes"
    inner = {name: {"_target_": maker, "value": value} for name, value in extra.items()}
    with pytest.raises(ConfigError) as refused:
        make(node(**inner), key="w")
    assert str(refused.value) == line.replace("{}", maker)


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), float("-inf")])
def test_a_number_without_bounds_is_finite(rate: float) -> None:
    assert check(node(rate=rate), key="w") == [f"w.rate: must be a finite number, got {rate}"]


def test_a_builtin_without_a_signature_takes_anything() -> None:
    assert check({"_target_": "builtins.dict", "a": 1}) == []
    assert make({"_target_": "builtins.dict", "a": 1}) == {"a": 1}
    assert with_defaults({"_target_": "builtins.dict", "a": 1}) == {"_target_": "builtins.dict", "a": 1}


class Wide(Widget):
    """It repeats one of the base class's arguments."""

    def __init__(self, *, height: int = 3, rate: float = 0.25, **options: Any) -> None:
        super().__init__(rate=rate, **options)
        self.height = height


def test_the_options_of_a_constructor_are_what_its_base_class_takes() -> None:
    base, wide = parameters(Widget), parameters(Wide)
    assert list(wide) == ["height", "rate", *(name for name in base if name != "rate")]
    assert wide["rate"].default == 0.25
    assert all(wide[name] == base[name] for name in base if name != "rate")
    of_it = node(_target_=f"{__name__}.Wide")
    assert with_defaults(of_it)["rate"] == 0.25
    assert check(of_it, key="w") == []
    lines = check({**of_it, "width": "4", "heigth": 1, "mode": "fasst"}, key="w")
    assert [line.partition(": ")[0] for line in lines] == ["w.width", "w.heigth", "w.mode"]
    assert "did you mean 'w.height'?" in lines[1]
    made = make({**of_it, "height": 5, "sizes": [1, 2]})
    assert (made.rate, made.height, made.sizes) == (0.25, 5, (1, 2))
