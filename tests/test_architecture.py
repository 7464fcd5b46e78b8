"""The house rules of the code, read from its imports: who may know whom."""

from __future__ import annotations

import ast
import re
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


def violations(paths, allowed):
    """`module imports name` for each import `allowed` refuses."""
    return [
        f"{name_of(path)} imports {name}"
        for path in paths
        for name in sorted(imports_of(path))
        if not allowed(name)
    ]


def in_room(room):
    found = [path for path in MODULES if inside(name_of(path), f"vit_train.{room}")]
    assert found, f"a rule speaks of {room}, which is gone"
    return found


# From the ground up; a room knows those before it, and nothing of those behind it
HOUSE_ORDER = (
    "text",
    "errors",
    "rng",
    "system",
    "construct",
    "layers",
    "models",
    "checkpoint",
    "weights",
    "data",
    "runs",
    "training",
    "inference",
    "config",
    "report",
    "cli",
)
GROUND = {"__init__", "__main__", "text", "errors", "rng", "construct"}


def test_the_reading_itself():
    """The rules below mean something only if imports are seen."""
    assert "torch.nn" in imports_of(PACKAGE / "training/strategy.py")
    assert "vit_train.checkpoint" in imports_of(PACKAGE / "config/build.py")
    assert inside("vit_train.cli.train", *imports_of(PACKAGE / "__main__.py"))
    assert violations([PACKAGE / "config/build.py"], lambda name: not inside(name, "omegaconf")) != []


def test_every_module_is_in_one_room():
    rooms = [[room for room in HOUSE_ORDER if path in in_room(room)] for path in MODULES]
    homeless = {name_of(path) for path, found in zip(MODULES, rooms) if len(found) != 1}
    assert homeless == {"vit_train", "vit_train.__main__"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == GROUND


@pytest.mark.parametrize("room", HOUSE_ORDER)
def test_imports_run_down(room):
    above = [f"vit_train.{name}" for name in HOUSE_ORDER[HOUSE_ORDER.index(room) + 1 :]]
    assert violations(in_room(room), lambda name: not inside(name, *above)) == []


def test_no_module_imports_itself_through_others():
    """Inside functions and for types included."""
    imports = {name_of(path): imports_of(path) & NAMES for path in MODULES}

    def reached(name):
        found, waiting = set(), [name]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    assert [name for name in sorted(NAMES) if name in reached(name)] == []


CORE = {
    "layers": ("torch", "vit_train.construct", "vit_train.layers"),
    "models": (
        "torch",
        "torchvision",
        "vit_train.construct",
        "vit_train.layers",
        "vit_train.models",
        "vit_train.system.precision",
    ),
}


@pytest.mark.parametrize("room", CORE)
def test_the_core_knows_little(room):
    """Beside the standard library."""
    known = violations(in_room(room), lambda name: inside(name, *CORE[room], *STANDARD))
    assert known == []


def test_only_the_top_knows_hydra():
    top = [
        path for room in ("config", "cli.train", "cli.typed", "cli.hydra_errors") for path in in_room(room)
    ]
    others = [path for path in MODULES if path not in top]
    assert violations(others, lambda name: not inside(name, "hydra", "omegaconf")) == []


def test_distribution_lives_in_strategy():
    others = [path for path in MODULES if path not in in_room("training.strategy")]
    assert violations(others, lambda name: not inside(name, "torch.distributed")) == []
    for path in others:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = isinstance(node, ast.Attribute) and node.attr == "distributed"
            assert not (used and isinstance(node.value, ast.Name) and node.value.id == "torch"), path


def test_functions_are_short():
    """At most 60 lines after the signature: what is longer is more than one thing."""
    found = {
        f"{name_of(path)}.{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.body[0].lineno >= 60
    }
    assert found == set()


def test_the_trainer_sees_contracts_only():
    [path] = in_room("training.trainer")
    of_data = {name for name in imports_of(path) if inside(name, "vit_train.data")}
    assert of_data == {"vit_train.data"}
    assert (
        violations(
            [path], lambda name: not inside(name, "vit_train.models", "vit_train.layers", "torchvision")
        )
        == []
    )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "vit_train.data":
            assert {alias.name for alias in node.names} <= {"Batch", "DataModule", "Loader"}


def test_the_description_names_every_module():
    described = (HOUSE / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = described.partition("```")[2].partition("```")[0]
    words = set(re.findall(r"\w+", tree))
    assert {path.stem for path in MODULES if path.stem[:2] != "__"} - words == set()


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


def test_the_docs_can_be_read_in_an_editor():
    """Lines of at most 120 characters outside tables; the README is two pages."""
    pages = [*HOUSE.glob("*.md"), *(HOUSE / "docs").glob("*.md")]
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in pages}
    assert len(lines[HOUSE / "README.md"]) <= 130
    long = [
        (p.name, text) for p in pages for text in lines[p] if len(text) > 120 and not text.startswith("|")
    ]
    assert long == []


def test_the_docs_name_tests_that_exist():
    pages = [*HOUSE.glob("*.md"), *(HOUSE / "docs").glob("*.md")]
    named = {path for page in pages for path in re.findall(r"[\w/]*test_\w+\.py", page.read_text("utf-8"))}
    assert len(named) > 50
    assert [path for path in named if not (HOUSE / "tests" / path.removeprefix("tests/")).is_file()] == []
