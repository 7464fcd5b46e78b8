"""The house rules of the code, read from its imports: who may know whom."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
PACKAGE = HOUSE / "vit_train"
MODULES = sorted(PACKAGE.rglob("*.py"))
STANDARD = set(sys.stdlib_module_names)


def name_of(path):
    """vit_train/layers/__init__.py -> vit_train.layers."""
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


def imports_of(path):
    """Full names of everything a module imports, also inside functions and for type checking.

    `from vit_train import checkpoint` is vit_train.checkpoint; a name that is no module of ours is left off.
    """
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in NAMES or module in ("torch", "hydra") else module)
    return found


def inside(name, *rooms):
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def modules_in(*rooms):
    """Modules of the rooms that exist; a rule about a room that does not is no rule yet."""
    rooms = [f"vit_train.{room}" for room in rooms]
    return [path for path in MODULES if inside(name_of(path), *rooms)]


def violations(paths, allowed):
    """`module imports name` for each import `allowed` refuses."""
    return [
        f"{name_of(path)} imports {name}"
        for path in paths
        for name in sorted(imports_of(path))
        if not allowed(name)
    ]


def test_the_reading_itself():
    """The rules below mean something only if imports are seen."""
    assert len(MODULES) > 30
    assert "vit_train.training.trainer" in NAMES
    assert "torch.nn" in imports_of(PACKAGE / "training/strategy.py")
    assert "vit_train.checkpoint" in imports_of(PACKAGE / "config/build.py")
    assert inside("vit_train.cli.train", *imports_of(PACKAGE / "__main__.py"))
    assert violations([PACKAGE / "config/build.py"], lambda name: not inside(name, "omegaconf")) != []


def test_layers_know_torch_and_bounds_only():
    rooms = ("torch", "vit_train.layers", "vit_train.construct")
    paths = modules_in("layers")
    assert len(paths) > 5
    assert violations(paths, lambda name: inside(name, *rooms) or name.split(".")[0] in STANDARD) == []


def test_models_know_layers():
    rooms = (
        "torch",
        "torchvision",
        *(f"vit_train.{n}" for n in ("layers", "models", "construct", "precision")),
    )
    paths = modules_in("models")
    assert len(paths) > 3
    assert violations(paths, lambda name: inside(name, *rooms) or name.split(".")[0] in STANDARD) == []


LOWER_ROOMS = (
    "layers",
    "models",
    "data",
    "weights",
    "optim",
    "muon",
    "ema",
    "objective",
    "strategy",
    "checkpoint",
    "tracker",
    "trained",
    "teacher",
    "export",
    "evaluation",
    "guard",
    "rng",
    "errors",
    "precision",
    "construct",
    "state",
    "saver",
    "nonfinite",
    "resume",
    "run_dir",
    "memory",
    "durable",
    "faults",
)


@pytest.mark.parametrize("room", [room for room in LOWER_ROOMS if modules_in(room)])
def test_lower_rooms_do_not_know_what_stands_on_them(room):
    above = (
        "vit_train.training.trainer",
        "vit_train.config.build",
        "vit_train.config.check",
        "vit_train.config.describe",
        "vit_train.config.teacher",
        "vit_train.cli",
        "hydra",
        "omegaconf",
    )
    assert violations(modules_in(room), lambda name: not inside(name, *above)) == []


def test_only_the_top_knows_hydra():
    top = [*modules_in("config"), PACKAGE / "cli/train.py", PACKAGE / "cli/typed.py"]
    others = [path for path in MODULES if path not in top]
    assert violations(others, lambda name: not inside(name, "hydra", "omegaconf")) == []


def test_nobody_below_knows_the_commands():
    others = [p for p in MODULES if not inside(name_of(p), "vit_train.cli") and p.name != "__main__.py"]
    assert violations(others, lambda name: not inside(name, "vit_train.cli")) == []


def test_distribution_lives_in_strategy():
    others = [path for path in MODULES if path != PACKAGE / "training/strategy.py"]
    assert violations(others, lambda name: not inside(name, "torch.distributed")) == []
    for path in others:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = isinstance(node, ast.Attribute) and node.attr == "distributed"
            assert not (used and isinstance(node.value, ast.Name) and node.value.id == "torch"), path


# What stood longer when the rule was made; a name that no longer needs to be here goes
LONG = {"vit_train.config.build._build", "vit_train.cli.train.execute"}


def test_functions_are_short():
    """At most 60 lines after the signature: what is longer is more than one thing."""
    found = {
        f"{name_of(path)}.{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.body[0].lineno >= 60
    }
    assert found == LONG


def test_no_module_imports_itself_through_others():
    """Type-only imports included."""
    imports = {name_of(path): imports_of(path) & NAMES for path in MODULES}

    def reached(name):
        found, waiting = set(), [name]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    assert [name for name in sorted(NAMES) if name in reached(name)] == []


def test_the_trainer_sees_contracts_only():
    path = PACKAGE / "training/trainer.py"
    concrete = (
        "vit_train.models",
        "vit_train.layers",
        "vit_train.config.build",
        "vit_train.cli",
        "torchvision",
    )
    assert violations([path], lambda name: not inside(name, *concrete)) == []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and inside(node.module or "", "vit_train.data"):
            assert node.module == "vit_train.data"
            assert {alias.name for alias in node.names} <= {"Batch", "DataModule", "Loader"}


def test_scripts_are_never_imported():
    assert violations(MODULES, lambda name: name.split(".")[0] not in ("scripts", "tests", "conftest")) == []


def test_no_drawer_for_everything():
    assert [path for path in MODULES if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].strip().endswith((".", ":", ","))


def test_sources_and_configs_are_ascii():
    configs = sorted((HOUSE / "configs").rglob("*.yaml"))
    assert len(configs) > 30
    wrong = [path for path in (*MODULES, *configs) if not path.read_bytes().isascii()]
    assert wrong == []
